"""Solves a model's coefficients, and a card's constants, from measurements.

A measurement gives each instant's peak: the largest of several moments, and which of them that is changes with the length (a
layer's backward early on holds more layer inputs, a late one more gradients). So it is not the peaks that are solved for but
what they differ by from the formula's, which knows the moments: over steps of one family a constant, so much for every token
and every token of a chunk, and with the first few layers of a model whose layers are alike, so much for every layer as well. Least squares
over at least one point more than there are coefficients; what is left over is the residual. The calibration is the formula's
moments with that added.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from .. import __version__
from ..errors import MeasurementError, one_line
from ..measuring.measurement import OK, Measurement, read_all_results
from ..plan import calibration
from ..plan.calibration import Calibration, family_of, fingerprint
from ..plan.layout import step_sizes
from ..spec.catalog import load_model
from ..spec.hardware import CUBLAS_HANDLES, Constants, write_measured
from ..spec.model import Model
from ..step.steps import Layout, kernels_of, step
from ..step.tape import BASIS, Vector, add
from ..units import MIB
from .calibrate import MAX_RESIDUAL, WrittenCalibration, describe_written
from .validate import FORMULA, chunks_of, instants_at, layout_measured, point_of, step_of

Factors = np.ndarray


class Fitted(NamedTuple):
    calibrations: list[Calibration]
    left_out: list[str]  # why a family has none


def fit_model(model: Model, measurements: Iterable[Measurement]) -> Fitted:
    """A calibration of every family that has points enough. Raises MeasurementError when none has."""
    groups: dict[tuple[object, ...], list[Measurement]] = defaultdict(list)
    for m in measurements:
        if m.outcome == OK and m.case.model == model.name and _stands_for(m, model):
            layout = layout_measured(m, model)
            if not layout.padded:  # see solve._calibration
                groups[_family_key(m, layout, _names_of_kernels(model, layout))].append(m)
    fitted = Fitted([], [])
    for members in groups.values():
        solved = _solve_family(model, members)
        if isinstance(solved, str):
            fitted.left_out.append(f"{model.name}, {members[0].case.strategy}: {solved}")
        else:
            fitted.calibrations.append(solved)
    if not fitted.calibrations:
        why = (
            "; ".join([*dict.fromkeys(fitted.left_out)][:3])
            or f"no measurement of {model.name} that a calibration could be solved from"
        )
        raise MeasurementError(
            f"{why}.\nMeasure more lengths and chunks: mstplan measure -m {model.name} --seq-len 2k,4k,6k,8k,12k"
        )
    return fitted


def fit_all(
    models: Sequence[str], strategies: Sequence[str], folder: Path, results: Sequence[Path], elsewhere: bool
) -> tuple[list[WrittenCalibration], list[str]]:
    """Fit each model's families to measurements and write them; of CUDA measurements also the cards' constants. elsewhere: is `folder`
    one that the planner does not read? Gives what was written, and what else is to be said. Raises MeasurementError."""
    loaded = [load_model(spec) for spec in models]
    content = read_all_results(results)
    chosen = _plannable([m for m in content.measurements if m.case.strategy in (*strategies, "custom")], elsewhere)
    rows, messages = [], list(content.skipped)
    for model in loaded:
        try:
            fitted = fit_model(model, chosen)
        except MeasurementError as e:
            if len(loaded) == 1:
                raise
            messages.append(str(e).splitlines()[0])
            continue
        path = calibration.write_calibrations(model, fitted.calibrations, folder)
        messages += fitted.left_out
        rows += [describe_written(model, c.provenance["strategy"], c, path) for c in fitted.calibrations]
    if not rows:
        raise MeasurementError(
            "none of these models has measurements enough.\nmstplan calibrate with one --model says what it lacks."
        )
    if constants := device_constants(chosen):
        path = write_measured(constants)
        messages += [
            f"{card}: {card_constants.context_bytes / MIB:,.0f} MiB of CUDA context, measured; wrote {one_line(path, 200)}"
            for card, card_constants in constants.items()
        ]
    return rows, messages


def _plannable(measurements: list[Measurement], elsewhere: bool) -> list[Measurement]:
    """Measurements that the planner may be given: it plans for cards."""
    if elsewhere:
        return measurements
    usable = [m for m in measurements if m.case.device != "cpu"]
    if measurements and not usable:
        raise MeasurementError(
            "these were measured on a CPU, and the planner plans for GPUs.\n--out FOLDER writes calibrations that it does not use."
        )
    return usable


def _stands_for(m: Measurement, model: Model) -> bool:
    """Whether a measurement is of the model, or of first layers that stand for all of them; a trainer holds tokens beside its step's."""
    if m.case.trainer is not None:
        return False
    layers = m.model.layers
    alike = layers == model.layers or (
        len(set(model.layer_kinds)) == 1 and m.case.recipe.checkpoint in ("none", "layer")
    )
    return alike and fingerprint(model.first(layers)) == fingerprint(m.model)


def _names_of_kernels(model: Model, layout: Layout) -> tuple[str, ...]:
    return tuple(kernel.name for kernel in kernels_of(model, layout))


def _family_key(m: Measurement, layout: Layout, kernels: tuple[str, ...]) -> tuple[object, ...]:
    flags = (layout.several_mlp_chunks, layout.several_loss_chunks, layout.masked, m.case.recipe.accumulation > 1)
    device = (m.case.device, m.environment["card"], m.environment["torch"], m.environment["transformers"])
    return *device, *flags, *kernels, repr(sorted(family_of(m.case.recipe).items()))


def _solve_family(model: Model, members: Sequence[Measurement]) -> Calibration | str:
    """The calibration, or why there is none."""
    first = members[0]
    layout = layout_measured(first, model)
    columns = [
        "",
        "bs",
        *(["bc"] if layout.several_mlp_chunks else []),
        *(["bk"] if layout.several_loss_chunks else []),
    ]
    if first.case.recipe.attention == "eager" or layout.masked:
        columns.append("bss")
    by_layer = any(m.model.layers != model.layers for m in members)
    factors = _make_factors(members, columns, by_layer)
    min_points = factors.shape[1] + 1
    if len(members) < min_points or np.linalg.matrix_rank(factors / np.abs(factors).max(axis=0)) < factors.shape[1]:
        varied_words = (
            "lengths"
            + (" and numbers of chunks" if layout.several_loss_chunks else "")
            + (" and numbers of layers" if by_layer else "")
        )
        return (
            f"{len(members)} point{'s' * (len(members) > 1)}, and {min_points} are needed, of different {varied_words}"
        )
    formula = step(model, layout, 0)
    predicted = [_formula_bytes(m) for m in members]
    names = [
        name
        for name in formula.moments
        if all(name in m.instants and name in prediction for m, prediction in zip(members, predicted, strict=True))
    ]
    bytes_ = np.array([[m.instants[name] for name in names] for m in members], dtype=float)
    differences = bytes_ - np.array([[prediction[name] for name in names] for prediction in predicted], dtype=float)
    solution = _least_squares(factors, differences)
    residual = float(np.abs((factors @ solution - differences) / bytes_).max())
    if not residual <= MAX_RESIDUAL:  # nor NaN
        return f"the coefficients miss a measurement by {residual:.2%}, more than {MAX_RESIDUAL:.1%}"
    if by_layer:
        half = len(columns)
        solution = solution[:half] + model.layers * solution[half:]
    moments = {
        name.value: tuple(add(moment.live, _make_vector(columns, solution[:, n])) for moment in formula.moments[name])
        for n, name in enumerate(names)
    }
    return Calibration(
        family_of(first.case.recipe),
        layout.several_mlp_chunks,
        layout.several_loss_chunks,
        layout.masked,
        first.case.recipe.accumulation > 1,
        _names_of_kernels(model, layout),
        moments,
        residual,
        _make_provenance(members, _left_out_error(factors, differences, bytes_)),
    )


def _make_factors(members: Sequence[Measurement], columns: Sequence[str], by_layer: bool) -> Factors:
    """A row for each measurement: `columns` of tape.BASIS; by_layer: also each of them times the number of layers."""
    rows = []
    for m in members:
        units = dict(zip(BASIS, step_sizes(m.case.recipe, m.case.seq_len, chunks_of(m)).units, strict=True))
        row = [units[name] for name in columns]
        rows.append(row + [value * m.model.layers for value in row] if by_layer else row)
    return np.array(rows, dtype=float)


def _least_squares(factors: Factors, bytes_: Factors) -> Factors:
    scale = np.abs(factors).max(axis=0)
    coefficients: Factors = np.linalg.lstsq(factors / scale, bytes_, rcond=None)[0] / scale[:, None]
    return coefficients


def _formula_bytes(m: Measurement) -> dict[str, int]:
    """The formula's bytes of each instant of the step that was measured."""
    formula_step = step_of(m, FORMULA)
    assert formula_step is not None
    return instants_at(m, formula_step)


def _left_out_error(factors: Factors, differences: Factors, bytes_: Factors) -> float:
    """The largest error of a step's peak for a point that was not solved from."""
    errors = [0.0]
    for n in range(len(factors)):
        others = np.arange(len(factors)) != n
        if np.linalg.matrix_rank(factors[others] / np.abs(factors).max(axis=0)) == factors.shape[1]:
            predicted = factors[n] @ _least_squares(factors[others], differences[others]) - differences[n] + bytes_[n]
            errors.append(abs(predicted.max() / bytes_[n].max() - 1))
    return float(max(errors))


def _make_vector(columns: Sequence[str], values: Factors) -> Vector:
    vector = [0] * len(BASIS)
    for name, value in zip(columns, values, strict=True):
        vector[BASIS.index(name)] = round(float(value))
    return tuple(vector)


def _make_provenance(members: Sequence[Measurement], left_out: float) -> dict[str, Any]:
    environment = members[0].environment
    points = [point_of(m) for m in members]
    return {
        "rung": "measurement",
        "strategy": members[0].case.strategy,
        "card": environment["card"],
        "driver": environment.get("driver"),
        "torch": environment["torch"],
        "transformers": environment["transformers"],
        "mstplan": __version__,
        "when": max(m.when for m in members),
        "points": points,
        "left_out_error": left_out,
    }


def device_constants(measurements: Iterable[Measurement]) -> dict[str, Constants]:
    """Constants by card as torch names it: bytes of the CUDA context and of cuBLAS' workspace, medians, and what they are from."""
    by_card: dict[str, list[Measurement]] = defaultdict(list)
    for m in measurements:
        if (
            m.outcome == OK and m.case.device == "cuda" and m.case.recipe.gpus == 1
        ):  # NCCL's memory would count as context
            by_card[m.environment["card"]].append(m)
    constants: dict[str, Constants] = {}
    for card, members in by_card.items():
        ranks = [rank for m in members for rank in m.ranks]
        contexts, workspaces = (
            [v for v in column if v is not None]
            for column in zip(*((r.context, r.workspace) for r in ranks), strict=True)
        )
        if contexts and workspaces:
            environment = members[-1].environment
            source = f"measured: {len(contexts)} steps with torch {environment['torch']}, driver {environment.get('driver')}, until {members[-1].when}"
            constants[card] = Constants(int(median(contexts)), int(median(workspaces)) // CUBLAS_HANDLES, source)
    return constants
