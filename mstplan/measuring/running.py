"""Points measured each in a process of its own, as many at a time as there is memory for. No torch.

What several points on one device at once disturb is not kept: their times, what of the device is in use beside their own tensors, and
that one of them ran out of memory, or that the allocator had to ask twice for some. The latter are measured again, alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from select import select
from typing import Any, NamedTuple

from ..plan import solve
from ..spec.hardware import ALLOCATORS, EXPANDABLE
from .measurement import FAILED, OUT_OF_MEMORY, Case, Figures, Measurement, card_of, utc_now
from .processes import (
    Process,
    Processes,
    allocator_settings,
    describe_death,
    process_environment,
)

SHARE_HELD = {True: 1.26, False: 1.44}
"""The most that torch's allocator held, as a share of the tensors' peak, with expandable segments and without. measured: 155 and 29 steps on
an H100 and an H200, torch 2.11. Only points that wait for others depend on it: none is answered by it."""
_LOOK_SECONDS = 0.5
"""Between two looks at the clock while nothing comes."""


class Point(NamedTuple):
    """A case that waits. number: its place among those asked for; bytes: that it is predicted to need of the device; None: all there are,
    for it has to be alone."""

    number: int
    case: Case
    bytes: int | None


class Result(NamedTuple):
    """What came of the case with that number."""

    number: int
    measurement: Measurement


def measure_each(
    cases: Sequence[Case],
    environment: Mapping[str, Any],
    processes: Processes,
    workers: int = 1,
    timeout: float | None = None,
    begins: Callable[[Case], object] = lambda _case: None,
) -> Generator[Result]:
    """Measure cases, up to `workers` at a time, in the order in which memory for them is there; results as they come. Whatever becomes of
    a process is an outcome: running out of memory, an error, a crash, a kill, or too little time (seconds). environment: what to record
    for a process that dies before it can tell. begins: called with each case that is begun. The processes end with the iterator."""
    total_bytes = environment["total_bytes"]
    waiting = [Point(n, case, bytes_needed(case, environment) if workers > 1 else None) for n, case in enumerate(cases)]
    running: list[_Run] = []
    try:
        while waiting or running:
            while (point := _next(waiting, running, workers, total_bytes)) is not None:
                waiting.remove(point)
                begins(point.case)
                running.append(_Run(point, environment_of(point.case, environment), processes))
                _note_company(running)
            for run in _await_some(running, timeout):
                running.remove(run)
                reply = run.end()
                if run.shared and _is_disturbed(reply):
                    waiting.append(run.point._replace(bytes=None))
                else:
                    yield Result(run.point.number, run.as_measurement(reply))
    finally:  # also Ctrl-C
        for run in running:
            run.process.stop()


def bytes_needed(case: Case, environment: Mapping[str, Any]) -> int:
    """Bytes of the device that a case is predicted to need, with what the allocator holds beyond tensors, and the CUDA context."""
    card = card_of(environment, case.limit)
    peak = solve.plan_at(case.described, case.recipe, card, case.seq_len).peak_bytes
    if case.device == "cpu":
        return peak
    settings = environment_of(case, environment)["allocator"]
    return int(peak * SHARE_HELD[ALLOCATORS[EXPANDABLE] in settings]) + card.gpu.context_bytes


def environment_of(case: Case, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that the case's figures will depend on: those of the device, and the allocator's settings, which may be the case's own."""
    if case.device == "cpu":
        return dict(environment)
    return {**environment, "allocator": allocator_settings(process_environment(case.device, case.allocator))}


def _next(waiting: Sequence[Point], running: Sequence[_Run], workers: int, total_bytes: int) -> Point | None:
    """The first point that there is room for beside those that run."""
    if not running:
        return min(waiting, key=lambda point: point.bytes is None, default=None)  # who has to be alone, last
    if len(running) >= workers or any(run.point.bytes is None for run in running):
        return None
    taken = sum(run.point.bytes or 0 for run in running)
    return next((p for p in waiting if p.bytes is not None and taken + p.bytes <= total_bytes), None)


def _note_company(running: Sequence[_Run]) -> None:
    if len(running) > 1:
        for run in running:
            run.shared = True


def _is_disturbed(reply: Mapping[str, Any]) -> bool:
    """Whether what came of a point may be due to others on the device."""
    return reply["outcome"] == OUT_OF_MEMORY or reply.get("retries", 0) > 0


class _Run:
    """A point that is being measured. shared: have others been on the device meanwhile?"""

    def __init__(self, point: Point, environment: dict[str, Any], processes: Processes):
        case = point.case
        self.point, self.environment, self.shared = point, environment, False
        self.process: Process = processes.begin((), process_environment(case.device, case.allocator))
        self.began = time.monotonic()
        self.late: float | None = None  # seconds that were too many
        try:
            self.process.ask((json.dumps(case.as_data()) + "\n").encode())
        except BaseException:
            self.process.stop()
            raise

    def fileno(self) -> int:
        return self.process.fileno()

    def is_late(self, timeout: float | None) -> bool:
        if timeout is not None and time.monotonic() - self.began > timeout:
            self.late = timeout
        return self.late is not None

    def end(self) -> dict[str, Any]:
        """What the process answered; what became of it, where it did not."""
        line, code, error_text = self.process.end(at_once=self.late is not None)
        if line.endswith(b"\n") and self.late is None:
            reply: dict[str, Any] = json.loads(line)
            return reply
        error = f"took more than {self.late:g} s" if self.late is not None else describe_death(code, error_text)
        return {"outcome": FAILED, "error": error, "figures": None}

    def as_measurement(self, reply: Mapping[str, Any]) -> Measurement:
        figures = [Figures.from_data(reply["figures"])] if reply["figures"] is not None else []
        ranks = tuple(each.beside_others() if self.shared else each for each in figures)
        environment = reply.get("environment", self.environment)
        return Measurement(self.point.case, environment, reply["outcome"], reply["error"], ranks, utc_now())


def _await_some(running: Sequence[_Run], timeout: float | None) -> list[_Run]:
    """Wait until at least one has ended, or takes too long."""
    while True:
        wait_seconds = _LOOK_SECONDS if timeout is not None else None
        readable, _, _ = select(running, [], [], wait_seconds)
        over = [run for run in readable if not run.process.read()]
        over += [run for run in running if run not in over and run.is_late(timeout)]
        if over:
            return over
