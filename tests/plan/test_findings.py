"""What is said beside answers, as facts that any form shows."""

from __future__ import annotations

import pytest

from mstplan.plan import findings, ways
from mstplan.plan.solve import max_seq, plan_at
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import STRATEGIES, strategy

MODEL = load_model("llama3.1-8b")


def test_a_length_that_is_too_long_has_its_reach_and_its_card() -> None:
    on = card("h100")
    plans = {name: plan_at(MODEL, strategy(name), on, 65536) for name in ("standard", "checkpoint")}
    told = findings.assess_length(plans, "checkpoint")
    assert told.reach == max_seq(MODEL, strategy("checkpoint"), on).s_max == told.reaches["checkpoint"] < 65536
    assert told.to_fit == ways.ways_to_fit(told.plan) and told.beyond is None
    assert told.smallest is not None
    there = plan_at(MODEL, strategy("checkpoint"), card(told.smallest.name), 65536)
    assert there.fits and told.smallest.usable_bytes > on.total_bytes
    assert any(f"{told.reach:,}" in line for line in told.advice)
    assert any(told.smallest.name in line for line in told.advice)


def test_what_fits_needs_no_advice() -> None:
    told = findings.assess_length({"mst": plan_at(MODEL, strategy("mst"), card("h100"), 65536)}, "mst")
    assert (told.advice, told.to_fit, told.beyond, told.smallest) == ((), (), None, None) and told.notes


@pytest.mark.parametrize(("name", "holds"), [("llama3.1-8b", True), ("llama3.1-70b", False)])
def test_where_nothing_fits_the_smallest_card_is_named(name: str, holds: bool) -> None:
    model, on = load_model(name), card("t4", host_memory=0)
    told = findings.find_longest(model, on, {each: strategy(each) for each in ("standard", "mst")})
    assert told.best.s_max == 0 and (told.smallest is not None) == holds
    assert [way.adapters is not None for way in told.to_fit] == [True] * holds  # QLoRA needs no CPU RAM, and holds 8B
    if told.smallest is None:
        assert "No single GPU holds it." in told.notes[-1]
    else:
        there = card(told.smallest.name, host_memory=0)
        assert f"holds it: {told.smallest.name}." in told.notes[-1]
        assert max_seq(model, strategy("mst"), there).s_max


def test_what_answers_stand_on() -> None:
    on = card("a100-80gb")
    told = findings.find_longest(MODEL, on, STRATEGIES)
    assert told.provenance.startswith("estimated, calibrated in part from traces")  # chunked-loss is not
    mixed = {"mst": STRATEGIES["mst"], "custom": strategy("mst", optimizer="sgd")}
    assert "calibrated in part" in findings.find_longest(MODEL, on, mixed).provenance
    assert findings.find_longest(MODEL, on, {"custom": mixed["custom"]}).provenance == findings.BARE_FORMULA
