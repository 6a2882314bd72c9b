"""Allocations and releases that the step model writes down: as many bytes as its peaks, each release after its allocation."""

from __future__ import annotations

import pytest

from bench.deepspeed_zero import WITH_IMAGES, config_of
from mstplan.errors import RecipeError
from mstplan.plan import layout
from mstplan.spec.catalog import load_model
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.events import Events, events_of
from mstplan.step.recipe import STRATEGIES
from mstplan.step.simulation import RELEASED
from mstplan.step.steps import Chunks, Sizes, step

H100 = card("h100").gpu
MODELS = (
    "gpt2",
    "llama3.2-1b",
    "gemma2-2b",
    "deepseek-v2-lite",
    "gpt-oss-20b",
    "qwen3-30b-a3b",
    "olmo2-7b",
    "phi3-mini-4k",
)
VARIANTS = {
    "plain": {},
    "mixed": {"precision": "mixed"},
    "fp32": {"precision": "fp32"},
    "accumulation": {"accumulation": 3},
    "optimizer in backward": {"optimizer_in_backward": True},
    "eager": {"attention": "eager"},
    "batch": {"batch": 3},
    "Adafactor": {"optimizer": "adafactor"},
    "FSDP2": {"sharding": "fsdp", "gpus": 4},
    "frozen": {"freeze": ("embeddings", "norms")},
    "LoRA": {"lora_rank": 16, "lora_targets": ("attention",)},
    "all linear": {"lora_rank": 16, "lora_dropout": 0.05},
    "DoRA": {"lora_rank": 16, "lora_targets": ("attention",), "dora": True},
    "QLoRA": {"lora_rank": 16, "lora_targets": ("attention",), "quantize": "nf4", "double_quantize": True},
    "QLoRA prepared": {
        "lora_rank": 16,
        "lora_targets": ("attention",),
        "quantize": "nf4",
        "kbit_preparation": True,
        "autocast": True,
    },
    "int8": {"lora_rank": 16, "lora_targets": ("attention",), "quantize": "int8"},
    "Liger": {"loss": "liger", "kernels": "liger"},
    "TRL": {"loss": "trl"},
    "selective": {"checkpoint": "selective"},
    "saved tensors": {"offload": "saved-tensors"},
    "8-bit": {"optimizer": "adamw-8bit"},
    "packed": {"packing": 4},
}


def running_peak(events: Events, sizes: Sizes) -> tuple[int, int, int]:
    """(peak, bytes before, bytes after) of a step that is not the first."""
    allocations = events.at(sizes)
    first = dict[int, int]()
    for number, size, _stream in (*allocations.before, *allocations.first):
        if size == RELEASED:
            del first[number]
        else:
            first[number] = size
    before = sum(first.values())
    live = peak = before
    alive: dict[int, int] = {}
    for number, size, _stream in allocations.step:
        assert (number in alive) == (size == RELEASED)
        change = -alive.pop(number) if size == RELEASED else alive.setdefault(number, size)
        live += change
        peak = max(peak, live)
    return peak, before, live


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_allocations_add_up_to_the_peak(name: str, variant: str) -> None:
    model = load_model(name)
    for strategy in STRATEGIES.values():
        chunks = Chunks(4 if strategy.mlp_chunks == "auto" else 1, 8 if strategy.loss_in_chunks else 1)
        if strategy.layer_in_chunks and model.attention.kv_heads % 2 == 0:
            chunks = chunks._replace(groups=2)
        try:
            recipe = chunks.put_into(strategy).changed(**VARIANTS[variant])
            whole = step(model, layout.layout_of(model, recipe, chunks, 8192), H100.workspaces_bytes)
        except RecipeError:  # no such recipe, or not for this model
            continue
        sizes = layout.step_sizes(recipe, 8192, chunks)
        peak, before, after = running_peak(events_of(whole, chunks), sizes)
        assert peak == pytest.approx(whole.largest(sizes)[1], rel=1e-6) and before == after


LORA = {"lora_rank": 8, "lora_targets": ("attention",), "input_gradients": True}
ON_SEVERAL = {
    "FSDP1": {"sharding": "fsdp1", "max_grad_norm": 1.0},
    "FSDP1, reentrant": {"sharding": "fsdp1", "checkpoint": "reentrant", "accumulation": 2, **LORA},
    "FSDP1, views": {"sharding": "fsdp1", "use_orig_params": True, "accumulation": 2},
    "FSDP1, synced": {"sharding": "fsdp1", "accumulation": 2, "sync_each_batch": True},
    "FSDP2, reentrant": {"sharding": "fsdp", "checkpoint": "reentrant", "accumulation": 2, **LORA},
    "FSDP2, replicas": {"sharding": "fsdp", "replicas": 2, "precision": "mixed"},
    "DDP": {"sharding": "ddp", "accumulation": 2, "max_grad_norm": 1.0},
    "ZeRO-1": {"sharding": "zero1", "accumulation": 2, "overlap_comm": True},
    "ZeRO-2": {"sharding": "zero2", "accumulation": 2},
    "ZeRO-3": {"sharding": "zero3", "accumulation": 2},
    "ZeRO-3, Liger": {"sharding": "zero3", "accumulation": 2, "loss": "liger", "checkpoint": "layer"},
    "ZeRO-3, reentrant": {"sharding": "zero3", "checkpoint": "reentrant", "accumulation": 2, **LORA},
    "experts": {"sharding": "fsdp", "expert_parallel": 4, "accumulation": 2, "max_grad_norm": 1.0},
    "experts, mixed": {"sharding": "fsdp", "expert_parallel": 2, "precision": "mixed"},
    "matrices": {"sharding": "fsdp", "tensor_parallel": 2},
    "Ulysses": {"sharding": "fsdp", "sequence_parallel": 2, "accumulation": 2},
    "ring": {"sharding": "fsdp", "context_parallel": 2},
    "images": {"sharding": "fsdp", "images": 2, "accumulation": 2},
    "images, LoRA": {"sharding": "ddp", "images": 1, "freeze": ("vision",), **LORA},
}


@pytest.mark.parametrize("variant", ON_SEVERAL)
def test_allocations_on_several_gpus_add_up_to_the_peak(variant: str) -> None:
    """In micro-batches after the first, too: what one leaves behind would be there in the next."""
    planned, chunks = 0, Chunks(1, 1)
    models = [load_model(name) for name in ("llama3.2-1b", "llama3.1-8b", "qwen3-30b-a3b", "qwen3-8b")]
    models += [read_config(config_of({"images": name}), name) for name in WITH_IMAGES]
    for model in models:
        for strategy in ("standard", "checkpoint"):
            recipe = STRATEGIES[strategy].changed(gpus=4, **ON_SEVERAL[variant])
            try:
                whole = layout.step_of(model, recipe, card("h100"), chunks, 8192)
            except RecipeError:  # not for this model
                continue
            sizes = layout.step_sizes(recipe, 8192, chunks)
            peak, before, after = running_peak(events_of(whole, chunks), sizes)
            assert (peak, before) == (pytest.approx(whole.largest(sizes)[1], rel=1e-5), after), model.name
            planned += 1
    assert planned
