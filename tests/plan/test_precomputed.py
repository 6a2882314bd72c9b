"""S_max that ship: current, and found anew where they are missing."""

from __future__ import annotations

import pytest

from mstplan import profiles
from mstplan.plan import allocation, findings, precomputed
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import STRATEGIES
from mstplan.units import GIB

from .precompute import answers_of

ON = card(memory=80 * GIB)


def test_those_that_ship_are_current() -> None:
    """Else: python -m tests.plan.precompute --write."""
    for name in ("llama3.1-8b", "qwen3-0.6b"):
        answers = answers_of(name, ON)
        assert (
            len(answers) == len(STRATEGIES) + 2
        )  # the best, and the best of the usual ones, with the allocator set the other way, too
        assert {key: precomputed.find(key) for key in answers} == answers


def test_the_first_answer_simulates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "search", None)
    assert findings.find_longest(load_model("llama3.1-8b"), ON, STRATEGIES).best.s_max > 100_000


def test_without_the_file_they_are_found_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe, chunks = load_model("qwen3-0.6b"), STRATEGIES["checkpoint"], allocation.Chunks(1, 1)
    arguments = model, recipe, card("rtx-4090"), chunks, 80_000
    with_file = allocation.longest_that_runs(*arguments)
    monkeypatch.setattr(precomputed, "_read", dict)
    assert allocation.longest_that_runs(*arguments) == with_file > 0


def test_a_key_tells_what_decides() -> None:
    model, recipe, chunks = load_model("qwen3-0.6b"), STRATEGIES["mst"], allocation.Chunks(4, 8)
    keys = {
        precomputed.key_of(*each)
        for each in (
            (model, recipe, ON, chunks, 1000),
            (model, recipe, ON, chunks, 1001),
            (model, recipe, ON, allocation.Chunks(4, 4), 1000),
            (model, recipe.changed(batch=2), ON, chunks, 1000),
            (model, recipe, card("h100"), chunks, 1000),
            (model, recipe, ON._replace(allocator="default"), chunks, 1000),
            (load_model("qwen3-4b"), recipe, ON, chunks, 1000),
        )
    }
    assert len(keys) == 7 and (profiles.ROOT / precomputed.FILE).exists()
