"""What `mstplan measure` says: a line for each point as it comes, on stderr; at the end the report of all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import one_line
from ..measuring.measurement import OK, Measurement
from ..measuring.sweep import Sweep
from ..step.recipe import strategy_label
from ..units import GIB, format_seconds
from . import parts, payload
from .parts import NOTHING, cell, strategy_cell
from .report import GAP, Block, Cell, Column, Report, Row, Table, line


def subject(m: Measurement) -> str:
    """What a line begins with: the model, and how many of its layers."""
    return one_line(m.case.model) + (f"/{m.case.layers}" if m.case.layers else "")


HEADER = f"{'peaks: GiB':10s} {'strategy':18s} {'tokens':>8s} {'alloc.':>7s} {'reserved':>8s} {'device':>7s} {'step':>7s} {'tokens/s':>8s}"


def device_words(environment: Mapping[str, Any]) -> str:
    """What is measured on, and with."""
    return f"{environment['card']}, {environment['total_bytes'] / GIB:.2f} GiB; torch {environment['torch']}, transformers {environment['transformers']}"


# ---- while it runs --------------------------------------------------------------------------------------------------------


def telling(
    environment: Mapping[str, Any], name: Callable[[Measurement], str] = subject
) -> tuple[Callable[[], None], Callable[[Measurement], None]]:
    """What to say when measuring begins, and of each point as it comes, which `name` tells from others: on stderr, as answers are on
    stdout."""
    return lambda: _say(f"measuring: real steps on {device_words(environment)}\n{HEADER}"), lambda m: _say(
        point(m, name)
    )


def _say(text: str) -> None:
    with suppress(OSError):  # nobody is there to read it
        print(text, file=sys.stderr, flush=True)


def point(m: Measurement, name: Callable[[Measurement], str] = subject) -> str:
    """One point in 80 columns; peaks in GiB."""
    start = f"{name(m):10.10s} {strategy_label(one_line(m.case.strategy)):18s} {m.case.seq_len:8,}"
    if m.outcome != OK:
        return f"{start} {m.outcome}" + (f": {m.reason}" if m.error else "")
    numbers = [parts.gib(size) if size is not None else "-" for size in m.peak]
    times = [cell.text for cell in _time_cells(m)]
    return f"{start} {numbers[0]:>7s} {numbers[1]:>8s} {numbers[2]:>7s} {times[0]:>7s} {times[1]:>8s}"


# ---- the report -----------------------------------------------------------------------------------------------------------


def report(results: Sweep, environment: Mapping[str, Any], out: Path) -> Report:
    """The points of a sweep, those measured before among them; then what failed, what was left out, where the results are."""
    points = _points(results)
    failed = [m for m in results.measurements if m.outcome != OK]
    not_timed = sum(m.outcome == OK and m.seconds is None for m in results.measurements)
    shared = (
        f"{not_timed} not timed, as others were on the device (-): without --workers they are measured again, alone."
    )
    anew = f"A process was begun anew for each point, which takes seconds: {one_line(results.why_anew, 200)}."
    before = f"{results.skipped} of {len(results.measurements)} had been measured before (--again measures them anew)."
    blocks: list[Block] = [
        line(f"measured: real steps on {device_words(environment)}"),
        points,
        *(line(f"{one_line(m.case.words, 200)}: {m.outcome}{_why(m)}", whole=True) for m in failed),
        *_eager_note(results),
        *(line(note, whole=True) for note in results.damaged),
        *([line(shared, whole=True)] if not_timed else []),
        *([line(anew, whole=True)] if results.why_anew else []),
        *([line(before, whole=True)] if results.skipped else []),
        GAP,
        line(f"results: {one_line(out, 200)}", whole=True),
    ]
    facts = payload.document(
        "measure",
        "measurement",
        environment=dict(environment),
        file=str(out),
        damaged=results.damaged,
        measured_before=results.skipped,
        not_timed=not_timed,
        not_forked=results.why_anew,
        results=[m.as_data() for m in results.measurements],
    )
    return Report("measure", facts, blocks, points)


def _eager_note(results: Sweep) -> list[Block]:
    """Which models ran eager attention: asked for, or for want of a package."""
    models = sorted({m.case.model for m in results.measurements if m.case.recipe.attention == "eager"})
    return [line(f"With eager attention: {one_line(', '.join(models), 200)}.", whole=True)] if models else []


def _why(m: Measurement) -> str:
    return f": {m.reason}" if m.error else ""


def _points(results: Sweep) -> Table:
    """Every point; people see no columns that nothing is in."""
    peaks = [m.peak for m in results.measurements if m.outcome == OK]
    columns = (
        Column("model", "model"),
        Column("layers", None),
        Column("strategy", "strategy"),
        Column("seq_len", "tokens", right=True),
        Column("outcome", "" if len(peaks) < len(results.measurements) else None),
        Column("allocated_bytes", "alloc." if peaks else None, right=True),
        Column("reserved_bytes", "reserved" if any(peak.reserved is not None for peak in peaks) else None, right=True),
        Column("device_bytes", "device" if any(peak.device is not None for peak in peaks) else None, right=True),
        Column("step_seconds", "step" if peaks else None, right=True),
        Column("tokens_per_second", "tok/s" if peaks else None, right=True),
    )
    return Table("points", columns, tuple(Row(_cells(m)) for m in results.measurements), "Peaks in GiB")


def _cells(m: Measurement) -> tuple[Cell, ...]:
    about = (
        Cell(m.case.model, subject(m)),
        cell(m.case.layers),
        strategy_cell(one_line(m.case.strategy)),
        parts.tokens_cell(m.case.seq_len),
    )
    if m.outcome != OK:
        return (*about, cell(m.outcome), *(NOTHING,) * 5)
    peaks = (parts.gib_cell(size) if size is not None else Cell(None, "-") for size in m.peak)
    return (*about, Cell(m.outcome, ""), *peaks, *_time_cells(m))


def _time_cells(m: Measurement) -> tuple[Cell, Cell]:
    """Seconds of a step and tokens per second, of one that was timed."""
    seconds, speed = m.seconds, m.tokens_per_second
    if seconds is None or speed is None:
        return Cell(None, "-"), Cell(None, "-")
    return Cell(seconds, format_seconds(seconds)), Cell(speed, f"{speed:,.0f}")
