"""Files that the user names: read whole or refused, written whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError, OutputError, quoted


def read_text(path: str | os.PathLike[str], what: str, largest: int, error: type[InputError]) -> str:
    """The text of a file that should hold `what`. A pipe or a device, more than `largest` bytes, no UTF-8: an `error`."""
    name, way_out = quoted(path), f"Give the path of {what}."
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device would block, or never end
            raise error(f"{name} is not a file.\n{way_out}")
        with open(path, "rb") as file:
            data = file.read(largest + 1)
    except FileNotFoundError:
        raise error(f"there is no file {name}.\n{way_out}") from None
    except (OSError, ValueError) as e:
        raise error(f"{name} cannot be read: {getattr(e, 'strerror', None) or e}.\n{way_out}") from None
    if len(data) > largest:
        raise error(f"{name} is larger than {largest // 10**6} MB and thus not {what}.\n{way_out}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        before = data[: e.start]
        line, column = before.count(b"\n") + 1, e.start - (before.rfind(b"\n") + 1) + 1
        raise error(
            f"{name} is not UTF-8 text: byte 0x{data[e.start]:02x} at line {line}, column {column}.\n"
            f"{way_out[:-1]}, saved as UTF-8."
        ) from None


@contextmanager
def refusing(path: str | os.PathLike[str]) -> Iterator[None]:
    """What goes wrong with files inside becomes an OutputError about `path`."""
    try:
        yield
    except (OSError, ValueError) as e:
        raise OutputError(f"cannot write {quoted(path)}: {getattr(e, 'strerror', None) or e}.\nName another file.") from None


def check_writable(path: str | os.PathLike[str], force: bool) -> None:
    """Raises OutputError when the file could not, or must not, be written. Writes nothing."""
    name, path = quoted(path), Path(path)
    with refusing(path):
        if path.is_dir():
            raise OutputError(f"{name} is a folder.\nName a file in it.")
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise OutputError(f"cannot write {name}: {quoted(folder)} {what}.\nMake that folder first, or name another.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write {name}: no permission to write in {quoted(folder)}.\nName another folder.")
        if path.exists() and not path.is_file():
            raise OutputError(f"cannot write {name}: it is not a regular file.\nName another.")
        if path.exists() and not force:
            raise OutputError(f"{name} exists already.\n--force overwrites it, or name another file.")


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Put `data` in place of the file, or leave everything as it was. Raises OutputError."""
    from secrets import token_hex

    with refusing(path):
        target = Path(os.path.realpath(path))
        part = target.with_name(f".mstplan-{token_hex(8)}.part")
        try:
            with open(part, "xb") as file:
                file.write(data)
            os.replace(part, target)
        except BaseException:  # also Ctrl-C
            part.unlink(missing_ok=True)
            raise


def replace_json(path: Path, document: dict[str, Any]) -> None:
    """Write JSON whole or not at all, making the folder first. A file of other content is kept as NAME.1, NAME.2, ... Raises OutputError."""
    data = (json.dumps(document, separators=(",", ":")) + "\n").encode()
    with refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else data
    if before != data:
        n = 1
        while (old := path.with_name(f"{path.name}.{n}")).exists():
            n += 1
        write(old, before)
    write(path, data)
