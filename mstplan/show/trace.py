"""The reports of the trace: the peaks beside the formula's, what is alive, what the allocator makes of it; and a word while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..step.recipe import Recipe, strategy_label
from ..tracing import explain
from ..tracing.findings import TracedLongest, TraceView
from ..tracing.trace import Alive, Trace
from ..units import MIB, format_gib, format_tokens
from . import parts, payload
from .parts import NOTHING, cell
from .report import Block, Cell, Column, Line, Report, Row, Table, line

if TYPE_CHECKING:
    from rich.status import Status

DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
NOTICEABLE, MOST_DIFFERENCES = MIB, 8
"""Bytes from which a difference between formula and trace is told, and how many are."""


def max_seq(longest: TracedLongest, tensors: bool = False) -> Report:
    """S_max of every strategy by trace, and what is alive at the best one's peak."""
    best = longest.best
    answers = parts.answers([f.answer for f in longest.results], best.answer)
    recipes = [each.answer.plan.recipe for each in longest.results]
    blocks: list[Block] = [*parts.heading(longest.model, longest.card, longest.provenance, recipes), answers]
    if best.answer.s_max:
        label = strategy_label(best.answer.strategy)
        blocks.append(line(f"The peak of {label} at {format_tokens(best.answer.s_max)} tokens:", "strong"))
        blocks.append(_alive(best.trace, tensors))
    else:
        blocks.append(parts.ways_to_train(longest.model, longest.card, longest.to_fit, ", by formula"))
    return Report("max-seq", payload.max_seq_by_trace(longest), [*blocks, *parts.remarks(longest.notes)], answers)


def report(
    v: TraceView,
    command: str = "trace",
    others: Sequence[TraceView] = (),
    files: Sequence[Path] = (),
    tensors: bool = False,
) -> Report:
    """A trace; before it whether other strategies fit that were traced at the same length. files: what was written of it; tensors: all of
    those at the peak, and not the largest only."""
    verdicts = [_verdict(each) for each in (*others, v)]
    instants = _instants(v)
    blocks: list[Block] = [
        *parts.heading(v.model, v.card, v.provenance, [each.plan.recipe for each in (*others, v)]),
        *verdicts,
        *([line(parts.pieces(v.plan), "quiet")] if v.plan.in_chunks else []),
        instants,
        _alive(v.trace, tensors),
        *(_differences(v) if v.formula else []),
        *parts.remarks(v.notes),
        *parts.written(files),
    ]
    strategies = _strategies([*others, v])
    facts = payload.trace_document(v, command, others)
    return Report(command, facts, blocks, strategies if command == "plan" else instants)


def _verdict(v: TraceView) -> Line:
    size = v.trace.peak.bytes
    if v.card.unlimited:
        return line(
            f"{format_tokens(v.trace.seq_len)} tokens with {strategy_label(v.strategy)}: peak {format_gib(size)}.",
            "strong",
        )
    return parts.fits(v.trace.seq_len, v.strategy, size, v.card.budget_bytes, v.fits, v.usage)


def _strategies(views: Sequence[TraceView]) -> Table:
    """Of `plan`: whether each strategy fits, as programs read it."""
    names = ("strategy", "fits", "peak_bytes", "seq_len", "budget_bytes", "instant")
    rows = tuple(
        Row(
            tuple(
                map(
                    cell,
                    (
                        v.strategy,
                        v.fits,
                        v.trace.peak.bytes,
                        v.trace.seq_len,
                        v.card.budget_bytes,
                        v.trace.peak.instant.value,
                    ),
                )
            )
        )
        for v in views
    )
    return Table("strategies", tuple(Column(name, None) for name in names), rows)


def _instants(v: TraceView) -> Table:
    columns = (
        Column("instant", "peak at"),
        Column("bytes", "trace GiB", right=True),
        Column("formula_bytes", "formula" if v.formula else None, right=True),
        Column("", "differs" if v.formula else None, right=True),
        Column("binds", ""),
    )
    formula = {i.name: i.bytes for i in v.formula}
    rows = []
    for peak in v.trace.peaks:
        planned = formula.get(peak.instant)
        compared = (
            (Cell(None, "-"), NOTHING)
            if planned is None
            else (parts.gib_cell(planned), Cell(None, f"{planned / peak.bytes - 1:+.2%}"))
        )
        binds = peak is v.trace.peak or peak.instant == v.trace.peak.instant
        cells = (cell(peak.instant.value), parts.gib_cell(peak.bytes), *compared, parts.binds_cell(binds))
        rows.append(Row(cells, "strong" if binds else ""))
    return Table("instants", columns, tuple(rows))


def _alive(trace: Trace, everything: bool) -> Table:
    """The tensors at the trace's peak, largest first."""
    columns = (
        Column("category", "for"),
        Column("tensor", "made by"),
        Column("shape", "shape"),
        Column("dtype", "dtype"),
        Column("copies", "n", right=True),
        Column("bytes", "GiB", right=True),
    )
    tensors = trace.alive(trace.peak.event)
    rows = tuple(
        Row(
            (
                cell(a.category.value),
                cell(explain.name_of(a)),
                cell(_shape(a)),
                Cell(a.dtype, DTYPES.get(a.dtype, a.dtype)),
                parts.copies_cell(a.copies),
                parts.gib_cell(a.bytes),
            )
        )
        for a in tensors
    )
    title, most = f"{trace.peak.instant}, {_at(trace)}:", parts.MOST if everything else parts.FEW
    return parts.summed("alive", columns, rows, [a.bytes for a in tensors], title, most)


def _at(trace: Trace) -> str:
    storage = trace.step.storages[trace.step.events[trace.peak.event][0]]
    return f"{storage.module}: {storage.operation}" if storage.module else storage.operation


def _shape(a: Alive) -> str:
    return f"({', '.join(map(str, a.shape))})" if a.shape else ""


def _differences(v: TraceView) -> list[Block]:
    """Where formula and trace differ at the peak."""
    differing = [row for row in v.differences if abs(row.difference) >= NOTICEABLE]
    if not differing:
        total = format_gib(abs(sum(row.difference for row in v.differences)))
        same = f"Formula and trace have the same tensors there, but for {total} of small ones and rounding."
        return [line(same, "quiet")]
    columns = (
        Column("formula", "formula"),
        Column("trace", "trace"),
        Column("dtype", "dtype"),
        Column("copies", "n", right=True),
        Column("difference", "GiB", right=True),
    )
    rows = tuple(
        Row(
            (
                cell(_names(row.formula)),
                cell(_names(row.trace)),
                cell(row.dtype),
                cell(f"{row.formula_copies} / {row.trace_copies}"),
                Cell(row.difference, f"{row.difference / 2**30:+.2f}"),
            )
        )
        for row in differing[:MOST_DIFFERENCES]
    )
    return [Table("differences", columns, rows, "Where formula and trace differ there")]


def _names(names: Sequence[str]) -> str:
    return "; ".join(names[:3]) + (f"; {len(names) - 3} more" if len(names) > 3 else "") or "-"


# ---- while it runs ------------------------------------------------------------------------------------------------------


@contextmanager
def status() -> Iterator[Status]:
    """A spinner on the terminal, if there is one; what is printed meanwhile goes above it."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.status("importing torch and transformers", spinner="dots") as waiting:
        yield waiting


def recipe_words(recipe: Recipe) -> str:
    """A recipe in a few words."""
    chunks = f", {recipe.mlp_chunks} and {recipe.loss_chunks} chunks" if recipe.loss_in_chunks else ""
    return f"checkpoint {recipe.checkpoint}{chunks}{', offload' if recipe.offload_layer_inputs else ''}"
