"""What commands say: tables on a console, JSON, complaints; and streams that take no more."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import one_line

if TYPE_CHECKING:
    from rich.console import Console


NARROWEST, WIDEST = 60, 1000
"""Columns between which tables and help are laid out. In fewer, cells would be left out."""


def sane_terminal() -> None:
    """What the environment says of the terminal's size, where it is none or one that nothing can be laid out in, is put right: rich and
    typer would print nothing, a column of letters, or a traceback."""
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        said = os.environ.get(name, "80")
        size = int(said) if said.isascii() and said.isdigit() and len(said) < 10 else 0
        if not size:
            del os.environ[name]
        elif not NARROWEST <= size <= WIDEST and name != "LINES":
            os.environ[name] = str(min(max(size, NARROWEST), WIDEST))


def new_console() -> Console:
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=False)
    console.width = max(console.width, NARROWEST)
    return console


def print_json(document: dict[str, Any]) -> None:
    """What is infinite or no number has no place in JSON: null."""
    import json

    try:
        text = json.dumps(document, indent=1, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(document), indent=1, allow_nan=False)
    typer.echo(text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def say_written(path: Path) -> None:
    typer.echo(f"wrote {one_line(path, 200)}")


def complain(message: str) -> None:
    """On stderr. Lines are printable and of some length at most, whatever got into them."""
    shown = "\n".join(one_line(line, 500) for line in message.split("\n"))
    with suppress(OSError):  # nobody is there to read it
        print(f"mstplan: {shown}", file=sys.stderr, flush=True)


class Unwritten(Exception):
    """Standard output takes no more. Not an OSError: click and rich have their own ideas about those."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.gone = isinstance(error, BrokenPipeError)
        self.reason = error.strerror or str(error)


class _Output(io.TextIOWrapper):
    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as e:
            raise Unwritten(e) from None

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as e:
            raise Unwritten(e) from None


def open_streams() -> None:
    """Standard output whose errors reach `process`; a stream that the caller closed swallows what it gets."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        now = sys.stdout
        about = {"encoding": now.encoding, "errors": "backslashreplace" if now.errors == "strict" else now.errors}
        lines, through = now.line_buffering, now.write_through
        sys.stdout = _Output(now.detach(), **about, line_buffering=lines, write_through=through)  # type: ignore[arg-type]
