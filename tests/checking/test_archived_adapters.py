"""Adapters and quantised weights, measured on two GPUs: what the formula and the trace say of the very steps."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from mstplan.spec.catalog import load_config
from mstplan.spec.hardware import card
from mstplan.step.allocator import MIN_BLOCK, round_size
from mstplan.step.recipe import Recipe

from .archived import DATA, OF_PHASE, Archived, archived

WITHIN = 1e-4
OUTLIERS = "int8-8bL4-events"
"""Its random weights give activations of which nearly all columns are outliers: bitsandbytes holds copies of those in 16 bits."""
ORDER_OF_CASTS = {67108864, 134217728, 16777216, 33554432}
"""autocast casts attention's arguments in the order in which C++ evaluates them."""
CASES = [
    a
    for a in archived()
    if a.case.get("tune") and not a.case.get("liger") and "8bit" not in a.case.get("optimizer", "")
]
RECORDED = [
    a for a in CASES if (DATA / a.gpu / "events" / f"{a.case['name']}.json.gz").exists() and a.case["name"] != OUTLIERS
]


@pytest.mark.parametrize("step", [a for a in CASES if a.case["name"] != OUTLIERS], ids=lambda a: a.name)
def test_the_formula_says_every_phase(step: Archived) -> None:
    predicted = step.predicted()
    assert predicted.keys() == step.phases.keys()
    for phase, size in predicted.items():
        assert size == pytest.approx(step.phases[phase]["allocated"], rel=WITHIN), phase


@pytest.mark.parametrize("step", CASES, ids=lambda a: a.name)
def test_what_stays_after_the_step(step: Archived) -> None:
    """Weights as they are stored, adapters, and the optimizer's states of these alone."""
    resident = sum(t.bytes for t in (*step.formula().stays(), *step.formula().states()))
    assert resident == pytest.approx(step.phases["optimizer"]["allocated_end"], rel=2e-4)


def test_8_bits_but_for_outliers() -> None:
    """Each layer's down product holds a 16-bit copy of (b, s, I) of outliers beside what is counted."""
    step = next(a for a in CASES if a.case["name"] == OUTLIERS)
    copies = 4 * 2 * 8192 * 14336
    for phase in ("forward", "backward"):
        assert step.predicted()[phase] + copies == pytest.approx(step.phases[phase]["allocated"], rel=0.005)


@pytest.mark.parametrize(
    "fields", [{"lora_rank": 64}, {"adapter_dtype": "bf16"}, {"lora_targets": ("attention",)}, {"quantize": "nf4"}]
)
def test_another_recipe_is_noticed(fields: dict[str, Any]) -> None:
    step = next(a for a in CASES if a.case["name"] == "lora-8bL4-events")
    other = Recipe(**{**step.recipe.model_dump(), **fields})
    changed = step._replace(case={**step.case})
    assert changed.predicted(other)["optimizer"] != pytest.approx(step.phases["optimizer"]["allocated"], rel=WITHIN)


def traced(step: Archived) -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    if step.recipe.quantize != "none":
        pytest.importorskip("bitsandbytes")
    from mstplan.tracing.tracer import trace

    config = {**load_config(step.case["model"]), "num_hidden_layers": step.case["layers"]}
    h100 = card("h100")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes', of a machine without a GPU
        return trace(
            config,
            step.recipe,
            step.case["seq_len"],
            workspace=h100.gpu.workspaces_bytes,
            platform=h100.platform,
            whole=True,
        )


@pytest.mark.slow
@pytest.mark.parametrize("step", RECORDED, ids=lambda a: a.name)
def test_the_trace_allocates_what_the_gpu_did(step: Archived) -> None:
    """Over 1 MiB, one by one; and with that every phase's peak."""
    from mstplan.tracing.allocation_diff import Allocation, allocations_of_trace, differences

    trace = traced(step)
    peaks = {peak.instant: peak.bytes for peak in trace.peaks}
    for phase, instants in OF_PHASE.items():
        size = max(peaks[instant] for instant in instants if instant in peaks)
        assert size == pytest.approx(step.phases[phase]["allocated"], rel=WITHIN), phase
    content = json.loads(
        gzip.decompress(Path(DATA / step.gpu / "events" / f"{step.case['name']}.json.gz").read_bytes())
    )
    real = [Allocation(e[0], content["frames"][e[1]]) for e in content["events"] if isinstance(e, list)]
    odd = differences(allocations_of_trace(trace), real, block=MIN_BLOCK)
    if step.recipe.kbit_preparation and step.recipe.autocast:
        odd = [each for each in odd if each.allocation.bytes not in map(round_size, ORDER_OF_CASTS)]
    assert not odd, [str(each) for each in odd[:5]]
