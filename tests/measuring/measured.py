"""Measurements made up from what a trace or the formula says, for tests of what is done with measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from mstplan.measuring import sweep
from mstplan.measuring.measurement import OK, Case, Figures, MeasuredPeak, Measurement
from mstplan.measuring.running import Result
from mstplan.measuring.worker import max_by_phase
from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing.trace import Trace

from ..tracing.tiny import TINY

CPU = {
    "card": "cpu",
    "total_bytes": 16 * 2**30,
    "threads": 1,
    "driver": None,
    "allocator": "",
    "python": "3.11",
    "torch": "2.13.0",
    "transformers": "5.23.0",
}
CARD = {**CPU, "threads": None, "card": "NVIDIA H100 80GB HBM3", "total_bytes": 84932978278, "driver": "580.1"}


def case(name: str = "checkpoint", seq_len: int = 512, config: Mapping[str, Any] = TINY, **more: Any) -> Case:
    fields = {key: more.pop(key) for key in list(more) if key in Recipe.model_fields}
    return Case(
        more.pop("model", "tiny"), name, dict(config), strategy(name, **fields), seq_len, **{"device": "cpu", **more}
    )


def measured(
    case: Case,
    instants: Mapping[str, int],
    outcome: str = OK,
    environment: Mapping[str, Any] | None = None,
    **more: Any,
) -> Measurement:
    """A step of which each instant took so many bytes."""
    peaks = {name: MeasuredPeak(size) for name, size in instants.items()}
    phases = {
        name: MeasuredPeak(size, more.get("reserved"), more.get("device"))
        for name, size in max_by_phase(dict(instants)).items()
    }
    figures = Figures(1, peaks, phases, (0.5, 0.4, 0.6), 2.5, more.get("context"), more.get("workspace"))
    known = dict(environment if environment is not None else CPU if case.device == "cpu" else CARD)
    return Measurement(case, known, outcome, "", (figures,) if outcome == OK else (), "2026-11-24T12:00:00+00:00")


def as_traced(case: Case, trace: Trace, share: float = 1.0, **more: Any) -> Measurement:
    """As a trace has it, times a share."""
    return measured(case, {peak.instant: round(peak.bytes * share) for peak in trace.peaks}, **more)


def measure_by(
    monkeypatch: pytest.MonkeyPatch,
    measure: Callable[[Case, Mapping[str, Any]], Measurement],
    environment: Mapping[str, Any] = CPU,
) -> None:
    """Let sweeps measure by calling this, in the order of the cases, on a device of which `environment` is known."""

    def measure_each(cases: Sequence[Case], known: Mapping[str, Any], *_: Any, **__: Any) -> Iterator[Result]:
        for number, each in enumerate(cases):
            yield Result(number, measure(each, known))

    monkeypatch.setattr(sweep, "measure_each", measure_each)
    monkeypatch.setattr(sweep, "ask_environment", lambda *_: dict(environment))
