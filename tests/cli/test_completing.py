"""Completion as shells ask for it: by click's protocol, in a real bash, and the scripts where shells look for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mstplan import gpus, model_names
from mstplan.cli import commands, completing
from mstplan.show.formats import FORMATS
from mstplan.step.kernels import attentions
from mstplan.step.losses import LOSSES
from mstplan.step.optimizers import OPTIMIZERS
from mstplan.step.recipe import strategy_labels

from ..processes import ROOT
from .conftest import Run

Ask = Callable[..., list[str]]


@pytest.fixture
def ask(run: Run, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """The lines of the answer for a line that ends in the word that is typed."""

    def asked(line: str, shell: str = "bash", typed: str | None = None) -> list[str]:
        words = line.split(" ")
        monkeypatch.setenv("_MSTPLAN_COMPLETE", f"{shell}_complete")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", typed if typed is not None else str(len(words) - 1))
        said = run()
        assert said.code == 0 and not said.err
        return said.out.splitlines()

    return asked


def plain(*names: str) -> list[str]:
    return [f"plain,{name}" for name in names]


VALUES = {
    "--model": model_names(),
    "--gpu": [gpu.name for gpu in gpus()],
    "--strategy": [*strategy_labels(), "all"],
    "-s": [*strategy_labels(), "all"],
    "--optimizer": OPTIMIZERS,
    "--loss": LOSSES,
    "--attention": attentions(),
    "--format": FORMATS,
    "--rung": ["formula", "trace"],
    "--sharding": ["none", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1"],
}


@pytest.mark.parametrize("flag", VALUES)
def test_values_are_those_of_the_registries(ask: Ask, flag: str) -> None:
    assert ask(f"mstplan max-seq {flag} ") == plain(*VALUES[flag])
    first = next(iter(VALUES[flag]))
    assert plain(first)[0] in ask(f"mstplan max-seq {flag} {first[:2]}")


def test_a_name_that_is_added_is_offered(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "signs", OPTIMIZERS["sgd"])
    assert ask("mstplan plan --optimizer si") == plain("signs")


def test_commands_and_options(ask: Ask) -> None:
    assert ask("mstplan ") == plain(*commands.COMMANDS) and ask("mstplan pl") == plain("plan", "plot")
    assert ask("mstplan --s") == plain("--show-completion")
    assert ask("mstplan --install-completion ") == plain("bash", "zsh", "fish")
    assert ask("mstplan max-seq --opt") == plain("--optimizer", "--optimizer-in-backward", "--optimizer-on-host")
    assert ask("mstplan max-seq --optimizer sgd --optimizer-in-backward --opt") == plain("--optimizer-on-host")
    long = {f"plain,{one.flags[0]}" for one in commands.OPTIONS["plan"].values()} | {"plain,--help"}
    assert set(ask("mstplan plan -")) == long
    assert ask("mstplan nonsense --") == [] and ask("mstplan plan --seq-len ") == []


def test_several_values_and_those_behind_a_sign(ask: Ask) -> None:
    assert ask("mstplan plan -s mst,check") == plain("mst,checkpointing", "mst,checkpointing-sqrt")
    assert ask("mstplan plan -s mst,m") == plain("mst,mst-offload", "mst,mst-layer", "mst,mst-layer-offload")
    assert ask("mstplan gpus --format=js", "zsh") == ["plain", "--format=json", "_"]
    assert ask("mstplan gpus --format = js") == plain("json") and ask("mstplan gpus --format =") == plain(*FORMATS)
    assert ask("mstplan gpus --format=js", "fish", "--format=js") == plain("--format=json")


def test_files_and_folders(ask: Ask) -> None:
    assert ask("mstplan max-seq -m ./co") == ["file,./co"] and ask("mstplan plan --recipe ") == ["file,"]
    assert ask("mstplan validate r") == ["file,r"] and ask("mstplan calibrate -o h") == ["dir,h"]
    assert "file,x" in ask("mstplan validate --results x")


def test_each_shell_has_its_own_form(ask: Ask) -> None:
    assert ask("mstplan max-seq --loss c", "zsh") == ["plain", "chunked", "_", "plain", "cce", "_"]
    assert ask("mstplan max-seq --assum", "zsh")[:2] == ["plain", "--assume"]
    assert ask("mstplan max-seq --batc", "fish", "--batc") == ["plain,--batch\tSequences per micro-batch"]
    assert ask("mstplan max-seq --loss ", "fish", "") == plain(*LOSSES)


@pytest.mark.parametrize(
    "line", ["mstplan plan --recipe 'half a", 'mstplan plan -m "', "mstplan 'plan' --gpu h10", "mstplan"]
)
def test_quotes_that_are_open_stop_nothing(ask: Ask, line: str) -> None:
    ask(line)


def test_what_no_shell_asks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, place in (("", "1"), ("tcsh_complete", "1"), ("bash_source", "1"), ("bash_complete", "x")):
        monkeypatch.setenv("_MSTPLAN_COMPLETE", asked)
        monkeypatch.setenv("COMP_WORDS", "mstplan pl")
        monkeypatch.setenv("COMP_CWORD", place)
        assert run() == (0, "", "")


def test_neither_torch_nor_typers_declarations_are_needed() -> None:
    """And a usual call does not read this module."""
    program = (
        "import sys; sys.argv = ['mstplan', 'gpus']; from mstplan import cli\n"
        "assert 'mstplan.cli.completing' not in sys.modules\n"
        "from mstplan.cli import completing\n"
        "for words in (['measure', '--suite'], ['validate', '--rung'], ['plan']): assert completing.offers(words, '')\n"
        "from mstplan.cli.commands import app\n"
        "assert not app.registered_commands\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


# ---- --show-completion, --install-completion ------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("ZDOTDIR", "XDG_CONFIG_HOME", "SHELL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("shell", completing.SHELLS)
def test_a_script_is_shown_and_put_where_the_shell_looks(
    run: Run, home: Path, shell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = run("--show-completion", shell)
    assert shown.code == 0 and f"_MSTPLAN_COMPLETE={shell}_complete" in shown.out
    assert run(f"--show-completion={shell}").out == shown.out
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert run("--show-completion").out == shown.out
    said = run("--install-completion")
    place = completing.SHELLS[shell].place(home)
    assert said.code == 0 and f"wrote {place}\n" in said.out and place.read_text() == shown.out


def test_a_start_file_gets_a_line_once_and_keeps_what_it_has(run: Run, home: Path) -> None:
    (home / ".bashrc").write_bytes(b"alias ll='ls -l' # \xff")
    for _ in range(2):
        assert run("--install-completion", "bash").code == 0
    lines = (home / ".bashrc").read_bytes().splitlines()
    assert lines == [b"alias ll='ls -l' # \xff", f"source {home}/.bash_completions/mstplan.sh".encode()]
    run("--install-completion", "zsh")
    assert (home / ".zshrc").read_text().splitlines() == ["fpath+=~/.zfunc; autoload -Uz compinit; compinit"]


def test_what_is_no_shell_is_refused(run: Run, home: Path) -> None:
    said = run("--install-completion", "fisch")
    assert (
        said.code == 2
        and said.err == "mstplan: unknown shell 'fisch'. Did you mean fish, zsh?\nKnown: bash, zsh, fish.\n"
    )
    assert run("--show-completion").code == 2 and not [*home.iterdir()]
    (home / ".zfunc").write_text("a file")
    said = run("--install-completion", "zsh")
    assert said.code == 2 and len(said.err.splitlines()) == 2 and not said.out


def test_help_tells_of_them(run: Run) -> None:
    said = run("--help").out
    assert "--show-completion" in said and "--install-completion" in said


# ---- a real bash ----------------------------------------------------------------------------------------------------------

BASH = r"""
source "$1"
line=$2
COMP_LINE=$line COMP_POINT=${#line}
IFS=' ' read -ra COMP_WORDS <<< "$line"
[[ $line == *' ' ]] && COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
compopt() { echo compopt "$@"; }
[[ $(complete -p mstplan) == *_mstplan_completion* ]] || exit 3
_mstplan_completion mstplan
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_a_real_bash_completes(tmp_path: Path) -> None:
    script, program = tmp_path / "mstplan.sh", tmp_path / "mstplan"
    script.write_text(completing.SHELLS["bash"].script)
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m mstplan "$@"\n')
    program.chmod(0o755)

    def pressed(line: str) -> list[str]:
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", "--norc", "-c", BASH, "bash", str(script), line]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split("\n")[:-1]

    assert pressed("mstplan pl") == ["plan", "plot"]
    assert pressed("mstplan max-seq --gpu-m") == ["--gpu-mem"]
    assert pressed("mstplan max-seq --model llama3.2-1b --optimizer adaf") == ["adafactor"]
    assert pressed("mstplan plan --recipe ")[0] == "compopt -o default"
