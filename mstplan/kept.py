"""What mstplan keeps for its user from one run to the next, read back: calibrations, a card's constants, traces.

Anybody may have written to these files, or nobody may look at them. They are looked at anew for every answer, so that what was
written a moment ago counts; they are checked whole before anything of them is used; and what is damaged is left out of answers,
with a line that names the file.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, NamedTuple

from .errors import InputError, OutputError, one_line, quoted
from .profiles import user_folder

LARGEST_FILE = 20_000_000  # bytes; the largest calibrations that ship have a quarter of a million


class KeptFile(NamedTuple):
    """A file as it is now: equal until somebody writes to it."""

    path: str
    written: tuple[int, ...]


def find_file(path: str | os.PathLike[str]) -> KeptFile | None:
    """The file at a path; None where there is none that one may look at."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return KeptFile(
        os.fspath(path), (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    )


def find_user_file(*names: str) -> KeptFile | None:
    """The file of that name in the user's folder."""
    try:
        folder = user_folder()
    except OutputError:
        return None
    return find_file(os.path.join(folder, *names))


def read_json(file: KeptFile, what: str, kind: Any) -> Any:
    """The file's JSON as an object of that kind, checked by pydantic. Raises InputError."""
    from pydantic import ValidationError

    from .files import read_text

    text = read_text(file.path, what, LARGEST_FILE, InputError)
    try:
        return adapter_for(kind).validate_json(text)
    except ValidationError as e:
        raise damage_error(file, _first_problem(e)) from None
    except UnicodeError:
        raise damage_error(file, "it holds what is no Unicode text") from None


def damage_error(file: KeptFile, why: str) -> InputError:
    return InputError(f"{quoted(file.path)} is damaged: {why}.")


def left_out_note(error: InputError) -> str:
    """A line for the answers that do without the file."""
    return f"{str(error).splitlines()[0].rstrip('.')}; it is left out."


@cache
def adapter_for(kind: Any) -> Any:
    """Pydantic's, which takes no value for one of another type."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(kind, config=ConfigDict(strict=True))


def _first_problem(error: Any) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(one_line(part, 30) for part in problem["loc"][:6])
    return f"{where + ': ' if where else ''}{one_line(problem['msg'].removeprefix('Value error, '))}"
