"""Published runs on several GPUs beside the step model: peaks, longest lengths, and what ran or ran out.

The rows, and the recipe that each is read as, stand in profiles/many_gpus.json. Nothing is fitted to them. A row whose recipe is not planned yet says
what is missing, and is answered as soon as it is planned; where a recipe next to it can be planned, that one is shown meanwhile.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..profiles import ROOT
from ..spec.catalog import load_model
from ..spec.hardware import EXPANDABLE, NCCL_BYTES, Card, card
from ..spec.model import Model
from ..step.recipe import Recipe
from ..units import GIB
from .allocation import usage_at
from .solve import max_seq, plan_at, recommend_chunks


@dataclass(frozen=True)
class Run:
    """One published run. kind: "peak", a peak of memory in the source's unit; "longest", of the lengths that ran the longest that was published;
    "verdict", whether it ran. The prediction is of the recipe; of the one next to it where that is not planned yet."""

    model: str
    gpus: int
    hardware: str
    case: str
    source: str
    kind: str
    batch: int
    seq_len: int  # of a whole sequence
    measured: str  # of a peak: "allocated" or "reserved", by torch; "nvidia-smi"; "not stated"
    unit: str
    published: float | None  # of a peak, in its unit
    runs: bool | None  # of a verdict
    published_device_gib: float | None  # what nvidia-smi is said to have shown at a longest length
    known_stack: bool  # the code that ran is the code that is planned
    allocator: str  # how torch's is set, as `card` has it
    explained_by: tuple[str, ...]
    missing: str  # what of the recipe is not planned yet; empty: nothing
    stands_for: str  # what the recipe next to it has in place of what is missing
    recipe: Recipe | None  # that is predicted
    predicted: float | None  # of a peak, in its unit
    predicted_tokens: int | None  # of a longest length
    fits: bool | None  # the published length
    predicted_gib: (
        float | None
    )  # of the whole device at the published length: reserved by the allocator, CUDA context, NCCL

    @property
    def difference(self) -> float | None:
        """Signed, relative to the published figure."""
        if self.predicted is not None and self.published is not None:
            return self.predicted / self.published - 1
        return None if self.predicted_tokens is None else self.predicted_tokens / self.seq_len - 1

    @property
    def agrees(self) -> bool | None:
        """Whether a verdict is the published one."""
        return None if self.runs is None or self.fits is None else self.runs == self.fits


def runs() -> tuple[Run, ...]:
    """Compare every published run with its prediction."""
    rows = json.loads((ROOT / "many_gpus.json").read_text(encoding="utf-8"))["rows"]
    return tuple(map(_compare, rows))


def _compare(row: dict[str, Any]) -> Run:
    figure, read_as = row["figure"], row["read_as"]
    allocator = read_as.get("allocator", EXPANDABLE)
    model, gpu = load_model(read_as["model"]), card(read_as["gpu"], reserve=NCCL_BYTES, allocator=allocator)
    recipe, missing, stands_for = _recipe_of(read_as, model, gpu, row["seq_len"])
    facts = {
        name: row[name] for name in ("model", "gpus", "hardware", "case", "source", "batch", "seq_len", "known_stack")
    }
    return Run(
        **facts,
        kind=figure["kind"],
        measured=figure.get("measured", ""),
        unit=figure.get("unit", ""),
        published=figure.get("value"),
        runs=figure.get("runs"),
        published_device_gib=figure.get("nvidia_smi_gib"),
        allocator=allocator,
        explained_by=tuple(row["explained_by"]),
        missing=missing,
        stands_for=stands_for,
        recipe=recipe,
        **_predict(model, recipe, gpu, row["seq_len"], figure),
    )


def _recipe_of(read_as: dict[str, Any], model: Model, gpu: Card, tokens: int) -> tuple[Recipe | None, str, str]:
    """The recipe that is planned, what is missing of the one that ran, and what stands for that."""
    missing = ""
    for name, stands_for in (("recipe", ""), ("nearest", read_as.get("nearest_is", ""))):
        if name not in read_as:
            continue
        try:
            recipe = Recipe(**read_as[name])
            plan_at(model, recipe, gpu, tokens, recommend_chunks(model, recipe, gpu))
        except InputError as e:
            missing = missing or " ".join(str(e).split())
            continue
        return recipe, missing, stands_for
    return None, missing, ""


def _predict(model: Model, recipe: Recipe | None, gpu: Card, tokens: int, figure: dict[str, Any]) -> dict[str, Any]:
    """Of a run's figure, what the recipe's step model says."""
    found: dict[str, Any] = dict.fromkeys(("predicted", "predicted_tokens", "fits", "predicted_gib"))
    if recipe is None:
        return found
    chunks = recommend_chunks(model, recipe, gpu)
    plan = plan_at(model, recipe, gpu, tokens, chunks)
    reserved = usage_at(model, recipe, gpu, tokens, chunks).reserved
    device = reserved + gpu.gpu.context_bytes + gpu.reserve_bytes
    found |= {"fits": plan.fits, "predicted_gib": device / GIB}
    if figure["kind"] == "longest":
        found["predicted_tokens"] = max_seq(model, recipe, gpu).s_max
    if figure["kind"] == "peak":
        sizes = {"reserved": reserved, "nvidia-smi": device}
        found["predicted"] = sizes.get(figure["measured"], plan.peak_bytes) / figure["unit_bytes"]
    return found
