"""An option that is given twice, of every command: no value of it is lost without a word."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

from mstplan import MeasurementError, cli
from mstplan.cli.commands import COMMANDS, app
from mstplan.measuring import measurement, sweep

from ..measuring.measured import CARD
from .conftest import Run

REQUIRED = {
    "max-seq": {"--model": "gpt2"},
    "plan": {"--model": "gpt2", "--seq-len": "64"},
    "theorem": {"--model": "gpt2"},
    "shapes": {"--model": "gpt2"},
    "plot": {"--model": "gpt2"},
    "trace": {"--model": "nothing", "--seq-len": "64"},  # with a model and a length it has an answer
    "calibrate": {"--model": "gpt2", "--from": "measurements"},
    "measure": {"--model": "gpt2", "--seq-len": "64"},
    "validate": {},
    "published": {},
    "check-smax": {"--model": "gpt2"},
    "check-throughput": {"--model": "gpt2", "--seq-len": "64"},
    "models": {"--fits": "h100"},
    "gpus": {},
    "recipes": {},
}
ADD_UP = {
    ("max-seq", "--strategy"),
    ("plan", "--strategy"),
    ("trace", "--strategy"),
    ("plot", "--strategy"),
    ("measure", "--strategy"),
    ("measure", "--seq-len"),
    ("models", "--strategy"),
    ("check-smax", "--strategy"),
    ("check-throughput", "--strategy"),
    ("validate", "--results"),
    ("validate", "--rung"),
    ("calibrate", "--model"),
    ("calibrate", "--strategy"),
    ("calibrate", "--results"),
}


def declared() -> dict[str, list[Any]]:
    """Of each command all options, as typer has them."""
    before, sys.argv = sys.argv, ["mstplan", "--help"]  # or else only what is asked for is declared
    for declare in cli.declarations(None).values():
        declare()
    sys.argv = before
    group = typer.main.get_command(app)
    return {
        name: [p for p in command.params if p.param_type_name == "option"] for name, command in group.commands.items()
    }  # type: ignore[attr-defined]


OPTIONS = declared()
SINGLE = [
    (name, option.opts[0])
    for name, options in OPTIONS.items()
    for option in options
    if not option.is_flag and (name, option.opts[0]) not in ADD_UP
]


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "ask_environment", lambda _device, _processes: dict(CARD))


def beside(name: str, flag: str) -> list[str]:
    return [word for key, value in REQUIRED[name].items() if key != flag for word in (key, value)]


def test_every_command_is_here() -> None:
    assert set(OPTIONS) == set(COMMANDS) == set(REQUIRED) and len(SINGLE) > 100
    assert {(name, option.opts[0]) for name, options in OPTIONS.items() for option in options} >= ADD_UP


@pytest.mark.parametrize("name", [name for name in REQUIRED if name not in ("gpus", "published", "recipes")])
def test_different_values_where_one_is_taken(run: Run, tmp_path: Path, name: str) -> None:
    for _, flag in (one for one in SINGLE if one[0] == name):
        for values in (("3", "4"), ("4", "3", "4")):
            said = run(name, *beside(name, flag), *(word for value in values for word in (flag, value)))
            assert (
                said.code == 2 and not said.out and said.err.startswith(f"mstplan: {flag} is given twice: '{values[0]}")
            ), (flag, said.err)
            assert f" and '{values[1]}" in said.err and said.err.splitlines()[1:] == ["Give it once."]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in REQUIRED if name not in ("gpus", "published")])
def test_the_same_value_twice_is_as_once(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def none(_device: str, _processes: object) -> NoReturn:
        raise MeasurementError("no device.")

    monkeypatch.setattr(sweep, "ask_environment", none)
    for _, flag in (one for one in SINGLE if one[0] == name):
        asked = (name, *beside(name, flag))
        once = run(*asked, flag, "\N{BULLET}3")  # nothing that any option takes: said before anything is done
        assert once.code == 2 and run(*asked, flag, "\N{BULLET}3", flag, "\N{BULLET}3") == once


def test_short_and_long_names_are_one_option(run: Run) -> None:
    said = run("max-seq", "-m", "gpt2", "--model=gpt2", "--gpu=h100", "--gpu", "a100")
    assert said.code == 2 and "--gpu is given twice: 'h100' and 'a100'" in said.err
    assert "--batch is given twice: '2' and '3'" in run("shapes", "-m", "gpt2", "-b2", "--batch", "3").err


def test_switches_may_be_repeated(run: Run) -> None:
    assert run("gpus", "--json", "--json") == run("gpus", "--json")


@pytest.mark.parametrize(("name", "flag"), sorted(ADD_UP))
def test_lists_add_up(run: Run, name: str, flag: str) -> None:
    """As if they were given with commas between: here of values that every such option refuses by name."""
    asked = (name, *beside(name, flag))
    together = run(*asked, flag, "one,two")
    assert (
        run(*asked, flag, "one", flag, "two") == together == run(*asked, flag, "one", flag, "two", flag, "one")
        and together.code == 2
    )


def test_strategies_and_files_add_up(run: Run, tmp_path: Path) -> None:
    told = run("max-seq", "-m", "gpt2", "--gpu", "h100", "-s", "checkpoint", "-s", "standard,mst", "--json").json
    assert [row["strategy"] for row in told["results"]] == ["checkpoint", "standard", "mst"]
    lines = measurement.shipped_results()[0].read_text().splitlines()
    for n, file in enumerate(("a.jsonl", "b,c.jsonl", "d.jsonl", "e.jsonl")):
        (tmp_path / file).write_text(lines[n] + "\n")
    said = run(
        "validate",
        "a.jsonl",
        "b,c.jsonl",
        "--results",
        "d.jsonl",
        "--results",
        "e.jsonl,a.jsonl",
        "--rung",
        "formula",
        "--json",
    )
    expected = [
        (case["model"], case["strategy"], case["seq_len"]) for case in (json.loads(line)["case"] for line in lines[:4])
    ]
    found = [(row["model"], row["strategy"], row["seq_len"]) for row in said.json["rows"]]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("published", "a.jsonl"), "unexpected extra argument"),
        (("check-smax", "-m", "gpt2", "a.jsonl"), "unexpected extra argument"),
        (("calibrate", "--from", "trace", "-m", "gpt2", "a.jsonl"), "RESULTS: nothing to do with --from trace"),
        (("validate", ""), "without a name"),
        (("calibrate", "--from", "measurements", "-m", "gpt2", "none.jsonl"), "none.jsonl"),
        (("measure", "a.jsonl"), "unexpected extra argument"),
        (("validate", "--", "-x.jsonl"), "'-x.jsonl'"),
        (("validate", "a.jsonl", "none.jsonl"), "no file 'a.jsonl'"),
    ],
)
def test_files_that_stand_by_themselves(run: Run, arguments: tuple[str, ...], says: str) -> None:
    said = run(*arguments)
    assert said.code == 2 and says in said.err and len(said.err.splitlines()) == 2 and not said.out
