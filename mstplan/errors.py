"""Every error that mstplan raises on purpose.

    MstplanError
     +-- InputError            something the user gave cannot be used (exit code 2)
          +-- UnitError        a size or a length that cannot be read
          +-- ModelError       a model that is unknown, malformed or cannot be planned
          +-- HardwareError    a card that is unknown, or a memory figure that makes no sense
          +-- RecipeError      a recipe that is malformed or contradicts itself
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


class HardwareError(InputError):
    """A card that is unknown, or a memory figure that makes no sense."""


class RecipeError(InputError):
    """A recipe that is malformed or contradicts itself."""


class OutputError(InputError):
    """A file that cannot be written."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean a, b?' for the names nearest to `name`, or '' when none is near."""
    import difflib

    near = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.5)
    return f" Did you mean {', '.join(near)}?" if near else ""
