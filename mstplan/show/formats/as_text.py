"""Text for a terminal, tables in 80 columns: the usual form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from .base import Format

if TYPE_CHECKING:
    from rich.console import Console

    from ..report import Block, Column, Line, Report, Row, Table

STYLES = {"": "", "strong": "bold", "quiet": "dim", "good": "bold green", "bad": "bold red"}
"""Of rich, for the tones of a report."""
NARROWEST, WIDEST = 60, 1000
"""Columns between which tables and help are laid out. In fewer, cells would be left out."""
FOLDED = 8
"""Characters that a column of folded words has at least."""


class Text(Format):
    name = "text"
    about = "tables for a terminal"
    suffixes = (".txt",)

    def render(self, report: Report) -> str:
        console = new_console()
        with console.capture() as kept:
            write(console, report.blocks)
        return kept.get()

    def emit(self, report: Report) -> None:
        write(new_console(), report.blocks)  # which knows whether it may use colours


def new_console() -> Console:
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=False)
    console.width = max(console.width, NARROWEST)
    return console


def write(console: Console, blocks: Iterable[Block]) -> None:
    """Blocks of a report on a console. A table that ends in a blank line needs no other one after it."""
    from .. import report

    ended = False
    for block in blocks:
        if not (ended and block is report.GAP):
            _block(console, block)
        ended = isinstance(block, report.Table) and block.layout != "ways"


def _block(console: Console, block: Block) -> None:
    from .. import report, tables

    if isinstance(block, report.Line):
        _line(console, block)
    elif isinstance(block, report.Notes):
        tables.notes(console, block.lines)
    elif isinstance(block, report.Table):
        {"grid": _grid, "answers": _answers, "ways": _ways}[block.layout](console, block)


def _line(console: Console, line: Line) -> None:
    from rich.padding import Padding
    from rich.text import Text

    text = Text.assemble(*((span.text, STYLES[span.tone]) for span in line.spans))
    console.print(Padding(text, (0, 0, 0, line.deep)) if line.deep else text, soft_wrap=line.whole)


def _said(console: Console, text: str, style: str = "", whole: bool = False) -> None:
    from rich.text import Text

    console.print(Text(text, style), soft_wrap=whole)


def _grid(console: Console, table: Table) -> None:
    """A table as rich lays it out."""
    from .. import tables

    if table.title:
        _said(console, table.title, "bold")
    columns = [table.columns[i] for i in table.for_terminals]
    grid = tables.new_table(*((column.heading or "", "right" if column.right else "left") for column in columns))
    if _least_width(table, columns) <= console.width:  # else other columns would vanish
        for column, drawn in zip(columns, grid.columns, strict=True):
            drawn.no_wrap |= column.whole
    shown = table.rows[: table.most]
    for row in (*shown, *([table.rest] if table.rest is not None and len(shown) < len(table.rows) else [])):
        grid.add_row(*_texts(table, row), style=STYLES[row.tone])
    if table.total is not None:
        grid.add_section()
        grid.add_row(*_texts(table, table.total))
    console.print(grid)


def _least_width(table: Table, columns: Sequence[Column]) -> int:
    """Characters in which the table can be read: columns that are not broken as wide as they are, others FOLDED at most."""
    widest = [
        max(len(column.heading or ""), *(len(row.cells[i].text) for row in table.rows))
        for column, i in zip(columns, table.for_terminals, strict=True)
    ]
    return sum(
        1 + (width if column.whole or column.right else min(width, FOLDED))
        for column, width in zip(columns, widest, strict=True)
    )


def _texts(table: Table, row: Row) -> list[str]:
    return [row.cells[i].text for i in table.for_terminals]


def _answers(console: Console, table: Table) -> None:
    """Up to two lines a row: all cells but the last under their headings, then the last, where there is something in it. Headings of
    several words take two lines where the table would be wider than the page otherwise."""
    if not table.rows:
        return
    shown = table.for_terminals
    rows = [_texts(table, row) for row in table.rows]
    headings = [[table.columns[i].heading or "" for i in shown[:-1]]]

    def column_widths() -> list[int]:
        return [max(map(len, column)) for column in zip(*headings, *(row[:-1] for row in rows), strict=True)]

    if sum(column_widths()) + len(shown) - 2 > console.width:
        parts = [heading.partition(" ") for heading in headings[0]]
        headings = [[first if rest else "" for first, _, rest in parts], [rest or first for first, _, rest in parts]]
    widths = column_widths()

    def line(cells: Sequence[str]) -> str:
        first, *numbers, last = cells
        padded = (cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=False))
        return " ".join([first.ljust(widths[0]), *padded, last])

    console.print()
    if table.title:
        _said(console, table.title, "bold")
    for heading in headings:
        _said(console, line(heading), "dim")
    for row, (*cells, below) in zip(table.rows, rows, strict=True):
        _said(console, line(cells), STYLES[row.tone])
        _below(console, below, widths[0] + 1)
    console.print()


def _below(console: Console, text: str, deep: int) -> None:
    """The second line of a row, or as many as it takes."""
    from rich.text import Text

    for part in Text(text).wrap(console, console.width - deep) if text else ():
        _said(console, " " * deep + part.plain.rstrip(), "dim")


def _ways(console: Console, table: Table) -> None:
    """Two lines a row: what it brings and costs, and the options to paste, which are in the last column."""
    if not table.rows:
        return
    _said(console, table.title, "bold")
    headings = [table.columns[i].heading or "" for i in table.for_terminals]
    rows = [_texts(table, row) for row in table.rows]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)][:-2]
    widths = [max(9 - (n > 0), width) for n, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> Iterator[str]:
        """What it costs is in the last column but one, and may take several lines."""
        from rich.text import Text

        numbers = " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=False)) + "  "
        for part in Text(cells[-2]).wrap(console, console.width - len(numbers)):
            yield numbers + part.plain.rstrip()
            numbers = " " * len(numbers)

    for text in line(headings):
        _said(console, text, "dim")
    for row in rows:
        for text in line(row):
            _said(console, text)
        _said(console, f"    {row[-1]}", "bold", whole=True)
