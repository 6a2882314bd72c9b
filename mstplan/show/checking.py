"""`mstplan validate --smax` and `--throughput` at work: predictions that are measured at once, point by point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from ..errors import MeasurementError
from ..observe import cache, limits, search, sweep
from ..observe.limits import ABOVE, BELOW, Limit
from ..observe.measurement import Case, Measurement
from ..plan import solve
from ..plan.config import read_config
from ..plan.hardware import Card
from ..plan.model import Model
from ..plan.recipe import Recipe
from ..plan.steps import Chunks
from ..units import format_gib, format_seconds, format_tokens
from . import measuring, tables


class Found(NamedTuple):
    """What was found, as data for --json; holds: do the predictions?"""

    data: dict[str, Any]
    holds: bool


@dataclass
class Bench:
    """Where and what to measure. Every point is appended to the results file `out`, and one that is there already is not made once
    more but with `again`."""

    spec: str
    known: Mapping[str, Any]
    card: Card
    device: str
    limit: int | None
    layers: int | None
    steps: int
    timeout: float | None
    out: Path
    again: bool = False

    def __post_init__(self) -> None:
        self.name, self.config = sweep.subject(self.spec, self.layers)
        self.model: Model = read_config(self.config, self.name)

    def measure(
        self, strategy: str, recipe: Recipe, seq_len: int, chunks: Chunks, console: Console | None, name: Callable[[Measurement], str] = measuring.subject
    ) -> Measurement:  # fmt: skip
        fixed = recipe.changed(mlp_chunks=chunks.mlp, loss_chunks=chunks.loss)
        case = Case(self.name, strategy, self.config, fixed, seq_len, self.layers, self.device, self.limit, self.steps)
        return measuring.run([case], self.known, self.out, self.timeout, console, self.again, name=name).measurements[0]

    def trace_at(self, recipe: Recipe, seq_len: int, card: Card) -> Any:
        workspace = card.gpu.workspaces_bytes if self.device == "cuda" else 0
        return cache.trace_of(self.config, recipe, seq_len, on=self.device, workspace=workspace, threads=self.known.get("threads"))


def smax(bench: Bench, recipes: Mapping[str, Recipe], console: Console | None) -> Found:
    """Each strategy's S_max by trace, tried from below and above, and the true one. Raises MeasurementError, before anything is
    measured, where not even one token is predicted to fit."""
    predictions = {strategy: _predicted(bench, strategy, recipe) for strategy, recipe in recipes.items()}
    if console is not None:
        measuring.heading(console, bench.known)
    found = []
    for strategy, (predicted, formula, chunks) in predictions.items():
        measure = _at_lengths(bench, strategy, recipes[strategy], chunks, console)
        found.append((limits.check(strategy, "trace", predicted, measure), formula))
    if console is not None:
        _report_smax(console, bench, found)
    data = {"limit_bytes": bench.card.total_bytes, "results": [_limit_data(limit, formula) for limit, formula in found]}
    return Found(data, all(limit.holds for limit, _ in found))


def _at_lengths(bench: Bench, strategy: str, recipe: Recipe, chunks: Chunks, console: Console | None) -> Callable[[int], Measurement]:
    return lambda seq_len: bench.measure(strategy, recipe, seq_len, solve.within(chunks, seq_len), console)


def _predicted(bench: Bench, strategy: str, recipe: Recipe) -> tuple[int, int, Chunks]:
    """S_max by trace and by formula, and the chunks to run it with. Raises MeasurementError when nothing fits."""
    found = _searched(bench, strategy, recipe)
    if not found[0]:
        raise MeasurementError(f"{bench.name}, {strategy}: not even one token is predicted to fit in {format_gib(bench.card.total_bytes)}.\n"
                               "Give more memory (--gpu-mem), or measure a slice of it (--layers).")  # fmt: skip
    return found


def _searched(bench: Bench, strategy: str, recipe: Recipe) -> tuple[int, int, Chunks]:
    if bench.device == "cuda":
        found = search.longest(bench.model, recipe, bench.card, bench.trace_at, strategy)
        return found.answer.s_max, found.formula, found.answer.plan.chunks
    answer = solve.max_seq(bench.model, recipe, bench.card, strategy)
    chunks = answer.plan.chunks

    def trace_at(seq_len: int) -> Any:
        few = solve.within(chunks, seq_len)
        return bench.trace_at(recipe.changed(mlp_chunks=few.mlp, loss_chunks=few.loss), seq_len, bench.card)

    return limits.longest_on_cpu(bench.card.total_bytes, trace_at, max(2, answer.s_max)), answer.s_max, chunks


def _report_smax(console: Console, bench: Bench, found: list[tuple[Limit, int]]) -> None:
    console.print()
    console.print(Text(f"S_max of {bench.name} in {format_gib(bench.card.total_bytes)}, tokens", "bold"))
    table = tables.new_table(
        ("strategy", "left"), ("formula", "right"), ("trace", "right"), ("98%", "right"), ("103%", "right"), ("ran", "right"), ("ran out", "right"),
        ("differs", "right"),
    )  # fmt: skip
    for limit, formula in found:
        outcomes = [limit.outcome_at(share) for share in (BELOW, ABOVE)]
        table.add_row(
            limit.strategy, format_tokens(formula), format_tokens(limit.predicted), *("ran" if o == "ok" else o for o in outcomes),
            format_tokens(limit.runs), format_tokens(limit.fails) if limit.fails else "-", f"{limit.error:+.1%}", style="" if limit.holds else "bold",
        )  # fmt: skip
    console.print(table)
    console.print("each must run at 98% of the trace's S_max and run out of memory at 103%; differs: of the trace's from the longest that ran.", soft_wrap=True)


def _limit_data(limit: Limit, formula: int) -> dict[str, Any]:
    return {
        "strategy": limit.strategy, "rung": limit.rung, "predicted": limit.predicted, "formula": formula, "runs": limit.runs, "fails": limit.fails,
        "error": limit.error, "holds": limit.holds, "points": [{"seq_len": m.case.seq_len, "outcome": m.outcome} for m in limit.points],
    }  # fmt: skip


def throughput(bench: Bench, recipes: Mapping[str, Recipe], seq_len: int, console: Console | None) -> Found:
    """Tokens per second over numbers of chunks around the recommended one."""
    if console is not None:
        measuring.heading(console, bench.known)
    data, holds = [], True
    for strategy, recipe in recipes.items():
        measure = _in_chunks(bench, strategy, recipe, seq_len, console)
        rows = limits.throughput(bench.model, recipe, bench.card, seq_len, measure)
        holds = holds and limits.holds(rows)
        if console is not None:
            _report_throughput(console, strategy, rows)
        data += [
            {"strategy": strategy, "chunks": list(row.chunks), "chunk_tokens": list(row.tokens), "recommended": row.recommended, "share": row.share,
             "outcome": row.measurement.outcome, "seconds": row.measurement.seconds if row.measurement.ranks else None}
            for row in rows
        ]  # fmt: skip
    return Found({"seq_len": seq_len, "results": data, "most_lost": limits.MOST_LOST}, holds)


def _in_chunks(bench: Bench, strategy: str, recipe: Recipe, seq_len: int, console: Console | None) -> Callable[[Chunks], Measurement]:
    def name(m: Measurement) -> str:
        return f"M {m.case.recipe.mlp_chunks}, {m.case.recipe.loss_chunks}"

    return lambda chunks: bench.measure(strategy, recipe, seq_len, chunks, console, name)


def _report_throughput(console: Console, strategy: str, rows: list[limits.Throughput]) -> None:
    table = tables.new_table(("M: MLP, loss", "left"), ("tokens", "left"), ("step", "right"), ("tokens/s", "right"), ("of one chunk", "right"), ("", "left"))
    for row in rows:
        m = row.measurement
        figures = (format_seconds(m.seconds), f"{m.tokens_per_second:,.0f}") if m.ranks else (m.outcome, "")
        share = f"{row.share:.1%}" if row.share is not None else "-"
        cells = (f"{row.chunks.mlp}, {row.chunks.loss}", "{:,}, {:,}".format(*row.tokens), *figures, share)
        table.add_row(*cells, "<- recommended" if row.recommended else "", style="bold" if row.recommended else "")
    console.print()
    console.print(Text(f"{strategy}:", "bold"))
    console.print(table)
    if len(rows) < 4:
        console.print("what is recommended is so few chunks that half, all and twice of it are not three different numbers.", soft_wrap=True)
    console.print(f"the recommended number may cost {limits.MOST_LOST:.0%} of the throughput in one chunk.", soft_wrap=True)
