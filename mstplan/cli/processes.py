"""What takes a while in as many processes as there are processors, with a bar on the terminal."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..show.progress import progress

MapEach = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
MOST = 8
"""Processes: each takes some 100 MB of CPU RAM."""


@contextmanager
def in_processes(what: str, names: Sequence[str]) -> Iterator[MapEach]:
    """A function like `map`, for things with these names; ends its processes when it is left, by Ctrl-C as well."""
    number = min(MOST, len(names), _processors())
    with (
        multiprocessing.get_context("spawn").Pool(number, _leave_interrupts) as pool,
        progress(what, len(names)) as advance,
    ):

        def map_each(run: Callable[[Any], Any], things: Iterable[Any]) -> Iterator[Any]:
            for name, result in zip(names, pool.imap(run, things), strict=False):
                advance(name, 1)
                yield result

        yield map_each


def _processors() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _leave_interrupts() -> None:
    """Leave Ctrl-C to the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
