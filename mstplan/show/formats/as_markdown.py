"""Markdown as GitHub reads it: a heading, every table whole, notes as a list."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .base import Format

if TYPE_CHECKING:
    from ..report import Block, Column, Report, Row, Table


class Markdown(Format):
    name = "markdown"
    about = "a page with every table"
    suffixes = (".md",)

    def render(self, report: Report) -> str:
        first, *others = [paragraph for block in report.blocks for paragraph in _paragraphs(block)]
        return "\n\n".join([first if first.startswith("#") else f"# {first}", *others]) + "\n"


def _paragraphs(block: Block) -> Iterator[str]:
    from ..report import Folded, Line, Notes

    if isinstance(block, Folded):
        for each in block.blocks:
            yield from _paragraphs(each)
    elif isinstance(block, Line):
        if block.text.strip():
            yield _plain(" ".join(block.text.split()))
    elif isinstance(block, Notes):
        if block.lines:
            yield "\n".join(f"- {_plain(each)}" for each in block.lines)
    elif block.rows:
        if block.title:
            yield f"## {_plain(block.title.rstrip(':'))}"
        yield as_markdown(block)


def as_markdown(table: Table) -> str:
    """A table alone, without its title."""
    return "\n".join(_lines(table))


def _lines(table: Table) -> Iterator[str]:
    columns = [table.columns[i] for i in table.for_people]
    yield _line([_plain(column.heading or "") for column in columns])
    yield _line(["---:" if column.right else "---" for column in columns])
    for row in (*table.rows, *([table.total] if table.total is not None else [])):
        yield _line(_cells(columns, row, table.for_people))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(columns: Sequence[Column], row: Row, chosen: Sequence[int]) -> list[str]:
    found = []
    for column, i in zip(columns, chosen, strict=True):
        text = " ".join(row.cells[i].text.split())
        cell = _code(text) if column.code else _plain(text)
        found.append(f"**{cell}**" if row.tone == "strong" and cell and not column.code else cell)
    return found


def _code(text: str) -> str:
    """What people copy: only a table's own sign is not left as it is."""
    kept = text.replace("|", r"\|")
    return f"`{kept}`" if kept else ""


def _plain(text: str) -> str:
    """Text whose signs Markdown leaves alone."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
