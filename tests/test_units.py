from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstplan.errors import UnitError
from mstplan.units import LONGEST, format_count, format_gib, format_seconds, parse_length, parse_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 2**30), ("80 GiB", 80 * 2**30), ("79.15GiB", int(79.15 * 2**30)), ("24576MiB", 24 * 2**30), ("512mb", 2**29),
     ("1tb", 2**40), ("0B", 0), ("123B", 123)],
)  # fmt: skip
def test_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "80", "GB", "-1GB", "1e3GB", "80 G", "nanGB", "99999999999TB", "8,0GB", "80GBs"])
def test_memory_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UnitError, match="80GB"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("text", "tokens"), [("65536", 65536), ("64k", 65536), ("64K", 65536), ("1M", 1048576), ("1.5k", 1536), ("1,048,576", 1048576), ("0.5M", 524288)]
)
def test_length(text: str, tokens: int) -> None:
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "0", "0k", "-1", "1.0001k", "1e6", "1G", str(LONGEST + 1), "9" * 400, "1.5"])
def test_length_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UnitError):
        parse_length(text)


@pytest.mark.parametrize("parse", [parse_memory, parse_length])
@given(text=st.text(max_size=20))
def test_any_text_is_read_or_refused(parse: Callable[[str], int], text: str) -> None:
    try:
        assert parse(text) >= 0
    except UnitError as e:
        assert len(str(e).splitlines()) <= 2  # noqa: PT017


@given(st.integers(1, LONGEST))
def test_a_written_length_reads_back(tokens: int) -> None:
    assert parse_length(f"{tokens:,}") == parse_length(str(tokens)) == tokens


def test_formats() -> None:
    assert format_gib(80 * 2**30) == "80.00 GiB" and format_gib(3 * 2**20) == "3.00 MiB" and format_gib(12) == "12 B"
    assert format_count(8_030_261_248) == "8.03B" and format_count(999_885_952) == "1.00B" and format_count(134_515_008) == "135M"
    assert format_seconds(0.25) == "250 ms" and format_seconds(600) == "10.0 min" and format_seconds(9000) == "2.5 h"
