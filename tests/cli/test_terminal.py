"""Whatever the environment says of the terminal, the answer is there, whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from .conftest import Run

ON = ("-m", "gpt2", "--gpu", "h100")
ASKED = (
    ("gpus", "--sources"),
    ("models",),
    ("shapes", "-m", "gpt2"),
    ("max-seq", *ON),
    ("plan", *ON, "--seq-len", "4k", "-s", "mst"),
    ("theorem", *ON),
    ("plan", "-m", "llama3.1-8b", "--gpu", "rtx-4090", "--seq-len", "4k", "-s", "standard"),
    ("--help",),
    ("plan", "--help"),
    ("plan", "--no-such-option"),
)
SIZES = (
    "0",
    "-5",
    "abc",
    "",
    "1",
    "59",
    "60",
    "67",
    "200",
    "1001",
    "99999999999",
    "9" * 5000,
    "1e3",
    "\u0661",
    "\x1b[31m",
)


def letters(text: str) -> Counter[str]:
    """All that is said, however it is folded into columns."""
    return Counter(re.sub(r"\x1b\[[0-9;]*m|[\s\u2500-\u257f]", "", text))


@pytest.mark.parametrize("asked", ASKED, ids=" ".join)
def test_sizes_of_every_kind(run: Run, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    usual = run(*asked)
    for size in SIZES if asked[0] == "gpus" else ("0", "1", "abc", "9" * 5000):
        monkeypatch.setenv("COLUMNS", size)
        said = run(*asked)
        lost = letters(usual.out) - letters(said.out)
        cut = sum(
            max(0, len(name) - 18) for name in set(re.findall("--[a-z-]+", usual.out))
        )  # by typer, of options' names
        most = (31 + cut) * ("--help" in asked)  # and of what they take
        assert (said.code, said.err) == (usual.code, usual.err) and sum(lost.values()) <= most, size
        assert max(map(len, said.out.splitlines()), default=0) <= 1000
        assert os.environ.get("COLUMNS", "80").isascii()


@pytest.mark.parametrize("asked", ASKED[3:5], ids=" ".join)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LINES", "0"),
        ("LINES", "abc"),
        ("LINES", "1"),
        ("LINES", "9" * 5000),
        ("TERM", ""),
        ("TERM", "dumb"),
        ("TERM", "\x1b"),
        ("NO_COLOR", "1"),
        ("FORCE_COLOR", "1"),
        ("COLORTERM", "truecolor"),
        ("TTY_COMPATIBLE", "1"),
    ],
)
def test_other_words_on_the_terminal(
    run: Run, asked: tuple[str, ...], name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = run(*asked)
    monkeypatch.setenv(name, value)
    said = run(*asked)
    assert (said.code, said.err) == (usual.code, usual.err) and letters(said.out) == letters(usual.out)


@pytest.mark.parametrize("width", ["abc", "0"])
def test_typers_own_variable(width: str) -> None:
    """Which it reads once."""
    asked = [sys.executable, "-m", "mstplan", "--help"]
    said = subprocess.run(
        asked, env={**os.environ, "TERMINAL_WIDTH": width}, capture_output=True, text=True, check=True
    )
    assert "max-seq" in said.stdout and not said.stderr
