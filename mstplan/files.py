"""Files that the user names: read whole or refused, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import InputError, OutputError, quoted

_PART_NAME = r"\.mstplan-[0-9a-f]{16}\.part"
_LEFT_OVER_SECONDS = 3600  # seconds


def read_bytes(path: str | os.PathLike[str], what: str, largest: int, error: type[InputError]) -> bytes:
    """Read the bytes of a file that should be `what`. A pipe or a device, more than `largest` bytes: an `error`."""
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
    return data


def read_text(path: str | os.PathLike[str], what: str, largest: int, error: type[InputError]) -> str:
    """The text of a file that should hold `what`; what is no UTF-8 is an `error`, too."""
    data = read_bytes(path, what, largest, error)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        before = data[: e.start]
        line, column = before.count(b"\n") + 1, e.start - (before.rfind(b"\n") + 1) + 1
        raise error(
            f"{quoted(path)} is not UTF-8 text: byte 0x{data[e.start]:02x} at line {line}, column {column}.\n"
            f"Give the path of {what}, saved as UTF-8."
        ) from None


def repeated_key(text: str) -> str | None:
    """A key that an object in a JSON text has twice, of which readers would take the last value silently. None where all is well, and
    where the text is no JSON."""
    repeated: list[str] = []

    def pairs(items: list[tuple[str, object]]) -> None:
        keys: set[str] = set()
        repeated.extend(key for key, _ in items if key in keys or keys.add(key))  # type: ignore[func-returns-value]

    try:
        json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return None
    return repeated[0] if repeated else None


@contextmanager
def refusing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what goes wrong with files inside into an OutputError about `path`."""
    try:
        yield
    except (OSError, ValueError) as e:
        raise OutputError(
            f"cannot write {quoted(path)}: {getattr(e, 'strerror', None) or e}.\nName another file."
        ) from None


def check_writable(path: str | os.PathLike[str], force: bool) -> None:
    """Check that a file could and may be written, and write nothing. Raises OutputError."""
    name, path = quoted(path), Path(path)
    with refusing(path):
        if path.is_dir():
            raise OutputError(f"{name} is a folder.\nName a file in it.")
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise OutputError(
                f"cannot write {name}: {quoted(folder)} {what}.\nMake that folder first, or name another."
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write {name}: no permission to write in {quoted(folder)}.\nName another folder.")
        if path.exists() and not path.is_file():
            raise OutputError(f"cannot write {name}: it is not a regular file.\nName another.")
        if path.exists() and not force:
            raise OutputError(f"{name} exists already.\n--force overwrites it, or name another file.")


def check_folder(folder: Path) -> None:
    """Check that files could be written to a folder, which is made once there is one; write nothing. Raises OutputError."""
    with refusing(folder):
        existing = next((path for path in (folder, *folder.parents) if _is_there(path)), folder)
        if not existing.is_dir():
            raise OutputError(f"cannot write to {quoted(folder)}: {quoted(existing)} is not a folder.\nName another.")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise OutputError(
                f"cannot write to {quoted(folder)}: no permission to write in {quoted(existing)}.\nName another folder."
            )


def _is_there(path: Path) -> bool:
    """Also of a link that leads nowhere. Raises OSError where one may not look."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def write(path: str | os.PathLike[str], data: bytes, like: str | os.PathLike[str] | None = None) -> None:
    """Put `data` in place of the file, or leave everything as it was: a link stays one, and a file that is there keeps its mode; a new
    one takes that of `like`. Raises OutputError."""
    from secrets import token_hex

    with refusing(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():  # a device behind a link must not become a file
            raise ValueError("it is not a regular file")
        _remove_left_parts(target.parent)
        temporary = target.with_name(f".mstplan-{token_hex(8)}.part")
        try:
            with open(temporary, "xb") as file:
                with suppress(FileNotFoundError):  # before anything is in it that others may not read
                    os.chmod(temporary, stat.S_IMODE(os.stat(target if like is None else like).st_mode))
                file.write(data)
            os.replace(temporary, target)
        except BaseException:  # also Ctrl-C
            temporary.unlink(missing_ok=True)
            raise


def _remove_left_parts(folder: Path) -> None:
    """Remove what a process left there that was killed while it wrote, which takes less than a second."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if (
                re.fullmatch(_PART_NAME, entry.name)
                and entry.is_file(follow_symlinks=False)
                and time.time() - entry.stat().st_mtime > _LEFT_OVER_SECONDS
            ):
                with suppress(OSError):
                    os.unlink(entry)


def replace_json(path: Path, document: dict[str, Any]) -> None:
    """Write JSON whole or not at all, making the folder first. A file of other content is kept as NAME.1, NAME.2, ... Raises OutputError."""
    with refusing(path):
        data = (json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n").encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path, force=True)
        before = path.read_bytes() if path.exists() else data
        if before != data:
            n = 1
            while (old := path.with_name(f"{path.name}.{n}")).exists():
                n += 1
            write(old, before, like=path)
    write(path, data)
