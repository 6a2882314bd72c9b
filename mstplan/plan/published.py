"""Published measurements beside the step model: what was published, what is predicted, and what explains the rest.

The rows and the recipe that each is read as stand in profiles/published.json. Nothing is fitted to them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..profiles import ROOT
from ..spec.catalog import load_model
from ..spec.hardware import card
from ..step.recipe import Recipe
from ..units import GIB
from .solve import longest_sequence, plan_at, recommend_chunks


@dataclass(frozen=True)
class Comparison:
    """One published row: tokens, and GiB where a peak was published."""

    model: str
    gpu: str
    case: str
    source: str
    kind: str  # "s_max": the longest that ran; "fit_point": a peak at a length that ran
    published_tokens: int
    predicted_tokens: int | None
    published_gib: float | None
    predicted_gib: float | None  # at the published length
    device_wide: bool  # the published peak is nvidia-smi's: the CUDA context is added to the prediction
    recipe: Recipe | None
    predicted_with_older_loss: int | None  # tokens, where the row ran a transformers before 4.45
    explained_by: tuple[str, ...]
    not_predicted: str = ""

    @property
    def tokens_difference(self) -> float | None:
        """Signed, relative to the published length."""
        return None if self.predicted_tokens is None else self.predicted_tokens / self.published_tokens - 1

    @property
    def gib_difference(self) -> float | None:
        if self.predicted_gib is None or self.published_gib is None:
            return None
        return self.predicted_gib / self.published_gib - 1


def comparisons() -> tuple[Comparison, ...]:
    """Compare every published row with its prediction."""
    rows = json.loads((ROOT / "published.json").read_text(encoding="utf-8"))["rows"]
    return tuple(_compare(row) for row in rows)


def _compare(row: dict[str, Any]) -> Comparison:
    assumptions, tokens = row["mstplan"], row["s_max"]
    published_figures = {
        "model": row["model"],
        "gpu": row["hardware"],
        "case": f"{row['strategy']}; {row['optimizer']}",
        "source": row["source"],
        "kind": row["kind"],
        "published_tokens": tokens,
        "published_gib": row["measured_peak_gib"],
    }
    if "not_predicted" in assumptions:
        return Comparison(
            **published_figures,
            predicted_tokens=None,
            predicted_gib=None,
            device_wide=False,
            recipe=None,
            predicted_with_older_loss=None,
            explained_by=(),
            not_predicted=assumptions["not_predicted"],
        )
    model, gpu_card, recipe = (
        load_model(assumptions["model"]),
        card(assumptions["gpu"]),
        Recipe.model_validate(assumptions["recipe"]),
    )
    chunks = recommend_chunks(model, recipe, gpu_card)
    device_wide = assumptions.get("device_wide", False)
    peak = plan_at(model, recipe, gpu_card, tokens, chunks).peak_bytes + (
        gpu_card.gpu.context_bytes if device_wide else 0
    )
    s_max = longest_sequence(model, recipe, gpu_card, chunks) if row["kind"] == "s_max" else None
    older = None
    if s_max is not None and assumptions.get("older_loss"):
        older = longest_sequence(model, recipe.changed(loss="transformers<4.45"), gpu_card, chunks)
    return Comparison(
        **published_figures,
        predicted_tokens=s_max,
        predicted_gib=peak / GIB,
        device_wide=device_wide,
        recipe=recipe,
        predicted_with_older_loss=older,
        explained_by=tuple(assumptions["explained_by"]),
    )
