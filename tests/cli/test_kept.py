"""Whatever lies in the user's folder, planning answers: with what is sound there, or without it and with a line that names the file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mstplan import card, load_model, max_seq, plan_at, strategy
from mstplan.plan import advice, calibration
from mstplan.profiles import ROOT
from mstplan.spec import hardware

from ..damage import damages, strict
from .conftest import Run, Said

MODEL = load_model("gpt2")
SHIPPED = json.loads((ROOT / "calibrations" / "gpt2.json").read_text())
RECIPES = [strategy(name) for name in ("standard", "checkpoint", "mst")]
CONSTANTS = {
    "cards": {
        "NVIDIA H100 80GB HBM3": {
            "context_bytes": 500 * 2**20,
            "cublas_workspace_bytes": 32 * 2**20,
            "context_source": "measured: 3 steps",
        },
        "A card of another kind": {"context_bytes": 1, "cublas_workspace_bytes": 0, "context_source": "measured"},
    }
}
PLAN = ("plan", "-m", "gpt2", "--gpu", "h100", "--seq-len", "4k", "-s", "checkpoint")
COMMANDS = (
    PLAN,
    ("max-seq", "-m", "gpt2", "--gpu", "h100"),
    ("theorem", "-m", "gpt2", "--gpu", "h100"),
    ("plot", "-m", "gpt2", "--gpu", "h100", "-o", "points.csv", "--points", "2", "--force", "-s", "checkpoint,mst"),
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSTPLAN_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "calibrations").mkdir(parents=True)
    return tmp_path / "home"


def put(path: Path, text: str) -> None:
    """As another process writes it."""
    new = path.with_name("new")
    new.write_text(text, encoding="utf-8", errors="surrogatepass")
    new.replace(path)


def answers() -> list[int]:
    on = card("h100")
    return [
        n for recipe in RECIPES for n in (plan_at(MODEL, recipe, on, 4096).peak_bytes, max_seq(MODEL, recipe, on).s_max)
    ]


def sound(note: str, name: str) -> bool:
    return name in note and note.endswith("it is left out.") and note.isprintable() and len(note) <= 300


def test_damaged_calibrations(folder: Path, run: Run) -> None:
    usual, path = answers(), folder / "calibrations" / "gpt2.json"
    seen = {"noted": 0, "same": 0}
    for n, (what, text) in enumerate(damages({**SHIPPED, "families": SHIPPED["families"][:2]}, seed=1, per_place=1)):
        put(path, text)
        if n % 8 == 0:
            said = run(*COMMANDS[n // 8 % 2], "--json")
            assert (said.code, said.err) == (0, "") and strict(said.out), what
        notes = advice.left_out_notes(MODEL)
        if notes:
            assert len(notes) == 1 and sound(notes[0], "gpt2.json"), (what, notes)
            assert answers() == usual, what
            seen["noted"] += 1
        else:  # nothing an answer depends on; or a moment fewer
            assert answers() == pytest.approx(usual, rel=0.001), what
            strict(json.dumps([plan_at(MODEL, r, card("h100"), 4096).calibration for r in RECIPES], allow_nan=False))
            seen["same"] += 1
    assert seen["noted"] > 3 * seen["same"] > 0, seen


@pytest.mark.parametrize("number", [-(10**12), -1, 0, 1, 10**12, 1 << 62])
@pytest.mark.parametrize("where", [None, *range(8)])
def test_moments_that_no_step_has(folder: Path, number: int, where: int | None) -> None:
    """All vectors alike damaged: in one share, or in all."""
    usual = answers()
    families = [
        {
            **f,
            "moments": {
                name: [[number if where in (None, n) else v[n] for n in range(8)] for v in vs]
                for name, vs in f["moments"].items()
            },
        }
        for f in SHIPPED["families"]
    ]
    put(folder / "calibrations" / "gpt2.json", json.dumps({**SHIPPED, "families": families}))
    notes, found = advice.left_out_notes(MODEL), answers()
    assert (notes and found == usual) or (
        -1 <= number <= 1 and where not in (0, 1, None) and min(found) > 0 and max(found) < 1 << 40
    )


def test_damaged_constants(folder: Path) -> None:
    usual = hardware.find_gpu("h100")
    measured = usual._replace(**CONSTANTS["cards"]["NVIDIA H100 80GB HBM3"])
    noted = 0
    for what, text in damages(CONSTANTS, seed=2, per_place=99):
        put(folder / "devices.json", text)
        found, notes = hardware.find_gpu("h100"), hardware.left_out_notes()
        noted += bool(notes)
        assert not notes or (len(notes) == 1 and sound(notes[0], "devices.json") and found == usual), what
        assert 0 <= found.context_bytes < found.usable_bytes, what
        assert found.context_source.isprintable() and len(found.context_source) <= 300
        assert (
            notes
            or found in (usual, measured)
            or found._replace(context_source="") == measured._replace(context_source="")
        ), what
    assert noted > 50


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(10**10)


FILES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_text(""),
    "nested": lambda path: path.write_text("[" * 5000),
    "a number": lambda path: path.write_text("9" * 5000),
    "not UTF-8": lambda path: path.write_bytes(b'{"cards": "\xff"}'),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "half a character": lambda path: path.write_text('{"cards": {"\\ud800": {}}}'),
    "a pipe": _fifo,
    "without end": lambda path: path.symlink_to("/dev/zero"),
    "too large": _large,
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["devices.json", "calibrations/gpt2.json"])
def test_files_of_every_kind(folder: Path, run: Run, kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = run(*PLAN, "--json").json
    FILES[kind](folder / name)
    said = run(*PLAN, "--json")
    told = strict(said.out)
    assert (
        said.code == 0
        and said.err == ""
        and told["peak_bytes"] == usual["peak_bytes"]
        and told["budget_bytes"] == usual["budget_bytes"]
    )
    new = [line for line in told["notes"] if line not in usual["notes"]]
    assert len(new) == ("link" not in kind) and all(sound(line, name.rpartition("/")[2]) for line in new)


def _told(said: Said) -> str:
    return re.sub(r"\s+", " ", said.out)


@pytest.mark.parametrize("asked", COMMANDS, ids=lambda asked: asked[0])
def test_every_command_says_it_once(
    folder: Path, run: Run, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder / "devices.json", "[]")
    put(folder / "calibrations" / "gpt2.json", json.dumps({**SHIPPED, "families": [{}]}))
    assert [
        sum(name in line for line in strict(run(*asked, "--json").out)["notes"])
        for name in ("devices.json", "gpt2.json")
    ] == [1, 1]
    assert _told(run(*asked)).count("it is left out.") == 2
    assert _told(run("gpus")).count("it is left out.") == len(strict(run("gpus", "--json").out)["notes"]) == 1
    put(folder / "devices.json", json.dumps(CONSTANTS))
    put(folder / "calibrations" / "gpt2.json", json.dumps(SHIPPED))
    assert "left out" not in _told(run(*asked)) + _told(run("gpus"))


def _more(share: float) -> str:
    """The calibrations of a model whose every byte is more by that share."""
    families = [
        {**f, "moments": {name: [[round(n * (1 + share)) for n in v] for v in vs] for name, vs in f["moments"].items()}}
        for f in SHIPPED["families"]
    ]
    return json.dumps({**SHIPPED, "families": families})


def test_what_is_written_counts_for_the_next_answer(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same process: written by it or by another, taken away, or in another folder."""

    def asked() -> tuple[int, int, int]:
        told = run(*PLAN, "--json").json
        found = plan_at(MODEL, RECIPES[1], card("h100"), 4096)
        assert told["peak_bytes"] == found.peak_bytes and told["budget_bytes"] == found.budget_bytes
        return found.peak_bytes, found.budget_bytes, max_seq(MODEL, RECIPES[1], card("h100")).s_max

    path, usual, before = folder / "calibrations" / "gpt2.json", asked(), hardware.find_gpu("h100").context_bytes
    put(path, _more(0.1))
    (more, budget, s_max) = asked()
    assert more == pytest.approx(1.1 * usual[0], rel=0.01) and budget == usual[1] and s_max < usual[2]
    put(path, _more(0.2))
    assert asked()[0] == pytest.approx(1.2 * usual[0], rel=0.01)
    calibration.write_calibrations(MODEL, calibration.calibrations_of(load_model("gpt2"))[:1], calibration.folders()[0])
    assert asked()[0] == pytest.approx(1.2 * usual[0], rel=0.01)
    monkeypatch.setenv("MSTPLAN_HOME", str(tmp_path / "another"))
    assert asked() == usual
    monkeypatch.setenv("MSTPLAN_HOME", str(folder))
    assert asked()[0] == pytest.approx(1.2 * usual[0], rel=0.01)
    path.unlink()
    assert asked() == usual
    hardware.write_measured({"NVIDIA H100 80GB HBM3": hardware.Constants(2**31, 0, "measured")})
    assert asked()[1] == usual[1] + before - 2**31
    (folder / "devices.json").unlink()
    assert asked() == usual


def test_a_models_file_is_read_for_every_answer(run: Run, tmp_path: Path) -> None:
    """Nothing of a config.json, of a recipe or of a card that was measured outlives its file in the same process."""
    config, recipe = tmp_path / "mine.json", tmp_path / "recipe.json"
    written = json.loads((ROOT / "models" / "gpt2.json").read_text())

    def parameters(layers: int) -> int:
        config.write_text(json.dumps({**written, "n_layer": layers}))
        told = run(
            "plan", "-m", "mine.json", "--gpu", "h100", "--seq-len", "1k", "--recipe", "recipe.json", "--json"
        ).json
        assert told["recipe"]["optimizer"] == json.loads(recipe.read_text())["optimizer"]
        return int(told["model"]["parameters"])

    strategy("mst", optimizer="sgd").write(recipe)
    twelve, three = parameters(12), parameters(3)
    strategy("mst", optimizer="adamw").write(recipe, force=True)
    assert twelve == parameters(12) > three == parameters(3)


def test_a_card_that_was_measured_counts_in_every_answer(folder: Path, run: Run) -> None:
    """In the list of cards, in a budget and in the smallest card; and no longer, once its file is gone."""
    big = [gpu["name"] for gpu in run("gpus", "--json").json["gpus"] if gpu["name"] == "h200"]
    asked = ("plan", "-m", "llama3.1-8b", "--gpu", "h100", "--seq-len", "32k", "-s", "checkpoint", "--json")
    before = run(*asked).json
    assert big and before["smallest_card"]["gpu"] is not None
    taken = {name: hardware.Constants(60 * 2**30, 0, "measured") for name in (before["smallest_card"]["gpu"], "h100")}
    hardware.write_measured(taken)
    after = run(*asked).json
    assert after["card"]["context_bytes"] == 60 * 2**30 and after["budget_bytes"] < before["budget_bytes"]
    assert after["smallest_card"] != before["smallest_card"] and after["s_max"] < before["s_max"]
    listed = {gpu["name"]: gpu["context_bytes"] for gpu in run("gpus", "--json").json["gpus"]}
    assert listed["h100"] == 60 * 2**30
    (folder / "devices.json").unlink()
    assert run(*asked).json == before


def test_a_models_name_leads_nowhere_else(folder: Path) -> None:
    """A Hub id has its file; no name leaves the folder."""
    for name in ("org/model", "../../escape", "/etc/x", "a" * 250, "..", "\x1b" * 70, "nul\0"):
        model = MODEL._replace(name=name)
        assert plan_at(model, RECIPES[1], card("h100"), 4096).calibration is None
        try:
            path = calibration.write_calibrations(model, calibration.calibrations_of(MODEL), calibration.folders()[0])
        except calibration.files.OutputError as e:
            assert len(str(e).splitlines()) == 2 and len(name) != len("org/model")  # noqa: PT017
        else:
            assert (
                path.parent == folder / "calibrations"
                and plan_at(model, RECIPES[1], card("h100"), 4096).calibration is not None
            )
    assert {p.name for p in folder.iterdir()} == {"calibrations"}
