"""The archive, replayed. Two GPUs': every instant of every step, by formula and by trace, and the allocations of a step one by one;
what differs by more than 0.1% stands in `differences.py`, with its reason, and nothing stands there that explains nothing. Then all
that ships, as `mstplan validate` sees it."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import transformers

from mstplan import profiles
from mstplan.checking import fit, validate
from mstplan.checking.validate import ALLOCATED, CALIBRATED, ERROR_BOUNDS, RESERVED, RUNGS
from mstplan.errors import ModelError
from mstplan.measuring import measurement
from mstplan.measuring.measurement import OK, Case, Figures, Measurement, read_results
from mstplan.plan.solve import step_sizes
from mstplan.show import validating
from mstplan.step.allocator import MIN_BLOCK, round_size
from mstplan.step.instants import Instant
from mstplan.step.recipe import Recipe
from mstplan.tracing import cache
from mstplan.tracing.allocation_diff import EXTRA, Allocation, Difference, allocations_of_trace, differences
from mstplan.tracing.tracer import trace

from .differences import FORMULA, OTHER_FAMILIES, OTHER_SCAN, REASONS, SEQUENCE, TRACE, Facts, Reason

GPUS = ("h200-2026-11-26", "h100-2026-11-27", "h200-2026-11-27")
WITHIN = 0.001
DATA = Path(__file__).parents[1] / "data"


@functools.cache
def archived(name: str) -> list[Measurement]:
    """Steps that ran."""
    results = read_results(profiles.ROOT / "measurements" / f"{name}.jsonl")
    assert not results.skipped
    return [m for m in results.measurements if m.outcome == OK]


class Gap(NamedTuple):
    """Bytes that were measured at an instant beyond what is predicted."""

    words: str
    facts: Facts
    instant: Instant
    bytes: int
    allowed: int  # bytes of the measured ones that are within bounds

    def is_explained(self, reasons: Sequence[Reason] = REASONS) -> bool:
        found = [r for r in reasons if self.instant in r.at and r.applies(self.facts)]
        most, least = (sum(r.bytes(self.facts) for r in found if r.is_less is less) for less in (False, True))
        return -least - self.allowed <= self.bytes <= most + self.allowed

    def __str__(self) -> str:
        names = [r.name for r in REASONS if self.instant in r.at and r.applies(self.facts)]
        return f"{self.facts.against}, {self.words}, {self.instant}: {self.bytes:+,} bytes; {names}"


def predicted(m: Measurement, against: str) -> dict[str, int]:
    if against == TRACE:
        return {peak.instant: peak.bytes for peak in validate.trace_measured(m).peaks}
    formula = validate.step_of(m, validate.FORMULA)
    assert formula is not None
    return validate.instants_at(m, formula)


@functools.cache
def gaps(against: str, name: str) -> list[Gap]:
    """Of every instant that was measured and is predicted."""
    rows = []
    for m in archived(name):
        facts = Facts.of(m.case, m.environment, against, transformers.__version__)
        sizes = predicted(m, against)
        common = [instant for instant in Instant if instant in m.instants and instant in sizes]
        assert len(common) >= 3
        words = f"{name}: {m.case.words}"
        rows += [Gap(words, facts, at, m.instants[at] - sizes[at], int(WITHIN * m.instants[at])) for at in common]
    return rows


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("against", [FORMULA, pytest.param(TRACE, marks=pytest.mark.slow)])
def test_every_instant_is_within_a_thousandth_or_explained(against, name):
    unexplained = [gap for gap in gaps(against, name) if not gap.is_explained()]
    assert not unexplained, "\n".join(map(str, unexplained))


def test_a_difference_without_a_reason_is_noticed():
    gap = next(g for g in gaps(FORMULA, GPUS[0]) if g.instant == Instant.LOSS and abs(g.bytes) < g.allowed)
    for more in (-2 * gap.allowed, gap.allowed + 2**33):
        assert gap.is_explained() and not gap._replace(bytes=gap.bytes + more).is_explained()


@pytest.mark.slow
def test_families_that_the_formula_does_not_read():
    """By trace alone, in their default sizes."""
    off = set()
    for row in map(json.loads, (DATA / GPUS[1] / "other-families.jsonl").read_text().splitlines()):
        case = row["case"]
        if row["outcome"] != OK:
            continue
        figures = Figures.from_data(row["ranks"][0])
        recipe = Recipe(**case["recipe"])
        traced = cache.trace_of(case["config"], recipe, case["seq_len"], workspace=figures.workspace or 0)
        sizes = {peak.instant: peak.bytes for peak in traced.peaks}
        errors = [abs(sizes[at] / peak.allocated - 1) for at, peak in figures.instants.items() if at in sizes]
        assert len(errors) >= 3
        if max(errors) > WITHIN:
            off.add(case["model"])
    assert off == OTHER_FAMILIES.keys()


# ---- one by one ---------------------------------------------------------------------------------------------------------


def read_events(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return content


def recorded() -> Iterator[Path]:
    """Events of mstplan's own training step, of models that the formula reads."""
    for name in GPUS:
        for path in sorted((DATA / name / "events").glob("*.json.gz")):
            case = read_events(path).get("case", {})
            if "recipe" not in case:  # another's loop
                continue
            with suppress(ModelError):
                if Case.from_data(case).described.model_type not in OTHER_SCAN:
                    yield path


RECORDED = tuple(recorded())


def really_allocated(content: dict[str, Any], facts: Facts) -> list[Allocation]:
    """Allocations in order, of micro-batches of the last."""
    stacks = content["frames"]
    rows = [
        Allocation(event[0], " > ".join(reversed(stacks[event[1]].split(" < "))))
        for event in content["events"]
        if isinstance(event, list)
    ]
    starts = [n for n, row in enumerate(rows) if row.name.endswith(":embedding")]
    return rows[starts[-1] :] if facts.recipe.accumulation > 1 else rows


class Odd(NamedTuple):
    """An allocation that the GPU alone made, or the trace alone has."""

    difference: Difference
    facts: Facts

    def is_named(self, reasons: Sequence[Reason] = REASONS) -> bool:
        made = self.difference.allocation
        for reason in reasons:
            if self.difference.what == EXTRA:
                sizes = reason.extra
            elif reason.in_backward and made.name:
                continue
            else:
                sizes = reason.missing
            if reason.applies(self.facts) and made.bytes in map(round_size, sizes(self.facts)):
                return True
        return False


@functools.cache
def odd_ones(path: Path) -> list[Odd]:
    content = read_events(path)
    case = Case.from_data(content["case"])
    facts = Facts.of(case, {}, SEQUENCE, transformers.__version__)
    traced = allocations_of_trace(trace(case.config, case.recipe, case.seq_len, whole=True))
    return [Odd(each, facts) for each in differences(traced, really_allocated(content, facts), block=MIN_BLOCK)]


@pytest.mark.slow
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parts[-3]}/{path.name.removesuffix('.json.gz')}")
def test_allocations_of_more_than_a_mebibyte_follow_each_other(path):
    """In the order of the trace, with those between that kernels make for themselves."""
    unnamed = [str(odd.difference) for odd in odd_ones(path) if not odd.is_named()]
    assert not unnamed, "\n".join(unnamed)


def test_another_sequence_is_noticed():
    """The same step of one layer less."""
    path = next(p for p in RECORDED if p.name.startswith("llama3.1-8b-L2-checkpoint-2048"))
    content = read_events(path)
    case = Case.from_data(content["case"])
    facts = Facts.of(case, {}, SEQUENCE, transformers.__version__)
    shorter = trace({**case.config, "num_hidden_layers": 1}, case.recipe, case.seq_len, whole=True)
    found = differences(allocations_of_trace(shorter), really_allocated(content, facts), block=MIN_BLOCK)
    assert sum(not Odd(each, facts).is_named() for each in found) > 10


@pytest.mark.slow
def test_every_reason_is_needed():
    """Else strike it out of `differences.py`, or its instants."""
    rows = [gap for name in GPUS for against in (FORMULA, TRACE) for gap in gaps(against, name)]
    odd = [each for path in RECORDED for each in odd_ones(path)]

    def is_idle(reason: Reason) -> bool:
        others = [each for each in REASONS if each is not reason]
        return all(gap.is_explained(others) for gap in rows) and all(each.is_named(others) for each in odd)

    assert [reason.name for reason in REASONS if is_idle(reason)] == []


# ---- all that ships ------------------------------------------------------------------------------------------------------


def everything() -> list[Measurement]:
    return measurement.read_all_results(measurement.shipped_results()).measurements


@pytest.fixture(scope="module")
def replayed() -> validate.Validation:
    return validate.validate(everything())


@pytest.mark.slow
def test_every_archived_step_of_a_cpu_is_within_bounds(replayed):
    rows = [row for row in replayed.rows if row.measurement.case.device == "cpu"]
    held = [row for row in rows if row.held]
    counts = {rung: sum(row.rung == rung for row in held) for rung in RUNGS}
    assert counts[validate.TRACE] >= 80 and counts[validate.FORMULA] >= 30
    assert not counts[CALIBRATED]  # those that ship are of AdamW's fused step, and foreach ran
    assert validate.bound_violations(replayed._replace(rows=rows), ERROR_BOUNDS) == []
    assert all(abs(row.error) < 0.0005 for row in held)  # as it was seen, and README says


def has_the_code_that_ran(m: Measurement) -> bool:
    """Whether the release of transformers that is traced here has the code of the one that was measured."""
    facts = Facts.of(m.case, m.environment, TRACE, transformers.__version__)
    return not any(reason.of_release and reason.applies(facts) for reason in REASONS)


def is_followed(m: Measurement) -> bool:
    """Whether the simulated allocator is given all that a GPU's was: not the whole weights that lay there before they were quantised, nor a
    stream of its own, on which saved tensors travel; and not what is none of its own, paged states in managed memory."""
    recipe = m.case.recipe
    return recipe.quantize == "none" and recipe.offload != "saved-tensors" and "paged" not in recipe.optimizer


@pytest.mark.slow
def test_reserved_memory(replayed):
    """By the trace, with the allocator's second step: to the byte nearly everywhere with expandable segments. Without them, which segments
    a GPU still has depends on all that ran in the process before."""
    errors: dict[tuple[str, bool], list[float]] = {}
    for row in replayed.rows:
        if row.what == RESERVED and has_the_code_that_ran(row.measurement) and is_followed(row.measurement):
            expandable = "expandable_segments:True" in row.measurement.environment.get("allocator", "")
            errors.setdefault((row.measurement.environment["card"], expandable), []).append(abs(row.error))
    bounds = {
        ("NVIDIA H200", True): (80, 0.003, 0.03),
        ("NVIDIA H200", False): (6, 0.01, 0.06),
        ("NVIDIA H100 80GB HBM3", True): (20, 0.003, 0.03),
        ("NVIDIA H100 80GB HBM3", False): (14, 0.03, 0.09),
    }
    assert errors.keys() == bounds.keys()
    for group, (count, mean, worst) in bounds.items():
        assert len(errors[group]) >= count
        assert sum(errors[group]) / len(errors[group]) <= mean and max(errors[group]) <= worst, group


@pytest.mark.slow
def test_every_instant_of_an_archived_step_of_a_cpu(replayed):
    """In fp32 no kernel has scratch memory that the trace does not know."""
    for row in replayed.rows:
        m = row.measurement
        if (row.rung, row.what, m.case.device, m.case.recipe.precision) == (validate.TRACE, ALLOCATED, "cpu", "fp32"):
            assert abs(row.worst_instant[1]) < 0.005, (m.case.words, row.worst_instant)


def test_calibrations_of_the_archives_longest_series():
    """Formula and CPU differ by buffers of some bytes in bf16: what is solved from four lengths tells the fifth."""
    series = [
        m
        for m in everything()
        if m.ranks
        and m.case.device == "cpu"
        and m.case.layers == 6
        and m.case.recipe.precision == "bf16"
        and m.case.strategy in ("standard", "checkpoint")
    ]
    found = fit.fit_model(series[0].case.described, series)
    assert {c.provenance["strategy"] for c in found.calibrations} == {"standard", "checkpoint"} and not found.left_out
    for one in found.calibrations:
        assert one.residual <= 0.005 and one.provenance["left_out_error"] <= ERROR_BOUNDS[CALIBRATED].mean
        for m in (m for m in series if m.case.strategy == one.provenance["strategy"]):
            told = (
                validate.step_of(m, validate.FORMULA)
                .calibrated(one.moments)
                .largest(step_sizes(m.case.recipe, m.case.seq_len, validate.chunks_of(m)))[1]
            )
            assert told == pytest.approx(m.peak.allocated, rel=ERROR_BOUNDS[CALIBRATED].mean)


def test_the_archive_is_whole():
    for path in measurement.shipped_results():
        found = measurement.read_results(path)
        assert not found.skipped and found.measurements and path.stat().st_size < 500_000
        assert len({m.environment["card"] for m in found.measurements}) == 1  # a file for each card and date


def test_the_archives_index_is_true():
    index = json.loads((profiles.ROOT / "measurements" / "index.json").read_text())
    assert {row["file"] for row in index["files"]} == {path.name for path in measurement.shipped_results()}
    for row in index["files"]:
        found = measurement.read_results(profiles.ROOT / "measurements" / row["file"]).measurements
        told = {name: {m.environment[name] for m in found} for name in ("card", "torch", "transformers")}
        assert told == {name: {row[name]} for name in told} and row["points"] == len(found)
        assert max(m.when for m in found).startswith(row["date"]) and row["about"]


@pytest.mark.slow
def test_readme_shows_the_errors(replayed):
    """As `mstplan validate --format markdown` has it."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    # Reserved memory is left out: where a process has made other traces before, its mean differs in the second place.
    shown, current = (
        [row for row in page.splitlines() if "reserved" not in row]
        for page in (text.split("<!-- errors -->\n")[1], validating.markdown(replayed))
    )
    assert shown == current
