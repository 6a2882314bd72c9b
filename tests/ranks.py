"""What ranks of a distributed run on the CPU begin and end with: `python -m MODULE RANK FOLDER`, as tests/processes.py starts each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mstplan.errors import InputError


def in_group(run: Callable[[int, Path], None], ranks: int = 2) -> None:
    """Run as one of so many ranks, given its number and the folder that all have; ends the process."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    store = (folder / "rendezvous").as_uri()  # a file: no port to be taken
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    run(rank, folder)
    dist.barrier()
    os._exit(0)  # all is written: on a busy machine gloo's threads may end a process that tears them down


def compare(cases: Iterable[str], difference: Callable[[str, int], float]) -> None:
    """Run every case as one of two ranks. Rank 0 writes to FOLDER/differences.json, by case, how far it is from one process, or the error."""

    def outcome(case: str, rank: int) -> float | str:
        try:
            return difference(case, rank)
        except (InputError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"

    def run(rank: int, folder: Path) -> None:
        found = {case: outcome(case, rank) for case in cases}
        if rank == 0:
            (folder / "differences.json").write_text(json.dumps(found))

    in_group(run)
