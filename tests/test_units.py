from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan.errors import UnitError
from mstplan.units import (
    LONGEST,
    SHORTEST,
    format_count,
    format_gib,
    format_seconds,
    parse_count,
    parse_length,
    parse_memory,
    parse_share,
    parse_whole,
)

ODD_SIZES = ["٨GB", "²GB", "9" * 5000 + "GB", "9" * 400 + ".0GB", "80\u212aB"]  # the last: Kelvin's sign
ODD_LENGTHS = ["1,,,_", "1,0", "1,000_000", "²", "٣k", "9" * 5000, "1\u212a"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GB", 80 * 2**30),
        ("80 GiB", 80 * 2**30),
        ("79.15GiB", int(79.15 * 2**30)),
        ("24576MiB", 24 * 2**30),
        ("512mb", 2**29),
        ("1tb", 2**40),
        ("0B", 0),
        ("123B", 123),
    ],
)
def test_memory(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "80", "GB", "-1GB", "1e3GB", "80 G", "nanGB", "99999999999TB", "8,0GB", "80GBs", "80iB", "80 ib", *ODD_SIZES],
)
def test_memory_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UnitError, match="80GB"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("65536", 65536),
        ("64k", 65536),
        ("64K", 65536),
        ("1M", 1048576),
        ("1.5k", 1536),
        ("1,048,576", 1048576),
        ("0.5M", 524288),
    ],
)
def test_length(text: str, tokens: int) -> None:
    assert parse_length(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "k", "0", "0k", "-1", "1.0001k", "1e6", "1G", str(LONGEST + 1), "9" * 400, "1.5", *ODD_LENGTHS]
)
def test_length_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UnitError):
        parse_length(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("32", 32), ("1,000", 1000), ("1_000_000", 10**6), (" 7 ", 7), ("9" * 18, 10**18 - 1)],
)
def test_whole_numbers(text: str, number: int) -> None:
    assert parse_whole(text) == number


@pytest.mark.parametrize("text", ["", "-1", "1.0", "²", "٣", "1,00", "1,,000", "_1", "9" * 19, "9" * 5000, "a\nb"])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(UnitError, match=r"--m '.*whole number") as e:
        parse_whole(text, "--m")
    assert len(str(e.value).splitlines()) == 2 and len(str(e.value)) < 250


def test_memory_is_read_to_the_byte() -> None:
    assert parse_memory("0.000000001GB") == 1 and parse_memory("999999999999999999B") == 10**18 - 1


@pytest.mark.parametrize(
    ("text", "number"), [("1e9", 10**9), ("5E8", 5 * 10**8), ("2.5e+8", 250_000_000), ("1,000", 1000)]
)
def test_counts_as_deepspeed_writes_them(text, number):
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["1.5e0", "1e-3", "1e99", "e9", "1e", "1.e9"])
def test_counts_that_are_not_whole(text):
    with pytest.raises(UnitError, match=r"cannot read --m .*whole number"):
        parse_count(text, "--m")


@pytest.mark.parametrize("parse", [parse_memory, parse_length, parse_whole])
@given(text=st.text(max_size=20))
def test_any_text_is_read_or_refused(parse: Callable[[str], int], text: str) -> None:
    try:
        assert parse(text) >= 0
    except UnitError as e:
        assert len(str(e).splitlines()) <= 2  # noqa: PT017


ALPHABET = "019.,_ +-%\nkKmMgGtTiIbBeEfx"
PARSERS: list[Callable[[str], float]] = [
    parse_memory,
    parse_length,
    parse_whole,
    lambda text: parse_share(text, "--to"),
]


def reads(parse: Callable[[str], float], text: str) -> bool:
    """Is it read, rather than refused?"""
    try:
        return parse(text) >= 0
    except UnitError as e:
        assert len(str(e).splitlines()) <= 2 and len(str(e)) < 300  # noqa: PT017
        return False


@pytest.mark.parametrize("parse", PARSERS)
def test_every_short_text_of_units_is_read_or_refused(parse: Callable[[str], float]) -> None:
    """All of up to three characters, and all unit-like endings behind numbers."""
    texts = ["".join(t) for n in range(4) for t in product(ALPHABET, repeat=n)]
    texts += [
        f"{number}{''.join(unit)}"
        for number in ("80", "1.5", "0", "1,000")
        for n in range(4)
        for unit in product(" %kmgtibKMGTIB", repeat=n)
    ]
    read = 0
    for text in texts:
        read += reads(parse, text)
    assert read > 50


@pytest.mark.parametrize("parse", PARSERS)
@settings(max_examples=300)
@given(text=st.text(alphabet=ALPHABET, max_size=40))
def test_longer_ones_too(parse: Callable[[str], float], text: str) -> None:
    reads(parse, text)


@given(st.integers(SHORTEST, LONGEST))
def test_a_written_length_reads_back(tokens: int) -> None:
    assert parse_length(f"{tokens:,}") == parse_length(str(tokens)) == tokens


def test_formats() -> None:
    assert format_gib(80 * 2**30) == "80.00 GiB" and format_gib(3 * 2**20) == "3.00 MiB" and format_gib(12) == "12 B"
    assert (
        format_count(8_030_261_248) == "8.03B"
        and format_count(999_885_952) == "1.00B"
        and format_count(134_515_008) == "135M"
    )
    assert format_seconds(0.25) == "250 ms" and format_seconds(600) == "10.0 min" and format_seconds(9000) == "2.5 h"
