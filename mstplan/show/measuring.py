"""`mstplan measure` at work: a line for each point as it comes, and how much time is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ..observe import measurement, sweep
from ..observe.measurement import OK, Case, Measurement
from ..observe.sweep import FINAL
from ..units import GIB, format_seconds
from . import tables
from .progress import progress


class Sweep(NamedTuple):
    """What became of the points asked for. skipped: how many had been measured before; damaged: lines of the file left out."""

    measurements: list[Measurement]
    skipped: int
    damaged: list[str]

    @property
    def complete(self) -> bool:
        """Does every point have its answer? That it runs out of memory is one; a failure or a refusal is none."""
        return all(m.outcome in FINAL for m in self.measurements)


def subject(m: Measurement) -> str:
    return m.case.model + (f"/{m.case.layers}" if m.case.layers else "")


def run(
    cases: Sequence[Case], known: Mapping[str, Any], out: Path, timeout: float | None, console: Console | None, again: bool = False, headed: bool = False,
    name: Callable[[Measurement], str] = subject,
) -> Sweep:  # fmt: skip
    """Measure each point that the file `out` has no result for, or with `again` all, and append what comes of it. Lines go to
    `console`, each beginning with the point's `name`, under a heading where it is to be `headed`. Raises MeasurementError and
    OutputError about the file."""
    with measurement.appending(out) as append, progress("measuring", len(cases)) as advance:
        if console is not None and headed:
            heading(console, known)
        earlier = measurement.read(out)
        done = {} if again else sweep.done(earlier.measurements)
        found, skipped = [], 0
        for case in cases:
            if (before := done.get(measurement.key_of(case, known))) is not None:
                skipped += 1
                found.append(before)
            else:
                advance(case.words, 0)
                found.append(sweep.run(case, known, timeout))
                append(found[-1])
            advance("", 1)
            if console is not None:
                console.print(line(found[-1], name), soft_wrap=True)
    return Sweep(found, skipped, earlier.skipped)


HEADER = f"{'peaks in GiB':12s} {'strategy':15s} {'tokens':>9s} {'alloc.':>7s} {'reserved':>8s} {'device':>7s} {'step':>7s} {'tokens/s':>8s}"


def heading(console: Console, known: Mapping[str, Any]) -> None:
    what = f"{known['card']}, {known['total_bytes'] / GIB:.2f} GiB; torch {known['torch']}, transformers {known['transformers']}"
    console.print(f"measurement rung: real steps on {what}", style="dim")
    console.print(HEADER, soft_wrap=True, style="dim")


def line(m: Measurement, name: Callable[[Measurement], str] = subject) -> str:
    """One point in 80 columns; peaks in GiB."""
    start = f"{name(m):12.12s} {m.case.strategy:15s} {m.case.seq_len:9,}"
    if m.outcome != OK:
        return f"{start} {m.outcome}" + (f": {m.error.splitlines()[0]}" if m.error else "")
    peak = m.peak
    numbers = [tables.gib(size) if size is not None else "-" for size in peak]
    return f"{start} {numbers[0]:>7s} {numbers[1]:>8s} {numbers[2]:>7s} {format_seconds(m.seconds):>7s} {m.tokens_per_second:8,.0f}"


def report(console: Console, found: Sweep, out: Path) -> None:
    """What remains to be said once all points are through."""
    for said in found.damaged:
        console.print(said, soft_wrap=True)
    if found.skipped:
        console.print(f"{found.skipped} of {len(found.measurements)} had been measured before (--again measures them anew).", soft_wrap=True)
    console.print(f"results: {out}", soft_wrap=True)
