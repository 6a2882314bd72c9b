"""Predictions held against measurements: each rung's answer for the very step that was measured, and how far off it is. No torch,
but for traces that are not kept yet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import mean, median
from typing import NamedTuple

from ..errors import InputError, MissingError, one_line
from ..measuring.measurement import OK, OUT_OF_MEMORY, Measurement
from ..measuring.sweep import card_of
from ..plan import solve
from ..plan.calibration import Calibration
from ..plan.solve import layout_of, sizes
from ..spec.hardware import Card
from ..step.steps import Chunks, Step, step
from ..tracing import cache
from ..tracing.simulation import fits_on, simulate
from ..tracing.trace import Trace

FORMULA, CALIBRATED, TRACE = "formula", "calibrated", "trace"
RUNGS = (FORMULA, CALIBRATED, TRACE)
ALLOCATED, RESERVED, DEVICE = "allocated", "reserved", "device"


class Row(NamedTuple):
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
        return max(((name, told / seen - 1) for name, told, seen in self.instants), key=lambda pair: abs(pair[1]))


class Broken(NamedTuple):
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
    rows: list[Row]
    broken: list[Broken]
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
    found = Validation([], [], 0, [])
    lost = 0
    for m in measurements:
        tell(m.case.words)
        if m.outcome == OUT_OF_MEMORY:
            lost += 1
            for rung in rungs:
                with _leaving_out(m, found):
                    if is_held_to(rung, m) and _said_to_fit(m, rung):
                        found.broken.append(Broken(m, rung))
        elif m.outcome == OK:
            for rung in rungs:
                with _leaving_out(m, found):
                    if rung == CALIBRATED and _solved_from(m):
                        found.left_out.append(
                            f"{m.case.words}: its calibration was solved from this very step, which says nothing about predictions"
                        )
                    else:
                        found.rows.extend(_rows(m, rung))
        else:
            found.left_out.append(f"{m.case.words}: {m.outcome}, {m.reason}")
    found.rows.extend(_on_the_device(found.rows))
    return found._replace(out_of_memory=lost)


@contextmanager
def _leaving_out(m: Measurement, found: Validation) -> Iterator[None]:
    """Say what cannot be predicted of one measurement, and let the others go on."""
    try:
        yield
    except MissingError:
        raise
    except InputError as e:
        found.left_out.append(f"{m.case.words}: {one_line(e, 150)}")


def _rows(m: Measurement, rung: str) -> list[Row]:
    if rung == TRACE:
        trace = traced(m)
        rows = [_row(m, rung, {peak.instant: peak.bytes for peak in trace.peaks})]
        if (
            m.case.device == "cuda" and m.peak.reserved is not None and not m.case.recipe.sharded
        ):  # its blocks are of several streams
            expandable = "expandable_segments:True" in m.environment.get("allocator", "")
            rows.append(Row(m, rung, RESERVED, simulate(trace, expandable=expandable).reserved, m.peak.reserved))
        return rows
    told = step_of(m, rung)
    return [_row(m, rung, instants_at(m, told))] if told is not None else []


def instants_at(m: Measurement, told: Step) -> dict[str, int]:
    """Bytes of each instant of a step at the measured sizes."""
    return {
        instant.name: instant.bytes for instant in told.instants(sizes(m.case.recipe, m.case.seq_len, chunks_of(m)))
    }


def _row(m: Measurement, rung: str, told: dict[str, int]) -> Row:
    seen = m.instants
    both = tuple((name, told[name], seen[name]) for name in told if name in seen)
    return Row(m, rung, ALLOCATED, max(told.values()), m.peak.allocated, both)


def step_of(m: Measurement, rung: str) -> Step | None:
    """The formula's step, or the one a calibration makes of it; None when there is none for it."""
    model, recipe, seq_len, chunks = m.case.described, m.case.recipe, m.case.seq_len, chunks_of(m)
    formula = step(model, layout_of(model, recipe, chunks, seq_len), workspace_of(m))
    if rung == FORMULA:
        return formula
    found = _calibration(m)
    return formula.calibrated(found.moments) if found is not None else None


def _calibration(m: Measurement) -> Calibration | None:
    return solve.calibration_at(m.case.described, m.case.recipe, m.case.seq_len, chunks_of(m))


def _solved_from(m: Measurement) -> bool:
    """Whether the calibration that predicts a step was solved from it."""
    found = _calibration(m)
    if found is None or found.provenance["rung"] != "measurement" or found.provenance["card"] != m.environment["card"]:
        return False
    return point_of(m) in found.provenance["points"]


def point_of(m: Measurement) -> list[int]:
    """Entry of a calibration's provenance for a step that it was solved from: b, s, chunks of MLP and loss, L."""
    return [m.case.recipe.batch, m.case.seq_len, *chunks_of(m), m.case.described.layers]


def traced(m: Measurement) -> Trace:
    case, threads = m.case, m.environment.get("threads")
    return cache.trace_of(
        case.config, case.recipe, case.seq_len, on=case.device, workspace=workspace_of(m), threads=threads
    )


def workspace_of(m: Measurement) -> int:
    """Bytes that cuBLAS was seen to take, else those known of the card; none on a CPU."""
    if m.case.device == "cpu":
        return 0
    seen = next((rank.workspace for rank in m.ranks if rank.workspace is not None), None)
    return seen if seen is not None else card(m).gpu.workspaces_bytes


def card(m: Measurement) -> Card:
    return card_of(m.environment, m.case.limit)


def _said_to_fit(m: Measurement, rung: str) -> bool:
    on, cuda = card(m), m.case.device == "cuda"
    if rung == TRACE:
        return fits_on(traced(m), on) if cuda else traced(m).peak.bytes <= on.total_bytes
    told = step_of(m, rung)
    most = on.budget_bytes if cuda else on.total_bytes  # a CPU has no context
    return told is not None and told.largest(sizes(m.case.recipe, m.case.seq_len, chunks_of(m)))[1] <= most


def _on_the_device(rows: Sequence[Row]) -> list[Row]:
    """Bytes that the whole card shows as used: reserved by trace, and the CUDA context as the measurements of other models had it. The
    context is the one thing that is fitted, so that no model is predicted from its own."""
    reserved = [row for row in rows if row.what == RESERVED and row.measurement.peak.device is not None]
    found = []
    for row in reserved:
        m = row.measurement
        others = [
            rank.context
            for other in reserved
            for rank in other.measurement.ranks
            if rank.context is not None
            and other.measurement.case.model != m.case.model
            and other.measurement.environment["card"] == m.environment["card"]
            and other.measurement.case.recipe.sharded == m.case.recipe.sharded
        ]
        if others and m.peak.device is not None:
            found.append(Row(m, row.rung, DEVICE, row.predicted + int(median(others)), m.peak.device))
    return found


# ---- how good that is ---------------------------------------------------------------------------------------------------


def summaries(rows: Iterable[Row], group: Callable[[Row], str] = lambda _row: "all") -> list[Summary]:
    """Summaries by rung, by what is predicted, by whether the rung is held to it, and by what `group` gives of a row."""
    sorted_in: dict[tuple[str, str, bool, str], list[Row]] = defaultdict(list)
    for row in rows:
        sorted_in[row.rung, row.what, row.held, group(row)].append(row)
    found = []
    for key, members in sorted_in.items():
        errors, instants = [row.error for row in members], [row.worst_instant[1] for row in members if row.instants]
        found.append(
            Summary(
                *key,
                len(errors),
                mean(map(abs, errors)),
                median(map(abs, errors)),
                max(errors, key=abs),
                max(instants, key=abs, default=None),
            )
        )
    return found


def by_strategy(row: Row) -> str:
    return one_line(row.measurement.case.strategy)


def by_model(row: Row) -> str:
    return one_line(row.measurement.case.model)


def by_length(row: Row) -> str:
    """Range of lengths, a power of two wide, that a row belongs to."""
    least = 1 << (row.measurement.case.seq_len.bit_length() - 1)
    return f"{least:,} to {2 * least - 1:,}"


class Bounds(NamedTuple):
    """The errors that a rung may have, as shares."""

    mean: float
    worst: float


BOUNDS = {FORMULA: Bounds(0.05, 0.05), CALIBRATED: Bounds(0.01, 0.03), TRACE: Bounds(0.01, 0.03)}


def is_held_to(rung: str, m: Measurement) -> bool:
    """Whether this rung is held to its error bound for this measurement. The trace follows the kernels of the device. Formula and calibrations count those of
    CUDA, as a CPU runs them too in bf16; in fp32, or with dropout, its attention is another, and what is offloaded stays in the same memory."""
    if rung == TRACE or m.case.device == "cuda":
        return True
    recipe, attention = m.case.recipe, m.case.described.attention
    return recipe.precision != "fp32" and not recipe.offload_layer_inputs and not attention.dropout


def beyond(found: Validation, bounds: dict[str, Bounds]) -> list[str]:
    """Lines on what is worse than it may be; of allocated bytes, which all rungs predict."""
    lines = []
    for s in summaries(row for row in found.rows if row.what == ALLOCATED and row.held):
        may = bounds[s.rung]
        if s.mean > may.mean:
            lines.append(f"{s.rung}: mean error {s.mean:.2%}, more than {may.mean:.2%}")
        if abs(s.worst) > may.worst:
            lines.append(f"{s.rung}: worst error {s.worst:+.2%}, more than {may.worst:.2%}")
    lines += [f"{b.rung}: {b.measurement.case.words} was to fit and ran out of memory" for b in found.broken]
    return lines
