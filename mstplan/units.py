"""Sizes and lengths: read once on the way in, written once on the way out. Inside, bytes and tokens are ints."""

from __future__ import annotations

import re

from .errors import UnitError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
_MEMORY = {"B": 1, "KB": KIB, "KIB": KIB, "MB": MIB, "MIB": MIB, "GB": GIB, "GIB": GIB, "TB": TIB, "TIB": TIB}
_LENGTH = {"": 1, "K": KIB, "M": MIB}
LONGEST = 2**40
"""Tokens beyond which a length is taken for a slip."""


def _shown(text: str) -> str:
    """What the user wrote, on one line and not too long."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def parse_memory(text: str) -> int:
    """Bytes of '80GB', '79.15GiB' or '24576MiB'. Raises UnitError.

    Memory is sold in powers of two: a card sold as 80 GB holds 80 GiB, so GB is read as GiB, MB as MiB.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)\s*", text, re.IGNORECASE)
    if match is None:
        raise UnitError(f"cannot read {_shown(text)} as an amount of memory.\nWrite it like 80GB, 79.15GiB or 24576MiB.")
    size = int(float(match[1]) * _MEMORY[match[2].upper()]) if "." in match[1] else int(match[1]) * _MEMORY[match[2].upper()]
    if not 0 <= size < 2**60:
        raise UnitError(f"{_shown(text)} is more memory than any machine has.\nWrite it like 80GB, 79.15GiB or 24576MiB.")
    return size


def parse_length(text: str) -> int:
    """Tokens of '65536', '64k' (65,536) or '1M' (1,048,576). Raises UnitError."""
    match = re.fullmatch(r"\s*(\d[\d,_]*(?:\.\d+)?)\s*([km]?)\s*", text, re.IGNORECASE)
    if match is None:
        raise UnitError(f"cannot read {_shown(text)} as a number of tokens.\nWrite it like 65536, 64k (65,536) or 1M (1,048,576).")
    digits = match[1].replace(",", "").replace("_", "")
    unit = _LENGTH[match[2].upper()]
    tokens = float(digits) * unit if "." in digits else int(digits) * unit
    if tokens != int(tokens) or not 1 <= tokens <= LONGEST:
        raise UnitError(f"{_shown(text)} is not a whole number of tokens between 1 and {LONGEST:,}.")
    return int(tokens)


def format_gib(size: int, digits: int = 2) -> str:
    """Bytes as GiB; small ones as MiB or KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size) >= unit * (0.1 if unit == GIB else 1):
            return f"{size / unit:,.{digits}f} {name}"
    return f"{size:,} B"


def format_tokens(tokens: int) -> str:
    return f"{tokens:,}"


def format_count(n: int) -> str:
    """Parameters: 8.03B, 494M, 1.04T."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= 0.9995 * unit:  # so that 999,885,952 reads 1.00B
            digits = 2 if n < 100 * unit else 0
            return f"{n / unit:.{digits}f}{name}"
    return str(n)


def format_seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
