"""Step times as tables and lines have them: expected where a GPU's rates were measured, and the least that a step can take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..units import format_seconds
from .report import Cell, Column

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..plan.solve import Answer, Plan


def are_expected(timed: Iterable[Plan | Answer]) -> bool:
    """Whether any of them has an expected time."""
    return any(each.expected_seconds is not None for each in timed)


def columns(expected: bool, narrow: bool = False) -> tuple[Column, ...]:
    """Of the least a step takes, the expected time, and tokens per second. A terminal has room for the first alone, or the others,
    and in a narrow table for the time only."""
    return (
        Column("step_seconds", "step >=", right=True, folded=expected),
        Column("expected_seconds", "step" if expected else None, right=True),
        Column("tokens_per_second", "tok/s" if expected else None, right=True, folded=narrow),
    )


def cells(timed: Plan | Answer, none: bool = False) -> tuple[Cell, ...]:
    """Cells of those columns; where no time is expected it is at least the least. none: there is no such step."""
    least, expected, rate = timed.step_seconds, timed.expected_seconds, timed.tokens_per_second
    shown_least = format_seconds(least) if least and not none else "-"
    shown = format_seconds(expected) if expected else f">= {shown_least}" if shown_least != "-" else "-"
    return Cell(least, shown_least), Cell(expected, shown), Cell(rate, f"{rate:,.0f}" if rate else "-")


def in_words(p: Plan) -> str:
    """'step 25.1 s expected, at least 14.0 s, 3,357 tokens/s'"""
    if p.expected_seconds is None:
        return f"step >= {format_seconds(p.step_seconds)}"
    least, expected = format_seconds(p.step_seconds), format_seconds(p.expected_seconds)
    return f"step {expected} expected, at least {least}, {p.tokens_per_second:,.0f} tokens/s"
