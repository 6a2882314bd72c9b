"""What test_ranks.py starts under torchrun: rank 1 runs out of memory while rank 0 waits for it in a collective, and outlives it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from mstplan.measuring import ranks
from mstplan.measuring.launch import read_launch

from .measured import CPU, case

folder = Path(sys.argv[1])
launch = read_launch()
assert launch is not None
rank = launch.rank


def measure_here(_case: object) -> None:
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    if rank == 1:
        raise MemoryError("too much")
    dist.barrier()


ranks.measure_here = measure_here  # type: ignore[assignment]
with ranks.Ranks("cpu", launch) as group:
    group.measure(case(), CPU, folder / "results.jsonl")
    other = folder / "0.pid"
    for _ in range(600):  # rank 1 stays, or gloo would tell rank 0 that it is gone
        if other.exists() and not Path(f"/proc/{other.read_text()}").exists():
            os._exit(0)
        time.sleep(0.1)
os._exit(9)
