"""Sequences that several GPUs share in a ring: the trace beside two real processes over gloo, their training beside a single process's, and
the formula beside the trace."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mstplan import load_model
from mstplan.errors import ModelError
from mstplan.plan.layout import step_of, step_sizes
from mstplan.plan.solve import fixed_chunks
from mstplan.spec.catalog import load_config
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.ring import ranks_that_differ
from mstplan.tracing import tracer
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import trace

from ..processes import on_two_ranks
from .real_events import peak, without
from .test_fsdp import without_known
from .two_ranks import CONFIG, TOKENS
from .two_rings import MODELS, recipes
from .two_sharers import seeded, whole_batch

LARGE = 8192  # bytes; smaller ones are scalars, position ids, row statistics, and the random generator's state that a checkpoint keeps
OWN_WEIGHTS = [name for name, recipe in recipes().items() if recipe.sharding == "none"]
OF_THE_CPU = re.compile(
    r"^gloo:|allgather_into_tensor_coalesced_ > empty$|_for_cpu_backward > contiguous > clone > empty_like > empty$"
)
"""gloo's flat copy of what it gathers, and its thread's; the contiguous copy of an output's gradient that the CPU's kernel takes (aten
native/cpu/FlashAttentionKernel.cpp)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two real ranks wrote."""
    path = tmp_path_factory.mktemp("rings")
    on_two_ranks("tests.tracing.two_rings", path)
    return path


@pytest.fixture(scope="module")
def real(folder: Any) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@contextmanager
def only(rank: int) -> Iterator[None]:
    """Within the context that rank is traced."""
    with patch.object(tracer, "ranks_that_differ", lambda _ranks: (rank,)):
        yield


@cache
def traced(name: str, rank: int) -> Trace:
    with only(rank):
        return trace(CONFIG, recipes()[name], TOKENS, on="cpu", whole=True)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", OWN_WEIGHTS)
def test_two_real_ranks_allocate_what_the_trace_says_in_that_order(real, name, rank):
    expected = [made.bytes for made in traced(name, rank).step.storages if made.bytes > LARGE]
    assert [e[0] for e in without(real[rank][name]["runs"][-1], OF_THE_CPU) if e[0] > LARGE] == expected


@pytest.mark.parametrize(("name", "rank"), [*product(OWN_WEIGHTS, [0, 1]), ("fsdp", 0)])
def test_two_real_ranks_hold_what_the_trace_says(real, name, rank):
    """Within what random generators' states make, which are not followed: 0.2%. The first rank has the largest shards."""
    runs = [without(events, OF_THE_CPU) for events in real[rank][name]["runs"]]
    if name == "fsdp":
        runs = [without_known(events)[0] for events in runs]
    assert max(traced(name, rank).live) == pytest.approx(real[rank][name]["resident"] + peak(runs), rel=0.002)


@pytest.mark.parametrize("name", OWN_WEIGHTS)
@pytest.mark.parametrize("heads", MODELS)
def test_two_ranks_train_as_a_single_process_does(folder, heads, name):
    """Loss and gradients of whole sequences, in fp32, summed in another order."""
    found = torch.load(folder / "trained.pt")[heads, name]
    recipe = recipes()[name]
    model = seeded(CONFIG | MODELS[heads], recipe)
    ids, labels = whole_batch(recipe.batch)
    loss = model(input_ids=ids, labels=labels, shift_labels=labels).loss
    loss.backward()
    assert float(found["loss"]) == pytest.approx(float(loss.detach()), rel=1e-6)
    scale = max(float(weight.grad.abs().max()) for weight in model.parameters())
    for weight_name, weight in model.named_parameters():
        assert float((found["gradients"][weight_name] - weight.grad).abs().max()) < 1e-5 * scale, weight_name


@pytest.mark.parametrize(
    ("model", "fields", "said"),
    [
        ("gemma3-4b", {}, "explicit mask.*\n.*context_parallel"),
        ("llama2-7b", {"precision": "fp32"}, "the memory-efficient kernel .*whose ring is not planned"),
    ],
)
def test_a_trace_refuses_what_no_ring_has(model, fields, said):
    with pytest.raises(ModelError, match=said):
        trace(load_config(model), Recipe(gpus=2, context_parallel=2, **fields), 4096)


def largest_of_ranks(name: str, recipe: Recipe, tokens: int, on: Any) -> dict[str, int]:
    """Bytes at each instant of the rank that has most then."""
    largest: dict[str, int] = {}
    for rank in ranks_that_differ(recipe.context_parallel):
        with only(rank):
            found = trace(load_config(name), recipe, tokens, workspace=on.gpu.workspaces_bytes, platform=on.platform)
        largest |= {p.instant: max(p.bytes, largest.get(p.instant, 0)) for p in found.peaks}
    return largest


CASES: list[tuple[str, str, str, int, dict[str, Any]]] = [
    ("h100", "llama3.1-8b", "standard", 16384, {"context_parallel": 8}),
    ("h100", "llama3.1-8b", "mst-offload", 65536, {"context_parallel": 8, "rotate_method": "alltoall"}),
    ("h100", "llama3.1-8b", "mst", 16384, {"context_parallel": 2}),
    ("h100", "llama2-7b", "checkpoint", 16384, {"context_parallel": 2, "batch": 2, "rotate_method": "alltoall"}),
    ("h100", "qwen3-4b", "mst", 16384, {"context_parallel": 3, "gpus": 6, "batch": 2, "sharding": "ddp", "pad_to": 6}),
    (
        "h100",
        "llama3.1-8b",
        "mst",
        16384,
        {"context_parallel": 4, "gpus": 16, "sharding": "fsdp", "precision": "mixed"},
    ),
    ("h100", "llama3.1-8b", "mst", 16384, {"context_parallel": 4, "lora_rank": 16, "kernels": "liger"}),
    ("h100", "llama3.1-8b", "mst-layer", 32768, {"context_parallel": 2, "batch": 2, "rotate_method": "alltoall"}),
    ("h100", "llama3.1-8b", "mst-layer-offload", 32768, {"context_parallel": 8, "attention_groups": 4}),
    ("h100", "mixtral-8x7b", "mst-layer", 32768, {"context_parallel": 8, "attention_groups": 2}),
    ("h100", "llama3.1-8b", "checkpoint", 16384, {"context_parallel": 8, "checkpoint": "selective"}),
    (
        "a100-80gb",
        "qwen3-4b",
        "mst",
        16384,
        {"context_parallel": 2, "checkpoint": "selective", "rotate_method": "alltoall", "batch": 2},
    ),
    ("a100-80gb", "llama3.1-8b", "mst", 16384, {"context_parallel": 4}),
    ("a100-80gb", "llama2-7b", "checkpoint", 16384, {"context_parallel": 4, "batch": 2, "rotate_method": "alltoall"}),
    ("a100-80gb", "llama2-7b", "standard", 16384, {"context_parallel": 2, "batch": 2}),
]


@pytest.mark.parametrize(("on", "model", "name", "tokens", "more"), CASES, ids=str)
def test_formula_and_trace_agree(on, model, name, tokens, more):
    """Every instant within 0.01%: what differs are row statistics of a few bytes, seeds, and rows that half of a rank's queries are rounded up by."""
    chunks = {"mlp_chunks": 4, "loss_chunks": 16} if name.startswith("mst") else {}
    groups = {"attention_groups": 1} if name.startswith("mst-layer") else {}
    recipe = strategy(name, **{"gpus": more["context_parallel"], **chunks, **groups, **more})
    tokens, of = recipe.padded(tokens), card(on)
    chunks_of = fixed_chunks(recipe)
    step = step_of(load_model(model), recipe, of, chunks_of, tokens)
    formula = {instant.name: instant.bytes for instant in step.instants(step_sizes(recipe, tokens, chunks_of))}
    expected = largest_of_ranks(model, recipe, tokens, of)
    assert formula == {name: pytest.approx(size, rel=1e-4) for name, size in expected.items()}


def test_a_rank_between_holds_most():
    """Of four ranks, at every instant: the last has no halves of queries, the first none of keys."""
    recipe = strategy("checkpoint", gpus=4, context_parallel=4)
    peaks = []
    for rank in range(4):
        with only(rank):
            peaks.append({p.instant: p.bytes for p in trace(load_config("llama3.1-8b"), recipe, 8192).peaks})
    assert all(peaks[1][name] >= peaks[rank][name] for rank in (0, 3) for name in peaks[1])
    assert peaks[1] == peaks[2] and peaks[1] != peaks[0]
