"""transformers' Trainer and TRL's SFTTrainer as people run them, measured on an H200 and an H100: they hold nothing beside what the recipe
of the same step says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mstplan.plan.solve import layout_of, step_sizes
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe
from mstplan.step.steps import Chunks, step

DATA = Path(__file__).parents[1] / "data"
WITHIN = 1e-4
CHECKPOINTED = {"adamw_kernel": "fused", "checkpoint": "layer"}
MIXED = {**CHECKPOINTED, "precision": "mixed"}
TRL = {"loss": "trl"}
LORA = {**CHECKPOINTED, "lora_rank": 16, "autocast": True, "input_gradients": True}
RECIPES: dict[str, dict[str, Any]] = {
    "hf-1b-bf16w": CHECKPOINTED,
    "hf-1b-fp32w-amp": MIXED,
    "hf-1b-bf16w-acc4": {**CHECKPOINTED, "accumulation": 4},
    "trl-1b-bf16w": {**CHECKPOINTED, **TRL},
    "trl-1b-fp32w": {**MIXED, **TRL},
    "trl-1b-8bit": {"checkpoint": "layer", **TRL, "optimizer": "adamw-8bit", "fp32_embedding_states": True},
    "trl-1b-fp32w-acc4": {**MIXED, **TRL, "accumulation": 4},
    "trl-1b-chunked": {**CHECKPOINTED, **TRL},
    "trl-1b-noexp": {**TRL, "adamw_kernel": "fused"},
    "trl-1b-liger": {**CHECKPOINTED, **TRL, "kernels": "liger"},  # whose loss TRL switches off for its own
    # the peak is in the first layer's backward, where its input is back and all others are gone in any case: it takes nothing off
    "trl-1b-actoffload": {**CHECKPOINTED, **TRL, "offload": "saved-tensors"},
    "trl-1b-packing": {**CHECKPOINTED, **TRL, "packing": 8},
    "trl-8bL4-lora": {**LORA, **TRL},
    "hf-8bL4-lora": LORA,
}
"""The recipe that each run is."""


def runs() -> Iterator[dict[str, Any]]:
    for folder in ("h200-2026-11-26", "h100-2026-11-27"):
        yield from map(json.loads, (DATA / folder / "trainers.jsonl").read_text().splitlines())


RUNS = {run["case"]["name"]: run for run in runs()}


def test_every_run_is_a_recipe() -> None:
    assert RUNS.keys() == RECIPES.keys()


def predicted(name: str, **fields: Any) -> int:
    """Peak of the recipe's step, in bytes."""
    case, recipe = RUNS[name]["case"], Recipe(**{**RECIPES[name], **fields})
    model, chunks = load_model(case["model"]), Chunks(1, int(recipe.loss_chunks))
    model = model.first(case["layers"]) if "layers" in case else model
    layout = layout_of(model, recipe, chunks, case["seq_len"], card("h100").platform)
    planned = step(model, layout, card("h100").gpu.workspaces_bytes)
    return planned.largest(step_sizes(recipe, case["seq_len"], chunks))[1]


@pytest.mark.parametrize("name", RECIPES)
def test_a_trainer_holds_what_the_recipe_says(name: str) -> None:
    steps = RUNS[name]["steps"]
    assert steps[1]["allocated"] == steps[2]["allocated"]
    assert predicted(name) == pytest.approx(steps[2]["allocated"], rel=WITHIN)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("trl-1b-noexp", {"loss": "liger"}),
        ("trl-1b-liger", {"kernels": "torch"}),
        ("trl-1b-fp32w-acc4", {"loss": "cce"}),
    ],
)
def test_another_loss_is_noticed(name: str, fields: dict[str, str]) -> None:
    assert predicted(name, **fields) != pytest.approx(RUNS[name]["steps"][2]["allocated"], rel=WITHIN)


def test_layer_inputs_in_cpu_ram_are_something_else() -> None:
    """mstplan's own offload lets the first layer's input go as soon as it has been read."""
    off = {"offload": "layer-inputs"}
    assert predicted("trl-1b-actoffload") - predicted("trl-1b-actoffload", **off) == 8192 * 2048 * 2


def test_another_recipe_is_noticed() -> None:
    measured = RUNS["hf-1b-bf16w"]["steps"][2]["allocated"]
    for fields in ({"checkpoint": "none"}, {"precision": "mixed"}, {"accumulation": 2}, {"batch": 2}):
        assert predicted("hf-1b-bf16w", **fields) != pytest.approx(measured, rel=WITHIN)
