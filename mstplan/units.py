"""Sizes and lengths: read once on the way in, written once on the way out. Inside, bytes and tokens are ints."""

from __future__ import annotations

import re

from .errors import UnitError, quoted

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
_MEMORY_UNITS = {"B": 1, "KB": KIB, "KIB": KIB, "MB": MIB, "MIB": MIB, "GB": GIB, "GIB": GIB, "TB": TIB, "TIB": TIB}
_LENGTH_UNITS = {"": 1, "K": KIB, "M": MIB}
SHORTEST, LONGEST = 2, 2**40
"""Tokens of a sequence: a single one has no next one to learn; beyond the longest, a length is taken for a slip."""
LEAST_MEMORY, MOST_MEMORY = GIB // 4, 2**60
"""Bytes of a card below which, and from which on, an amount of memory is taken for a slip."""


# ASCII digits only: \d takes those of every script, and int() reads no more than some thousands of them.
_WHOLE_NUMBER = r"[0-9]{1,18}|[0-9]{1,3}(?:,[0-9]{3}){1,5}|[0-9]{1,3}(?:_[0-9]{3}){1,5}"
_FRACTION = r"(?:\.([0-9]{1,18}))?"


def parse_whole(text: str, name: str = "") -> int:
    """A whole number such as 1000, 1,000 or 1_000; `name` says in messages what it is. Raises UnitError."""
    match = _match_text(f"({_WHOLE_NUMBER})", text)
    if match is None:
        raise UnitError(
            f"cannot read {_said(text, name)} as a whole number.\nWrite it like 32 or 1,000, with at most 18 digits."
        )
    return _parse_digits(match[1])


def parse_count(text: str, name: str = "") -> int:
    """The same, or a power of ten as DeepSpeed's files write it: 1e9, 2.5e8. Raises UnitError."""
    match = _match_text(rf"([0-9]{{1,18}}){_FRACTION}e\+?([0-9]{{1,2}})", text)
    if match is None:
        return parse_whole(text, name)
    digits, zeros = match[1] + (match[2] or ""), int(match[3]) - len(match[2] or "")
    if zeros < 0 or len(digits) + zeros > 18:
        raise UnitError(
            f"cannot read {_said(text, name)} as a whole number.\nWrite it like 5e8 or 500,000,000, with at most 18 digits."
        )
    return int(digits + "0" * zeros)


def _match_text(pattern: str, text: object) -> re.Match[str] | None:
    return re.fullmatch(rf"\s*{pattern}\s*", text, re.IGNORECASE | re.ASCII) if isinstance(text, str) else None


def _parse_digits(text: str) -> int:
    return int(text.replace(",", "").replace("_", ""))


def _said(text: str, name: str) -> str:
    """What was typed, after what it is, where that is known."""
    return f"{name} {quoted(text)}".lstrip()


def parse_memory(text: str, name: str = "") -> int:
    """Bytes of '80GB', '79.15GiB' or '24576MiB'; `name` says in messages what it is. Raises UnitError.

    Memory is sold in powers of two: a card sold as 80 GB holds 80 GiB, so GB is read as GiB, MB as MiB.
    """
    match = _match_text(rf"([0-9]{{1,18}}){_FRACTION}\s*([kmgt]i?b|b)", text)
    if match is None:
        raise UnitError(
            f"cannot read {_said(text, name)} as an amount of memory.\nWrite it like 80GB, 79.15GiB or 24576MiB."
        )
    fraction = match[2] or ""
    scale: int = 10 ** len(fraction)
    size = int(match[1] + fraction) * _MEMORY_UNITS[match[3].upper()] // scale
    if size >= MOST_MEMORY:
        raise UnitError(
            f"{_said(text, name)} is more memory than any machine has.\nWrite it like 80GB, 79.15GiB or 24576MiB."
        )
    return size


def parse_length(text: str) -> int:
    """Tokens of '65536', '64k' (65,536) or '1M' (1,048,576). Raises UnitError."""
    match = _match_text(rf"({_WHOLE_NUMBER}){_FRACTION}\s*([km]?)", text)
    if match is None:
        raise UnitError(
            f"cannot read {quoted(text)} as a number of tokens.\nWrite it like 65536, 64k (65,536) or 1M (1,048,576)."
        )
    fraction = match[2] or ""
    scale: int = 10 ** len(fraction)
    tokens, remainder = divmod(
        (_parse_digits(match[1]) * scale + int(fraction or "0")) * _LENGTH_UNITS[match[3].upper()], scale
    )
    if remainder or not SHORTEST <= tokens <= LONGEST:
        raise UnitError(f"{quoted(text)} is not a whole number of tokens between {SHORTEST} and {LONGEST:,}.")
    return tokens


def trainable_tokens(tokens: int) -> int:
    """So many tokens, or 0 where they are too few to train on."""
    return tokens if tokens >= SHORTEST else 0


def parse_share(text: str, name: str) -> float:
    """A share of '1%' or '0.01', from 0 to 1; `name` says in messages what it is. Raises UnitError."""
    match = _match_text(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(%?)", text)
    share = float(match[1]) / (100 if match[2] else 1) if match is not None else -1.0
    if not 0 <= share <= 1:
        raise UnitError(f"cannot read {name} {quoted(text)} as a share.\nWrite it like 1% or 0.01.")
    return share


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
