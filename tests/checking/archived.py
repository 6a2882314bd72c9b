"""Steps of plain transformers, peft, bitsandbytes, Liger, CCE, Trainer and TRL, measured on two GPUs, independent of mstplan: the recipe that
each of them is, and what the formula says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mstplan.plan.layout import layout_of, step_sizes
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.spec.model import Model
from mstplan.step.instants import Instant
from mstplan.step.recipe import Recipe
from mstplan.step.steps import Chunks, Step, step

DATA = Path(__file__).parents[1] / "data"
GPUS = ("h200-2026-11-26", "h100-2026-11-27")
FORWARD = (Instant.END_OF_FORWARD, Instant.LOSS)
BACKWARD = (Instant.LOSS_BACKWARD, Instant.LAST_LAYER, Instant.MIDDLE_LAYER, Instant.FIRST_LAYER, Instant.EMBEDDING)
OF_PHASE = {"forward": FORWARD, "backward": BACKWARD, "optimizer": (Instant.OPTIMIZER,)}
OPTIMIZERS = {
    "foreach": {"adamw_kernel": "foreach"},
    "fused": {"adamw_kernel": "fused"},
    "for-loop": {"adamw_kernel": "for-loop"},
    "adafactor": {"optimizer": "adafactor"},
    "adamw8bit": {"optimizer": "adamw-8bit"},
    "paged8bit": {"optimizer": "paged-adamw-8bit"},
    "adamw4bit": {"optimizer": "adamw-4bit"},
    "muon": {"optimizer": "muon", "adamw_kernel": "fused"},
    "lion": {"optimizer": "lion"},
    "lion8bit": {"optimizer": "lion-8bit"},
    "paged32": {"optimizer": "paged-adamw"},
    "ao8bit": {"optimizer": "adamw-8bit-torchao"},
}


class Archived(NamedTuple):
    """A measured step. phases: of forward, backward, optimizer: allocated (peak) and allocated_end (what stays), in bytes."""

    gpu: str
    case: dict[str, Any]
    phases: dict[str, dict[str, int]]

    @property
    def name(self) -> str:
        return f"{self.gpu[:4]}/{self.case['name']}"

    @property
    def model(self) -> Model:
        model = load_model(self.case["model"])
        layers = self.case.get("layers")
        return model.first(layers) if layers else model

    @property
    def recipe(self) -> Recipe:
        return Recipe(**fields_of(self.case))

    def formula(self, other: Recipe | None = None) -> Step:
        """The step of the case's recipe, or of another."""
        recipe, chunks = other or self.recipe, Chunks(1, 1)
        layout = layout_of(self.model, recipe, chunks, self.case["seq_len"], card("h100").platform)
        return step(self.model, layout, card("h100").gpu.workspaces_bytes)

    def predicted(self, other: Recipe | None = None) -> dict[str, int]:
        """Peak of each phase, by the formula, in bytes."""
        recipe = other or self.recipe
        peaks = {
            peak.name: peak.bytes
            for peak in self.formula(other).instants(step_sizes(recipe, self.case["seq_len"], Chunks(1, 1)))
        }
        return {
            phase: max(peaks[instant] for instant in instants if instant in peaks)
            for phase, instants in OF_PHASE.items()
            if any(instant in peaks for instant in instants)
        }


def fields_of(case: dict[str, Any]) -> dict[str, Any]:
    """Fields of the recipe that a case of `recipes.jsonl` is."""
    fields: dict[str, Any] = {"checkpoint": "layer" if case.get("checkpoint", True) else "none"}
    fields.update(OPTIMIZERS[case.get("optimizer", "foreach")])
    fields["batch"] = case.get("batch", 1)
    if case.get("selective"):
        fields["checkpoint"] = "selective"
    if case.get("precision"):
        fields["precision"] = case["precision"]
    if case.get("amp"):
        fields["autocast"] = True
    if case.get("clip"):
        fields["max_grad_norm"] = 1.0
    if case.get("liger"):
        fields["loss"] = "liger"
        fields["kernels"] = "liger" if case["liger"] == "all" else "torch"
    if case.get("cce"):
        fields["loss"] = "cce"
    for name, field in (("freeze", "freeze"), ("train", "train")):
        if case.get(name):
            fields[field] = tuple(case[name])
    if fields["checkpoint"] != "none" and (case.get("freeze") or case.get("train")):
        fields["input_gradients"] = True  # gradient_checkpointing_enable
    if case.get("tune") in ("lora", "qlora", "int8"):
        fields.update(
            lora_rank=case.get("rank", 16),
            lora_dropout=case.get("dropout", 0.0),
            dora=case.get("dora", False),
            adapter_dtype="fp32" if case.get("adapter32", True) else "bf16",
            lora_modules_to_save=tuple(case.get("save", ())),
            input_gradients=fields["checkpoint"] != "none",
        )
        if case.get("targets"):
            fields["lora_targets"] = tuple(case["targets"])
    if case.get("tune") == "qlora":
        double = case.get("double", True)
        fields.update(quantize=case.get("quant", "nf4"), double_quantize=double)
        fields["kbit_preparation"] = case.get("prepare", True)
    if case.get("tune") == "int8":
        fields.update(quantize="int8", kbit_preparation=case.get("prepare", True))
    return fields


@cache
def archived(file: str = "recipes") -> tuple[Archived, ...]:
    """Steps that ran. file: recipes or trainers."""
    return tuple(_rows(file))


def _rows(file: str) -> Iterator[Archived]:
    for gpu in GPUS:
        for row in map(json.loads, (DATA / gpu / f"{file}.jsonl").read_text().splitlines()):
            if row["outcome"] == "ok":
                yield Archived(gpu, row["case"], row["phases"])
