"""Experts over several GPUs: the trace beside two and four real processes over gloo that run transformers' own code, and the formula beside the trace."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest

from mstplan.errors import InputError
from mstplan.plan.layout import step_of, step_sizes
from mstplan.plan.solve import fixed_chunks
from mstplan.spec.catalog import load_config
from mstplan.spec.config import read_config
from mstplan.spec.hardware import Card, card
from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import trace

from ..processes import on_two_ranks
from .real_events import check_held, check_order
from .test_fsdp import KNOWN
from .two_experts import MODELS, of_four, recipes
from .two_ranks import TOKENS

NOT_TRACED = re.compile("|".join(("^gloo:", *KNOWN.values())))
"""gloo's copies; two experts over four ranks pad nothing."""
RECIPES = {**recipes(), **of_four()}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks allocated, and the first two of four, by recipe."""
    folder = tmp_path_factory.mktemp("experts")
    (folder / "four").mkdir()
    on_two_ranks("tests.tracing.two_experts", folder)
    on_two_ranks("tests.tracing.four_experts", folder / "four", ranks=4)
    folders = (folder, folder / "four")
    return [
        {name: found for at in folders for name, found in json.loads((at / f"rank{rank}.json").read_text()).items()}
        for rank in range(2)
    ]


@cache
def traced(name: str) -> Trace:
    return trace(MODELS["qwen3_moe"], RECIPES[name], TOKENS, on="cpu", whole=True)


@pytest.mark.parametrize("name", RECIPES)
def test_real_ranks_allocate_what_the_trace_says_in_that_order(real, name):
    check_order(traced(name), [rank[name] for rank in real], NOT_TRACED)


@pytest.mark.parametrize("name", RECIPES)
def test_real_ranks_hold_what_the_trace_says(real, name):
    check_held(traced(name), [rank[name] for rank in real], NOT_TRACED)


@pytest.mark.parametrize("name", ["standard", "checkpoint"])
def test_few_layers_written_down_are_all_of_them(name):
    """A trace of eight layers, of which few are run, is the one of all, event by event."""
    config = MODELS["qwen3_moe"] | {"num_hidden_layers": 8}
    few, whole = (trace(config, RECIPES[name], TOKENS, whole=whole) for whole in (False, True))
    assert len(few.kept) < 8
    assert few.live == whole.live


@pytest.mark.parametrize(
    ("model", "ranks", "said"),
    [
        ("qwen3-30b-a3b", 3, "128 experts, which 3 GPUs cannot share out evenly"),
        ("llama3.1-8b", 2, "no ep_plan for LlamaForCausalLM"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(model, ranks, said):
    with pytest.raises(InputError, match=said):
        trace(load_config(model), strategy("checkpoint", gpus=ranks, expert_parallel=ranks, sharding="fsdp"), 1024)


@pytest.mark.parametrize(
    ("on", "model", "name", "gpus", "more"),
    [
        ("h100", "qwen3-30b-a3b", "standard", 8, {"expert_parallel": 8}),
        ("h100", "qwen3-30b-a3b", "checkpoint", 8, {"expert_parallel": 4, "batch": 2}),
        ("a100-80gb", "mixtral-8x7b", "checkpoint", 8, {"expert_parallel": 8, "expert_imbalance": 2.5}),
        ("h100", "mixtral-8x7b", "standard", 16, {"expert_parallel": 2, "adamw_kernel": "for-loop"}),
        ("h100", "qwen1.5-moe-a2.7b", "checkpoint", 8, {"expert_parallel": 4}),
        ("h100", "gpt-oss-20b", "standard", 8, {"expert_parallel": 4}),
        ("h100", "gpt-oss-20b", "checkpoint", 8, {"expert_parallel": 8, "expert_imbalance": 1.5}),
        ("h100", "moonlight-16b-a3b", "checkpoint", 16, {"expert_parallel": 8}),
        ("h100", "deepseek-v2-lite", "standard", 4, {"expert_parallel": 4}),
        ("h100", "deepseek-v2-lite", "checkpoint", 8, {"expert_parallel": 2}),
        ("h100", "olmoe-1b-7b", "checkpoint", 8, {"expert_parallel": 8, "optimizer": "sgd"}),
        ("h100", "glm-4.5-air", "checkpoint", 8, {"expert_parallel": 8}),
        ("h100", "qwen3-30b-a3b", "checkpoint", 8, {"expert_parallel": 8, "loss": "trl"}),
        ("h100", "mixtral-8x7b", "checkpoint", 8, {"expert_parallel": 4, "loss": "liger", "offload": "layer-inputs"}),
        ("h100", "qwen1.5-moe-a2.7b", "chunked-loss", 8, {"expert_parallel": 2, "loss_chunks": 4}),
        ("h100", "qwen3-30b-a3b", "checkpoint", 8, {"expert_parallel": 8, "loss": "liger", "max_grad_norm": 1.0}),
    ],
    ids=str,
)
def test_formula_and_trace_agree(on, model, name, gpus, more):
    """Every instant within 0.01%: what differs are weights of norms and counts of rows, rounded up to blocks of 512 bytes."""
    check(load_config(model), strategy(name, gpus=gpus, sharding="fsdp", **more), card(on))


TRAINED: list[dict[str, Any]] = [
    {"accumulation": 3, "max_grad_norm": 1.0},
    {"accumulation": 2, "sync_each_batch": True},
    {"precision": "mixed"},
    {"precision": "mixed", "accumulation": 2, "max_grad_norm": 1.0},
    {"freeze": ("mlp",)},
    {"train": ("layers.[23].*",)},
    {"train": ("attention", "norms"), "accumulation": 3},
    {"optimizer_on_host": True, "weights_on_host": True},
    {"optimizer_on_host": True, "weights_on_host": True, "precision": "mixed", "accumulation": 2},
    {"lora_rank": 16, "lora_targets": ("attention",)},
    {"lora_rank": 16, "lora_targets": ("attention",), "accumulation": 3, "max_grad_norm": 1.0},
    {"lora_rank": 16, "lora_targets": ("attention",), "accumulation": 2, "sync_each_batch": True},
    {"lora_rank": 16, "lora_targets": ("attention",), "input_gradients": True},
]
"""What people train with."""
FAMILIES = (
    "qwen3-30b-a3b",
    "mixtral-8x7b",
    "deepseek-v2-lite",
    "glm-4.5-air",
    "gpt-oss-20b",
    "olmoe-1b-7b",
    "qwen1.5-moe-a2.7b",
)
ROTATION = [
    (FAMILIES[n % len(FAMILIES)], ("checkpoint", "standard")[n // 2 % 2], (8, 4)[n % 2], (256, 4096)[n // 4 % 2], more)
    for n, more in enumerate(TRAINED * 2)
]
"""Each twice: every family, both strategies, experts whole on a GPU and in shards of two, few tokens, for which weights are the peak, and many."""


@pytest.mark.parametrize(("model", "name", "ranks", "tokens", "more"), ROTATION, ids=str)
def test_formula_and_trace_agree_on_what_people_train_with(model, name, ranks, tokens, more):
    """Four layers."""
    ranks = 4 if ranks == 8 and model == "qwen1.5-moe-a2.7b" else ranks  # 60 experts
    config = load_config(model) | {"num_hidden_layers": 4, "layer_types": None}
    check(config, strategy(name, gpus=8, sharding="fsdp", expert_parallel=ranks, **more), card("h100"), tokens)


def test_mixed_precision_casts_the_scores_that_experts_are_given():
    """FSDP2's policy casts what its modules are given: DeepSeek's scores are in fp32, and what is weighed with them would be."""
    config = load_config("moonlight-16b-a3b") | {"num_hidden_layers": 3}
    recipe = strategy("standard", gpus=8, sharding="fsdp", expert_parallel=8, precision="mixed")
    check(config, recipe, card("h100"))


def test_formula_and_trace_agree_where_few_layers_attend():
    """Qwen3-Next, of four layers."""
    config = load_config("qwen3-next-80b-a3b") | {"num_hidden_layers": 4, "layer_types": None}
    check(config, strategy("checkpoint", gpus=8, sharding="fsdp", expert_parallel=4), card("h100"))


def check(config: dict[str, Any], recipe: Recipe, of: Card, tokens: int = 4096) -> None:
    found = trace(config, recipe, tokens, workspace=of.gpu.workspaces_bytes, platform=of.platform)
    chunks = fixed_chunks(recipe)
    step = step_of(read_config(config, "model"), recipe, of, chunks, tokens)
    formula = {instant.name: instant.bytes for instant in step.instants(step_sizes(recipe, tokens, chunks))}
    assert formula == {p.instant: pytest.approx(p.bytes, rel=1e-4) for p in found.peaks}
