"""S_max against lengths that ran on GPUs and that ran out of memory there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mstplan.plan.allocation import longest_that_runs, usage_up_to
from mstplan.plan.solve import longest_sequence, max_seq, recommend_chunks
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import EXPANDABLE, USUAL, Card, card
from mstplan.step.recipe import STRATEGIES
from mstplan.step.steps import Chunks

MODEL = load_model("llama3.1-8b")
H100, H200 = (Path(__file__).parents[1] / "data" / name for name in ("h100-2026-11-27", "h200-2026-11-26"))
CHUNKED = ("mst", "mst-offload")
FOREACH = {name: recipe.changed(adamw_kernel="foreach") for name, recipe in STRATEGIES.items()}
"""As they were measured."""


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def lengths(measured: list[dict[str, Any]], strategy: str) -> tuple[int, int]:
    """(the longest that ran, the shortest that ran out of memory) with expandable segments."""
    of_strategy = [
        row for row in measured if row["case"]["strategy"] == strategy and row["case"].get("expandable", True)
    ]
    ran = [row["case"]["seq_len"] for row in of_strategy if row["outcome"] == "ok"]
    failed = [row["case"]["seq_len"] for row in of_strategy if row["outcome"] == "oom"]
    return max(ran), min(failed, default=1 << 40)


def as_measured(measured: list[dict[str, Any]]) -> Card:
    """The card, as large as the process had it."""
    cap = measured[0]["case"].get("cap_bytes")
    if cap is None:
        return card("h100")
    on = card("h100", memory=None)
    return on._replace(total_bytes=cap + on.gpu.context_bytes)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("folder", [H100, H200], ids=["H100", "H200"])
def test_s_max_is_a_length_that_ran(folder: Path, strategy: str) -> None:
    """At most the shortest that failed, and no less than 98% of the longest that ran: in one step after a short one, so that of lengths
    that ran out some steps after a cold start the shortest counts."""
    measured = rows(folder / "smax.jsonl")
    if not any(row["case"]["strategy"] == strategy for row in measured):
        pytest.skip("not measured")
    ran, failed = lengths(measured, strategy)
    cold = [row for row in rows(H100 / "cold.jsonl") if row["strategy"] == strategy and row["expandable"]]
    ran = min([ran, *(row["seq_len"] for row in cold if row["outcome"] == "oom")])
    assert 0.98 * ran <= max_seq(MODEL, FOREACH[strategy], as_measured(measured)).s_max < failed


DIFFER = {
    ("standard", 2000, USUAL): "runs: holes of the default allocator come and go with some bytes",
    ("standard", 2500, USUAL): "runs out in step 3: the same",
    ("checkpoint", 11900, USUAL): "runs out in step 2, the simulation from 12,000 on",
    ("checkpoint-sqrt", 12900, USUAL): "runs out in step 2, the simulation from 12,950 on",
    ("standard", 4454, EXPANDABLE): "runs out in step 4, the simulation in step 2",
}
"""Runs from a cold start that the simulation does not foretell."""


def test_cold_starts_are_foretold() -> None:
    """Eighteen runs, step by step: whether memory runs out, and in which step."""
    differ = set()
    for row in rows(H100 / "cold.jsonl"):
        allocator = EXPANDABLE if row["expandable"] else USUAL
        on, steps = card("h100", allocator=allocator), len(row["steps"]) + (row["outcome"] == "oom")
        usage = usage_up_to(MODEL, FOREACH[row["strategy"]], on, row["seq_len"], Chunks(*row["chunks"]))
        failed = usage.steps if not usage.runs else None
        if (failed if failed is not None and failed <= steps else None) != (steps if row["outcome"] == "oom" else None):
            differ.add((row["strategy"], row["seq_len"], allocator))
    assert differ == set(DIFFER)


@pytest.mark.parametrize("allocator", [EXPANDABLE, USUAL])
def test_what_it_finds_runs_and_a_little_more_does_not(allocator: str) -> None:
    for strategy in ("standard", "checkpoint", "mst"):
        recipe, on = FOREACH[strategy], card("h100", allocator=allocator)
        chunks = recommend_chunks(MODEL, recipe, on)
        fitting = longest_sequence(MODEL, recipe, on, chunks)
        s_max = longest_that_runs(MODEL, recipe, on, chunks, fitting)
        assert usage_up_to(MODEL, recipe, on, s_max, chunks).runs and s_max < fitting
        assert not all(
            usage_up_to(MODEL, recipe, on, s_max + n * fitting // 512, chunks).runs for n in (1, 2) if allocator
        )


def test_a_gpu_that_holds_nothing() -> None:
    recipe, on = STRATEGIES["standard"], card(memory=20 * 2**30)
    assert longest_that_runs(MODEL, recipe, on, Chunks(1, 1), 0) == 0
    usage = usage_up_to(MODEL, recipe, on, 128, Chunks(1, 1))
    assert not usage.runs and usage.steps == 1 and usage.out_of_memory is not None
