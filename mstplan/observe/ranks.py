"""One measured step on all the ranks that torchrun started, with FSDP2; rank 0 writes what each of them saw.

A rank that fails leaves the others waiting in a collective. So the first that fails writes the record, and ends; torchrun ends
the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .measurement import OK, Case, Figures, Measurement, appending
from .point import attempt, check_cuda, environment, local_rank
from .point import measure as measure_here
from .sweep import now

__all__ = ["environment", "measure", "process_group"]

_FAILED = "mstplan: failed"


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """The one that torchrun prepared."""
    if device == "cuda":
        check_cuda()
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure(case: Case, known: dict[str, Any], out: Path) -> Measurement | None:
    """Measure, and append what comes of it to `out`: one record. None on ranks that have nothing to say. Raises OutputError."""
    mine = attempt(lambda: measure_here(case))
    if mine["outcome"] != OK:
        rank = str(dist.get_rank())
        store = dist.distributed_c10d._get_default_store()
        if store.compare_set(_FAILED, "", rank).decode() != rank:
            return None
        return _write(Measurement(case, known, mine["outcome"], f"rank {rank}: {mine['error']}", (), now()), out)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine["figures"])
    if dist.get_rank() != 0:
        return None
    return _write(Measurement(case, known, OK, "", tuple(map(Figures.from_data, found)), now()), out)


def _write(found: Measurement, out: Path) -> Measurement:
    with appending(out) as append:
        append(found)
    return found
