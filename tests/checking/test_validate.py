"""Errors of every rung beside measurements, made up; the archive stands in test_archive.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mstplan import card
from mstplan.checking import fit, validate
from mstplan.checking.validate import ALLOCATED, CALIBRATED, DEVICE, ERROR_BOUNDS, FORMULA, RESERVED, TRACE, ErrorBounds
from mstplan.measuring.measurement import FAILED, OUT_OF_MEMORY, Measurement
from mstplan.plan import calibration
from mstplan.show import validating
from mstplan.step.instants import Instant
from mstplan.step.recipe import strategy
from mstplan.tracing.simulation import required_bytes, simulate
from mstplan.tracing.tracer import trace
from mstplan.units import MIB

from ..measuring.measured import CARD, CPU, as_traced, case, measured
from ..tracing.tiny import TINY

WORKSPACE = 32 * MIB
DROPOUT = {**TINY, "attention_dropout": 0.1}


def on_card(
    tokens: int = 512, share: float = 1.0, model: str = "tiny", context: int = 500 * MIB, **more: object
) -> Measurement:
    """A step on a card, as the trace has it, times a share."""
    one = case(seq_len=tokens, device="cuda", model=model)
    traced = trace(TINY, one.recipe, tokens, workspace=WORKSPACE)
    reserved = simulate(traced, expandable=False).reserved
    found = as_traced(
        one, traced, share, reserved=reserved, device=reserved + context, context=context, workspace=WORKSPACE
    )
    return replace(found, **more)  # type: ignore[arg-type]


def test_errors_are_signed_and_of_what_was_measured():
    low, high = (validate.validate([on_card(share=share)]) for share in (1.25, 0.8))
    for found, error in ((low, 1 / 1.25 - 1), (high, 1 / 0.8 - 1)):
        errors = {row.rung: row.error for row in found.rows if row.what == ALLOCATED}
        assert errors == {FORMULA: pytest.approx(error, abs=2e-3), TRACE: pytest.approx(error, abs=1e-6)}
        assert all(
            told / seen - 1 == pytest.approx(error, abs=2e-3) for row in found.rows for _, told, seen in row.instants
        )


def test_reserved_is_what_the_simulated_allocator_reserves():
    row = next(row for row in validate.validate([on_card()]).rows if row.what == RESERVED)
    assert row.rung == TRACE and row.error == 0
    m = on_card(environment={**CARD, "allocator": "expandable_segments:True"})
    expandable = simulate(validate.trace_measured(m), expandable=True).reserved
    assert (
        next(row for row in validate.validate([m]).rows if row.what == RESERVED).predicted
        == expandable
        != row.predicted
    )


def test_the_context_is_never_from_the_model_that_it_predicts():
    """Leave one model out: the one thing that is fitted."""
    one, other = on_card(), on_card(model="other", context=700 * MIB)
    assert not [row for row in validate.validate([one]).rows if row.what == DEVICE]
    rows = {row.measurement.case.model: row for row in validate.validate([one, other]).rows if row.what == DEVICE}
    assert {name: row.predicted - row.measured for name, row in rows.items()} == {
        "tiny": 200 * MIB,
        "other": -200 * MIB,
    }
    elsewhere = replace(other, environment={**CARD, "card": "NVIDIA H200"})
    assert not [row for row in validate.validate([one, elsewhere]).rows if row.what == DEVICE]


def test_what_was_to_fit_and_ran_out():
    h100 = card("h100").gpu
    fits, context = trace(TINY, strategy("checkpoint"), 512, workspace=h100.workspaces_bytes), h100.context_bytes
    enough = required_bytes(fits) + context + 30 * MIB
    lost = [
        on_card(outcome=OUT_OF_MEMORY, ranks=(), case=case(device="cuda", limit=limit))
        for limit in (enough, fits.peak.bytes // 2 + context)
    ]
    found = validate.validate(lost)
    assert found.out_of_memory == 2 and {(b.measurement.case.limit, b.rung) for b in found.broken} == {
        (enough, FORMULA),
        (enough, TRACE),
    }
    said = validate.bound_violations(found, ERROR_BOUNDS)
    assert len(said) == 2 and all("was to fit and ran out of memory" in line for line in said)
    cpu = on_card(
        outcome=OUT_OF_MEMORY, ranks=(), case=case(limit=2**20, device="cpu"), environment={**CARD, "card": "cpu"}
    )
    assert not validate.validate([cpu], [TRACE]).broken


def test_what_failed_is_left_out_and_said():
    found = validate.validate([on_card(outcome=FAILED, ranks=(), error="killed\nby hand")])
    assert not found.rows and found.left_out == ["tiny, checkpoint, 512 tokens: failed, killed"]


def test_summaries():
    found = validate.validate([on_card(), on_card(share=0.5), on_card(tokens=1024, share=1.25)], [TRACE])
    rows = [row for row in found.rows if row.what == ALLOCATED]
    (everything,) = validate.summarize(rows)
    assert (everything.n, everything.worst) == (3, pytest.approx(1.0, abs=1e-5))
    assert everything.mean == pytest.approx((0 + 1 + 0.2) / 3, abs=1e-5) and everything.median == pytest.approx(
        0.2, abs=1e-5
    )
    assert everything.worst_instant == pytest.approx(1.0, abs=1e-5)
    one = rows[0]._replace(instants=(("loss", 90, 100), ("optimizer step", 100, 100)))
    assert one.worst_instant == ("loss", pytest.approx(-0.1)) and validate.summarize([one])[
        0
    ].worst_instant == pytest.approx(-0.1)
    assert {s.group: s.n for s in validate.summarize(rows, validate.by_length)} == {
        "512 to 1,023": 2,
        "1,024 to 2,047": 1,
    }
    assert {s.group for s in validate.summarize(rows, validate.by_strategy)} == {"checkpoint"}
    assert validate.summarize([]) == []


def test_bounds():
    found = validate.validate([on_card(share=0.98)], [TRACE])
    assert validate.bound_violations(found, {TRACE: ErrorBounds(0.03, 0.03)}) == []
    assert len(validate.bound_violations(found, {TRACE: ErrorBounds(0.01, 0.03)})) == 1
    assert len(validate.bound_violations(found, {TRACE: ErrorBounds(0.01, 0.01)})) == 2


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, True),
        ({"precision": "mixed"}, True),
        ({"precision": "fp32"}, False),
        ({"name": "mst-offload", "mlp_chunks": 2, "loss_chunks": 2}, False),
        ({"config": DROPOUT}, False),
    ],
    ids=["bf16", "mixed", "fp32", "offload", "dropout"],
)
def test_on_a_cpu_the_formula_is_held_to_its_bounds_where_the_kernels_are_those_of_cuda(changes, held):
    one = case(seq_len=512, **changes)
    found = validate.validate([measured(one, {"loss": 2**30})], [FORMULA])
    assert [row.held for row in found.rows] == [held]
    assert {line.split(":")[0] for line in validate.bound_violations(found, ERROR_BOUNDS)} == (
        {FORMULA} if held else set()
    )
    assert [s.held for s in validate.summarize(found.rows)] == [held]
    assert (
        ("formula\\* |" in validating.markdown(found))
        == (not held)
        == any("*" in line for line in validating.notes(found))
    )
    on_cuda = validate.validate([measured(replace(one, device="cuda"), {"loss": 2**30})], [FORMULA])
    assert all(row.held for row in on_cuda.rows)


def test_no_step_is_predicted_by_a_calibration_that_was_solved_from_it(tmp_path, monkeypatch):
    """Leave one out, of what is fitted."""
    monkeypatch.setenv("MSTPLAN_HOME", str(tmp_path))
    seen = [on_card(tokens) for tokens in (512, 1024, 2048, 4096)]
    model = seen[0].case.described
    calibration.write_calibrations(model, fit.fit_model(model, seen).calibrations, tmp_path / "calibrations")
    other = on_card(3000)
    found = validate.validate([*seen, other], [CALIBRATED])
    assert [row.measurement for row in found.rows] == [other] and abs(found.rows[0].error) < 1e-4
    assert len(found.left_out) == 4 and all("solved from this very step" in line for line in found.left_out)
    elsewhere = replace(seen[0], environment={**CARD, "card": "NVIDIA H200"})
    assert len(validate.validate([elsewhere], [CALIBRATED]).rows) == 1


def test_a_cpu_is_traced_with_the_threads_that_it_had():
    """Attention's kernel has buffers for each."""
    one = case("standard", seq_len=512)
    few, many = (measured(one, {"loss": 2**30}, environment={**CPU, "threads": threads}) for threads in (64, 128))
    less, more = (
        {peak.instant: peak.bytes for peak in validate.trace_measured(m).peaks}[Instant.MIDDLE_LAYER]
        for m in (few, many)
    )
    assert more - less == 64 * 2 * 64 * 512 * (
        4 + 2
    )  # for each two blocks of 64 queries by 512 keys, in fp32 and in bf16
    assert few.key != many.key and torch.get_num_threads() == 1


def test_no_calibration_no_row():
    assert not validate.validate([on_card()], [CALIBRATED]).rows
