"""What `mstplan measure` says: a line for each point as it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import one_line
from ..measuring.measurement import OK, Measurement
from ..measuring.sweep import Sweep
from ..units import GIB, format_seconds
from . import tables


def subject(m: Measurement) -> str:
    """What a line begins with: the model, and how many of its layers."""
    return one_line(m.case.model) + (f"/{m.case.layers}" if m.case.layers else "")


HEADER = f"{'peaks in GiB':12s} {'strategy':15s} {'tokens':>9s} {'alloc.':>7s} {'reserved':>8s} {'device':>7s} {'step':>7s} {'tokens/s':>8s}"


def heading(console: Console, known: Mapping[str, Any]) -> None:
    what = f"{known['card']}, {known['total_bytes'] / GIB:.2f} GiB; torch {known['torch']}, transformers {known['transformers']}"
    console.print(f"measured: real steps on {what}", style="dim")
    console.print(HEADER, soft_wrap=True, style="dim")


def line(m: Measurement, name: Callable[[Measurement], str] = subject) -> str:
    """One point in 80 columns; peaks in GiB."""
    start = f"{name(m):12.12s} {one_line(m.case.strategy):15s} {m.case.seq_len:9,}"
    if m.outcome != OK:
        return f"{start} {m.outcome}" + (f": {m.reason}" if m.error else "")
    peak = m.peak
    numbers = [tables.gib(size) if size is not None else "-" for size in peak]
    return f"{start} {numbers[0]:>7s} {numbers[1]:>8s} {numbers[2]:>7s} {format_seconds(m.seconds):>7s} {m.tokens_per_second:8,.0f}"


def report(console: Console, found: Sweep, out: Path) -> None:
    """What remains to be said once all points are through."""
    for said in found.damaged:
        console.print(said, soft_wrap=True)
    if found.skipped:
        console.print(
            f"{found.skipped} of {len(found.measurements)} had been measured before (--again measures them anew).",
            soft_wrap=True,
        )
    console.print(f"results: {one_line(out, 200)}", soft_wrap=True)
