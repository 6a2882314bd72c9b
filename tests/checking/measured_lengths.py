"""README's table of lengths of Llama-3.1-8B that ran and that ran out of memory on an H100, beside S_max.

python -m tests.checking.measured_lengths    # prints it; the traces take some minutes
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mstplan.plan import solve
from mstplan.spec.catalog import load_config, load_model
from mstplan.spec.hardware import Card, card
from mstplan.step.recipe import STRATEGIES, Recipe, strategy_label
from mstplan.tracing import cache
from mstplan.tracing.search import find_longest

from ..recipes import in_chunks

DATA = Path(__file__).parents[1] / "data" / "h100-2026-11-27"
MODEL = "llama3.1-8b"
HEADER = (
    "| strategy | runs | runs out | from cold | tensors fit (formula) | the allocator finds room (trace) |",
    "|---|---:|---:|---:|---:|---:|",
)
NAMES = ("standard", "checkpoint", "checkpoint-sqrt", "mst", "mst-offload")
"""Strategies in the order of the table."""


class Run(NamedTuple):
    """strategy, tokens, pieces; how far it came. cold: the first step was of full length; steps: full ones that ran."""

    strategy: str
    seq_len: int
    chunks: tuple[int, int]
    cold: bool
    ran: bool
    steps: int
    beside: int  # bytes of the GPU beside the allocator
    total: int


def runs() -> Iterator[Run]:
    """With expandable segments."""
    for name in ("smax", "cold"):
        for row in map(json.loads, (DATA / f"{name}.jsonl").read_text().splitlines()):
            case: dict[str, Any] = row.get("case", row)
            if case.get("expandable", True):
                ran, steps = row["outcome"] == "ok", len(row.get("steps", ()))
                chunks = tuple(row["chunks"])
                yield Run(
                    *(case["strategy"], case["seq_len"], chunks, name == "cold", ran, steps),
                    *(row["beside"], row["total"]),
                )


RUNS = tuple(runs())


def strategies() -> list[str]:
    return [name for name in NAMES if any(run.strategy == name for run in RUNS)]


def warm(name: str, ran: bool) -> int | None:
    """The longest that ran, or the shortest that did not, after a step of 512 tokens."""
    lengths = [run.seq_len for run in RUNS if (run.strategy, run.cold, run.ran) == (name, False, ran)]
    return (max if ran else min)(lengths, default=None)


def recipe_of(name: str) -> Recipe:
    """The strategy in as many pieces as ran."""
    mlp, loss = next(run.chunks for run in RUNS if run.strategy == name)
    return in_chunks(STRATEGIES[name].changed(adamw_kernel="foreach"), mlp, loss)  # as they were measured


def measured_card(name: str) -> Card:
    """The H100 with what was seen in use beside the allocator."""
    run = next(run for run in RUNS if run.strategy == name)
    h100 = card("h100")
    return Card(h100.gpu, run.total, reserve_bytes=run.beside - h100.gpu.context_bytes)


def by_formula(name: str) -> int:
    model, recipe, h100 = load_model(MODEL), recipe_of(name), measured_card(name)
    return solve.longest_sequence(model, recipe, h100, solve.recommend_chunks(model, recipe, h100))


def by_trace(name: str) -> int:
    config = load_config(MODEL)

    def trace_at(recipe: Recipe, seq_len: int, on: Card):  # type: ignore[no-untyped-def]
        return cache.trace_of(config, recipe, seq_len, workspace=on.gpu.workspaces_bytes)

    return find_longest(load_model(MODEL), recipe_of(name), measured_card(name), trace_at, name).answer.s_max


def cold_words(name: str) -> str:
    """What ran from a cold start, step by step."""
    colds = sorted((run for run in RUNS if run.strategy == name and run.cold), key=lambda run: run.seq_len)
    return "; ".join(f"{run.seq_len:,}: {'runs' if run.ran else f'out in step {run.steps + 1}'}" for run in colds)


def line(name: str, traced: str) -> str:
    """One row; traced: S_max by trace, in words."""
    figures = [f"{n:,}" if n is not None else "" for n in (warm(name, True), warm(name, False))]
    return f"| {strategy_label(name)} | {' | '.join(figures)} | {cold_words(name)} | {by_formula(name):,} | {traced} |"


if __name__ == "__main__":
    print(*HEADER, *(line(name, f"{by_trace(name):,}") for name in strategies()), sep="\n")
