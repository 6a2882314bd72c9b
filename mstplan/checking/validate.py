"""Predictions held against measurements: each rung's answer for the very step that was measured, and how far off it is. No torch,
but for traces that are not kept yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import mean, median
from typing import NamedTuple

from ..errors import InputError, MissingError, one_line
from ..measuring.measurement import OK, OUT_OF_MEMORY, Measurement, card_of
from ..plan.calibration import Calibration
from ..plan.layout import calibration_at, layout_of, step_sizes
from ..spec.hardware import Card
from ..spec.model import Model
from ..step.steps import Chunks, Layout, Step, step
from ..tracing import cache
from ..tracing.simulation import fits_on, simulate
from ..tracing.trace import Trace

FORMULA, CALIBRATED, TRACE = "formula", "calibrated", "trace"
RUNGS = (FORMULA, CALIBRATED, TRACE)
ALLOCATED, RESERVED, DEVICE = "allocated", "reserved", "device"


class ErrorRow(NamedTuple):
    """A measured step's peak and a rung's prediction of it, in bytes. what: allocated | reserved | device."""

    measurement: Measurement
    rung: str
    what: str
    predicted: int
    measured: int
    instants: tuple[tuple[str, int, int], ...] = ()  # (name, predicted, measured) of each, where both tell

    @property
    def held(self) -> bool:
        return is_held_to(self.rung, self.measurement)

    @property
    def error(self) -> float:
        """Signed, as a share of what was measured: + is too much."""
        return self.predicted / self.measured - 1

    @property
    def worst_instant(self) -> tuple[str, float]:
        """The name and the error of the instant that is furthest off."""
        return max(
            ((name, predicted / measured - 1) for name, predicted, measured in self.instants),
            key=lambda pair: abs(pair[1]),
        )


class BrokenPrediction(NamedTuple):
    """A step that a rung said would fit, and that ran out of memory."""

    measurement: Measurement
    rung: str


class Summary(NamedTuple):
    """Summary of the errors of some rows: means of their absolute values, and the worst with its sign. worst_instant: of all instants, whether
    they make the peak or not; None where rows have none."""

    rung: str
    what: str
    held: bool  # to the rung's bounds
    group: str
    n: int
    mean: float
    median: float
    worst: float
    worst_instant: float | None


class Validation(NamedTuple):
    rows: list[ErrorRow]
    broken: list[BrokenPrediction]
    out_of_memory: int  # how many measurements ran out of memory
    left_out: list[str]  # why a measurement was not compared


def chunks_of(m: Measurement) -> Chunks:
    return Chunks(int(m.case.recipe.mlp_chunks), int(m.case.recipe.loss_chunks))


def validate(
    measurements: Iterable[Measurement],
    rungs: Sequence[str] = RUNGS,
    tell: Callable[[str], object] = lambda _words: None,
) -> Validation:
    """Compare every measurement with every rung that has an answer. `tell` hears what is compared at the moment."""
    validation = Validation([], [], 0, [])
    out_of_memory = 0
    for m in measurements:
        tell(m.case.words)
        if m.outcome == OUT_OF_MEMORY:
            out_of_memory += 1
            for rung in rungs:
                with _note_left_out(m, validation):
                    if is_held_to(rung, m) and _is_said_to_fit(m, rung):
                        validation.broken.append(BrokenPrediction(m, rung))
        elif m.outcome == OK:
            for rung in rungs:
                with _note_left_out(m, validation):
                    if rung == CALIBRATED and _is_solved_from(m):
                        validation.left_out.append(
                            f"{m.case.words}: its calibration was solved from this very step, which says nothing about predictions"
                        )
                    else:
                        validation.rows.extend(_make_rows(m, rung))
        else:
            validation.left_out.append(f"{m.case.words}: {m.outcome}, {m.reason}")
    validation.rows.extend(_make_device_rows(validation.rows))
    return validation._replace(out_of_memory=out_of_memory)


@contextmanager
def _note_left_out(m: Measurement, validation: Validation) -> Iterator[None]:
    """Say what cannot be predicted of one measurement, and let the others go on."""
    try:
        yield
    except MissingError:
        raise
    except InputError as e:
        validation.left_out.append(f"{m.case.words}: {one_line(e, 150)}")


def _make_rows(m: Measurement, rung: str) -> list[ErrorRow]:
    if rung == TRACE:
        trace = trace_measured(m)
        rows = [_allocated_row(m, rung, {peak.instant: peak.bytes for peak in trace.peaks})]
        if (
            m.case.device == "cuda" and m.peak.reserved is not None and m.case.recipe.gpus == 1
        ):  # its blocks are of several streams
            expandable = "expandable_segments:True" in m.environment.get("allocator", "")
            rows.append(ErrorRow(m, rung, RESERVED, simulate(trace, expandable=expandable).reserved, m.peak.reserved))
        return rows
    rung_step = step_of(m, rung)
    return [_allocated_row(m, rung, instants_at(m, rung_step))] if rung_step is not None else []


def instants_at(m: Measurement, rung_step: Step) -> dict[str, int]:
    """Bytes of each instant of a step at the measured sizes."""
    return {
        instant.name: instant.bytes
        for instant in rung_step.instants(step_sizes(m.case.recipe, m.case.seq_len, chunks_of(m)))
    }


def _allocated_row(m: Measurement, rung: str, predicted: dict[str, int]) -> ErrorRow:
    measured = m.instants
    instants = tuple((name, predicted[name], measured[name]) for name in predicted if name in measured)
    return ErrorRow(m, rung, ALLOCATED, max(predicted.values()), m.peak.allocated, instants)


def step_of(m: Measurement, rung: str) -> Step | None:
    """The formula's step, or the one a calibration makes of it; None when there is none for it."""
    model = m.model
    formula = step(model, layout_measured(m, model), workspace_of(m))
    if rung == FORMULA:
        return formula
    calibration = _find_calibration(m)
    return formula.calibrated(calibration.moments) if calibration is not None else None


def layout_measured(m: Measurement, model: Model) -> Layout:
    """The structure of the step that was measured, as of `model`."""
    return layout_of(model, m.case.recipe, chunks_of(m), m.case.seq_len, card_measured(m).platform)


def _find_calibration(m: Measurement) -> Calibration | None:
    platform = card_measured(m).platform
    return calibration_at(m.model, m.case.recipe, m.case.seq_len, chunks_of(m), platform)


def _is_solved_from(m: Measurement) -> bool:
    """Whether the calibration that predicts a step was solved from it."""
    calibration = _find_calibration(m)
    if (
        calibration is None
        or calibration.provenance["rung"] != "measurement"
        or calibration.provenance["card"] != m.environment["card"]
    ):
        return False
    return point_of(m) in calibration.provenance["points"]


def point_of(m: Measurement) -> list[int]:
    """Entry of a calibration's provenance for a step that it was solved from: b, s, chunks of MLP and loss, L."""
    return [m.case.recipe.batch, m.case.seq_len, *chunks_of(m), m.model.layers]


def trace_measured(m: Measurement) -> Trace:
    case, threads = m.case, m.environment.get("threads")
    return cache.trace_of(
        case.config,
        case.recipe,
        case.seq_len,
        on=case.device,
        workspace=workspace_of(m),
        platform=card_measured(m).platform,
        threads=threads,
    )


def workspace_of(m: Measurement) -> int:
    """Bytes that cuBLAS was seen to take, else those known of the card; none on a CPU."""
    if m.case.device == "cpu":
        return 0
    measured = next((rank.workspace for rank in m.ranks if rank.workspace is not None), None)
    return measured if measured is not None else card_measured(m).gpu.workspaces_bytes


def card_measured(m: Measurement) -> Card:
    return card_of(m.environment, m.case.limit)


def _is_said_to_fit(m: Measurement, rung: str) -> bool:
    planned_card, cuda = card_measured(m), m.case.device == "cuda"
    if rung == TRACE:
        return (
            fits_on(trace_measured(m), planned_card)
            if cuda
            else trace_measured(m).peak.bytes <= planned_card.total_bytes
        )
    rung_step = step_of(m, rung)
    budget = planned_card.budget_bytes if cuda else planned_card.total_bytes  # a CPU has no context
    return (
        rung_step is not None
        and rung_step.largest(step_sizes(m.case.recipe, m.case.seq_len, chunks_of(m)))[1] <= budget
    )


def _make_device_rows(rows: Sequence[ErrorRow]) -> list[ErrorRow]:
    """Bytes that the whole card shows as used: reserved by trace, and the CUDA context as the measurements of other models had it. The
    context is the one thing that is fitted, so that no model is predicted from its own."""
    reserved = [row for row in rows if row.what == RESERVED and row.measurement.peak.device is not None]
    device_rows = []
    for row in reserved:
        m = row.measurement
        others = [
            rank.context
            for other in reserved
            for rank in other.measurement.ranks
            if rank.context is not None
            and other.measurement.case.model != m.case.model
            and other.measurement.environment["card"] == m.environment["card"]
            and (other.measurement.case.recipe.gpus > 1) == (m.case.recipe.gpus > 1)
        ]
        if others and m.peak.device is not None:
            device_rows.append(ErrorRow(m, row.rung, DEVICE, row.predicted + int(median(others)), m.peak.device))
    return device_rows


# ---- how good that is ---------------------------------------------------------------------------------------------------


def summarize(rows: Iterable[ErrorRow], group: Callable[[ErrorRow], str] = lambda _row: "all") -> list[Summary]:
    """Summaries by rung, by what is predicted, by whether the rung is held to it, and by what `group` gives of a row."""
    groups: dict[tuple[str, str, bool, str], list[ErrorRow]] = defaultdict(list)
    for row in rows:
        groups[row.rung, row.what, row.held, group(row)].append(row)
    summaries = []
    for key, members in groups.items():
        errors, instants = [row.error for row in members], [row.worst_instant[1] for row in members if row.instants]
        summaries.append(
            Summary(
                *key,
                len(errors),
                mean(map(abs, errors)),
                median(map(abs, errors)),
                max(errors, key=abs),
                max(instants, key=abs, default=None),
            )
        )
    return summaries


def by_strategy(row: ErrorRow) -> str:
    return one_line(row.measurement.case.strategy)


def by_model(row: ErrorRow) -> str:
    return one_line(row.measurement.case.model)


def by_length(row: ErrorRow) -> str:
    """Range of lengths, a power of two wide, that a row belongs to."""
    least = 1 << (row.measurement.case.seq_len.bit_length() - 1)
    return f"{least:,} to {2 * least - 1:,}"


class ErrorBounds(NamedTuple):
    """The errors that a rung may have, as shares."""

    mean: float
    worst: float


ERROR_BOUNDS = {FORMULA: ErrorBounds(0.05, 0.05), CALIBRATED: ErrorBounds(0.01, 0.03), TRACE: ErrorBounds(0.01, 0.03)}


def is_held_to(rung: str, m: Measurement) -> bool:
    """Whether this rung is held to its error bound for this measurement. The trace follows the kernels of the device. Formula and calibrations count those of
    CUDA, as a CPU runs them too in bf16; in fp32, or with dropout, its attention is another, and what is offloaded stays in the same memory."""
    if rung == TRACE or m.case.device == "cuda":
        return True
    recipe, attention = m.case.recipe, m.model.attention
    return recipe.precision != "fp32" and not recipe.offload_layer_inputs and not attention.dropout


def bound_violations(validation: Validation, bounds: dict[str, ErrorBounds]) -> list[str]:
    """Lines on what is worse than it may be; of allocated bytes, which all rungs predict."""
    lines = []
    for s in summarize(row for row in validation.rows if row.what == ALLOCATED and row.held):
        bound = bounds[s.rung]
        if s.mean > bound.mean:
            lines.append(f"{s.rung}: mean error {s.mean:.2%}, more than {bound.mean:.2%}")
        if abs(s.worst) > bound.worst:
            lines.append(f"{s.rung}: worst error {s.worst:+.2%}, more than {bound.worst:.2%}")
    lines += [f"{b.rung}: {b.measurement.case.words} was to fit and ran out of memory" for b in validation.broken]
    return lines
