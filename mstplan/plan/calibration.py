"""Calibrations: what an instant of a model's step takes, solved from traces of it, as vectors that the planner evaluates.

A calibration is of one model and one family of recipes: those that differ in batch, length and number of chunks only. It takes
the place of the formula's moments; its residual says how far it was off where it was checked. Files lie beside the shipped
models, or, made by `mstplan calibrate`, in the user's folder, which comes first. An old file is kept beside a new one. The user's
are checked whole when they are read; those that ship are the package's own data, which a test checks in the same way.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field

from .. import files, kept
from ..errors import InputError, one_line
from ..kept import KeptFile
from ..profiles import ROOT, user_folder
from ..spec.model import Model
from ..step.instants import Instant
from ..step.recipe import Recipe
from ..step.tape import BASIS, Vector

SCHEMA_VERSION = 2
OPEN_FIELDS = ("batch", "mlp_chunks", "loss_chunks", "accumulation", "pad_to")
"""Fields of a recipe that a family leaves open."""
MAX_BYTES_PER_WEIGHT = 128
"""Bytes for each weight that no share of a moment reaches: weight, gradient, states and temporaries are some 30 at most, and what
grows with tokens is far less."""
NOISE_BYTES = 64
"""Bytes a token by which an instant of constant size may seem to shrink, where it is solved from measurements."""

OLDEST_BASIS = 8
"""Entries of the vectors in the oldest files: what has come since, only kernels' workspaces grow with, which no calibration holds."""


def _fill_up(vector: Sequence[int]) -> Vector:
    return (*vector, *(0,) * (len(BASIS) - len(vector)))


_Vector = Annotated[tuple[int, ...], Field(min_length=OLDEST_BASIS, max_length=len(BASIS)), AfterValidator(_fill_up)]
_Moments = Annotated[dict[str, Annotated[tuple[_Vector, ...], Field(min_length=1)]], Field(min_length=1)]


class Calibration(NamedTuple):
    """Calibration of one family. moments: by instant, vectors over tape.BASIS in bytes, without cuBLAS' workspaces; the largest counts."""

    recipe: dict[str, Any]  # what `family_of` gives of it
    several_mlp: bool  # is the MLP in several chunks?
    several_loss: bool
    masked: bool  # do sliding-window layers carry an explicit mask?
    accumulating: bool
    kernels: tuple[str, ...]  # attention kernels that ran: of layers without an explicit mask, and of those with one
    moments: _Moments
    residual: Annotated[
        float, Field(ge=0, le=1)
    ]  # the largest error as a share of a traced peak, of all instants and points, one of them not solved from
    provenance: dict[str, Any]  # rung, versions, points

    @property
    def family(self) -> tuple[object, ...]:
        """Identity of the family: calibrations that share it take each other's place."""
        flags = self.several_mlp, self.several_loss, self.masked, self.accumulating
        return repr(sorted(self.recipe.items())), *flags, self.kernels

    @property
    def source(self) -> str:
        """Source in a few words."""
        p = self.provenance
        return one_line(f"{p['rung']}s with torch {p['torch'].partition('+')[0]}, transformers {p['transformers']}")


class _CalibrationFile(NamedTuple):
    schema_version: int
    model: str
    fingerprint: str
    families: tuple[Calibration, ...]


def family_of(recipe: Recipe) -> dict[str, Any]:
    """Fields in which a recipe differs from the default one, but for OPEN_FIELDS."""
    default = Recipe.model_construct()
    return {
        name: value
        for name, value in vars(recipe).items()
        if name not in OPEN_FIELDS and value != getattr(default, name)
    }


_YOUNGER_FIELDS = (
    ", stand_in=None",
    ", vision=None",
    ", release=None",
    ", published=('', False)",
    ", head_bias=False",
    ", idle_window=None",
    ", tempered=False",
    ", normalised=True",
    ", shared_bias=False",
    ", rotary=True",
    ", embedding_dropout=None",
    ", keys='shared'",
    ", causal_mask=False",
    ", causality=0",
    ", sinusoids=0",
    ", alibi=False",
    ", embedding_norm=False",
    ", eager_only=False",
    ", own_flash=False",
    ", gated_output=False",
    ", mixer='attention'",
    ", mixer=None",
    ", feed_forward=True",
    ", widens=False",
    ", wide_residual=False",
    ", gated=True, latent=None",
    ", towers=()",
    ", values='projected'",
    ", attention=None",
    ", mlp_width=None",
    ", keys=''",
    ", beside_mlp=False",
    ", per_layer=None",
    ", indexer=None",
    ", altup=None",
    ", cuts_gates=False",
)
"""Facts that models had before there were fields for them: calibrations are older."""


def fingerprint(model: Model) -> str:
    """Hash of everything about a model that decides memory."""
    facts = model._replace(name="", hub_id=None, notes=(), context=None, dtype="", release=None, published=("", False))
    text = facts.listed()
    for younger in _YOUNGER_FIELDS:
        text = text.replace(younger, "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folders() -> tuple[Path, ...]:
    """Folders where calibrations are looked for, in this order. Raises OutputError where the user has no folder."""
    return user_folder() / "calibrations", ROOT / "calibrations"


def file_name(model: Model) -> str:
    return f"{model.name.replace(os.sep, '--')}.json"  # of an id org/name, too


class OwnCalibrations(NamedTuple):
    """Calibrations in the user's folder for a model; left_out_note: why they are left out, in a line."""

    calibrations: tuple[Calibration, ...] = ()
    left_out_note: str = ""


def find_own_file(model: Model) -> KeptFile | None:
    """The user's own calibrations of a model, as they are now. Answers that stand on others do not compare equal."""
    return kept.find_user_file("calibrations", file_name(model))


def calibrations_of(model: Model) -> tuple[Calibration, ...]:
    """The calibrations that are there for a model: the user's own, else those that ship. None of another model of that name."""
    return _read_own(model, find_own_file(model)).calibrations or _read_shipped(model)


def left_out_notes(model: Model) -> list[str]:
    """A line when the user's own calibrations of the model are there and cannot be used."""
    line = _read_own(model, find_own_file(model)).left_out_note
    return [line] if line else []


@lru_cache(maxsize=256)
def _read_own(model: Model, file: KeptFile | None) -> OwnCalibrations:
    try:
        return OwnCalibrations(_read_checked(model, file)) if file is not None else OwnCalibrations()
    except InputError as e:
        return OwnCalibrations(left_out_note=kept.left_out_note(e))


@lru_cache(maxsize=256)
def _read_shipped(model: Model) -> tuple[Calibration, ...]:
    path = ROOT / "calibrations" / file_name(model)
    if not os.path.isfile(path):
        return ()
    document = json.loads(path.read_text(encoding="utf-8"))  # building what checks it would take a tenth of an answer
    return (
        tuple(_from_data(data) for data in document["families"])
        if document["fingerprint"] == fingerprint(model)
        else ()
    )


def _from_data(data: dict[str, Any]) -> Calibration:
    moments = {name: tuple(_fill_up(vector) for vector in vectors) for name, vectors in data["moments"].items()}
    return Calibration(**{**data, "kernels": tuple(data["kernels"]), "moments": moments})


def _read_checked(model: Model, file: KeptFile) -> tuple[Calibration, ...]:
    """A file's calibrations of the model. Raises InputError for one that holds what cannot be."""
    content: _CalibrationFile = kept.read_json(file, "calibrations of `mstplan calibrate`", _CalibrationFile)
    if content.schema_version != SCHEMA_VERSION:
        raise kept.damage_error(
            file, f"its schema is {one_line(content.schema_version)}, and this mstplan reads {SCHEMA_VERSION}"
        )
    if content.fingerprint != fingerprint(model):
        return ()
    for number, calibration in enumerate(content.families):
        if why := _find_problem(model, calibration):
            raise kept.damage_error(file, f"families.{number}: {why}")
    return content.families


def _find_problem(model: Model, calibration: Calibration) -> str | None:
    """Reason why a calibration cannot be right, or ""."""
    try:
        recipe = Recipe(**calibration.recipe)
    except (InputError, TypeError):
        return "recipe: none that mstplan knows"
    if family_of(recipe) != calibration.recipe:
        return "recipe: more than tells a family"
    if not set(calibration.moments) <= set(Instant):
        return "moments: of an instant that a step does not have"
    return _find_moment_problem(model, recipe, calibration.moments) or _find_provenance_problem(calibration.provenance)


def _find_moment_problem(model: Model, recipe: Recipe, moments: dict[str, tuple[Vector, ...]]) -> str | None:
    """Reason why moments cannot be right: each holds the weights on the device and grows with the sequence, one by a hidden state."""
    from ..step.parameters import parameter_count

    parameters = parameter_count(model)[0]
    weights = 0 if recipe.weights_on_host else parameters * recipe.weight_bytes // recipe.shards
    vectors = [dict(zip(BASIS, vector, strict=True)) for several in moments.values() for vector in several]
    slopes = [v["bs"] + v["s"] + v["br"] + min(0, v["bc"]) + min(0, v["bk"]) for v in vectors]  # a chunk may be short
    if max(abs(n) for v in vectors for n in v.values()) > MAX_BYTES_PER_WEIGHT * parameters:
        return "moments: more bytes than a step of the model can take"
    if min(v[""] for v in vectors) < weights // 2:  # what is solved from measurements has some noise
        return "moments: fewer bytes than the model's weights take"
    if (
        min(slopes) < -NOISE_BYTES
        or min(v["bss"] + v["ss"] for v in vectors) < 0
        or max(v["bs"] for v in vectors) < model.hidden
    ):
        return "moments: they do not grow with the sequence as a step does"
    return None


def _find_provenance_problem(provenance: dict[str, Any]) -> str | None:
    """Reason why a provenance cannot be right: what is read of it is there, and the rest can be printed as JSON."""
    is_measured = provenance.get("rung") == "measurement"
    names = ("rung", "torch", "transformers", *(("card", "strategy") if is_measured else ()))
    texts = [provenance.get(name) for name in names]
    if not all(isinstance(text, str) and 0 < len(text) <= 100 for text in texts) or provenance["rung"] not in (
        "trace",
        "measurement",
    ):
        return "provenance: it does not say where the numbers are from"
    points = provenance.get("points")
    if not isinstance(points, list) or not all(
        isinstance(p, list) and all(type(n) is int and n > 0 for n in p) for p in points
    ):
        return "provenance: it does not say which points were solved from"
    try:
        json.dumps(provenance, allow_nan=False)
    except ValueError:
        return "provenance: it holds what is no number"
    return None


_set_aside = ContextVar("calibrations set aside", default=False)


@contextmanager
def set_aside() -> Iterator[None]:
    """Within it answers are the formula's alone: for comparing recipes of which some are calibrated and others are not. Plans are asked
    what they stand on outside of it, and do not outlive it."""
    before = _set_aside.set(True)
    try:
        yield
    finally:
        _set_aside.reset(before)


def are_set_aside() -> bool:
    return _set_aside.get()


def find_calibration(
    model: Model, recipe: Recipe, several_mlp: bool, several_loss: bool, masked: bool, kernels: tuple[str, ...]
) -> Calibration | None:
    """The calibration of the recipe's family with these attention kernels, if there is one."""
    structure = (several_mlp, several_loss, masked, recipe.accumulation > 1, kernels)
    candidates = [
        c
        for c in calibrations_of(model)
        if (c.several_mlp, c.several_loss, c.masked, c.accumulating, c.kernels) == structure
    ]
    if not candidates:
        return None
    family = family_of(recipe)
    return next((c for c in candidates if c.recipe == family), None)


def write_calibrations(model: Model, calibrations: Iterable[Calibration], folder: Path) -> Path:
    """Write a model's calibrations in place of those of the same families; others of the same model stay. An older file is kept
    as NAME.json.1, .2, ... Returns where. Raises OutputError."""
    path = folder / file_name(model)
    written = list(calibrations)
    families = {c.family for c in written}
    others = [c for c in _read_own(model, kept.find_file(path)).calibrations if c.family not in families]
    rows = [c._asdict() for c in [*written, *others]]
    document = {
        "schema_version": SCHEMA_VERSION,
        "model": model.name,
        "fingerprint": fingerprint(model),
        "families": rows,
    }
    files.replace_json(path, document)
    return path
