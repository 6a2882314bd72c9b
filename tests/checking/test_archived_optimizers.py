"""Full fine-tuning with every optimizer that was measured on an H200 and an H100: peaks of all phases, what stays after the step, and
what was seen to be allocated in it, one by one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mstplan.plan.layout import step_sizes
from mstplan.spec.catalog import load_config, load_model
from mstplan.spec.hardware import card
from mstplan.step.optimizers import OPTIMIZERS
from mstplan.step.recipe import Recipe
from mstplan.step.roles import Role
from mstplan.step.steps import Chunks, Step, step
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import trace

from .archived import DATA, GPUS, OF_PHASE, Archived, archived, layout_of

WITHIN = 1e-4
BLOCK = 512
SMALL = 16_384  # bytes: below are scalars, and what kernels make for sums of them
OTHERS = ("tune", "liger", "cce", "selective", "freeze", "train")
CASES = {run.name: run for run in archived() if not any(run.case.get(field) for field in OTHERS)}
TRACED = {name: run for name, run in CASES.items() if run.case.get("layers") or "clip" in run.case}


def test_every_optimizer_but_sgd_was_measured() -> None:
    assert {run.recipe.optimizer for run in CASES.values()} == set(OPTIMIZERS) - {"sgd"}
    assert any(run.recipe.max_grad_norm for run in CASES.values())


def in_allocator(run: Archived, total: int) -> int:
    """Bytes less those of paged states, which the archive's figures do not have."""
    return total - run.formula().optimizer.managed


@pytest.mark.parametrize("name", CASES)
def test_peaks_of_every_phase(name: str) -> None:
    run = CASES[name]
    for phase, peak in run.predicted().items():
        assert in_allocator(run, peak) == pytest.approx(run.phases[phase]["allocated"], rel=WITHIN), phase


@pytest.mark.parametrize("name", CASES)
def test_what_stays_after_the_step(name: str) -> None:
    """Weights, states, workspaces, and the tokens, which are their own labels there."""
    run = CASES[name]
    planned = run.formula()
    stays = sum(tensor.bytes for tensor in (*planned.stays(), *planned.states()))
    tokens = 8 * run.case.get("batch", 1) * run.case["seq_len"]
    assert in_allocator(run, stays + tokens) == pytest.approx(run.phases["optimizer"]["allocated_end"], rel=WITHIN)


def traced(run: Archived) -> Trace:
    config = dict(load_config(run.case["model"]))
    if run.case.get("layers"):
        config["num_hidden_layers"] = run.case["layers"]
    on = card("h100")
    workspace = on.gpu.workspaces_bytes
    return trace(config, run.recipe, run.case["seq_len"], workspace=workspace, platform=on.platform)


@pytest.mark.parametrize("name", TRACED)
def test_the_trace_is_exact_but_for_labels(name: str) -> None:
    """The archive's tokens are their own labels."""
    run = TRACED[name]
    peaks = {peak.instant: peak.bytes for peak in traced(run).peaks}
    for phase, instants in OF_PHASE.items():
        peak = max(peaks[instant] for instant in instants if instant in peaks)
        managed = run.formula().optimizer.managed
        more = peak - managed - 8 * run.case["seq_len"] - run.phases[phase]["allocated"]
        assert abs(more) <= BLOCK * 64 and (more == 0 or managed), (phase, more)


def test_another_recipe_is_noticed() -> None:
    run = CASES["h100/full-1bL4-adamw4bit-events"]
    for fields in (
        {"optimizer": "adamw-8bit-torchao"},
        {"optimizer": "adamw"},
        {"precision": "mixed"},
        {"max_grad_norm": 1.0},
    ):
        recipe = run.recipe.changed(**fields)
        layout = layout_of(run.model, recipe, Chunks(1, 1), run.case["seq_len"], card("h100").platform)
        other = step(run.model, layout, card("h100").gpu.workspaces_bytes)
        _, peak = other.largest(step_sizes(recipe, run.case["seq_len"], Chunks(1, 1)))
        same = peak == pytest.approx(max(p["allocated"] for p in run.phases.values()), rel=WITHIN)
        assert same == ("max_grad_norm" in fields)  # norms are no peak
        assert bool(other.clipping) == ("max_grad_norm" in fields)


# ---- what the step was seen to allocate ---------------------------------------------------------------------------------------

FRAMES = ("clip_grad.py", "_muon.py", "optim/adam.py", "adam.py", "adamw.py", "optimization.py", "sgd.py")
OWN = "llama3.1-8b-L4-checkpoint-8192"  # of mstplan's own step
EVENTS = {
    **{run.name: run for run in CASES.values() if (DATA / run.gpu / "events" / f"{run.case['name']}.json.gz").exists()},
    **{
        f"h200/{OWN}{more}": None
        for more in ("", "-adamw_kernel=for-loop", "-adamw_kernel=fused", "-optimizer=adafactor")
    },
    f"h200/{OWN}-optimizer=sgd": None,
}


class Seen(NamedTuple):
    """Allocations of the optimizer's step, in bytes asked for; peak: the most of them at once, in whole blocks."""

    made: list[int]
    peak: int


def seen_in_step(data: dict[str, Any]) -> Seen:
    """From the first allocation on by clipping or an optimizer."""
    frames, sizes, made = data["frames"], [], []
    live = peak = 0
    begun = False
    for event in data["events"]:
        if isinstance(event, list):
            size, stack = event
            begun = begun or any(frame in frames[stack] for frame in FRAMES)
            sizes.append((size, begun))
            if begun:
                made.append(size)
                live += -(-size // BLOCK) * BLOCK
        elif event >= 0 and sizes[event][1]:
            live -= -(-sizes[event][0] // BLOCK) * BLOCK
        peak = max(peak, live)
    return Seen(made, peak)


def formula_of(data: dict[str, Any], run: Archived | None) -> Step:
    if run is not None:
        return run.formula()
    fields, case = dict(data["case"]["recipe"]), data["case"]
    recipe = Recipe.model_validate(fields)
    model = load_model(case["model"]).first(case["layers"])
    layout = layout_of(model, recipe, Chunks(1, 1), case["seq_len"], card("h100").platform)
    return step(model, layout, card("h100").gpu.workspaces_bytes)


def read_events(name: str) -> dict[str, Any]:
    gpu = next(each for each in GPUS if each[:4] == name[:4])
    path = Path(DATA / gpu / "events" / f"{name[5:]}.json.gz")
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return found


@pytest.mark.parametrize("name", EVENTS)
def test_what_the_step_makes_at_its_peak(name: str) -> None:
    """All but scalars and what kernels add up in."""
    data = read_events(name)
    planned, seen = formula_of(data, EVENTS[name]), seen_in_step(data)
    bytes_at = [sum(held.bytes for held in made) for made in (planned.clipping, planned.optimizer.temporaries)]
    assert max(bytes_at) == pytest.approx(seen.peak, rel=WITHIN, abs=40 * BLOCK)


@pytest.mark.parametrize("name", [name for name in EVENTS if "muon" in name or "4bit" in name or "ao8bit" in name])
def test_the_trace_makes_them_one_by_one(name: str) -> None:
    run = EVENTS[name]
    assert run is not None
    made = [storage.bytes for storage in traced(run).update.storages]
    assert [size for size in made if size > SMALL] == [
        size for size in seen_in_step(read_events(name)).made if size > SMALL
    ]


def test_states_are_no_temporaries() -> None:
    planned = CASES["h100/full-1bL4-muon-events"].formula()
    assert all(tensor.role is not Role.UPDATE for tensor in planned.states())
