"""A traced step on the simulated allocator: the same bytes, more reserved, and an end where the card ends."""

from __future__ import annotations

import pytest

from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing.recording import Category
from mstplan.tracing.simulation import all_events, fits_on, frame_names, required_bytes, simulate
from mstplan.tracing.snapshot import snapshot
from mstplan.units import GIB, MIB

from .tiny import step_of

CHECKPOINT = strategy("checkpoint")
RECIPES = [
    CHECKPOINT,
    Recipe(),
    strategy("mst", mlp_chunks=4, loss_chunks=4),
    Recipe(optimizer_in_backward=True),
    Recipe(optimizer="sgd"),
    Recipe(accumulation=3),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_allocated_is_the_traces_own_peak(recipe):
    """Two counts of the same step: a running sum of blocks, and the allocator's, with expandable segments, where none is larger than asked."""
    trace = step_of(recipe, 4096)
    found = simulate(trace, expandable=True)
    assert found.out_of_memory is None
    assert found.allocated == trace.peak.bytes
    assert found.reserved >= found.allocated


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_step_releases_is_all_it_made(recipe):
    trace = step_of(recipe, 4096)
    alive: dict[int, int] = {}
    for key, size, sign in all_events(trace, steps=3):
        if sign > 0:
            assert key not in alive
            alive[key] = size
        else:
            assert alive.pop(key) == size
    assert sum(alive.values()) == sum(w.bytes for w in trace.weights) + sum(s.bytes for s in trace.held_states)


def test_the_first_micro_batch_makes_the_gradients():
    """They lie where its backward made them, not where an empty card would put them: what a GPU reserved beyond a trace of the second."""
    trace = step_of(Recipe(accumulation=2), 4096)
    assert trace.first_passes is not None
    made = [s.bytes for s in trace.first_passes.storages if s.category == Category.GRADIENTS]
    assert sorted(made) == sorted(weight.bytes for weight in trace.weights if weight.trained)
    assert trace.first_passes.live() is not None and max(trace.first_passes.live()) > sum(made)


def test_states_of_an_optimizer_in_backward_come_one_by_one():
    trace = step_of(Recipe(optimizer_in_backward=True), 4096)
    first = trace.first_passes
    assert first is not None
    left = [first.storages[i] for i in first.alive_at(len(first.events) - 1)]
    states = [s.bytes for s in left if s.category == Category.STATES]
    assert sorted(states) == sorted(s.bytes for s in trace.held_states)


def test_a_card_too_small_is_an_answer():
    trace = step_of(CHECKPOINT, 4096)
    failed = simulate(trace, expandable=True, limit=trace.peak.bytes - 8 * MIB).out_of_memory
    assert failed is not None and failed.allocated <= trace.peak.bytes and failed.requested > 0


def test_needed_is_just_enough():
    trace = step_of(CHECKPOINT, 4096)
    enough = required_bytes(trace, precision=MIB)
    assert simulate(trace, expandable=True, limit=enough).out_of_memory is None
    assert enough >= trace.peak.bytes


def test_runs_on_a_card():
    trace = step_of(CHECKPOINT, 4096)
    assert fits_on(trace, card(memory=8 * GIB))
    small = card(memory=8 * GIB, reserve=card(memory=8 * GIB).allocatable_bytes - trace.peak.bytes + MIB)
    assert not fits_on(trace, small)


def test_a_snapshot_of_it_has_names():
    trace = step_of(CHECKPOINT, 4096).with_workspace(32 * MIB)
    document = snapshot(all_events(trace), lambda key: frame_names(trace, key), expandable=True)
    lines = {frame["name"] for entry in document["device_traces"][0] for frame in entry.get("frames", [])}
    assert {
        "cuBLAS workspace 1 of 2",
        "cuBLAS workspace 2 of 2",
        "optimizer",
        "exp_avg",
        "model.layers.5.mlp.gate_proj",
        "model.embed_tokens.weight",
    } <= lines
