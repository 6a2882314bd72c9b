"""Steps with images on several cards: the trace beside two real processes under FSDP2 and DDP, and the formula beside the trace."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan.errors import RecipeError
from mstplan.measuring.allocations import Allocation
from mstplan.plan import solve
from mstplan.plan.layout import step_of
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.selection import WeightKind
from mstplan.step.steps import Chunks, Layout, build
from mstplan.step.towers import modules_of_towers
from mstplan.step.zero import weights_in_order
from mstplan.tracing.allocation_diff import (
    EXTRA,
    KNOWN_ON_CPU,
    KnownBuffer,
    allocations_of_trace,
    differences,
    unexplained,
)
from mstplan.tracing.fsdp import BUFFER
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import trace, whole_model
from mstplan.train.locate import find_parts, layers_of_towers
from mstplan.train.step import TrainingStep, build_model, read_settings

from ..processes import on_two_ranks
from ..recipes import in_chunks
from .test_fsdp import check_peaks, without_known
from .test_images import CONFIGS as PICTURED
from .test_images import with_two
from .test_towers import CONFIGS, agree
from .two_ranks import TOKENS
from .two_ranks_with_images import config_of, recipes

ABOVE = 20_000
"""Bytes: a tower's hidden states are smaller, of which the CPU's layer norms make copies."""
BIAS_IN_PLACE = KnownBuffer(
    "a bias added in place",
    "where a product cannot add a bias itself, torch adds it in place, but to what passes for a subclass, as fake tensors do",
    "from source: aten native/Linear.cpp, linear: isTensorSubclassLike",
    r"linear_1 > add\.Tensor$",
    what=EXTRA,
    inside=False,
)
FEW_AND_MANY: tuple[dict[str, Any], ...] = ({}, {"gpus": 2, "sharding": "fsdp"}, {"gpus": 8, "sharding": "fsdp"})
KNOWN = (*(known._replace(inside=False) for known in KNOWN_ON_CPU), BIAS_IN_PLACE)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first of two ranks allocated, by recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks("tests.tracing.two_ranks_with_images", folder)
    found: dict[str, Any] = json.loads((folder / "rank0.json").read_text())
    return found


@cache
def traced(name: str) -> Trace:
    return trace(config_of(name), recipes()[name], TOKENS, on="cpu", whole=True)


@pytest.mark.parametrize("name", recipes())
def test_two_real_ranks_allocate_what_the_trace_says_in_that_order(real, name):
    events, _ = without_known(real[name]["runs"][-1])
    there = [Allocation(size, " > ".join(operations)) for size, _, _, operations in events if size > 0]
    found = differences(allocations_of_trace(traced(name)), there, KNOWN, ABOVE)
    assert not unexplained(found), "\n".join(map(str, unexplained(found)))


@pytest.mark.parametrize("name", recipes())
def test_two_real_ranks_hold_what_the_trace_says(real, name):
    """Within what the CPU's kernels make for themselves: 0.2%."""
    resident = real[name]["resident"] + real[name]["buckets"]
    check_peaks(traced(name), resident, [without_known(events)[0] for events in real[name]["runs"]])


def test_ddp_waits_for_gradients_that_do_not_come(tmp_path: Path):
    """Why that is refused: of the layers of a tower from which no feature comes."""
    recipe = strategy("checkpoint", gpus=2, sharding="ddp", precision="fp32", images=1)
    config = config_of("llava")
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        step = TrainingStep(build_model(read_settings(config, whole=True), recipe, "sdpa", "cpu"), recipe, TOKENS)
        step.run()
        with pytest.raises(RuntimeError, match="finished reduction in the prior iteration"):
            step.run()
    finally:
        dist.destroy_process_group()
    for answer in (
        lambda: trace(config, recipe, TOKENS),
        lambda: solve.plan_at(read_config(config, "m"), recipe, card("h100"), TOKENS),
    ):
        with pytest.raises(RecipeError, match=r"(?s)no gradient comes to .*ddp waits for it\.\n.*--freeze vision"):
            answer()


@pytest.mark.parametrize("family", sorted(PICTURED))
def test_units_are_the_layers_that_transformers_does_not_split(family):
    """`_no_split_modules`, by which accelerate wraps; there SigLIP's and CLIP's embeddings are units as well, here they are the root's."""
    model = whole_model(read_settings(PICTURED[family], whole=True), Recipe(images=1), "cuda", False)
    parts = find_parts(model)
    units = {*layers_of_towers(parts), *parts.layers}
    unsplit = {module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())}
    others = {type(module).__name__ for module in unsplit ^ units}
    assert others <= {"SiglipVisionEmbeddings", "CLIPVisionEmbeddings", "SiglipMultiheadAttentionPoolingHead"}
    assert len(units) > len(parts.layers)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_towers_that_the_trace_alone_knows_are_sharded_as_well(family):
    one, two, many = (
        trace(PICTURED[family], with_two(family, "checkpoint", **fields), 1055) for fields in FEW_AND_MANY
    )
    weights = [sum(weight.bytes for weight in each.weights if "visual" in weight.name) for each in (one, two, many)]
    assert weights[0] == pytest.approx(2 * weights[1], rel=0.01) and weights[0] == pytest.approx(
        8 * weights[2], rel=0.02
    )
    assert any("visual.blocks.1" in made.module for made in two.step.storages if made.operation == BUFFER)


# ---- the formula beside the trace -----------------------------------------------------------------------------------

SHARDS: dict[str, Any] = {"gpus": 2, "sharding": "fsdp"}
LORA: dict[str, Any] = {**SHARDS, "lora_rank": 16}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("gemma3", "standard", SHARDS),
    ("gemma3", "checkpoint", {**SHARDS, "batch": 2, "images": 1}),
    ("gemma3", "mst-offload", SHARDS),
    ("gemma3", "mst-layer", SHARDS),
    ("gemma3", "checkpoint", {**SHARDS, "precision": "mixed", "freeze": ["vision"]}),
    ("gemma3", "standard", {**SHARDS, "precision": "mixed", "reduce_dtype": "bf16", "accumulation": 3, "gpus": 4}),
    ("gemma3", "standard", {**SHARDS, "train": ["projector"]}),
    ("gemma3", "standard", {**LORA, "autocast": True}),
    ("llava", "standard", SHARDS),
    ("llava", "checkpoint", SHARDS),
    ("llava", "mst", SHARDS),
    ("llava", "checkpoint", {**SHARDS, "accumulation": 2}),
    ("llava", "checkpoint", {**SHARDS, "gpus": 4, "replicas": 2}),
    ("llava", "checkpoint", {**SHARDS, "precision": "fp32"}),
    ("llava", "checkpoint", {**SHARDS, "optimizer_in_backward": True}),
    ("llava", "checkpoint", {**SHARDS, "checkpoint": "selective"}),
    ("llava", "checkpoint", {**SHARDS, "freeze": ["vision"]}),
    ("llava", "checkpoint", {**SHARDS, "freeze": ["vision", "embeddings"]}),
    ("llava", "standard", {**SHARDS, "freeze": ["language_model"]}),
    ("llava", "checkpoint", {**SHARDS, "train": ["*encoder.layers.1.*", "*language_model.layers.1.*"]}),
    ("llava", "standard", LORA),
    ("llava", "checkpoint", {**LORA, "quantize": "nf4"}),
    ("llava", "checkpoint", {**LORA, "quantize": "nf4", "quant_storage": "bf16", "autocast": True}),
    ("gemma3", "checkpoint", {"gpus": 8, "sharding": "ddp"}),
    ("gemma3", "mst", {"gpus": 8, "sharding": "ddp", "accumulation": 2}),
    ("llava", "standard", {"gpus": 8, "sharding": "ddp", "freeze": ["vision"]}),
    ("llava", "checkpoint", {"gpus": 8, "sharding": "ddp", "lora_rank": 16}),
]


@pytest.mark.parametrize(("family", "name", "fields"), CASES, ids=str)
def test_every_instant(family, name, fields):
    agree(CONFIGS[family], in_chunks(strategy(name, **{"images": 2, **fields}), 4, 4), 2048)


MODELS = {family: read_config(config, family) for family, config in CONFIGS.items()}


@pytest.mark.parametrize("family", sorted(MODELS))
def test_zeros_partitions_have_a_towers_weights_in_the_order_of_the_model(family):
    recipe = strategy("checkpoint", images=2)
    model = MODELS[family]
    masked = family == "gemma3"
    tape = build(model, Layout(recipe, False, False, masked, masks_all=masked))
    in_towers = {WeightKind.VISION, WeightKind.PROJECTOR}
    ours = weights_in_order(tape, False, modules_of_towers(model))
    theirs = list(whole_model(read_settings(CONFIGS[family], whole=True), recipe, "cuda", False).named_parameters())
    first = [weight for weight in ours if weight.kinds & in_towers]
    assert ours[: len(first)] == first and len(ours) == len(theirs)
    for weight, (name, parameter) in zip(first, theirs, strict=False):
        assert name.endswith(weight.name) and tuple(parameter.shape) == weight.shape
    assert "language_model" in theirs[len(first)][0]


@settings(max_examples=20, deadline=None)
@given(
    family=st.sampled_from(sorted(MODELS)),
    sharding=st.sampled_from(["fsdp", "zero1", "zero2"]),
    gpus=st.sampled_from([2, 4, 8]),
    lora=st.booleans(),
)
def test_twice_as_many_cards_need_no_more_each(family, sharding, gpus, lora):
    """Where they divide most weights: what is gathered is padded."""

    def peak(gpus: int) -> int:
        recipe = strategy("checkpoint", gpus=gpus, sharding=sharding, images=2, freeze=["vision"], lora_rank=16 * lora)
        return solve.plan_at(MODELS[family], recipe, card("h100"), 4096).peak_bytes

    assert peak(2 * gpus) <= peak(gpus)


@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
def test_zero_divides_what_a_tower_trains(sharding):
    def partition(**more: Any) -> int:
        recipe = strategy("checkpoint", gpus=8, sharding=sharding, images=2, **more)
        zero = step_of(MODELS["gemma3"], recipe, card("h100"), Chunks(1, 1), 4096).zero
        assert zero is not None
        return zero.partition

    tower = next(tower.parameters for tower in MODELS["gemma3"].towers if tower.kind == "vision")
    assert partition() - partition(freeze=["vision"]) == pytest.approx(tower / 8, abs=2)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sharding": "zero3", "gpus": 8}, "take sharding='fsdp'"),
        ({"sharding": "fsdp1", "gpus": 8}, "take sharding='fsdp'"),
        ({"gpus": 2, "sequence_parallel": 2}, "share weights alone"),
        ({"gpus": 2, "tensor_parallel": 2}, "share weights alone"),
        ({"sharding": "fsdp", "gpus": 2, "optimizer_on_host": True, "weights_on_host": True}, "CPU RAM"),
    ],
)
def test_what_is_not_planned_says_what_is(fields, said):
    with pytest.raises(RecipeError, match=said):
        Recipe(images=1, **fields)


@pytest.mark.parametrize("sharding", ["zero1", "zero2"])
def test_zero_of_weights_that_no_gradient_comes_to(sharding):
    recipe = strategy("checkpoint", gpus=8, sharding=sharding, images=1)
    with pytest.raises(RecipeError, match=r"(?s)no gradient comes to .*partitions\.\nFreeze the tower"):
        solve.plan_at(MODELS["llava"], recipe, card("h100"), 4096)
