"""One measured step on all the ranks that a launcher started; one of them writes what each saw.

A rank that fails leaves the others waiting in a collective, under NCCL for minutes. So the first that fails writes the record, and a
thread of every other rank, which looks for that, ends it.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ..errors import MeasurementError, one_line, quoted
from .launch import LAUNCHERS, Launch
from .measurement import OK, Case, Figures, Measurement, appending, utc_now
from .worker import attempt_step, check_cuda, local_rank, measure_here, read_environment

_FAILED_KEY, _RECORDED_KEY = "mstplan: a rank failed", "mstplan: its record is written"
_POLL_SECONDS = 0.5  # between two looks


class Ranks:
    """The process group of the ranks that a launcher started, while the context lasts. Raises MeasurementError where the ranks do not meet."""

    def __init__(self, device: str, launch: Launch):
        self.device, self.launch = device, launch
        self.failed = False

    def __enter__(self) -> Ranks:
        if self.device == "cuda":
            check_cuda()
            torch.cuda.set_device(local_rank())
        host, port = self.launch.host, self.launch.port
        self.launch.tell_torch()
        try:
            socket.getaddrinfo(host, port)  # torch would try again and again
            dist.init_process_group("nccl" if self.device == "cuda" else "gloo")
            # A connection of one's own: whoever waits for others holds the process group's.
            self.store = TCPStore(host, port, is_master=False, wait_for_workers=False)
        except Exception as e:  # noqa: BLE001  torch raises what it likes
            raise MeasurementError(
                f"the {self.launch.ranks} ranks do not meet at {quoted(host)}, port {port} (MASTER_ADDR, MASTER_PORT): {one_line(e)}.\n"
                f"Start them with {LAUNCHERS}."
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if not self.failed:  # else the others are gone or stuck, and NCCL would wait for them
            dist.destroy_process_group()

    def environment(self) -> dict[str, Any]:
        return read_environment(self.device)

    def measure(self, case: Case, environment: dict[str, Any], out: Path) -> Measurement | None:
        """Measure, and append what comes of it to `out`: one record. None on ranks that have nothing to say. Raises OutputError."""
        with self._ending_with_the_first_that_fails():
            attempted = attempt_step(lambda: measure_here(case))
            if attempted["outcome"] != OK:
                return self._record_failure(case, environment, attempted, out)
            figures: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(figures, attempted["figures"])
        if dist.get_rank() != 0:
            return None
        return _append_measurement(
            Measurement(case, environment, OK, "", tuple(map(Figures.from_data, figures)), utc_now()), out
        )

    def _record_failure(
        self, case: Case, environment: dict[str, Any], attempted: dict[str, Any], out: Path
    ) -> Measurement | None:
        """Keep the error of the first rank that fails; later ones have nothing to add."""
        self.failed, rank = True, str(dist.get_rank())
        if self.store.compare_set(_FAILED_KEY, "", rank).decode() != rank:
            self.store.wait([_RECORDED_KEY], timedelta(minutes=1))
            return None
        try:
            return _append_measurement(
                Measurement(
                    case, environment, attempted["outcome"], f"rank {rank}: {attempted['error']}", (), utc_now()
                ),
                out,
            )
        finally:
            self.store.set(_RECORDED_KEY, rank)

    @contextmanager
    def _ending_with_the_first_that_fails(self) -> Iterator[None]:
        finished = threading.Event()

        def watch() -> None:
            while not finished.wait(_POLL_SECONDS):
                if not self.failed and self.store.check([_RECORDED_KEY]):
                    os._exit(0)

        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            finished.set()


def _append_measurement(measurement: Measurement, out: Path) -> Measurement:
    with appending(out) as append:
        append(measurement)
    return measurement
