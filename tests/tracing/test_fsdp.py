"""FSDP2: the trace on the fake process group beside two real processes, over numbers of ranks, and beside the formula."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mstplan import load_model
from mstplan.errors import RecipeError
from mstplan.plan.layout import step_of, step_sizes
from mstplan.plan.solve import fixed_chunks
from mstplan.spec.catalog import load_config
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.events import events_of
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.simulation import AllocatorEvent, Stream
from mstplan.tracing.fsdp import BUFFER, COPY_IN, GATHERED, SCATTER, SHARDS, first_of_ranks, shard_shape
from mstplan.tracing.simulation import allocations_of
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import trace

from ..processes import on_two_ranks
from .four_ranks import recipes as replicated
from .real_events import LARGE, peaks
from .two_ranks import CONFIG, TOKENS, mixed_recipes, recipes

ON = card("h100")
GPU = ON.gpu

# What real ranks allocate and the trace does not: buffers that a card does not have either.
OF_GLOO = {
    "an all-gather's flat copy of its output": r"c10d::_allgather_base_ > empty$",  # ProcessGroupGloo.cpp, newLikeFlat of outputs
    "the same, where the next one is waited for": r"^gloo:all_gather > empty$",
    "a reduce-scatter's copy of its input, which is all-reduced": r"c10d::_reduce_scatter_base_ > clone > empty_strided$",
}
OF_THE_CPU = {
    # aten native/TensorShape.cpp, _pad_chunk: rows that the ranks do not divide; CUDA's kernel pads as it copies (cuda/TensorShape.cu)
    "a padded gradient on its way into the reduce-scatter": r"_chunk_cat > new_zeros > new_empty > empty$",
}
KNOWN = {**OF_GLOO, **OF_THE_CPU}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks allocated, by recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "four").mkdir()
    on_two_ranks("tests.tracing.two_ranks", folder)
    on_two_ranks("tests.tracing.four_ranks", folder / "four", ranks=4)
    return [
        {
            **json.loads((folder / f"rank{rank}.json").read_text()),
            **json.loads((folder / "four" / f"rank{rank}.json").read_text()),
        }
        for rank in range(2)
    ]


RECIPES = {**recipes(), **replicated()}


def known(operations: list[str]) -> str | None:
    said = " > ".join(operations)
    return next((name for name, pattern in KNOWN.items() if re.search(pattern, said)), None)


def without_known(events: list[list[Any]]) -> tuple[list[list[Any]], Counter[str]]:
    """Events without the buffers that KNOWN names, in both directions, and how many there were of each."""
    kept, out, count = [], set(), Counter[str]()
    for size, phase, address, operations in events:
        name = known(operations) if size > 0 else None
        if name is not None:
            out.add(address)
            count[name] += 1
        elif size < 0 and address in out:
            out.remove(address)
        else:
            kept.append([size, phase, address, operations])
    return kept, count


@cache
def traced(recipe: Recipe) -> Trace:
    return trace(CONFIG, recipe, TOKENS, on="cpu", whole=True)


@pytest.mark.parametrize("name", RECIPES)
def test_two_real_ranks_allocate_what_the_trace_says_in_that_order(real, name):
    found = traced(RECIPES[name])
    events, _ = without_known(real[0][name]["runs"][0])
    assert [e[0] for e in events if e[0] > LARGE] == [m.bytes for m in found.step.storages if m.bytes > LARGE]


@pytest.mark.parametrize("name", RECIPES)
def test_two_real_ranks_hold_what_the_trace_says(real, name):
    """Within what random generators' states make, which are not followed: 0.2%."""
    rank = real[0][name]
    check_peaks(traced(RECIPES[name]), rank["resident"], [without_known(events)[0] for events in rank["runs"]])


def check_peaks(found: Trace, resident: int, runs: list[list[list[Any]]]) -> None:
    """What a real rank holds before a step, to the byte, and at most in each pass of one: within 0.2% of a trace."""
    assert resident == sum(alive.bytes for alive in found.resident)
    passes = ("forward", "backward") if found.recipe.optimizer_in_backward else ("forward", "backward", "optimizer")
    real = peaks(runs)
    for phase in passes:
        ours = max(
            (found.live[e] for place, span in found.step.blocks() for e in span if pass_of(place.run) == phase),
            default=found.live[-1],  # an optimizer that makes nothing
        )
        assert ours == pytest.approx(resident + real[phase], rel=0.002), phase


def pass_of(run: str) -> str:
    return "backward" if run == "recompute" else run


@pytest.mark.parametrize("name", {**RECIPES, **mixed_recipes()})
def test_the_formula_knows_what_is_on_which_stream(name):
    check_streams({**RECIPES, **mixed_recipes()}[name])


def check_streams(recipe: Recipe) -> None:
    """Bytes that a step allocates on each stream beside the one that computes: those that torch's code enters, which have no names, and the formula's."""
    chunks = fixed_chunks(recipe, TOKENS)
    formula = step_of(read_config(CONFIG, "tiny"), recipe, ON, chunks, TOKENS)
    planned = bytes_by_stream(events_of(formula, chunks).at(step_sizes(recipe, TOKENS, chunks)).step)
    real = bytes_by_stream(allocations_of(traced(recipe)).step)
    assert len(real) >= 2 and sorted(real.values()) == sorted(planned.values())


def bytes_by_stream(events: Iterable[AllocatorEvent]) -> Counter[int]:
    found = Counter[int]()
    for _, size, stream in events:
        if size > 0 and stream != Stream.COMPUTE:
            found[stream] += size
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_what_only_real_ranks_allocate(real, name):
    """One copy for each of the collectives: of a micro-batch 6 groups gathered in forward, 5 in backward; 6 scattered, two weights padded,
    once where whole gradients stay."""
    layers, recipe = CONFIG["num_hidden_layers"], RECIPES[name]
    _, count = without_known(real[0][name]["runs"][0])
    gathers = recipe.accumulation * (2 * layers + 1)
    scattered = 1 if recipe.keeps_whole_gradients else recipe.accumulation
    assert count == dict(zip(KNOWN, (gathers, gathers, scattered * (layers + 1), scattered * 2), strict=True))


@pytest.mark.parametrize("name", mixed_recipes())
def test_two_real_ranks_gather_and_scatter_in_mixed_precision(real, name):
    """Of the sizes that only FSDP2's tensors have: all-gathers, reduce-scatters, shards of the whole model's groups."""
    found = traced(mixed_recipes()[name])
    of_fsdp = {m.bytes for m in found.step.storages if m.operation in (BUFFER, COPY_IN, SCATTER, SHARDS)}
    others = {m.bytes for m in found.step.storages if m.operation not in (BUFFER, COPY_IN, SCATTER, SHARDS, "_to_copy")}
    sizes = of_fsdp - others
    assert len(sizes) > 3
    events, _ = without_known(real[0][name]["runs"][0])
    assert [e[0] for e in events if e[0] in sizes] == [m.bytes for m in found.step.storages if m.bytes in sizes]


def test_the_other_rank_holds_no_more(real):
    for name in RECIPES:
        assert real[1][name]["resident"] <= real[0][name]["resident"]


def test_shards_of_all_ranks_are_the_model_and_its_padding():
    whole = trace(CONFIG, strategy("checkpoint"), TOKENS)
    for gpus in (2, 8, 1024):
        sharded = trace(CONFIG, strategy("checkpoint", gpus=gpus, sharding="fsdp"), TOKENS)
        for one, all_of_it in zip(sharded.weights, whole.weights, strict=True):
            if not one.trained:
                assert one == all_of_it  # buffers
                continue
            rows = all_of_it.shape[0]
            assert one.bytes * gpus == all_of_it.bytes // rows * (-(-rows // gpus) * gpus)
            # Real ranks split as torch.chunk does, and the last ones may have nothing.
            assert sum(part.shape[0] for part in torch.empty(rows, device="meta").chunk(gpus)) == rows
            assert torch.empty(rows, device="meta").chunk(gpus)[0].shape[0] == shard_shape((rows,), gpus)[0]


@pytest.mark.parametrize("name", ["standard", "checkpoint", "mst", "mst-offload", "mst-layer"])
def test_more_ranks_need_no_more_each(name):
    chunks = {"mlp_chunks": 4, "loss_chunks": 16} if name.startswith("mst") else {}
    chunks |= {"attention_groups": 2} if name == "mst-layer" else {}
    config = load_config("llama3.1-8b")
    peaks = [
        trace(config, strategy(name, gpus=gpus, sharding="fsdp", **chunks), 4096).peak.bytes for gpus in (2, 8, 1024)
    ]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 1.3 * peaks[1]


# Each strategy in two of these ways, each way with two strategies.
IN_FEW_LAYERS = [
    (name, more)
    for n, name in enumerate(("standard", "checkpoint", "mst", "mst-offload"))
    for m, more in enumerate(
        ({}, {"precision": "mixed"}, {"accumulation": 2, "sync_each_batch": True}, {"optimizer_in_backward": True})
    )
    if (n + m) % 2 == 0
]


@pytest.mark.parametrize(("name", "more"), IN_FEW_LAYERS, ids=str)
def test_few_layers_tell_all(name, more):
    chunks = {"mlp_chunks": 4, "loss_chunks": 3} if name.startswith("mst") else {}
    recipe = strategy(name, gpus=8, sharding="fsdp", **chunks, **more)
    config = {**CONFIG, "num_hidden_layers": 9}
    short, whole = trace(config, recipe, 512), trace(config, recipe, 512, whole=True)
    assert len(short.kept) < 9
    assert [(p.instant, p.bytes) for p in short.peaks] == [(p.instant, p.bytes) for p in whole.peaks]
    assert short.live[-1] == whole.live[-1]


def test_what_is_held_while_a_layer_runs():
    """In forward its weights and its buffer; in backward its weights, the buffer of the layer before, the input of the reduce-scatter after."""
    found = trace(CONFIG, strategy("checkpoint", gpus=8, sharding="fsdp"), TOKENS, whole=True)
    layer = sum(m.bytes for m in found.step.storages if m.operation == GATHERED and "layers.2." in m.module + ".") // 2
    for run, buffers in (("forward", {"2": 1}), ("backward", {"1": 1})):
        span = next(span for place, span in found.step.blocks() if place == (run, 2))
        alive = [
            found.step.storages[i] for i in found.step.alive_at(span[-1] if run == "forward" else span[len(span) // 2])
        ]
        held = [m for m in alive if m.operation == BUFFER and "layers" in m.module]
        assert len(held) == sum(buffers.values()) and all(m.bytes == layer for m in held)
        assert len([m for m in alive if m.operation == SCATTER]) == (run == "backward")
    assert len([m for m in found.step.storages if m.operation == SHARDS]) == CONFIG["num_hidden_layers"] + 1


def check_formula(name: str, recipe: Recipe, tokens: int, worst: float = 0.01) -> None:
    """Every instant within 1%, or `worst`, the peak within 0.2%."""
    found = trace(load_config(name), recipe, tokens, workspace=GPU.workspaces_bytes, platform=ON.platform)
    chunks = fixed_chunks(recipe)
    step = step_of(load_model(name), recipe, ON, chunks, tokens)
    formula = {instant.name: instant.bytes for instant in step.instants(step_sizes(recipe, tokens, chunks))}
    assert formula == {p.instant: pytest.approx(p.bytes, rel=worst) for p in found.peaks}
    assert max(formula.values()) == pytest.approx(found.peak.bytes, rel=0.002)


IN_CPU_RAM = {"optimizer_on_host": True, "weights_on_host": True}

# Every number of ranks with every strategy and every model, every length with each.
ROTATION = [
    (model, name, (2048, 32768)[(m + n + g) % 2], gpus)
    for m, model in enumerate(("llama3.1-8b", "qwen3-4b", "mixtral-8x7b"))
    for n, name in enumerate(("standard", "checkpoint", "mst"))
    for g, gpus in enumerate((2, 8, 64))
    if (m + n + g) % 3 != 1 or gpus == 8
]


@pytest.mark.parametrize(("model", "name", "tokens", "gpus"), ROTATION)
def test_formula_and_trace_agree(model, name, tokens, gpus):
    chunks = {"mlp_chunks": 4, "loss_chunks": 16} if name == "mst" else {}
    check_formula(model, strategy(name, gpus=gpus, sharding="fsdp", **chunks), tokens)


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("gemma3-4b", {}),
        ("gpt-oss-20b", {}),
        ("gpt2", {}),
        ("llama3.1-8b", {"precision": "mixed"}),
        ("qwen3-4b", {"accumulation": 2, "sync_each_batch": True}),
        ("qwen3-0.6b", {"accumulation": 2}),
        ("qwen3-0.6b", {"accumulation": 4, "precision": "mixed", "gpus": 3}),
        ("llama3.2-1b", {"accumulation": 3, "precision": "mixed", "reduce_dtype": "bf16"}),
        ("qwen3-0.6b", {"precision": "mixed", "reduce_dtype": "bf16"}),
        ("qwen3-0.6b", {"gpus": 16, "replicas": 2}),
        ("qwen3-0.6b", {"gpus": 16, "replicas": 4, "precision": "mixed", "reduce_dtype": "bf16"}),
        ("qwen3-0.6b", {"gpus": 16, "replicas": 2, "accumulation": 2, "sync_each_batch": True}),
        ("qwen3-0.6b", {"gpus": 16, "replicas": 2, "optimizer_in_backward": True}),
        ("llama3.2-1b", IN_CPU_RAM),
        ("qwen3-0.6b", {**IN_CPU_RAM, "precision": "mixed", "accumulation": 2}),
        ("qwen3-0.6b", {**IN_CPU_RAM, "precision": "mixed", "accumulation": 2, "sync_each_batch": True}),
        ("qwen3-0.6b", {**IN_CPU_RAM, "gpus": 8, "replicas": 4, "reduce_dtype": "bf16", "precision": "mixed"}),
        ("qwen3-4b", {"optimizer_in_backward": True}),
        ("llama3.2-1b", {"loss": "liger", "precision": "mixed", "reduce_dtype": "bf16"}),
        ("llama3.2-1b", {"loss": "liger", "accumulation": 3, "kernels": "liger"}),
        ("llama3.2-1b", {"loss": "cce"}),
        ("llama3.2-1b", {"loss": "trl", "accumulation": 2, "precision": "mixed"}),
        ("llama3.2-1b", {"loss": "trl", "lora_rank": 16, "autocast": True}),
        ("llama3.1-8b", {"adamw_kernel": "for-loop"}),
        ("llama3.1-8b", {"precision": "mixed", "gpus": 2}),
        ("llama3.2-1b", {"checkpoint": "selective", "precision": "mixed", "accumulation": 2}),
        ("llama3.2-1b", {"checkpoint": "every-3", "gpus": 16, "replicas": 2}),
        ("llama3.2-1b", {"checkpoint": "reentrant", **IN_CPU_RAM}),
        ("llama3.2-1b", {"checkpoint": "reentrant", "lora_rank": 8, "input_gradients": True}),
    ],
    ids=str,
)
def test_formula_and_trace_agree_on_other_models_and_recipes(model, more):
    check_formula(model, strategy("checkpoint", **{"gpus": 8, "sharding": "fsdp", **more}), 1024)


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("llama3.2-1b", {}),
        ("llama3.2-1b", {"offload": "layer-inputs", "attention_on_host": True}),
        ("gemma3-4b", {"offload": "layer-inputs"}),
        ("mixtral-8x7b", {"precision": "mixed"}),
    ],
    ids=str,
)
def test_formula_and_trace_agree_on_layers_in_chunks(model, more):
    """The rehearsal of layers in chunks gathers weights, too, and lets them go before the first step."""
    chunks = {"mlp_chunks": 4, "loss_chunks": 4, "attention_groups": 2}
    check_formula(model, strategy("mst-layer", **{"gpus": 4, "sharding": "fsdp", **chunks, **more}), 8192)


def test_a_process_group_that_is_there_is_left_alone(tmp_path):
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        with (
            pytest.raises(RecipeError, match="init_process_group"),
            first_of_ranks(strategy("checkpoint", gpus=2, sharding="fsdp")),
        ):
            pass
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
    with first_of_ranks(strategy("checkpoint")) as mesh:
        assert mesh is None
