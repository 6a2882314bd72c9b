"""Sequences that several GPUs share (Ulysses): the trace beside two real processes over gloo, their training beside a single process's, and
the formula beside the trace."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
import torch

from mstplan import load_model
from mstplan.errors import ModelError, RecipeError
from mstplan.plan.layout import step_of, step_sizes
from mstplan.plan.solve import fixed_chunks
from mstplan.spec.catalog import load_config
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import trace
from mstplan.train.step import TrainingStep, build_model, read_settings

from ..processes import on_two_ranks
from .real_events import peak, without
from .test_fsdp import without_known
from .two_ranks import CONFIG, TOKENS
from .two_sharers import MODELS, pairs, recipes, seeded, whole_batch

ON = card("h100")
LARGE = 8192  # bytes; smaller ones are scalars, position ids, row statistics, and the random generator's state that a checkpoint keeps
COPIES = re.compile("_for_cpu_backward > contiguous > clone > empty_like > empty$")
"""What the CPU's attention kernel makes of two rows' gradient, a contiguous copy (aten native/cpu/FlashAttentionKernel.cpp)."""
OWN_WEIGHTS = [name for name, recipe in recipes().items() if recipe.sharding == "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two real ranks wrote."""
    path = tmp_path_factory.mktemp("sharers")
    on_two_ranks("tests.tracing.two_sharers", path)
    return path


@pytest.fixture(scope="module")
def real(folder: Any) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@cache
def traced(name: str) -> Trace:
    return trace(CONFIG, recipes()[name], TOKENS, on="cpu", whole=True)


@pytest.mark.parametrize("name", OWN_WEIGHTS)
def test_two_real_ranks_allocate_what_the_trace_says_in_that_order(real, name):
    expected = [made.bytes for made in traced(name).step.storages if made.bytes > LARGE]
    for rank in real:
        assert [e[0] for e in without(rank[name]["runs"][-1], COPIES) if e[0] > LARGE] == expected


@pytest.mark.parametrize("name", OWN_WEIGHTS)
def test_two_real_ranks_hold_what_the_trace_says(real, name):
    """Within what random generators' states make, which are not followed: 0.05%."""
    for rank in real:
        most = peak([without(events, COPIES) for events in rank[name]["runs"]])
        assert max(traced(name).live) == pytest.approx(rank[name]["resident"] + most, rel=0.0005)


@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_with_weights_shared_out_as_well(real, name):
    """The first rank has the largest shards. 0.2%, as above, but for gloo's buffers of FSDP2's collectives (test_fsdp.py)."""
    found, rank = traced(name), real[0][name]
    resident = rank["resident"] + rank["buckets"]
    most = peak([without_known(events)[0] for events in rank["runs"]])
    assert max(found.live) == pytest.approx(resident + most, rel=0.002)


@pytest.mark.parametrize(("heads", "name"), pairs(recipes(), MODELS))
def test_two_ranks_train_as_a_single_process_does(folder, heads, name):
    """Loss and gradients of whole sequences, in fp32, summed in another order."""
    found = torch.load(folder / "trained.pt")[heads, name]
    recipe = recipes()[name]
    model = seeded(CONFIG | MODELS[heads], recipe)
    ids, labels = whole_batch(recipe.batch)
    loss = model(input_ids=ids, labels=labels, shift_labels=labels).loss
    loss.backward()
    loss = loss.detach()
    assert float(found["loss"]) == pytest.approx(float(loss), rel=1e-6)
    scale = max(float(weight.grad.abs().max()) for weight in model.parameters())
    for weight_name, weight in model.named_parameters():
        assert float((found["gradients"][weight_name] - weight.grad).abs().max()) < 1e-5 * scale, weight_name


def test_ranks_share_sequences_only_where_they_are():
    model = build_model(read_settings(CONFIG), Recipe(), "sdpa", "cpu")
    with pytest.raises(RecipeError, match="a multiple of so many ranks, and there is 1"):
        TrainingStep(model, recipes()["standard"], TOKENS)


@pytest.mark.parametrize(
    ("model", "ranks", "tokens", "said"),
    [
        ("gemma3-4b", 2, 4096, "explicit mask.*\n.*--attention flash"),
        ("llama3.1-8b", 3, 768, "cannot be shared evenly by 3 GPUs"),
    ],
)
def test_a_trace_refuses_what_ranks_cannot_share(model, ranks, tokens, said):
    with pytest.raises(ModelError, match=said):
        trace(load_config(model), Recipe(gpus=ranks, sequence_parallel=ranks), tokens)


def check_formula(name: str, recipe: Recipe, tokens: int) -> None:
    """Every instant within 0.01%: what differs are row statistics of a few bytes, and seeds."""
    found = trace(load_config(name), recipe, tokens, workspace=ON.gpu.workspaces_bytes, platform=ON.platform)
    chunks = fixed_chunks(recipe)
    step = step_of(load_model(name), recipe, ON, chunks, tokens)
    formula = {instant.name: instant.bytes for instant in step.instants(step_sizes(recipe, tokens, chunks))}
    assert formula == {p.instant: pytest.approx(p.bytes, rel=1e-4) for p in found.peaks}


CASES: list[tuple[str, str, int, dict[str, Any]]] = [
    ("llama3.1-8b", "standard", 16384, {"sequence_parallel": 8}),
    ("llama3.1-8b", "mst-offload", 262144, {"sequence_parallel": 8}),
    ("llama3.1-8b", "mst", 65536, {"sequence_parallel": 32}),  # one head of queries each
    ("qwen3-4b", "mst", 16384, {"sequence_parallel": 2, "batch": 2}),
    ("qwen3-4b", "checkpoint", 16384, {"sequence_parallel": 32, "batch": 2, "attention": "flash"}),
    ("qwen3-4b", "mst", 16384, {"sequence_parallel": 8, "batch": 2, "attention": "flash"}),
    ("qwen3-4b", "checkpoint", 4096, {"sequence_parallel": 8, "batch": 2, "attention": "flash"}),
    ("qwen3-4b", "checkpoint", 8192, {"sequence_parallel": 32, "batch": 2}),
    ("qwen3-4b", "standard", 1024, {"sequence_parallel": 8, "precision": "fp32"}),
    ("qwen3-4b", "standard", 8192, {"sequence_parallel": 4, "gpus": 8, "sharding": "ddp", "precision": "mixed"}),
    ("qwen2.5-7b", "checkpoint", 7168, {"sequence_parallel": 28, "loss": "liger", "kernels": "liger"}),
    ("llama2-7b", "checkpoint", 8192, {"sequence_parallel": 4, "attention": "efficient", "batch": 2}),
    ("llama3.1-8b", "mst", 16384, {"sequence_parallel": 8, "kernels": "liger", "lora_rank": 16}),
    ("gemma3-4b", "checkpoint", 8192, {"sequence_parallel": 2, "attention": "flash"}),
    ("llama3.1-8b", "mst-layer", 32768, {"sequence_parallel": 8}),
    (
        "llama3.1-8b",
        "mst-layer-offload",
        32768,
        {"sequence_parallel": 2, "attention_groups": 4, "attention_on_host": True},
    ),
    ("llama3.1-8b", "mst-layer", 32768, {"sequence_parallel": 8, "kernels": "liger", "lora_rank": 16}),
    ("mixtral-8x7b", "mst-layer", 32768, {"sequence_parallel": 8, "attention_groups": 2}),
    ("qwen3-4b", "mst-layer", 16384, {"sequence_parallel": 8, "attention": "flash", "attention_groups": 2}),
    ("qwen3-4b", "mst-layer", 16384, {"sequence_parallel": 2, "attention": "flash", "attention_groups": 2, "batch": 2}),
    ("qwen3-4b", "mst-layer", 16384, {"sequence_parallel": 32, "batch": 2}),
    ("llama2-7b", "mst-layer", 8192, {"sequence_parallel": 4, "attention": "efficient", "attention_groups": 2}),
    ("llama3.1-8b", "mst", 16384, {"sequence_parallel": 8, "checkpoint": "selective"}),
    (
        "qwen3-4b",
        "checkpoint",
        16384,
        {"sequence_parallel": 2, "attention": "flash", "batch": 2, "checkpoint": "selective"},
    ),
    ("llama3.1-8b", "standard", 16384, {"sequence_parallel": 8, "offload": "saved-tensors"}),
    ("qwen3-4b", "mst", 16384, {"sequence_parallel": 2, "attention": "flash", "packing": 4}),
    ("qwen3-4b", "mst-layer", 16384, {"sequence_parallel": 4, "attention": "flash", "batch": 3, "padding_free": True}),
]


@pytest.mark.parametrize(("model", "name", "tokens", "more"), CASES, ids=str)
def test_formula_and_trace_agree(model, name, tokens, more):
    chunks = {"mlp_chunks": 4, "loss_chunks": 16} if name.startswith("mst") else {}
    groups = {"attention_groups": 1} if name.startswith("mst-layer") else {}
    check_formula(model, strategy(name, **{"gpus": more["sequence_parallel"], **chunks, **groups, **more}), tokens)


@pytest.mark.parametrize("model", ["llama3.1-8b", "mixtral-8x7b"])
def test_formula_and_trace_agree_with_weights_in_shards(model):
    more = {"gpus": 16, "sequence_parallel": 8, "sharding": "fsdp", "mlp_chunks": 4, "loss_chunks": 16}
    check_formula(model, strategy("mst", **more), 32768)
