"""The release of transformers whose modelling code is planned, where something that decides memory differs between releases.

What differs between 5.17 and 5.23 in the code of the families here: Gemma-2 ran sdpa up to 5.20, which leaves its soft-capping out, and
refuses it from 5.21 on (models/gemma2/modeling_gemma2.py, _supports_sdpa). Nothing else decides a peak.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..errors import ModelError, quoted

NEWEST = "5.23"
"""The newest release that was read."""

Number = tuple[int, int]


class Release(NamedTuple):
    """A release, such as "5.17", and how it came to be the one: asked for, installed, or the newest that is known."""

    version: str
    origin: str

    @property
    def number(self) -> Number:
        return parse_release(self.version)

    @property
    def words(self) -> str:
        return f"transformers {self.version} ({self.origin})"


def parse_release(text: str) -> Number:
    """(5, 17) of "5.17" or "5.17.0". Raises ModelError."""
    match = re.fullmatch(r"(\d{1,3})\.(\d{1,3})(\..{0,40})?", text.strip(), re.ASCII)
    if match is None:
        raise ModelError(f"{quoted(text)} is no release of transformers.\nWrite it like 5.17 or 5.17.0.")
    return int(match[1]), int(match[2])


def is_release(text: str) -> bool:
    try:
        return bool(parse_release(text))
    except ModelError:
        return False


def release(asked: str | None = None) -> Release:
    """The release to plan for. Raises ModelError for what is none."""
    if asked is not None:
        parse_release(asked)
        return Release(asked.strip(), "as asked")
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("transformers")
    except PackageNotFoundError:
        installed = ""
    return Release(installed, "installed") if is_release(installed) else Release(NEWEST, "the newest that is known")
