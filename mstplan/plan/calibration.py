"""Calibrations: what an instant of a model's step takes, solved from traces of it, as vectors that the planner evaluates.

A calibration is of one model and one family of recipes: those that differ in batch, length and number of chunks only. It takes
the place of the formula's moments; its residual says how far it was off where it was checked. Files lie beside the shipped
models, or, made by `mstplan calibrate`, in the user's folder, which comes first. An old file is kept beside a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .. import files
from ..profiles import ROOT, user_folder
from .model import Model
from .recipe import Recipe
from .tape import Vector

SCHEMA_VERSION = 1
SIZES = ("batch", "mlp_chunks", "loss_chunks", "accumulation", "pad_to")
"""Fields of a recipe that a family leaves open."""


class Calibration(NamedTuple):
    """Of one family. moments: by instant, vectors over tape.BASIS in bytes, without cuBLAS' workspaces; the largest counts."""

    recipe: dict[str, Any]  # what `family_of` gives of it
    several_mlp: bool  # is the MLP in several chunks?
    several_loss: bool
    masked: bool  # do sliding-window layers carry an explicit mask?
    accumulating: bool
    moments: dict[str, tuple[Vector, ...]]
    residual: float  # the largest error as a share of a traced peak, of all instants and points, one of them not solved from
    provenance: dict[str, Any]  # rung, versions, points

    @property
    def family(self) -> tuple[object, ...]:
        """The same for calibrations that take each other's place."""
        return repr(sorted(self.recipe.items())), self.several_mlp, self.several_loss, self.masked, self.accumulating

    @property
    def said(self) -> str:
        """Where it comes from, in a few words."""
        p = self.provenance
        return f"{p['rung']}s with torch {p['torch'].partition('+')[0]}, transformers {p['transformers']}"


def family_of(recipe: Recipe) -> dict[str, Any]:
    """What tells it from the default recipe, but for SIZES."""
    usual = Recipe.model_construct()
    return {name: value for name, value in vars(recipe).items() if name not in SIZES and value != getattr(usual, name)}


def fingerprint(model: Model) -> str:
    """The same for models of the same sizes and switches, whatever their name."""
    facts = model._replace(name="", hub_id=None, notes=(), context=None, dtype="")
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def folders() -> tuple[Path, ...]:
    return user_folder() / "calibrations", ROOT / "calibrations"


@lru_cache(maxsize=256)
def of_model(model: Model) -> tuple[Calibration, ...]:
    """The calibrations that are there for a model; none when the file is damaged, or of another model of that name."""
    for folder in folders():
        path = folder / f"{model.name}.json"
        if os.sep not in model.name and path.is_file():
            found = _read(path, fingerprint(model))
            if found:
                return found
    return ()


def find(model: Model, recipe: Recipe, several_mlp: bool, several_loss: bool, masked: bool) -> Calibration | None:
    """The calibration of the recipe's family, if there is one."""
    structure = (several_mlp, several_loss, masked, recipe.accumulation > 1)
    candidates = [c for c in of_model(model) if (c.several_mlp, c.several_loss, c.masked, c.accumulating) == structure]
    if not candidates:
        return None
    family = family_of(recipe)
    return next((c for c in candidates if c.recipe == family), None)


def _read(path: Path, wanted: str) -> tuple[Calibration, ...]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema_version"] != SCHEMA_VERSION or document["fingerprint"] != wanted:
            return ()
        return tuple(_from_data(row) for row in document["families"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()


def _from_data(row: dict[str, Any]) -> Calibration:
    moments = {name: tuple(tuple(vector) for vector in vectors) for name, vectors in row["moments"].items()}
    return Calibration(**{**row, "moments": moments})


def write(model: Model, found: Iterable[Calibration], folder: Path) -> Path:
    """Write a model's calibrations in place of those of the same families; others of the same model stay. An older file is kept
    as NAME.json.1, .2, ... Returns where. Raises OutputError."""
    path = folder / f"{model.name}.json"
    new = list(found)
    families = {c.family for c in new}
    stay = [c for c in _read(path, fingerprint(model)) if c.family not in families] if path.is_file() else []
    rows = [c._asdict() for c in [*new, *stay]]
    document = {"schema_version": SCHEMA_VERSION, "model": model.name, "fingerprint": fingerprint(model), "families": rows}
    files.replace_json(path, document)
    of_model.cache_clear()
    return path
