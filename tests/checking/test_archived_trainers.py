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
IN_PIECES = {"loss": "chunked", "loss_chunks": 32}  # of 256 tokens, which are no peak
RECIPES: dict[str, dict[str, Any]] = {
    "hf-1b-bf16w": CHECKPOINTED,
    "hf-1b-fp32w-amp": MIXED,
    "hf-1b-bf16w-acc4": {**CHECKPOINTED, "accumulation": 4},
    "trl-1b-bf16w": {**CHECKPOINTED, **IN_PIECES},
    "trl-1b-fp32w": {**MIXED, **IN_PIECES},
    "trl-1b-chunked": {**CHECKPOINTED, **IN_PIECES},
    "trl-1b-actoffload": {**CHECKPOINTED, **IN_PIECES},  # with checkpoints it takes nothing off
}
"""The recipe that each run is."""
NO_RECIPE = {
    "trl-1b-liger": "Liger's norms, rotary embedding and MLP keep less",
    "trl-1b-8bit": "the states of bitsandbytes are 8 bits wide, but for small tensors and the embedding",
    "trl-1b-noexp": "TRL's loss is the peak: pieces of it are no pieces of mstplan's",
    "trl-1b-fp32w-acc4": "TRL's loss adds the head's gradient up otherwise",
    "trl-1b-packing": "eight sequences in one row, told apart by positions",
    "trl-8bL4-lora": "LoRA",
    "hf-8bL4-lora": "LoRA",
}
"""What no recipe says, and why."""


def runs() -> Iterator[dict[str, Any]]:
    for folder in ("h200-2026-11-26", "h100-2026-11-27"):
        yield from map(json.loads, (DATA / folder / "trainers.jsonl").read_text().splitlines())


RUNS = {run["case"]["name"]: run for run in runs()}


def test_every_run_has_a_recipe_or_says_why_not() -> None:
    assert RUNS.keys() == RECIPES.keys() | NO_RECIPE.keys() and not RECIPES.keys() & NO_RECIPE.keys()


def predicted(name: str, **fields: Any) -> int:
    """Peak of the recipe's step, in bytes."""
    case, recipe = RUNS[name]["case"], Recipe(**{**RECIPES[name], **fields})
    model, chunks = load_model(case["model"]), Chunks(1, int(recipe.loss_chunks))
    planned = step(model, layout_of(model, recipe, chunks, case["seq_len"]), card("h100").gpu.workspaces_bytes)
    return planned.largest(step_sizes(recipe, case["seq_len"], chunks))[1]


@pytest.mark.parametrize("name", RECIPES)
def test_a_trainer_holds_what_the_recipe_says(name: str) -> None:
    steps = RUNS[name]["steps"]
    assert steps[1]["allocated"] == steps[2]["allocated"]
    assert predicted(name) == pytest.approx(steps[2]["allocated"], rel=WITHIN)


def test_another_recipe_is_noticed() -> None:
    measured = RUNS["hf-1b-bf16w"]["steps"][2]["allocated"]
    for fields in ({"checkpoint": "none"}, {"precision": "mixed"}, {"accumulation": 2}, {"batch": 2}):
        assert predicted("hf-1b-bf16w", **fields) != pytest.approx(measured, rel=WITHIN)
