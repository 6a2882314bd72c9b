"""Coefficients from measurements: made up from the formula, they come back; noise and too few points are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from mstplan import MeasurementError, card, load_model, max_seq
from mstplan.checking import fit, validate
from mstplan.measuring.measurement import Measurement, slice_config
from mstplan.plan import calibration
from mstplan.plan.layout import layout_of, step_sizes
from mstplan.spec import hardware
from mstplan.spec.catalog import load_config
from mstplan.spec.config import read_config
from mstplan.step.recipe import STRATEGIES, Recipe
from mstplan.step.steps import Chunks, step

from ..measuring.measured import CARD, CPU, case, measured

NAME = "llama3.2-1b"
WORKSPACE = 32 * 2**20
LENGTHS = (4096, 6144, 10240, 12288, 20480)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MSTPLAN_HOME", str(tmp_path))


def as_planned(
    strategy: str, tokens: int, layers: int | None = None, change: Callable[[int], int] = lambda size: size, **more: Any
) -> Measurement:
    """What the formula says of a step, measured."""
    config: dict[str, Any] = (
        dict(load_config(NAME)) if layers is None else slice_config(load_config(NAME), layers, NAME)
    )
    one = case(strategy, tokens, config, model=NAME, layers=layers, device=more.pop("device", "cuda"), **more)
    model, recipe = read_config(config, NAME), one.recipe
    chunks = Chunks(int(recipe.mlp_chunks), int(recipe.loss_chunks))
    workspace = WORKSPACE if one.device == "cuda" else 0
    told = step(model, layout_of(model, recipe, chunks, tokens), workspace).instants(step_sizes(recipe, tokens, chunks))
    return measured(one, {i.name: change(i.bytes) for i in told}, workspace=workspace, context=500 * 2**20)


def points(strategy: str, **more: Any) -> list[Measurement]:
    if STRATEGIES[strategy].loss != "chunked":
        return [as_planned(strategy, tokens, **more) for tokens in LENGTHS]
    return [
        as_planned(strategy, tokens, mlp_chunks=2 + n % 3, loss_chunks=8 >> n % 3, **more)
        for n, tokens in enumerate((*LENGTHS, 16384))
    ]


def errors(found: Iterable[calibration.Calibration], at: Measurement) -> list[float]:
    told = validate.step_of(at, validate.FORMULA)
    assert told is not None
    (one,) = found
    where = step_sizes(at.case.recipe, at.case.seq_len, validate.chunks_of(at))
    return [i.bytes / at.instants[i.name] - 1 for i in told.calibrated(one.moments).instants(where)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_the_formula_says_comes_back(strategy):
    chunks = {"mlp_chunks": 4, "loss_chunks": 16} if STRATEGIES[strategy].loss == "chunked" else {}
    found = fit.fit_model(load_model(NAME), points(strategy))
    assert not found.left_out and found.calibrations[0].residual < 1e-5
    assert found.calibrations[0].provenance["left_out_error"] < 1e-4
    longer = as_planned(strategy, 65536, **chunks)
    assert errors(found.calibrations, longer) == pytest.approx([0] * len(longer.instants), abs=2e-5)


@pytest.mark.parametrize("strategy", ["standard", "checkpoint", "mst", "mst-offload"])
def test_slices_tell_the_whole_model(strategy):
    """Memory at an instant is a constant and so much for every layer."""
    chunks = [
        {"mlp_chunks": 2 + n % 3, "loss_chunks": 8 >> n % 3} if STRATEGIES[strategy].loss == "chunked" else {}
        for n in range(9)
    ]
    lengths = (4096, 6144, 10240, 12288, 20480, 8192, 16384, 5120, 9216)
    some = [as_planned(strategy, tokens, layers=(4, 6, 9)[n // 3], **chunks[n]) for n, tokens in enumerate(lengths)]
    found = fit.fit_model(load_model(NAME), some)
    whole = as_planned(strategy, 32768, **({"mlp_chunks": 4, "loss_chunks": 16} if chunks[0] else {}))
    assert errors(found.calibrations, whole) == pytest.approx([0] * len(whole.instants), abs=1e-4)
    assert found.calibrations[0].provenance["points"][0][-1] == 4


def test_segments_of_a_slice_do_not():
    with pytest.raises(MeasurementError, match=r"no measurement of llama3\.2-1b"):
        fit.fit_model(load_model(NAME), [as_planned("checkpoint-sqrt", tokens, layers=4) for tokens in LENGTHS])


def test_steps_of_a_trainer_do_not():
    with pytest.raises(MeasurementError, match="no measurement"):
        fit.fit_model(load_model(NAME), points("checkpoint", trainer="transformers"))


def test_too_few_or_too_equal_points():
    model = load_model(NAME)
    for few in (points("mst")[:4], [*points("mst")[:1]] * 8, []):
        with pytest.raises(MeasurementError, match=r"mstplan measure -m llama3\.2-1b"):
            fit.fit_model(model, few)
    both = fit.fit_model(model, [*points("mst")[:2], *points("checkpoint")])
    assert len(both.calibrations) == 1 and "mst: 2 points, and 5 are needed" in both.left_out[0]


def test_what_no_coefficients_describe_is_refused():
    noisy = [
        as_planned("checkpoint", tokens, change=lambda size, n=n: int(size * (1 + 0.02 * (-1) ** n)))
        for n, tokens in enumerate(LENGTHS)
    ]
    with pytest.raises(MeasurementError, match=r"miss a measurement by .*more than 0\.5%"):
        fit.fit_model(load_model(NAME), noisy)


def test_families_are_apart():
    """Other recipes, cards and libraries, and what ran out of memory."""
    from dataclasses import replace

    some = points("checkpoint")
    other_card = [
        replace(m, environment={**CARD, "card": "NVIDIA A100-SXM4-80GB"})
        for m in points("checkpoint", change=lambda size: 2 * size)
    ]
    lost = [replace(m, outcome="out of memory", ranks=()) for m in points("checkpoint")]
    found = fit.fit_model(load_model(NAME), [*some, *other_card, *lost, *points("checkpoint", optimizer="sgd")])
    assert len(found.calibrations) == 3 and all(c.residual < 1e-5 for c in found.calibrations)


def test_the_planner_uses_it_and_says_so():
    """A card that takes a tenth more than the formula says."""
    model, on = load_model(NAME), card("h100", torch="2.10")  # whose kernels were measured
    before = max_seq(model, STRATEGIES["checkpoint"], on).s_max
    calibration.write_calibrations(
        model,
        fit.fit_model(model, points("checkpoint", change=lambda size: size + size // 10)).calibrations,
        calibration.folders()[0],
    )
    answer = max_seq(model, STRATEGIES["checkpoint"], on)
    assert answer.s_max < before and answer.plan.calibration is not None
    assert (
        answer.plan.calibration.source.startswith("measurements with torch")
        and answer.plan.calibration.provenance["card"] == CARD["card"]
    )
    kept = max_seq(model, STRATEGIES["mst"], on)
    assert kept.plan.calibration is None or kept.plan.calibration.provenance["rung"] == "trace"


def test_other_families_of_a_file_stay():
    model, folder = load_model(NAME), calibration.folders()[0]
    for strategy in ("checkpoint", "mst", "checkpoint"):
        calibration.write_calibrations(model, fit.fit_model(model, points(strategy)).calibrations, folder)
    assert len(calibration.calibrations_of(model)) == 2


def test_a_cards_constants():
    found = fit.device_constants([*points("checkpoint"), *points("checkpoint", device="cpu")])
    assert list(found) == [CARD["card"]] and found[CARD["card"]].context_bytes == 500 * 2**20
    before, other = hardware.find_gpu("h100"), hardware.find_gpu("a100-80gb")
    hardware.write_measured(found)
    now = hardware.find_gpu("h100")
    assert now == before._replace(**found[CARD["card"]]._asdict()) and now.context_source.startswith(
        "measured: 5 steps"
    )
    assert hardware.find_gpu("a100-80gb") == other
    hardware.write_measured({"NVIDIA A100-SXM4-80GB": found[CARD["card"]]._replace(context_bytes=7)})
    assert hardware.find_gpu("h100") == now and hardware.find_gpu("a100-80gb").context_bytes == 7


NEGATIVE = (
    '{"cards": {"NVIDIA H100 80GB HBM3": {"context_bytes": -1, "cublas_workspace_bytes": 0, "context_source": ""}}}'
)


@pytest.mark.parametrize("text", ["", "[]", '{"cards": 1}', '{"cards": {"NVIDIA H100 80GB HBM3": {}}}', NEGATIVE])
def test_damaged_constants_are_none(text):
    before = hardware.find_gpu("h100")
    hardware.measured_file().write_text(text)
    assert hardware.find_gpu("h100") == before


def test_constants_of_a_cpu_are_none():
    assert fit.device_constants([measured(case(), {"loss": 1}, environment=CPU)]) == {}


def test_recipe_fields_that_a_family_leaves_open():
    assert set(calibration.OPEN_FIELDS) <= set(Recipe.model_fields)
