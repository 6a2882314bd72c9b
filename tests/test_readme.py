"""What the README shows is what the program says."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_first_answer_is_current() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- max-seq -->\n```\n(.*?)\n```", text, re.DOTALL)
    assert shown is not None
    command = [sys.executable, "-m", "mstplan", "max-seq", "--model", "llama3.1-8b", "--gpu-mem", "80GB"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert [line.rstrip() for line in said.rstrip().splitlines()] == shown[1].splitlines()


def test_the_python_examples_run() -> None:
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert results.attempted >= 8 and results.failed == 0


def test_every_command_in_the_readme_exists() -> None:
    from mstplan import cli

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`mstplan ([a-z][a-z-]*)", text))
    assert named and named <= cli.declarations(None).keys()
