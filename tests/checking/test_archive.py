"""Two GPUs' archives, replayed: every instant of every step, by formula and by trace, and the allocations of a step one by one. What
differs by more than 0.1% stands in `differences.py`, with its reason, and nothing stands there that explains nothing."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mstplan import profiles
from mstplan.checking import validate
from mstplan.errors import ModelError
from mstplan.measuring.measurement import OK, Case, Measurement, read_results
from mstplan.step.allocator import round_size
from mstplan.step.instants import Instant
from mstplan.tracing.allocation_diff import EXTRA, Allocation, Difference, allocations_of_trace, differences
from mstplan.tracing.tracer import trace

from .differences import FORMULA, REASONS, SEQUENCE, TRACE, Facts, Reason

GPUS = ("h200-2026-11-26", "h100-2026-11-27")
WITHIN = 0.001
DATA = Path(__file__).parents[1] / "data"


@cache
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
        most = sum(r.bytes(self.facts) for r in reasons if self.instant in r.at and r.applies(self.facts))
        return -self.allowed <= self.bytes <= most + self.allowed

    def __str__(self) -> str:
        names = [r.name for r in REASONS if self.instant in r.at and r.applies(self.facts)]
        return f"{self.facts.against}, {self.words}, {self.instant}: {self.bytes:+,} bytes; {names}"


def predicted(m: Measurement, against: str) -> dict[str, int]:
    if against == TRACE:
        return {peak.instant: peak.bytes for peak in validate.trace_measured(m).peaks}
    formula = validate.step_of(m, validate.FORMULA)
    assert formula is not None
    return validate.instants_at(m, formula)


@cache
def gaps(against: str, name: str) -> list[Gap]:
    """Of every instant that was measured and is predicted."""
    rows = []
    for m in archived(name):
        facts = Facts.of(m.case, m.environment, against, transformers.__version__)
        sizes = predicted(m, against)
        common = [instant for instant in Instant if instant in m.instants and instant in sizes]
        assert len(common) >= 3
        words = f"{name}: {m.case.words}"
        rows += [
            Gap(words, facts, at, m.instants[at] - sizes[at], int(WITHIN * m.instants[at])) for at in common
        ]
    return rows


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("against", [FORMULA, pytest.param(TRACE, marks=pytest.mark.slow)])
def test_every_instant_is_within_a_thousandth_or_explained(against, name):
    unexplained = [gap for gap in gaps(against, name) if not gap.is_explained()]
    assert not unexplained, "\n".join(map(str, unexplained))


@pytest.mark.slow
def test_every_reason_is_needed():
    """Else strike it out of `differences.py`, or its instants."""
    rows = [gap for name in GPUS for against in (FORMULA, TRACE) for gap in gaps(against, name)]
    idle = []
    for reason in REASONS:
        others = [each for each in REASONS if each is not reason]
        if reason.at and all(gap.is_explained(others) for gap in rows):
            idle.append(reason.name)
    assert not idle


def test_a_difference_without_a_reason_is_noticed():
    gap = next(g for g in gaps(FORMULA, GPUS[0]) if g.instant == Instant.LOSS and abs(g.bytes) < g.allowed)
    for more in (-2 * gap.allowed, gap.allowed + 2**33):
        assert gap.is_explained() and not gap._replace(bytes=gap.bytes + more).is_explained()


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
            try:
                yield path if Case.from_data(case).described else path
            except ModelError:
                continue


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


def is_named(difference: Difference, facts: Facts) -> bool:
    size = difference.allocation.bytes
    return any(
        size in {round_size(n) for n in (each.extra if difference.what == EXTRA else each.missing)(facts)}
        for each in REASONS
        if each.applies(facts)
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parts[-3]}/{path.name.removesuffix('.json.gz')}")
def test_allocations_of_more_than_a_mebibyte_follow_each_other(path):
    """In the order of the trace, with those between that kernels make for themselves."""
    content = read_events(path)
    case = Case.from_data(content["case"])
    facts = Facts.of(case, {}, SEQUENCE, transformers.__version__)
    traced = allocations_of_trace(trace(case.config, case.recipe, case.seq_len, whole=True))
    found = differences(traced, really_allocated(content, facts), block=512)
    unnamed = [each for each in found if not is_named(each, facts)]
    assert not unnamed, "\n".join(map(str, unnamed))
