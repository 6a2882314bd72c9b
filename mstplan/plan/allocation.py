"""What the caching allocator makes of a planned step: whether it runs, what it reserves, and the longest sequence that runs.

Tensors that fit together need not find room: the allocator has holes. The step model writes its allocations down in order
(`step/events.py`), and the simulated allocator (`step/simulation.py`) is given them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from ..spec.hardware import Card
from ..spec.model import Model
from ..step.events import events_of
from ..step.recipe import Recipe
from ..step.simulation import Usage, simulate_steps
from ..step.steps import Chunks
from ..step.steps import step as formula_step
from ..units import SHORTEST
from . import precomputed
from .layout import cap_chunks, hardest_lengths, layout_of, step_of, step_sizes

RESOLUTION = 512
"""The longest sequence that runs is searched for in steps of this share of the longest whose tensors fit."""


def usage_up_to(model: Model, recipe: Recipe, card: Card, seq_len: int, chunks: Chunks) -> Usage:
    """Usage of the batch, among those of up to `seq_len` tokens, that needs most: the first that does not run, or what reserves most."""
    usages = []
    for tokens in hardest_lengths(model, recipe, seq_len):
        usages.append(usage_at(model, recipe, card, tokens, cap_chunks(chunks, recipe.local_tokens(tokens))))
        if not usages[-1].runs:
            return usages[-1]
    return max(usages, key=lambda usage: usage.reserved)


@lru_cache(maxsize=4096)
def usage_at(model: Model, recipe: Recipe, card: Card, tokens: int, chunks: Chunks) -> Usage:
    """Usage of batches of so many tokens."""
    sizes = step_sizes(recipe, tokens, chunks)
    formula = formula_step(model, layout_of(model, recipe, chunks, tokens, card.platform), card.gpu.workspaces_bytes)
    planned = step_of(model, recipe, card, chunks, tokens)
    calibrated = planned.largest(sizes)[1] - formula.largest(sizes)[1] if planned.is_calibrated else 0
    limit = card.allocatable_bytes - max(0, calibrated)
    return simulate_steps(events_of(formula, chunks).at(sizes), expandable=card.expandable, limit=limit)


def longest_that_runs(model: Model, recipe: Recipe, card: Card, chunks: Chunks, fitting: int) -> int:
    """The longest sequence that runs, in tokens; 0 when not even `SHORTEST` does. fitting: the longest whose tensors fit.

    With expandable segments holes grow with the length, so that it is looked for from `fitting` downwards. Without them they come and go, so
    that lengths are tried upwards, and the first that does not run ends it: longer ones that happen to run would not help.
    """
    if fitting < SHORTEST:
        return fitting
    s_max = precomputed.find(precomputed.key_of(model, recipe, card, chunks, fitting))
    return s_max if s_max is not None else search(model, recipe, card, chunks, fitting)


@lru_cache(maxsize=1024)
def search(model: Model, recipe: Recipe, card: Card, chunks: Chunks, fitting: int) -> int:
    """The same, found by simulation."""

    def runs(seq_len: int) -> bool:
        return usage_up_to(model, recipe, card, seq_len, chunks).runs

    bracket = _downwards if card.expandable else _upwards
    low, high = bracket(runs, fitting)
    multiple = recipe.multiple
    while high - low > max(fitting // RESOLUTION, multiple):
        middle = max(low + 1, (low + high) // 2 // multiple * multiple)
        if runs(middle):
            low = middle
        else:
            high = middle
    return low // multiple * multiple


def _downwards(runs: Callable[[int], bool], fitting: int) -> tuple[int, int]:
    """(a length that runs or 0, a longer one that does not), or `fitting` twice where that runs: tried in growing steps."""
    if runs(fitting):
        return fitting, fitting
    high, step = fitting, max(1, fitting // 64)
    while (candidate := fitting - step) >= SHORTEST:
        if runs(candidate):
            return candidate, high
        high, step = candidate, 2 * step
    return 0, high


def _upwards(runs: Callable[[int], bool], fitting: int) -> tuple[int, int]:
    """The same, tried in sixteenths of `fitting`."""
    low = 0
    for n in range(4, 17):
        if not runs(candidate := max(SHORTEST, fitting * n // 16)):
            return low, candidate
        low = candidate
    return fitting, fitting
