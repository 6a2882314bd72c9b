"""Solves a step's coefficients from traces.

Every moment of a step takes bytes that are a sum of a constant and of shares of what batch, length and chunks give
(tape.BASIS). Steps of one family make the same allocations in the same order at every length, so the traces of a few lengths
give every moment's shares as the solution of linear equations, in whole bytes. One trace more, of a longer sequence, is not
solved from but compared: the residual holds for it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import __version__
from ..errors import ModelError, RecipeError
from ..plan import calibration
from ..plan.calibration import Calibration
from ..plan.layout import step_sizes, window_of
from ..showing import Showing, show_nothing
from ..spec.catalog import load_config, load_model
from ..spec.model import Model
from ..spec.platform import AMPERE, Platform
from ..step.recipe import STRATEGIES, Recipe
from ..step.steps import Chunks, Layout, evaluate, kernels_of
from ..step.tape import BASIS, Moment, Vector, undominated
from ..tracing.cache import trace_of, versions
from ..tracing.trace import Trace

TraceAt = Callable[[Recipe, int], Trace]
MAX_RESIDUAL = 0.005
"""A residual above this is refused: the solution would not be the model's."""


class TracePoint(NamedTuple):
    """A step to trace: lengths that chunks divide, so that all of them are of one size."""

    batch: int
    seq_len: int
    mlp_chunks: int
    loss_chunks: int


# Lengths whose remainders by 128 differ, so that rows rounded up to 128 are told from tokens. Of two sequences and three: one
# alone takes an allocation less (transformers' loss copies the labels of several).
TRACE_POINTS = (
    TracePoint(2, 5040, 5, 8),
    TracePoint(3, 7920, 8, 5),
    TracePoint(2, 6160, 4, 10),
    TracePoint(3, 12240, 4, 9),
    TracePoint(2, 16200, 15, 4),
    TracePoint(3, 9000, 9, 6),
    TracePoint(2, 10080, 6, 20),
    TracePoint(3, 14000, 7, 7),
    TracePoint(2, 5400, 10, 12),
    TracePoint(3, 20160, 9, 14),
)
CALIBRATED_STRATEGIES = tuple(name for name, recipe in STRATEGIES.items() if not recipe.layer_in_chunks)
"""Strategies that have coefficients: where whole layers run in chunks, the numbers of chunks and of groups of heads decide which
allocations there are, not their sizes alone."""
HOLDOUT_POINT = TracePoint(1, 100800, 25, 30)
LINEAR_TERMS, SQUARE_TERMS = ("", "bs", "bc", "bk", "s", "br"), ("bss", "ss")


class Family(NamedTuple):
    """Family of recipes to calibrate: a strategy, and whether its MLP and its loss run in several chunks (one is recommended where that is enough)."""

    strategy: str
    several_mlp: bool
    several_loss: bool
    masked: bool


def families_of(model: Model, names: Sequence[str] = CALIBRATED_STRATEGIES) -> list[Family]:
    families = []
    for name in names:
        recipe = STRATEGIES[name]
        chunks = list(
            product(
                (True, False) if recipe.mlp_recompute else (False,),
                (True, False) if recipe.loss_in_chunks else (False,),
            )
        )
        for masked in (False, True) if window_of(model, recipe) is not None else (False,):
            families += [Family(name, *several, masked) for several in chunks]
    return families


def calibrate(model: Model, family: Family, trace_at: TraceAt, platform: Platform = AMPERE) -> Calibration:
    """Solve the family's moments, of steps with the attention kernels that `platform` has. Raises ModelError when the steps are not
    alike, or the residual is over `MAX_RESIDUAL`."""
    recipe = STRATEGIES[family.strategy]
    absent = {name for name, several in (("bc", family.several_mlp), ("bk", family.several_loss)) if not several}
    basis = [name for name in LINEAR_TERMS if name not in absent] + list(SQUARE_TERMS if family.masked else ())
    window = window_of(model, recipe)
    points = [_fit_point(point, family, window) for point in (*TRACE_POINTS[: len(basis) + 1], HOLDOUT_POINT)]
    # the formula counts these workspaces beside a calibration: they are no shares of batch and length
    traces = [trace_at(_recipe_at(recipe, point), point.seq_len).without_gradient_workspaces() for point in points]
    moments = _solve_vectors(model, basis, points[:-1], traces[:-1])
    solved = {
        name: tuple(m.live for m in undominated([Moment(v, "", ()) for v in vectors]))
        for name, vectors in moments.items()
    }
    residual = max(_largest_error(solved, point, t) for point, t in zip(points, traces, strict=True))
    if not residual <= MAX_RESIDUAL:  # nor NaN
        raise ModelError(
            f"{model.name}, {family.strategy}: the coefficients miss a trace by {residual:.2%}, more than {MAX_RESIDUAL:.1%}: not written."
        )
    layout = Layout(recipe, family.several_mlp, family.several_loss, family.masked, platform=platform)
    kernels = tuple(kernel.name for kernel in kernels_of(model, layout))
    provenance = {
        "rung": "trace",
        **versions(),
        "mstplan": __version__,
        "points": [list(point) for point in points[:-1]],
        "checked": list(points[-1]),
    }
    return Calibration(
        calibration.family_of(recipe),
        family.several_mlp,
        family.several_loss,
        family.masked,
        False,
        kernels,
        solved,
        residual,
        provenance,
    )


class WrittenCalibration(NamedTuple):
    """A calibration of one family, in its file."""

    model: str
    strategy: str
    mlp_in_chunks: bool
    loss_in_chunks: bool
    masked: bool  # sliding windows with explicit masks
    vectors: int
    residual: float
    file: str


def describe_written(model: Model, strategy: str, solved: Calibration, file: Path) -> WrittenCalibration:
    return WrittenCalibration(
        model.name,
        strategy,
        solved.several_mlp,
        solved.several_loss,
        solved.masked,
        sum(map(len, solved.moments.values())),
        solved.residual,
        str(file),
    )


def calibrate_all(
    models: Sequence[str],
    strategies: Sequence[str],
    folder: Path,
    keep: bool,
    showing: Showing = show_nothing,
    platform: Platform = AMPERE,
) -> list[WrittenCalibration]:
    """Calibrate each model (a name, path or id) for the attention kernels of `platform`, and write its file as soon as it is done. keep:
    use and fill the cache of traces.
    Raises what the trace refuses, ModelError, RecipeError and OutputError."""
    versions()  # no torch: said at once
    if unfit := next((name for name in strategies if name not in CALIBRATED_STRATEGIES), None):
        raise RecipeError(
            f"{unfit} has no calibration: how many chunks there are changes its steps in more than sizes.\n"
            f"Choose from {', '.join(CALIBRATED_STRATEGIES)}; the formula plans {unfit} as the trace does."
        )
    work = [(spec, load_model(spec)) for spec in models]
    rows: list[WrittenCalibration] = []
    solved: dict[tuple[str, Family], Calibration] = {}
    with showing("calibrating", sum(len(families_of(model, strategies)) for _, model in work)) as advance:
        for spec, model in work:
            config, members = load_config(spec), []

            def trace_at(recipe: Recipe, seq_len: int) -> Trace:
                return trace_of(config, recipe, seq_len, keep=keep, platform=platform)  # noqa: B023  used within this turn only

            for family in families_of(model, strategies):
                advance(f"{model.name}, {family.strategy}", 0)
                key = (calibration.fingerprint(model), family)  # models of other names and the same sizes
                if key not in solved:
                    solved[key] = calibrate(model, family, trace_at, platform)
                members.append((family, solved[key]))
                advance("", 1)
            path = calibration.write_calibrations(model, [c for _, c in members], folder)
            rows += [describe_written(model, family.strategy, c, path) for family, c in members]
    return rows


def _fit_point(point: TracePoint, family: Family, window: int | None) -> TracePoint:
    """The point on the family's side of the sliding window, with the family's chunks."""
    point = point._replace(
        mlp_chunks=point.mlp_chunks if family.several_mlp else 1,
        loss_chunks=point.loss_chunks if family.several_loss else 1,
    )
    if window is not None and not family.masked:
        return _below(point, window)
    if window is not None:  # all by one factor: lengths that lie close together tell no coefficients apart
        return point._replace(seq_len=point.seq_len * -(-window // min(each.seq_len for each in TRACE_POINTS)))
    return point


def _below(point: TracePoint, window: int) -> TracePoint:
    """The point with a length below `window`, a multiple of its chunks: as few of them as have room there."""
    most = window - 1
    mlp, loss = min(point.mlp_chunks, isqrt(most)), min(point.loss_chunks, isqrt(most))
    scale = -(-point.seq_len // most)
    return point._replace(
        seq_len=max(mlp * loss, point.seq_len // scale // (mlp * loss) * (mlp * loss)), mlp_chunks=mlp, loss_chunks=loss
    )


def _recipe_at(recipe: Recipe, point: TracePoint) -> Recipe:
    return recipe.changed(batch=point.batch, mlp_chunks=point.mlp_chunks, loss_chunks=point.loss_chunks)


def _point_units(point: TracePoint) -> dict[str, int]:
    recipe = Recipe.model_construct(batch=point.batch)
    return dict(
        zip(BASIS, step_sizes(recipe, point.seq_len, Chunks(point.mlp_chunks, point.loss_chunks)).units, strict=True)
    )


def _solve_vectors(
    model: Model, basis: Sequence[str], points: Sequence[TracePoint], traces: Sequence[Trace]
) -> dict[str, list[Vector]]:
    """Solve every moment's vector, by instant."""
    if len({(len(t.live), tuple(t.step.places)) for t in traces}) > 1:
        raise ModelError(
            f"{model.name}: its steps differ between lengths in more than sizes, so that no coefficients describe them."
        )
    factors = np.array([[_point_units(p)[name] for name in basis] for p in points], dtype=float)
    bytes_ = np.array([t.requested for t in traces], dtype=float)
    scale = factors.max(axis=0)
    solution = np.rint(np.linalg.lstsq(factors / scale, bytes_, rcond=None)[0] / scale[:, None]).astype(np.int64)
    places = [BASIS.index(name) for name in basis]
    vectors: dict[str, list[Vector]] = {}
    for place, span in traces[0].step.blocks():
        events = span or range(span.start - 1, span.start)  # an optimizer that makes nothing finds what backward left
        columns = {tuple(column) for column in solution[:, events.start : events.stop].T.tolist()}
        vectors.setdefault(traces[0].instant_of(place), []).extend(_vector(places, column) for column in columns)
    return vectors


def _vector(places: Sequence[int], column: Sequence[int]) -> Vector:
    vector = [0] * len(BASIS)
    for place, value in zip(places, column, strict=True):
        vector[place] = value
    return tuple(vector)


def _largest_error(moments: dict[str, tuple[Vector, ...]], point: TracePoint, trace: Trace) -> float:
    """The largest error of an instant's peak, as a share of it."""
    units = tuple(_point_units(point).values())
    predicted = {name: max(evaluate(v, units) for v in vectors) for name, vectors in moments.items()}
    return max(abs(predicted[peak.instant] / peak.bytes - 1) for peak in trace.peaks)
