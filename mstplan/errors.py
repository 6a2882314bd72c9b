"""Every error that mstplan raises on purpose.

    MstplanError
     +-- InputError            something the user gave cannot be used (exit code 2)
          +-- UnitError        a size or a length that cannot be read
          +-- ModelError       a model that is unknown, malformed or cannot be planned
          |    +-- UnreadError one that the formula cannot count; the trace may answer for it
          +-- HardwareError    a card that is unknown, or a memory figure that makes no sense
          +-- RecipeError      a recipe that is malformed or contradicts itself
          +-- MeasurementError results that cannot be read, or a measurement that cannot be made
          +-- MissingError     something that has to be installed first, or run first
          |    +-- VersionError another release of torch or transformers
          +-- OutputError      a file that cannot be written

Messages are one or two lines: what is wrong, then the way out. That something does not fit is an answer, not an error.
"""

from __future__ import annotations

from collections.abc import Iterable


class MstplanError(Exception):
    """Base of all errors raised by mstplan."""


class InputError(MstplanError):
    """Something the user gave cannot be used."""


class UnitError(InputError):
    """A size or a length that cannot be read."""


class ModelError(InputError):
    """A model that is unknown, malformed or cannot be planned."""


class UnreadError(ModelError):
    """A model that the formula cannot count; the trace may answer for it. reason: what is in the way, in a line."""

    def __init__(self, name: str, reason: str, way_out: str) -> None:
        super().__init__(f"{name}: {reason}\n{way_out}")
        self.reason = reason


class HardwareError(InputError):
    """A card that is unknown, or a memory figure that makes no sense."""


class RecipeError(InputError):
    """A recipe that is malformed or contradicts itself."""


class MeasurementError(InputError):
    """Results that cannot be read, or a measurement that cannot be made."""


class MissingError(InputError):
    """Something has to be installed, or run, first."""


class VersionError(MissingError):
    """The installed torch or transformers has not what a trace relies on: another release has to be installed first."""


class OutputError(InputError):
    """A file that cannot be written."""


def one_line(value: object, max_length: int = 100) -> str:
    """Foreign text as a message shows it: on one line, printable, cut in the middle when long."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # an int of thousands of digits; lists in lists in lists
        return "something far too large to show"
    printable = text if text.isprintable() else ascii(text)[1:-1]
    half = max_length // 2 - 1
    return printable if len(printable) <= max_length else f"{printable[:half]}...{printable[-half:]}"


def quoted(value: object) -> str:
    """`one_line(value)` in quotes."""
    return f"'{one_line(value)}'"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """' Did you mean a, b?' for the names nearest to `name`, or '' when none is near."""
    import difflib

    matches = difflib.get_close_matches(name[:60].lower(), list(names), n=3, cutoff=0.5)  # slow for long texts
    return f" Did you mean {', '.join(matches)}?" if matches else ""
