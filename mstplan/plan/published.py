"""Published measurements beside the step model: what was published, what is predicted, and what explains the rest.

The rows and the recipe that each is read as stand in profiles/published.json. Nothing is fitted to them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..profiles import ROOT
from ..spec.catalog import load_model
from ..spec.config import read_config
from ..spec.hardware import USUAL, Card, card
from ..spec.model import Model
from ..step.recipe import Recipe
from ..step.steps import Chunks
from ..units import GIB
from .allocation import usage_at
from .solve import longest_sequence, peak_at, plan_at, recommend_chunks


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
    return tuple(_compare(row) for row in _published()["rows"])


def _published() -> dict[str, Any]:
    told: dict[str, Any] = json.loads((ROOT / "published.json").read_text(encoding="utf-8"))
    return told


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


# ---- series: one recipe at several lengths or batches ---------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One published figure of a series, in its unit, and what is predicted for it."""

    batch: int
    seq_len: int
    published: float
    predicted: float | None

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    @property
    def difference(self) -> float | None:
        """Signed, relative to the published figure."""
        return None if self.predicted is None else self.predicted / self.published - 1


@dataclass(frozen=True)
class Series:
    """Published figures of one recipe. What grows with the tokens is compared apart from what does not: the slope, between the first and
    the last figure, is free of a constant that was counted along."""

    name: str
    model: str
    gpu: str
    case: str
    source: str
    measured: str  # "allocated" or "reserved": at most, by torch; "not stated"
    unit: str  # as printed
    known_stack: bool  # the code that ran is the code that is planned: figures agree, not only slopes
    recipe: Recipe | None  # of a batch of one
    points: tuple[Point, ...]
    assumptions: tuple[str, ...]
    explained_by: tuple[str, ...]
    unit_bytes: int
    not_predicted: str = ""

    @property
    def published_slope(self) -> float | None:
        """Bytes a token."""
        first, last = self.points[0], self.points[-1]
        grown = last.tokens - first.tokens
        return (last.published - first.published) * self.unit_bytes / grown if grown else None

    @property
    def predicted_slope(self) -> float | None:
        first, last = self.points[0], self.points[-1]
        if last.tokens == first.tokens or first.predicted is None or last.predicted is None:
            return None
        return (last.predicted - first.predicted) * self.unit_bytes / (last.tokens - first.tokens)

    @property
    def slope_difference(self) -> float | None:
        """Signed, relative to the published slope."""
        predicted, published = self.predicted_slope, self.published_slope
        return None if predicted is None or published is None else predicted / published - 1


def all_series() -> tuple[Series, ...]:
    """Compare every published series with its prediction."""
    return tuple(map(_compare_series, _published()["series"]))


def series_model(name: str) -> Model:
    """The model that a series names: one of the file's own configs, else a shipped one."""
    config = _published()["configs"].get(name)
    return load_model(name) if config is None else read_config(config, name)


def _compare_series(row: dict[str, Any]) -> Series:
    read_as = row["mstplan"]
    facts = {name: row[name] for name in ("name", "model", "case", "source", "measured", "unit", "unit_bytes")}
    recipe, predicted = None, [None] * len(row["points"])
    if "not_predicted" not in read_as:
        model = series_model(read_as["model"])
        recipe, gpu_card = Recipe.model_validate(read_as["recipe"]), card(read_as["gpu"])._replace(allocator=USUAL)
        predicted = [
            _bytes_of(model, recipe.changed(batch=batch), gpu_card, seq_len, row["measured"]) / row["unit_bytes"]
            for batch, seq_len, _ in row["points"]
        ]
    points = (
        Point(batch, seq_len, figure, value)
        for (batch, seq_len, figure), value in zip(row["points"], predicted, strict=True)
    )
    return Series(
        **facts,
        gpu=row["hardware"],
        known_stack=row["known_stack"],
        recipe=recipe,
        points=tuple(points),
        assumptions=tuple(read_as.get("assumptions", ())),
        explained_by=tuple(read_as.get("explained_by", ())),
        not_predicted=read_as.get("not_predicted", ""),
    )


def _bytes_of(model: Model, recipe: Recipe, gpu_card: Card, seq_len: int, measured: str) -> int:
    """What torch reserves at most, by the simulated allocator, where that was measured; else what is allocated."""
    chunks = Chunks(1, 1)
    if measured == "reserved":
        return usage_at(model, recipe, gpu_card, seq_len, chunks).reserved
    return peak_at(model, recipe, gpu_card, seq_len, chunks)[1]
