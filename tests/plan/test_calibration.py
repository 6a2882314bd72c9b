"""The calibrations that ship: one for every dense model, strategy and side of a sliding window, and within a hair of the formula."""

from __future__ import annotations

import pytest

from mstplan import card, kept, load_model, model_names, plan_at
from mstplan.plan import calibration
from mstplan.plan.layout import bare_recipe, calibration_at, layout_of, step_sizes
from mstplan.plan.solve import choose_chunks, fixed_chunks
from mstplan.profiles import ROOT
from mstplan.step.recipe import STRATEGIES
from mstplan.step.steps import Chunks, Layout, step

OLDER = ("falcon", "opt", "bloom", "gptj", "gpt_bigcode")
"""Families of short contexts, most of which keep matrices of all pairs of tokens: the formula answers for them."""
NEWER = ("gemma3n_text", "gemma4_text")
"""Families whose layers differ too much for quick traces: the formula answers for them, too."""
MODELS = {name: model for name in model_names() if (model := load_model(name)).model_type not in (*OLDER, *NEWER)}
DENSE = [name for name, model in MODELS.items() if model.experts is None and model.mixer is None]
"""Of layers that mix tokens otherwise than by attention no calibrations ship: the formula answers."""
ON = card("a100-80gb")
LENGTHS = (4096, 65536, 1048576)

CALIBRATED = {
    name: recipe for name, recipe in STRATEGIES.items() if name != "chunked-loss" and not recipe.layer_in_chunks
}
"""Strategies of which calibrations ship."""


@pytest.fixture(autouse=True)
def shipped_ones(tmp_path, monkeypatch):
    """None of the user's own."""
    monkeypatch.setenv("MSTPLAN_HOME", str(tmp_path))


def test_no_file_without_a_model():
    assert {path.stem for path in (ROOT / "calibrations").glob("*.json")} == set(DENSE)


@pytest.mark.parametrize("name", DENSE)
def test_every_strategy_at_every_length(name):
    model = load_model(name)
    for strategy, recipe in CALIBRATED.items():
        for seq_len in LENGTHS:
            plan = plan_at(
                model, recipe.changed(pad_to=8), ON, seq_len
            )  # else a shorter batch with a padded mask may need most
            assert plan.calibration is not None, (strategy, seq_len)
            assert plan.calibration.provenance["rung"] == "trace" and plan.calibration.residual <= 0.005


@pytest.mark.parametrize("name", DENSE)
def test_what_it_changes(name):
    """Formula and trace count the same tensors. A calibration adds buffers of some bytes, and to the loss the copy of the labels
    (8 bytes a token) that transformers makes of several sequences: it is solved from two sequences and three."""
    model = load_model(name)
    for strategy, recipe in CALIBRATED.items():
        chunks = fixed_chunks(recipe, 16, 32) if recipe.loss == "chunked" else Chunks(1, 1)
        for seq_len in LENGTHS:
            layout, where = layout_of(model, recipe, chunks, seq_len), step_sizes(recipe, seq_len, chunks)
            formula = step(model, layout, 0)
            found = calibration_at(model, recipe, seq_len, chunks)
            assert found is not None, (strategy, seq_len)
            told, calibrated = formula.largest(where)[1], formula.calibrated(found.moments).largest(where)[1]
            assert abs(calibrated - told) <= 8 * seq_len + 1e-4 * told, (strategy, seq_len)


def test_other_kernels_stand_on_the_formula():
    """What ships is of FlashAttention-2 and the memory-efficient kernel, which sdpa runs on an A100."""
    model, recipe = load_model("llama3.1-8b"), STRATEGIES["checkpoint"]
    assert plan_at(model, recipe, card("h100"), 4096).calibration is None
    assert plan_at(model, recipe, card("h100", torch="2.10+cu128"), 4096).calibration is not None


def test_other_recipes_stand_on_the_formula():
    model = load_model("llama3.1-8b")
    for changes in ({"optimizer": "sgd"}, {"precision": "mixed"}, {"attention": "eager"}, {"accumulation": 2}):
        assert plan_at(model, STRATEGIES["checkpoint"].changed(**changes), ON, 4096).calibration is None
    assert plan_at(model, STRATEGIES["checkpoint"].changed(batch=3), ON, 4096).calibration is not None
    assert choose_chunks(model, STRATEGIES["mst"], ON, 65536).loss > 1


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"schema_version": 1}', '{"schema_version": 99, "fingerprint": "", "families": []}']
)
def test_a_damaged_file_is_none(tmp_path, text):
    """The one that ships is used."""
    folder = tmp_path / "calibrations"
    folder.mkdir()
    (folder / "llama3.1-8b.json").write_text(text)
    assert plan_at(load_model("llama3.1-8b"), STRATEGIES["mst"], ON, 4096).calibration is not None


def test_another_model_of_the_same_name_has_none():
    other = load_model("llama3.1-8b")._replace(hidden=2048)
    assert calibration.calibrations_of(other) == ()


@pytest.mark.parametrize("name", DENSE)
def test_what_ships_passes_the_check_of_what_users_keep(name):
    """And is read in the same way."""
    model, file = load_model(name), kept.find_file(ROOT / "calibrations" / f"{name}.json")
    assert file is not None and calibration._read_checked(model, file) == calibration.calibrations_of(model) != ()


CHANGES = (
    {},
    {"optimizer": "sgd"},
    {"precision": "mixed"},
    {"precision": "fp32", "attention": "eager"},
    {"optimizer_in_backward": True},
    {"gpus": 8, "sharding": "fsdp"},
    {"optimizer_on_host": True, "weights_on_host": True},
)


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m", "llama3.1-405b", "gpt-oss-20b"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_moments_of_real_steps_are_no_damage(name, changes):
    model = load_model(name)
    for strategy in ("standard", "checkpoint", "mst-offload"):
        recipe = STRATEGIES[strategy].changed(**changes)
        several = recipe.loss == "chunked"
        moments = step(model, Layout(bare_recipe(recipe), several, several, False), 0).moments
        found = {instant: tuple(moment.live for moment in those) for instant, those in moments.items()}
        assert calibration._find_moment_problem(model, recipe, found) is None
