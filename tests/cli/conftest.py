"""The command line as a user meets it: run in an empty folder, 80 columns, no colour."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from mstplan import cli
from mstplan.cli import commands


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:  # type: ignore[type-arg]
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run mstplan in an empty folder, 80 columns, no colour."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def called(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["mstplan", *arguments])
        monkeypatch.setattr(
            commands.app, "registered_commands", []
        )  # of earlier calls, each of which typer would make anew
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        code = stop.value.code
        return Said(code if isinstance(code, int) else int(code is not None), out, err)

    return called
