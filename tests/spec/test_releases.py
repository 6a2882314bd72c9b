"""Which release of transformers is planned, and what depends on it."""

from __future__ import annotations

from importlib import metadata

import pytest

import mstplan
from mstplan.errors import ModelError, VersionError
from mstplan.plan.advice import recipe_notes
from mstplan.plan.calibration import calibrations_of
from mstplan.spec.releases import NEWEST, parse_release, release
from mstplan.tracing.cache import check_release


@pytest.mark.parametrize(("text", "number"), [("5.17", (5, 17)), (" 5.17.0 ", (5, 17)), ("5.23.0.dev0", (5, 23))])
def test_releases(text: str, number: tuple[int, int]) -> None:
    assert parse_release(text) == number == release(text).number


@pytest.mark.parametrize("text", ["", "5", "five", "5.17; rm", "v5.17", "5.17\n6", "99999.1", "5." + "1" * 1000])
def test_what_is_no_release(text: str) -> None:
    with pytest.raises(ModelError, match="no release of transformers") as e:
        mstplan.load_model("llama3.1-8b", transformers=text)
    assert len(str(e.value).splitlines()) == 2 and len(str(e.value)) < 250


def test_the_installed_one_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_name: str) -> str:
        raise metadata.PackageNotFoundError

    for version, expected in ((lambda _name: "5.19.2", "5.19.2"), (lambda _name: "main", NEWEST), (nothing, NEWEST)):
        monkeypatch.setattr(metadata, "version", version)
        assert release().version == expected


@pytest.mark.parametrize(("asked", "has_sdpa"), [("5.17.0", True), ("5.20.2", True), ("5.21", False), ("5.23", False)])
def test_gemma_2_runs_sdpa_up_to_one(asked: str, has_sdpa: bool) -> None:
    model = mstplan.load_model("gemma2-2b", transformers=asked)
    assert model.has_sdpa == has_sdpa and model.release is not None
    notes = " ".join(recipe_notes(model, mstplan.strategy("standard")))
    assert f"as in transformers {asked} (as asked): sdpa up to 5.20, none from 5.21 on" in notes
    assert bool(calibrations_of(model)) != has_sdpa  # those that ship are of a release without


@pytest.mark.parametrize("name", ["llama3.1-8b", "gemma3-4b", "gpt-oss-20b"])
def test_others_depend_on_none(name: str) -> None:
    old, new = mstplan.load_model(name, transformers="5.17"), mstplan.load_model(name)
    assert old == new and old.release is None


def test_a_trace_runs_the_installed_one() -> None:
    installed = {"transformers": "5.23.0"}
    check_release(installed, None)
    check_release(installed, "5.23")
    with pytest.raises(VersionError, match=r"not 5\.17") as e:
        check_release(installed, "5.17")
    assert len(str(e.value).splitlines()) == 2
