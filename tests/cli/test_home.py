"""A user without a home, with somebody else's, or one that cannot be written to: answers all the same, one refusal where writing was asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mstplan import load_model
from mstplan.plan import calibration
from mstplan.spec.catalog import load_config

from ..damage import strict
from .conftest import Run

Make = Callable[[Path, pytest.MonkeyPatch], str]  # gives MSTPLAN_HOME, "" for none
ON = ("-m", "gpt2", "--gpu", "h100")
ASKED = (
    ("gpus",),
    ("models", "gpt"),
    ("shapes", "-m", "gpt2"),
    ("max-seq", *ON),
    ("plan", *ON, "--seq-len", "4k", "-s", "mst"),
    ("theorem", *ON),
    ("plot", *ON, "-o", "out.csv", "--points", "2", "--force"),
)


def _denied(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """What somebody else's folder of mode 700 says to anybody but root."""
    home, real = (
        str(folder / "theirs"),
        {name: getattr(os, name) for name in ("stat", "lstat", "open", "mkdir", "scandir")},
    )

    def refuse(name: str) -> Callable[..., object]:
        def refusing(path: object = ".", *more: object, **named: object) -> object:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(home + os.sep):
                raise PermissionError(13, "Permission denied", str(path))
            return real[name](path, *more, **named)

        return refusing

    for name in real:
        patch.setattr(os, name, refuse(name))
    return home


def _no_home(_: Path, patch: pytest.MonkeyPatch) -> str:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    patch.setattr(Path, "home", unknown)
    return ""


def _file(folder: Path, _: pytest.MonkeyPatch) -> str:
    (folder / "file").write_text("")
    return str(folder / "file")


def _loop(folder: Path, _: pytest.MonkeyPatch) -> str:
    (folder / "loop").symlink_to(folder / "loop")
    return str(folder / "loop")


HOMES: dict[str, Make] = {
    "none": _no_home,
    "somebody else's": _denied,
    "a file": _file,
    "a loop of links": _loop,
    "a long name": lambda folder, patch: "x" * 300,
    "a long path": lambda folder, patch: str(folder) + "/xxxxxxxxx" * 500,
    "what can be no file": lambda folder, patch: "/proc/mstplan",
}


@pytest.fixture(params=HOMES)
def no_home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    named: str = HOMES[request.param](tmp_path, monkeypatch)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MSTPLAN_HOME", named)
    return named


@pytest.mark.usefixtures("no_home")
def test_every_answer_is_the_usual_one(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for asked in ASKED:
        said = run(*asked, "--json")
        with monkeypatch.context() as usual:
            usual.setenv("MSTPLAN_HOME", str(tmp_path / "usual"))
            assert (said.code, said.err) == (0, "") and strict(said.out) == run(*asked, "--json").json
    assert {path.name for path in tmp_path.iterdir()} <= {"out.csv", "file", "loop"}


@pytest.mark.usefixtures("no_home")
def test_writing_there_is_refused(run: Run) -> None:
    """Before anything is traced."""
    said = run("calibrate", "--from", "trace", "-m", "gpt2", "-s", "standard")
    assert said.code == 2 and said.out == "" and len(said.err.splitlines()) == 2 and len(said.err) < 500, said


@pytest.mark.usefixtures("no_home")
def test_the_api_refuses_it_too(tmp_path: Path) -> None:
    model = load_model("gpt2")
    with pytest.raises(calibration.files.OutputError) as e:
        calibration.write_calibrations(model, calibration.calibrations_of(model), calibration.folders()[0])
    assert len(str(e.value).splitlines()) == 2


@pytest.mark.parametrize(
    "name",
    ["m" * n for n in range(249, 256)] + ["\x1b" * 70, "\x01" * 255, "é" * 127, "a.json", " ", "-m", "'\"", "%s{}"],
    ids=repr,
)
def test_models_in_folders_of_any_name(run: Run, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSTPLAN_HOME", str(tmp_path / "home"))
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(dict(load_config("smollm2-135m"))))
    model = str(tmp_path / name)
    for asked in (
        ("max-seq",),
        ("plan", "--seq-len", "4k", "-s", "mst"),
        ("plot", "-o", "out.csv", "--points", "2", "--force", "-s", "mst"),
    ):
        said = run(*asked, "-m", model, "--gpu", "h100")
        assert said.code == 0 and said.err == "" and said.out.replace("\n", "").isprintable(), said
