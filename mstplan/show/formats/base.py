"""What mstplan asks of an output format: a name, what it is for, and a text for a report."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ..report import Report


class Format:
    """A form in which every answer can be had. A new one is a file with a subclass, and a line in this folder's `__init__.py`."""

    name: ClassVar[str]
    """What --format calls it."""
    about: ClassVar[str]
    """What it gives, in a few words, for the help."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """How names of files end that hold it."""

    def render(self, report: Report) -> str:
        """All of the report as text that ends in a newline."""
        raise NotImplementedError

    def emit(self, report: Report) -> None:
        """Put the report on standard output."""
        import typer

        typer.echo(self.render(report), nl=False)
