"""Coefficients solved from a few traces: exact at lengths and chunks that they were not solved from; used by the planner; refused when off."""

from __future__ import annotations

import json

import pytest

from mstplan.checking import calibrate as solving
from mstplan.checking.calibrate import Family, calibrate, families_of
from mstplan.errors import ModelError, RecipeError
from mstplan.plan import calibration, solve
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.steps import Chunks
from mstplan.tracing.tracer import trace
from mstplan.units import GIB

from ..tracing.tiny import TINY, step_of

MODEL = read_config(TINY, "tiny")._replace(name="tiny")
CARD = card(memory=8 * GIB)


def trace_at(recipe: Recipe, seq_len: int):
    return step_of(recipe, seq_len)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder of its own."""
    monkeypatch.setenv("MSTPLAN_HOME", str(tmp_path))
    return tmp_path / "calibrations"


@pytest.fixture(scope="module")
def mst():
    return calibrate(MODEL, Family("mst", True, True, False), trace_at)


def test_the_residual_is_rounding(mst):
    assert 0 <= mst.residual < 1e-3  # a small model: 512 bytes a tensor are something
    assert mst.provenance["rung"] == "trace" and mst.provenance["torch"]


def test_the_planner_uses_it_and_says_so(mst, folder):
    recipe = strategy("mst", mlp_chunks=3, loss_chunks=7)
    assert solve.plan_at(MODEL, recipe, CARD, 7777).calibration is None
    calibration.write_calibrations(MODEL, [mst], folder)
    after = solve.plan_at(MODEL, recipe, CARD, 7777)
    assert after.calibration == mst
    traced = step_of(recipe, 7777).with_workspace(CARD.gpu.workspaces_bytes).peak
    assert after.instant == traced.instant
    assert abs(after.peak_bytes / traced.bytes - 1) <= 1e-3
    for instant in after.instants():  # one ledger: entries still add up to what is told
        assert sum(entry.bytes for entry in instant.entries) == instant.bytes
    assert after.peak_bytes == max(i.bytes for i in after.instants())


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd"},
        {"precision": "mixed"},
        {"checkpoint": 2},
        {"mlp_chunks": 1},
        {"accumulation": 2},
        {"attention": "eager"},
    ],
)
def test_other_recipes_stand_on_the_formula(mst, folder, changes):
    calibration.write_calibrations(MODEL, [mst], folder)
    recipe = strategy("mst", **{"mlp_chunks": 3, "loss_chunks": 7, **changes})
    assert solve.plan_at(MODEL, recipe, CARD, 5000).calibration is None


def test_batches_are_of_the_family(mst, folder):
    calibration.write_calibrations(MODEL, [mst], folder)
    recipe = strategy("mst", mlp_chunks=3, loss_chunks=7, batch=5)
    found = solve.plan_at(MODEL, recipe, CARD, 3001)
    traced = step_of(recipe, 3001).with_workspace(CARD.gpu.workspaces_bytes).peak
    assert found.calibration is not None and abs(found.peak_bytes / traced.bytes - 1) <= 1e-3


def test_s_max_is_solved_from_it(mst, folder):
    calibration.write_calibrations(MODEL, [mst], folder)
    recipe = strategy("mst", mlp_chunks=4, loss_chunks=8)
    chunks = Chunks(4, 8)
    s_max = solve.longest_sequence(MODEL, recipe, CARD, chunks)
    assert (
        solve.peak_at(MODEL, recipe, CARD, s_max, chunks)[1]
        <= CARD.budget_bytes
        < solve.peak_at(MODEL, recipe, CARD, s_max + 1, chunks)[1]
    )


@pytest.mark.parametrize("damage", ["", "{", '{"schema_version": 99}', "[]"])
def test_a_damaged_or_newer_file_is_none(mst, folder, damage):
    calibration.write_calibrations(MODEL, [mst], folder)
    (folder / "tiny.json").write_text(damage)
    assert calibration.calibrations_of(MODEL) == ()


def test_another_model_of_that_name_is_not_served(mst, folder):
    calibration.write_calibrations(MODEL, [mst], folder)
    assert calibration.calibrations_of(MODEL._replace(hidden=512)) == ()
    assert calibration.calibrations_of(MODEL) == (mst,)


def test_an_old_file_is_kept(mst, folder):
    path = calibration.write_calibrations(MODEL, [mst], folder)
    old = path.read_bytes()
    calibration.write_calibrations(MODEL, [mst], folder)
    assert [p.name for p in folder.iterdir()] == ["tiny.json"]  # the same: nothing to keep
    calibration.write_calibrations(MODEL, [mst._replace(residual=0.001)], folder)
    assert (folder / "tiny.json.1").read_bytes() == old
    assert json.loads(path.read_text())["families"][0]["residual"] == 0.001


def test_steps_that_are_not_alike_are_refused():
    def other_at_some_length(recipe: Recipe, seq_len: int):
        return step_of(Recipe() if seq_len == solving.TRACE_POINTS[1].seq_len else recipe, seq_len)

    with pytest.raises(ModelError, match="differ between lengths"):
        calibrate(MODEL, Family("checkpoint", False, False, False), other_at_some_length)


def test_a_residual_too_large_is_refused():
    def more_where_it_is_checked(recipe: Recipe, seq_len: int):
        return step_of(recipe, seq_len if seq_len != solving.HOLDOUT_POINT.seq_len else seq_len + 2000)

    with pytest.raises(ModelError, match="not written"):
        calibrate(MODEL, Family("checkpoint", False, False, False), more_where_it_is_checked)


def test_families_follow_windows_and_chunks():
    assert Family("mst", False, False, False) in families_of(MODEL) and not any(f.masked for f in families_of(MODEL))
    sliding = MODEL._replace(layer_kinds=tuple(kind._replace(window=512) for kind in MODEL.layer_kinds))
    assert {f.masked for f in families_of(sliding, ["checkpoint"])} == {False, True}
    assert Family("chunked-loss", False, True, False) in families_of(MODEL)
    assert not any(f.several_mlp for f in families_of(MODEL, ["chunked-loss"]))  # its MLP is in one piece


def test_layers_in_chunks_have_none(tmp_path):
    assert not any("layer" in family.strategy for family in families_of(MODEL))
    with pytest.raises(RecipeError, match="mst-layer has no calibration"):
        solving.calibrate_all(["gpt2"], ["checkpoint", "mst-layer"], tmp_path, keep=False)


@pytest.mark.parametrize("several", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("window", [64, 512, 2048, 262144])
def test_points_lie_on_the_familys_side_of_the_window(window, several):
    for point in (*solving.TRACE_POINTS, solving.HOLDOUT_POINT):
        below = solving._fit_point(point, Family("mst", *several, False), window)
        above = solving._fit_point(point, Family("mst", *several, True), window)
        assert below.seq_len < window <= above.seq_len
        for fitted in (below, above):
            assert fitted.seq_len % fitted.mlp_chunks == 0 == fitted.seq_len % fitted.loss_chunks
            assert (fitted.mlp_chunks > 1, fitted.loss_chunks > 1) == several


def test_windows_longer_than_every_point_are_solved_for():
    """Lengths that are all near such a window leave shares of b s s and of s s undetermined."""
    window = 40_000
    sliding = {**TINY, "model_type": "mistral", "sliding_window": window}
    model = read_config(sliding, "tiny")

    def trace_sliding(recipe: Recipe, seq_len: int):
        return trace(sliding, recipe, seq_len)

    solved = calibrate(model, Family("checkpoint", False, False, True), trace_sliding)
    assert solved.residual < 1e-3
