"""An answer before it has a form: all its facts as plain data, and the same facts in the order in which people read them.

Commands make one `Report` each, and every output format (`formats/`) renders it. Nothing here knows a format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Tone = Literal["", "strong", "quiet", "good", "bad"]
"""How much a text stands out."""


class Span(NamedTuple):
    text: str
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of text, in spans. whole: not broken where it is longer than the page is wide; deep: columns it is moved in."""

    spans: tuple[Span, ...] = ()
    whole: bool = False
    deep: int = 0

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)


def line(text: str, tone: Tone = "", whole: bool = False, deep: int = 0) -> Line:
    """A line in one tone."""
    return Line((Span(text, tone),), whole, deep)


GAP = Line()
"""A blank line."""


@dataclass(frozen=True, slots=True)
class Notes:
    """Remarks, each a sentence or more."""

    lines: tuple[str, ...]


class Column(NamedTuple):
    """What a table's rows have. name: for programs, with the unit, "" where it is for people only; heading: for people, None where it is for
    programs only; code: what people copy; folded: what a terminal leaves out, and a page has room for; whole: never on two lines."""

    name: str
    heading: str | None
    right: bool = False
    code: bool = False
    folded: bool = False
    whole: bool = False


class Cell(NamedTuple):
    """A value as programs read it, in bytes, tokens, seconds, and as people do."""

    value: Any
    text: str


class Row(NamedTuple):
    cells: tuple[Cell, ...]
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns. A terminal shows the first `most` rows, then `rest` in place of the others, and `total` below a rule. layout: how
    a terminal lays it out."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    title: str = ""
    layout: Literal["grid", "answers", "ways"] = "grid"
    most: int | None = None
    rest: Row | None = None
    total: Row | None = None

    @property
    def for_people(self) -> list[int]:
        """Columns with a heading."""
        return [i for i, column in enumerate(self.columns) if column.heading is not None]

    @property
    def for_terminals(self) -> list[int]:
        """Those of them that a terminal shows."""
        return [i for i in self.for_people if not self.columns[i].folded]

    @property
    def for_programs(self) -> list[int]:
        """Columns with a name."""
        return [i for i, column in enumerate(self.columns) if column.name]


@dataclass(frozen=True, slots=True)
class Folded:
    """What a terminal leaves out, and a page has room for."""

    blocks: tuple[Line | Table, ...]


Block = Line | Notes | Table | Folded


@dataclass(frozen=True, slots=True)
class Report:
    """The answer of a command. facts: everything, nested, as plain data with a schema_version; blocks: for people, in reading order, a title
    first; main: the table that stands for the answer where only one can be given."""

    command: str
    facts: Mapping[str, Any]
    blocks: Sequence[Block]
    main: Table
