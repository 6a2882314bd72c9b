"""How long the planner takes from Python: one S_max, a recommendation, grids, and the simulated allocator at one length.

    python bench/solver.py

The claims: one S_max under 1 ms; a grid of 10,000 points in seconds.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import mstplan
from mstplan.plan import allocation, solve
from mstplan.step import layers, steps

MODEL, CARD = mstplan.load_model("llama3.1-8b"), mstplan.card("h100")


def measure(name: str, call: Callable[[], object], runs: int) -> None:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - started))
    low, middle, high = (
        statistics.quantiles(times, n=4) if runs > 3 else (min(times), statistics.median(times), max(times))
    )
    print(f"{name:58s} median {middle:9.3f} ms   quartiles {low:9.3f} to {high:9.3f}   ({runs} runs)")


def cold() -> object:
    """As the first question of a process: nothing laid out or replayed yet."""
    solve._cached_step.cache_clear()
    steps.step.cache_clear()
    layers.layer.cache_clear()
    return mstplan.max_seq(MODEL, mstplan.strategy("checkpoint"), CARD)


def grid() -> object:
    """10,000 questions: memory sizes x chunk counts x batches."""
    recipe = mstplan.strategy("mst")
    cards = [mstplan.card(memory=(24 + n) * 2**30) for n in range(100)]
    return [
        solve.longest_sequence(MODEL, recipe.model_copy(update={"batch": batch}), on, mstplan.Chunks(2**m, 2**k))
        for on in cards
        for batch in (1, 2, 4, 8)
        for m in range(5)
        for k in range(5)
    ]


def simulated() -> object:
    """Steps at one length, event by event: of these a longest sequence that does not ship takes a dozen."""
    allocation.usage_at.cache_clear()
    return allocation.usage_at(MODEL, mstplan.strategy("mst"), CARD, 80_000, mstplan.Chunks(4, 16))


def main() -> None:
    print(f"mstplan {mstplan.__version__}, Python {platform.python_version()}, {MODEL.name} on {CARD.gpu.name}")
    fixed, auto = mstplan.strategy("mst", mlp_chunks=8, loss_chunks=32), mstplan.strategy("mst")
    measure(
        "S_max of mst, chunks given", lambda: solve.longest_sequence(MODEL, fixed, CARD, mstplan.Chunks(8, 32)), 1000
    )
    measure("S_max of mst with its plan, chunks given", lambda: mstplan.max_seq(MODEL, fixed, CARD), 500)
    measure("S_max of mst, chunks recommended", lambda: mstplan.max_seq(MODEL, auto, CARD), 200)
    measure("S_max of checkpoint, first question of a process", cold, 50)
    measure("the allocator's steps at one length", simulated, 20)
    measure("peak at one length", lambda: solve.peak_at(MODEL, fixed, CARD, 65536, mstplan.Chunks(8, 32)), 1000)
    measure("10,000 S_max (100 cards x 4 batches x 25 chunk counts)", grid, 1)
    lengths = range(1024, 1024 + 10_000 * 64, 64)
    measure(
        "10,000 peaks over length",
        lambda: [solve.peak_at(MODEL, fixed, CARD, s, mstplan.Chunks(8, 32)) for s in lengths],
        1,
    )


if __name__ == "__main__":
    main()
