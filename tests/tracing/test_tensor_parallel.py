"""Matrices that several GPUs split: the trace beside two real processes over gloo, their training beside a single process's, and the formula
beside the trace."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
import torch

from mstplan import load_model
from mstplan.errors import ModelError
from mstplan.plan.layout import step_of, step_sizes
from mstplan.plan.solve import fixed_chunks
from mstplan.spec.catalog import load_config
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import trace

from ..processes import on_two_ranks
from . import four_splitters, two_splitters
from .real_events import check_held, check_order
from .two_ranks import TOKENS
from .two_sharers import seeded, whole_batch
from .two_splitters import LOSS, MODELS, NORMS, recipes

MIXED: dict[str, Any] = {"precision": "mixed", "reduce_dtype": "bf16", "adamw_kernel": "foreach"}
IN_PAIRS: dict[str, Any] = {"gpus": 8, "sharding": "fsdp"}
COPIES: dict[str, Any] = {"precision": "mixed", "replicas": 2}
IN_SHARDS = four_splitters.recipes()
NOT_TRACED = re.compile(
    r"^gloo:|allgather_into_tensor_coalesced_ > empty$|c10d::_allgather_base_ > empty$"
    r"|c10d::(_reduce_scatter_base_|reduce_scatter_tensor_coalesced_) > clone > empty_strided$"
    r"|^Optimizer.step.* > (lerp_|addcmul_|_foreach_lerp_|_foreach_addcmul_) > PythonSubclass > clone > empty_strided$"
)
"""gloo's flat copy of what it gathers, and its thread's; that of what a reduce-scatter is given, which it all-reduces; a rank's rows of the
embedding's whole gradient, which AdamW's loop and its foreach kernel cut anew for each operation, two at once: no more than the square root and the
quotient that they make of second moments."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two real ranks wrote."""
    path = tmp_path_factory.mktemp("splitters")
    on_two_ranks("tests.tracing.two_splitters", path)
    return path


@pytest.fixture(scope="module")
def real(folder: Any) -> list[dict[str, Any]]:
    """What each rank allocated, by recipe: of two that split matrices, and of four that have parts of them in shards as well."""
    (folder / "four").mkdir()
    on_two_ranks("tests.tracing.four_splitters", folder / "four", ranks=4)
    names = [(f"rank{rank}.json", f"four/rank{rank}.json") for rank in range(2)]
    return [json.loads((folder / one).read_text()) | json.loads((folder / other).read_text()) for one, other in names]


@cache
def traced(name: str) -> Trace:
    return trace(MODELS["llama"], (recipes() | IN_SHARDS)[name], TOKENS, on="cpu", whole=True)


@pytest.mark.parametrize("name", [*recipes(), *IN_SHARDS])
def test_two_real_ranks_allocate_what_the_trace_says_in_that_order(real, name):
    check_order(traced(name), [rank[name] for rank in real], NOT_TRACED)


@pytest.mark.parametrize("name", [*recipes(), *IN_SHARDS])
def test_two_real_ranks_hold_what_the_trace_says(real, name):
    check_held(traced(name), [rank[name] for rank in real], NOT_TRACED)


@pytest.mark.parametrize("way", two_splitters.TRAINED)
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_train_as_a_single_process_does(folder, name, way):
    """Loss and whole gradients, in fp32, summed in another order."""
    check_trained(torch.load(folder / "trained.pt")[name, way], MODELS[name], rows=1, again="over" not in way)


@pytest.mark.parametrize("way", four_splitters.TRAINED)
@pytest.mark.parametrize("name", MODELS)
def test_four_ranks_train_as_a_single_process_does(real, folder, name, way):
    """Loss and whole gradients of the mean of two rows, of each of which two ranks have parts of all matrices in shards."""
    check_trained(torch.load(folder / "four" / "trained.pt")[name, way], MODELS[name], rows=2, again="over" not in way)


def check_trained(found: dict[str, Any], config: dict[str, Any], rows: int, again: bool) -> None:
    """Check loss and gradients of a batch, and the gradients' sum with those of the same tokens backwards. again: of norms of heads those of the
    first batch are summed up over the two ranks once more, as transformers does it."""
    first: dict[str, torch.Tensor] = {}
    model = seeded(config, recipes()["standard"])
    ids = whole_batch(rows)[0] % 1000
    for key, batch in (("gradients", ids), ("accumulated", ids.flip(1))):
        loss = torch.stack([model(input_ids=row, labels=row).loss for row in batch.split(1)]).mean()
        loss.backward()
        if key == "gradients":
            assert float(found["loss"]) == pytest.approx(float(loss.detach()), rel=1e-6)
        scale = max(float(weight.grad.abs().max()) for weight in model.parameters())
        for name, weight in model.named_parameters():
            of_heads = name.endswith(("q_norm.weight", "k_norm.weight"))
            more = first.get(name, 0) if again and of_heads else 0
            assert float((found[key][name] - weight.grad - more).abs().max()) < 1e-5 * scale, (key, name)
        first = {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    ("model", "ranks", "said"),
    [
        ("llama3.1-8b", 3, "cannot be split evenly over 3 GPUs"),
        ("mixtral-8x7b", 2, "has the style packed_colwise, which is not traced"),
        ("gpt2", 2, "no tp_plan for GPT2LMHeadModel"),
    ],
)
def test_a_trace_refuses_plans_that_it_does_not_know(model, ranks, said):
    with pytest.raises(ModelError, match=said):
        trace(load_config(model), Recipe(gpus=ranks, tensor_parallel=ranks, adamw_kernel="for-loop"), 1024)


@pytest.mark.parametrize(
    ("on", "model", "name", "tokens", "more"),
    [
        ("h100", "llama3.1-8b", "standard", 4096, {"tensor_parallel": 8}),
        ("h100", "llama3.1-8b", "checkpoint", 4096, {"tensor_parallel": 4}),
        ("h100", "qwen3-8b", "standard", 4096, {"tensor_parallel": 2, "batch": 2}),
        ("h100", "qwen2.5-7b", "standard", 4096, {"tensor_parallel": 4}),
        ("a100-80gb", "qwen3-8b", "checkpoint", 4096, {"tensor_parallel": 8}),
        ("h100", "mistral-7b-v0.3", "checkpoint", 8192, {"tensor_parallel": 8}),
        (
            "h100",
            "llama3.1-8b",
            "checkpoint",
            4096,
            {"tensor_parallel": 4, "adamw_kernel": "fused", "max_grad_norm": 1.0},
        ),
        ("h100", "qwen3-8b", "checkpoint", 2048, {"tensor_parallel": 2, "adamw_kernel": "foreach"}),
        ("h100", "llama3.1-8b", "checkpoint", 4096, {"tensor_parallel": 4, **NORMS}),
        ("h100", "qwen3-8b", "standard", 4096, {"tensor_parallel": 2, "batch": 2, **NORMS}),
        (
            "h100",
            "qwen2.5-7b",
            "checkpoint",
            4096,
            {"tensor_parallel": 4, "max_grad_norm": 1.0, "adamw_kernel": "fused", **NORMS},
        ),
        (
            "h100",
            "llama3.1-8b",
            "checkpoint",
            4096,
            {"tensor_parallel": 2, "gpus": 8, "sharding": "fsdp", "accumulation": 2, **NORMS},
        ),
        ("h100", "llama3.1-8b", "checkpoint", 4096, {"tensor_parallel": 4, **LOSS}),
        ("a100-80gb", "mistral-7b-v0.3", "standard", 2048, {"tensor_parallel": 2, "batch": 2, **LOSS}),
        ("h100", "qwen3-8b", "checkpoint", 8192, {"tensor_parallel": 2, "gpus": 8, "sharding": "fsdp", **LOSS} | MIXED),
        ("h100", "qwen2.5-7b", "standard", 2048, {"tensor_parallel": 4, "adamw_kernel": "fused", "batch": 2}),
        ("h100", "llama3.1-8b", "standard", 4096, {"tensor_parallel": 2, "gpus": 8, "sharding": "fsdp"}),
        (
            "h100",
            "qwen3-8b",
            "checkpoint",
            4096,
            {"tensor_parallel": 2, "gpus": 8, "sharding": "fsdp", "max_grad_norm": 1.0},
        ),
        ("h100", "qwen3-8b", "checkpoint", 4096, {"tensor_parallel": 4, "gpus": 12, "sharding": "fsdp"}),
        ("a100-80gb", "qwen2.5-7b", "standard", 2048, {"tensor_parallel": 2, "gpus": 8, "sharding": "fsdp"} | MIXED),
        (
            "h100",
            "mistral-7b-v0.3",
            "checkpoint",
            8192,
            {"tensor_parallel": 4, "gpus": 16, "sharding": "fsdp"} | COPIES,
        ),
        ("h100", "llama3.1-8b", "checkpoint", 4096, {"tensor_parallel": 4, "accumulation": 3}),
        ("h100", "qwen3-8b", "standard", 2048, {"tensor_parallel": 2, "adamw_kernel": "fused", "accumulation": 2}),
        (
            "h100",
            "llama3.1-8b",
            "checkpoint",
            4096,
            {"tensor_parallel": 2, "gpus": 8, "sharding": "fsdp", "accumulation": 3},
        ),
        (
            "h100",
            "llama3.1-8b",
            "standard",
            2048,
            {"tensor_parallel": 4, "gpus": 8, "sharding": "fsdp", "accumulation": 2, "sync_each_batch": True},
        ),
        (
            "h100",
            "qwen3-8b",
            "checkpoint",
            4096,
            {"tensor_parallel": 2, "gpus": 8, "sharding": "fsdp", "accumulation": 3, "precision": "mixed"},
        ),
        ("h100", "llama3.1-8b", "checkpoint", 4096, {"tensor_parallel": 4, "precision": "mixed"}),
        (
            "h100",
            "qwen3-8b",
            "checkpoint",
            2048,
            {"tensor_parallel": 2, "precision": "mixed", "adamw_kernel": "fused", "accumulation": 2, "batch": 2},
        ),
        ("h100", "qwen2.5-7b", "standard", 2048, {"tensor_parallel": 2, "autocast": True}),
        ("h100", "llama3.1-8b", "checkpoint", 4096, {"tensor_parallel": 4, "checkpoint": "selective"}),
        ("h100", "qwen3-8b", "checkpoint", 2048, {"tensor_parallel": 2, "checkpoint": "selective"}),
        ("h100", "llama3.1-8b", "checkpoint", 4096, {"tensor_parallel": 4, "checkpoint": "reentrant"}),
        ("h100", "qwen3-8b", "checkpoint", 4096, {"tensor_parallel": 4, "checkpoint": "every-2"}),
        ("h100", "llama3.1-8b", "checkpoint", 4096, {"tensor_parallel": 4, "offload": "layer-inputs"}),
        ("h100", "qwen3-8b", "checkpoint", 4096, {"tensor_parallel": 2, "offload": "layer-inputs"} | IN_PAIRS),
        ("h100", "llama3.1-8b", "checkpoint", 4096, {"tensor_parallel": 2, "checkpoint": "selective"} | IN_PAIRS),
        ("h100", "qwen3-8b", "checkpoint", 2048, {"tensor_parallel": 2, "checkpoint": "reentrant"} | IN_PAIRS),
        ("h100", "llama3.1-8b", "checkpoint", 2048, {"tensor_parallel": 2, "checkpoint": "every-2"} | IN_PAIRS),
    ],
    ids=str,
)
def test_formula_and_trace_agree(on, model, name, tokens, more):
    """Every instant within 0.01%: what differs are weights of norms, rounded up to blocks of 512 bytes."""
    usual = {} if "sharding" in more else {"gpus": more["tensor_parallel"], "adamw_kernel": "for-loop"}
    recipe, of = strategy(name, **{**usual, **more}), card(on)
    found = trace(load_config(model), recipe, tokens, workspace=of.gpu.workspaces_bytes, platform=of.platform)
    chunks = fixed_chunks(recipe)
    step = step_of(load_model(model), recipe, of, chunks, tokens)
    formula = {instant.name: instant.bytes for instant in step.instants(step_sizes(recipe, tokens, chunks))}
    assert formula == {p.instant: pytest.approx(p.bytes, rel=1e-4) for p in found.peaks}
