"""How long `mstplan max-seq` takes, against importing what any such command line must import.

    python bench/startup.py [--runs 21]

Runs both in turn, in fresh processes of this Python, and prints medians and quartiles in milliseconds. The claim: the whole
process takes at most five times `python -c "import typer, rich.table, pydantic"` in the same environment.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version

BASELINE = [sys.executable, "-c", "import typer, rich.table, pydantic"]
PROGRAM = [sys.executable, "-m", "mstplan", "max-seq", "--model", "llama3.1-8b", "--gpu-mem", "80GB"]


def milliseconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {"imports": [], "max-seq": []}
    for _ in range(runs + 1):  # the first round warms the file cache and the byte code
        times["imports"].append(milliseconds(BASELINE))
        times["max-seq"].append(milliseconds(PROGRAM))
    packages = ", ".join(f"{name} {version(name)}" for name in ("typer", "rich", "pydantic"))
    print(f"Python {platform.python_version()}, {packages}, {os.cpu_count()} cores, {runs} runs each")
    for name, row in times.items():
        low, middle, high = statistics.quantiles(row[1:], n=4)
        print(f"{name:8s} median {middle:6.1f} ms   quartiles {low:6.1f} to {high:6.1f}")
    ratio = statistics.median(times["max-seq"][1:]) / statistics.median(times["imports"][1:])
    print(f"ratio    {ratio:.2f} (claim: at most 5)")


if __name__ == "__main__":
    main()
