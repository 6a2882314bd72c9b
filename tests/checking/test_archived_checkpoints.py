"""Ways to checkpoint, offload and pack, measured on two GPUs under transformers' and TRL's own code: formula and trace say what they hold."""

from __future__ import annotations

import gzip
import json
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mstplan.plan.layout import layout_of, step_sizes
from mstplan.plan.solve import host_bytes
from mstplan.spec.catalog import load_config
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.allocator import MIN_BLOCK
from mstplan.step.recipe import Recipe
from mstplan.step.steps import Chunks, Step, step
from mstplan.tracing.allocation_diff import EXTRA, MISSING, Allocation, allocations_of_trace, differences
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import trace

from .archived import DATA, OF_PHASE, archived

WAYS, SELECTIVE = DATA / "h200-2026-11-27", DATA / "h100-2026-11-27"
WITHIN = 4e-5
MISTRAL = {"vocab_size": 32768, "sliding_window": None}
CARD = card("h100")


class Way(NamedTuple):
    """A step that ran."""

    name: str
    config: dict[str, Any]
    recipe: Recipe
    seq_len: int
    phases: dict[str, dict[str, int]]
    pinned: int  # bytes of CPU RAM

    def formula(self, **changes: Any) -> tuple[Step, Recipe]:
        model, recipe = read_config(self.config, self.name), self.recipe.changed(**changes)
        layout = layout_of(model, recipe, Chunks(1, 1), self.seq_len, CARD.platform)
        return step(model, layout, CARD.gpu.workspaces_bytes), recipe

    def by_formula(self, **changes: Any) -> dict[str, int]:
        """Peaks of the phases, in bytes."""
        built, recipe = self.formula(**changes)
        return by_phase({p.name: p.bytes for p in built.instants(step_sizes(recipe, self.seq_len, Chunks(1, 1)))})

    def by_trace(self) -> dict[str, int]:
        return by_phase({peak.instant: peak.bytes for peak in traced(self.name).peaks})


def by_phase(peaks: dict[Any, int]) -> dict[str, int]:
    return {phase: max(peaks[i] for i in instants if i in peaks) for phase, instants in OF_PHASE.items()}


def way_of(row: dict[str, Any]) -> Way:
    case, mistral = row["case"], row["case"]["model"] == "mistral-7b"
    config = dict(load_config("mistral-7b-v0.1" if mistral else case["model"]))
    config.update(MISTRAL if mistral else {})
    if layers := case.get("layers"):
        config["num_hidden_layers"] = layers
        config.pop("layer_types", None)
    recipe = Recipe(
        adamw_kernel="fused",
        checkpoint="selective" if case.get("selective") else case.get("how", "none"),
        batch=case.get("batch", 1),
        packing=case.get("packing", 1),
        offload="saved-tensors" if case.get("offload") else "none",
    )
    return Way(case["name"], config, recipe, case["seq_len"], row["phases"], row.get("pinned_bytes", 0))


def ways() -> dict[str, Way]:
    rows = map(json.loads, (WAYS / "ways.jsonl").read_text().splitlines())
    selective = ({"case": a.case, "phases": a.phases} for a in archived() if a.case.get("selective"))
    return {row["case"]["name"]: way_of(row) for row in chain(rows, selective)}


ALL = ways()
SAVED = [name for name, way in ALL.items() if way.recipe.offload == "saved-tensors"]


@cache
def traced(name: str) -> Trace:
    way = ALL[name]
    workspace, platform = CARD.gpu.workspaces_bytes, CARD.platform
    return trace(way.config, way.recipe, way.seq_len, workspace=workspace, platform=platform)


def test_all_of_them_are_here() -> None:
    assert len(ALL) == 17 and len(SAVED) == 9
    assert {way.recipe.checkpoint for way in ALL.values()} == {"none", "layer", "selective", "every-2", "every-3"}


@pytest.mark.parametrize("name", ALL)
def test_the_formula_says_what_a_step_holds(name: str) -> None:
    for phase, peak in ALL[name].by_formula().items():
        assert peak == pytest.approx(ALL[name].phases[phase]["allocated"], rel=WITHIN), phase


@pytest.mark.parametrize("name", ALL)
def test_the_trace_says_what_a_step_holds(name: str) -> None:
    for phase, peak in ALL[name].by_trace().items():
        assert peak == pytest.approx(ALL[name].phases[phase]["allocated"], rel=WITHIN), phase


@pytest.mark.parametrize("name", ALL)
def test_weights_and_states_stay(name: str) -> None:
    way = ALL[name]
    left = sum(entry.bytes for entry in way.formula()[0].constants() if entry.name != "gradients")
    assert left + CARD.gpu.workspaces_bytes == pytest.approx(way.phases["optimizer"]["allocated_end"], rel=1e-4)


@pytest.mark.parametrize("name", SAVED)
def test_cpu_ram_of_saved_tensors(name: str) -> None:
    """torch pins powers of two; 5 bytes are scalars'."""
    built, recipe = ALL[name].formula()
    assert ALL[name].pinned - host_bytes(built.model, recipe, ALL[name].seq_len, built) == 5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("full-1b-8k-selective", {"checkpoint": "layer"}),
        ("every2-1b-8k", {"checkpoint": "every-3"}),
        ("every2-1b-8k", {"checkpoint": 2}),
        ("off-1b-8k-none", {"offload": "none"}),
        ("off-1b-8k-layer", {"offload": "none"}),
        ("off-1b-8k-layer", {"checkpoint": "selective"}),
        ("pack4-1b-8k-none", {"packing": 1}),
        ("pack4-1b-8k-none", {"attention": "flash"}),
    ],
)
def test_another_recipe_is_noticed(name: str, changes: dict[str, Any]) -> None:
    peaks, measured = ALL[name].by_formula(**changes), ALL[name].phases
    assert any(peak != pytest.approx(measured[phase]["allocated"], rel=100 * WITHIN) for phase, peak in peaks.items())


# ---- one by one ---------------------------------------------------------------------------------------------------------


def really_allocated(path: Path) -> list[Allocation]:
    content = json.loads(gzip.decompress(path.read_bytes()))
    stacks = content["frames"]
    return [Allocation(event[0], stacks[event[1]]) for event in content["events"] if isinstance(event, list)]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("off-1bL4-none-events", WAYS / "events" / "off-1bL4-none.json.gz"),
        ("off-1bL4-layer-events", WAYS / "events" / "off-1bL4-layer.json.gz"),
        ("full-1bL4-selective-events", SELECTIVE / "events" / "full-1bL4-selective-events.json.gz"),
    ],
)
def test_allocations_of_more_than_a_mebibyte_follow_each_other(name: str, path: Path) -> None:
    """But for copies within attention: the kernel saves keys, queries and values before it runs, what stands in for it saves them after, in
    another order."""
    way = ALL[name]
    ours = allocations_of_trace(trace(way.config, way.recipe, way.seq_len, platform=CARD.platform, whole=True))
    found = differences(ours, really_allocated(path), block=MIN_BLOCK)
    missing, extra = ([each for each in found if each.what == what] for what in (MISSING, EXTRA))
    assert all("self_attn" in each.allocation.name for each in extra), found
    assert sorted(d.allocation.bytes for d in missing) == sorted(d.allocation.bytes for d in extra)
    assert len(extra) == (3 * way.config["num_hidden_layers"] if name == "off-1bL4-none-events" else 0)


def test_another_order_is_noticed() -> None:
    way, path = ALL["off-1bL4-layer-events"], WAYS / "events" / "off-1bL4-none.json.gz"
    ours = allocations_of_trace(trace(way.config, way.recipe, way.seq_len, platform=CARD.platform, whole=True))
    assert len(differences(ours, really_allocated(path), block=MIN_BLOCK)) > 50
