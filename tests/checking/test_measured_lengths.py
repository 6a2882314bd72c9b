"""README's table of lengths that ran is what was measured, and what formula and trace say today; no length that runs out is called one
that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from . import measured_lengths as lengths

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ROWS = README.split("<!-- lengths -->\n")[1].splitlines()
NAMES = lengths.strategies()


def traced_words(row: str) -> str:
    return row.split("|")[-2].strip()


def test_the_table_has_every_strategy_that_was_measured() -> None:
    assert ROWS[:2] == list(lengths.HEADER) and len(ROWS) == 2 + len(NAMES)
    assert len(lengths.RUNS) == 16


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_measured_and_formula_are_current(number: int) -> None:
    row = ROWS[2 + number]
    assert row == lengths.line(NAMES[number], traced_words(row))


@pytest.mark.survey
@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_the_trace_is_current(number: int) -> None:
    assert traced_words(ROWS[2 + number]) == f"{lengths.by_trace(NAMES[number]):,}"


@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_what_the_trace_lets_run_runs(number: int) -> None:
    """It is below the shortest that ran out after a short step, and at most 2% below the longest that ran."""
    traced, name = int(traced_words(ROWS[2 + number]).replace(",", "")), NAMES[number]
    longest, shortest = lengths.warm(name, True), lengths.warm(name, False)
    assert longest is not None and traced >= 0.98 * longest
    assert shortest is None or traced < shortest
