"""What --help says: examples that run, choices from where they are defined, and no options of something else."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer

from mstplan import cli
from mstplan.checking.validate import RUNGS as COMPARED
from mstplan.cli.commands import COMMANDS, EXAMPLES, FLAGS, Options, app, declared
from mstplan.cli.options import RecipesOptions
from mstplan.cli.planning import DTYPES, RUNGS
from mstplan.measuring.measurement import DEVICES
from mstplan.step.optimizers import OPTIMIZERS
from mstplan.step.recipe import STRATEGIES, Recipe, strategy_labels

from .conftest import Run

cli.declarations(None)
WITH_TORCH = {"trace", "calibrate", "measure", "validate", "check-smax", "check-throughput"}
ALL = [(name, example) for name, examples in EXAMPLES.items() for example in examples]
FREE = [example for name, example in ALL if name not in WITH_TORCH and "--rung trace" not in example]


def test_every_command_has_examples() -> None:
    assert EXAMPLES.keys() == COMMANDS.keys() == FLAGS.keys() and all(EXAMPLES.values()) and len(FREE) >= 10


@pytest.mark.parametrize("columns", ["80", "60"])
@pytest.mark.parametrize("name", COMMANDS)
def test_examples_stand_one_a_line(run: Run, name: str, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    said = run(name, "--help")
    lines = [line.strip() for line in said.out.splitlines()]
    assert said.code == 0 and lines[lines.index("Examples:") + 1 :] == [*EXAMPLES[name], ""]
    assert max(len(line) for line in said.out.splitlines()) <= 80
    assert "<bool>" not in said.out and "--json" in said.out


@pytest.mark.parametrize("example", FREE)
def test_examples_run(run: Run, example: str) -> None:
    said = run(*shlex.split(example)[1:])
    assert said.code == 0 and said.out and not said.err


@pytest.fixture
def parsers(monkeypatch: pytest.MonkeyPatch) -> dict[str, typer.core.TyperCommand]:
    monkeypatch.setattr(sys, "argv", ["mstplan", "--help"])  # or else only what is asked for is declared
    monkeypatch.setattr(app, "registered_commands", [])
    for declare in COMMANDS.values():
        declare()
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "example"), ALL)
def test_examples_are_read(parsers: dict[str, typer.core.TyperCommand], name: str, example: str) -> None:
    program, command, *arguments = shlex.split(example)
    assert (program, command) == ("mstplan", name)
    parsers[name].make_context(name, arguments)


def test_choices_are_those_that_are_taken(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is added where the choices are defined is in help at once."""
    monkeypatch.setitem(OPTIMIZERS, "signs", OPTIMIZERS["sgd"])
    monkeypatch.setitem(STRATEGIES, "mine", STRATEGIES["mst"])
    said = " ".join(run("max-seq", "--help").out.replace("│", " ").split())
    for known in (OPTIMIZERS, strategy_labels(), get_args(Recipe.model_fields["attention"].annotation)):
        assert " | ".join(known) in said
    assert "Default adamw." in said and "Default mixed" not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("max-seq", "-m", "gpt2", "--rung", "traces"), f"'traces'. Did you mean trace?\nKnown: {', '.join(RUNGS)}."),
        (("max-seq", "-m", "gpt2", "--rung", "TRACE"), "--rung: 'TRACE' is spelled otherwise.\nWrite --rung trace."),
        (("validate", "--rung", "formulae"), f"Did you mean formula?\nKnown: {', '.join(COMPARED)}."),
        (("shapes", "-m", "gpt2", "--dtype", "bf16"), "is bfloat16.\nWrite --dtype bfloat16."),
        (("shapes", "-m", "gpt2", "--dtype", "fp16"), "Nearest: --dtype bfloat16, of the same size."),
        (("shapes", "-m", "gpt2", "--dtype", "int8"), f"'int8'.\nKnown: {', '.join(DTYPES)}."),
        (("measure", "-m", "gpt2", "--seq-len", "64", "--device", "gpu"), "Write --device cuda."),
        (("check-smax", "-m", "gpt2", "--device", "cpu0"), f"Did you mean cpu, cuda?\nKnown: {', '.join(DEVICES)}."),
        (("calibrate", "-m", "gpt2", "--from", "traces"), "unknown --from 'traces'. Did you mean trace?"),
    ],
)
def test_unknown_choices_are_answered_with_the_nearest(
    run: Run, arguments: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    said = run(*arguments)
    assert said.code == 2 and says in said.err and not said.out and len(said.err.splitlines()) == 2
    assert [*tmp_path.iterdir()] == []


def test_each_command_has_the_options_that_it_reads() -> None:
    assert FLAGS["published"] == {"--json", "--format", "--markdown"}
    assert len(FLAGS["validate"]) < 15 and not FLAGS["validate"] & {"--device", "--batch", "--assume", "--seq-len"}
    assert FLAGS["check-throughput"] - FLAGS["check-smax"] == {"--seq-len"}
    assert not FLAGS["check-smax"] & {"--mean", "--markdown", "--plot", "--results", "--force", "RESULTS"}


def test_options_are_an_object_that_does_not_change() -> None:
    asked = RecipesOptions(batch=2)
    assert asked.batch == 2 and asked.accumulation is None and asked.offload is None
    assert asked.changed(gpus=8).gpus == 8 and asked.gpus is None and asked.changed(gpus=8).batch == 2
    with pytest.raises(AttributeError, match="does not change"):
        asked.batch = 3
    with pytest.raises(TypeError, match="no such options: bach"):
        RecipesOptions(bach=2)


def test_a_subclass_says_an_option_anew() -> None:
    class Mine(RecipesOptions):
        batch = RecipesOptions.accumulation

    assert declared(Mine)["batch"].flags == ("--accumulation",) and list(declared(Mine)) == list(
        declared(RecipesOptions)
    )
    assert declared(Options) == {}
