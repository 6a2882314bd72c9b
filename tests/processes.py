"""Two real processes of a distributed run on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """Of a process on one thread, which talks to others on this machine and runs this checkout."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}


def on_two_ranks(module: str, folder: Path, timeout: float = 240, ranks: int = 2) -> None:
    """Run `python -m MODULE RANK FOLDER` for ranks 0 and 1, or more, each on one thread; fails when one of them does."""
    outputs = [(folder / f"output{rank}").open("w") for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(folder)],
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        codes = [process.wait(timeout=timeout) for process in processes]
    finally:
        for process, output in zip(processes, outputs, strict=True):
            process.kill()
            process.wait()
            output.close()
    assert not any(codes), "".join((folder / f"output{rank}").read_text()[-2000:] for rank in range(ranks))


def differences_of(module: str, folder: Path, timeout: float = 240) -> dict[str, float | str]:
    """What two ranks find that compare cases with one process (tests/ranks.py): by case how far they are off, or the error."""
    on_two_ranks(module, folder, timeout)
    found: dict[str, float | str] = json.loads((folder / "differences.json").read_text())
    return found
