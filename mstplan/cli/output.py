"""What commands say: tables on a console, JSON, complaints; and streams that take no more."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import one_line
from ..show.formats import FORMATS
from ..show.formats.as_text import NARROWEST, WIDEST

if TYPE_CHECKING:
    from ..show.report import Report
    from .commands import Taken
    from .options import FormatOptions


def sane_terminal() -> None:
    """What the environment says of the terminal's size, where it is none or one that nothing can be laid out in, is put right: rich and
    typer would print nothing, a column of letters, or a traceback."""
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        text = os.environ.get(name, "80")
        size = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
        if not size:
            del os.environ[name]
        elif not NARROWEST <= size <= WIDEST and name != "LINES":
            os.environ[name] = str(min(max(size, NARROWEST), WIDEST))


def settle_format(options: Taken) -> Taken:
    """The options with one form of the answer: the name of `format`, which an option of that name, as --json, is short for. Raises
    InputError for an unknown name, and for two different ones."""
    from ..errors import InputError, did_you_mean, quoted

    named = getattr(options, "format", None)
    flags = {f"--{name}": name for name in FORMATS if getattr(options, name, False)}
    if named is not None:
        if named not in FORMATS:
            raise InputError(
                f"unknown format {quoted(named)}.{did_you_mean(named, FORMATS)}\nKnown: {', '.join(FORMATS)}."
            )
        flags[f"--format {named}"] = named
    if len(set(flags.values())) > 1:
        raise InputError(f"{' and '.join(flags)} exclude each other.\nLeave one of the two out.")
    return options.changed(format=next(iter(flags.values()))) if flags else options


def emit(options: FormatOptions, report: Report) -> None:
    """The answer in the form that was asked for."""
    FORMATS[options.format or "text"].emit(report)


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
