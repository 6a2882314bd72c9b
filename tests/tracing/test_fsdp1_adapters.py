"""FSDP1 with adapters over frozen weights: the trace beside two real processes, and the formula beside it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mstplan.errors import RecipeError
from mstplan.step.recipe import strategy
from mstplan.tracing.fsdp import GATHERED, SHARDS

from ..processes import on_two_ranks
from .real_events import without
from .test_fsdp import LARGE, check_peaks, traced
from .test_fsdp1 import OF_GLOO
from .two_ranks_flat_adapters import mixed_recipes, recipes


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first of two ranks allocated, by recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks("tests.tracing.two_ranks_flat_adapters", folder)
    found: dict[str, Any] = json.loads((folder / "rank0.json").read_text())
    return found


@pytest.mark.parametrize("name", recipes())
def test_two_real_ranks_allocate_what_the_trace_says_in_that_order(real, name):
    events = without(real[name]["runs"][0], OF_GLOO)
    expected = [made.bytes for made in traced(recipes()[name]).step.storages if made.bytes > LARGE]
    assert [e[0] for e in events if e[0] > LARGE] == expected


@pytest.mark.parametrize("name", recipes())
def test_two_real_ranks_hold_what_the_trace_says(real, name):
    """Within what random generators' states make, which are not followed: 0.2%."""
    runs = [without(events, OF_GLOO) for events in real[name]["runs"]]
    check_peaks(traced(recipes()[name]), real[name]["resident"], runs)


@pytest.mark.parametrize("name", mixed_recipes())
def test_two_real_ranks_gather_and_sum_several_dtypes(real, name):
    """Of the sizes that only flat tensors have; and what stays, but for the scales of 4-bit weights, which are no parameters."""
    found = traced(mixed_recipes()[name])
    of_fsdp = {m.bytes for m in found.step.storages if m.operation in (GATHERED, SHARDS)}
    sizes = of_fsdp - {m.bytes for m in found.step.storages if m.operation not in (GATHERED, SHARDS, "cat")}
    assert len(sizes) > 3
    events = without(real[name]["runs"][0], OF_GLOO)
    assert [e[0] for e in events if e[0] in sizes] == [m.bytes for m in found.step.storages if m.bytes in sizes]
    scales = sum(weight.bytes for weight in found.weights if ".quantisation_" in weight.name)
    resident = sum(each.bytes for each in (*found.held_weights, *found.held_states))
    assert real[name]["resident"] + scales == resident
