"""Allocations and releases that the step model writes down: as many bytes as its peaks, each release after its allocation."""

from __future__ import annotations

import pytest

from mstplan.errors import RecipeError
from mstplan.plan import layout
from mstplan.spec.catalog import load_model
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
}


def running_peak(events: Events, sizes: Sizes) -> tuple[int, int, int]:
    """(peak, bytes before, bytes after) of a step that is not the first."""
    allocations = events.at(sizes)
    before = sum(size for _, size in (*allocations.before, *allocations.states))
    live = peak = before
    alive: dict[int, int] = {}
    for number, size in allocations.step:
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
        chunks = Chunks(4, 8) if strategy.loss_in_chunks else Chunks(1, 1)
        try:
            recipe = strategy.changed(mlp_chunks=chunks.mlp, loss_chunks=chunks.loss, **VARIANTS[variant])
        except RecipeError:  # no such recipe
            continue
        whole = step(model, layout.layout_of(model, recipe, chunks, 8192), H100.workspaces_bytes)
        sizes = layout.step_sizes(recipe, 8192, chunks)
        peak, before, after = running_peak(events_of(whole, chunks), sizes)
        assert peak == pytest.approx(whole.largest(sizes)[1], rel=1e-6) and before == after
