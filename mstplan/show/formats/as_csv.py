"""CSV (RFC 4180, but for bare newlines): the main table of an answer, with plain numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .base import Format

if TYPE_CHECKING:
    from ..report import Report, Table


class Csv(Format):
    name = "csv"
    about = "the main table, plain numbers"
    suffixes = (".csv",)

    def render(self, report: Report) -> str:
        return as_csv(report.main)


def as_csv(table: Table, end: str = "\n") -> str:
    """The columns that programs read."""
    import csv
    import io

    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator=end)
    rows.writerow(table.columns[i].name for i in table.for_programs)
    rows.writerows([_plain(row.cells[i].value) for i in table.for_programs] for row in table.rows)
    return text.getvalue()


def _plain(value: Any) -> Any:
    """Nothing for None, and the words that JSON has for truth."""
    return str(value).lower() if isinstance(value, bool) else value
