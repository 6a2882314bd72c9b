"""The longest sequence by trace: the one for which the caching allocator just finds room.

The formula points the way: what the allocator needs at a length differs from the formula's peak by nearly the same bytes at the
lengths around, so the length at which the formula, corrected by that, fills the card is tried next. It ends with two traces: of a
length that runs, and of one token more, which does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..plan import solve
from ..plan.hardware import Card
from ..plan.model import Model
from ..plan.recipe import Recipe
from ..plan.solve import Answer, Peak, Plan
from ..plan.steps import Chunks
from ..units import LONGEST
from .card import needed, room, runs
from .trace import Trace

TraceAt = Callable[[Recipe, int, Card], Trace]
MOST_TRACES = 40


class Found(NamedTuple):
    """S_max of one strategy by trace; `trace` is that of S_max, or of one token when even that does not fit (s_max 0)."""

    answer: Answer
    trace: Trace
    traces: int  # how many it took
    formula: int  # the formula's S_max


def longest(model: Model, recipe: Recipe, card: Card, trace_at: TraceAt, strategy: str) -> Found:
    """The longest sequence that runs, with the formula's recommended chunks. Host memory limits it as well."""
    start = solve.max_seq(model, recipe, card, strategy)
    chunks = start.plan.chunks if start.s_max else solve.recommend(model, recipe, card)
    seen: dict[int, Trace] = {}

    def trace(seq_len: int) -> Trace:
        if seq_len not in seen:
            few = solve.within(chunks, seq_len)
            seen[seq_len] = trace_at(recipe.changed(mlp_chunks=few.mlp, loss_chunks=few.loss), seq_len, card)
        return seen[seq_len]

    def fits(seq_len: int) -> bool:
        host = card.host_bytes is None or trace(seq_len).host_peak <= card.host_bytes
        return host and runs(trace(seq_len), card)

    low, high, guess, step = 0, LONGEST, max(1, start.s_max), 1  # the longest known to run, the shortest known not to
    while high - low > 1 and len(seen) < MOST_TRACES:
        if fits(guess):
            low = guess
        else:
            high = guess
        corrected = _corrected(model, recipe, card, chunks, trace(guess))
        if low < corrected < high and corrected != guess:
            guess = corrected
        else:  # close by: feel the way in growing steps
            guess, step = (min(low + step, high - 1), 2 * step) if guess == low else (max(high - step, low + 1), 2 * step)
    plan = solve.plan_at(model, recipe, card, max(1, low), solve.within(chunks, max(1, low)))
    return Found(Answer(strategy, low, _as_traced(plan, trace(max(1, low)))), trace(max(1, low)), len(seen), start.s_max)


def _corrected(model: Model, recipe: Recipe, card: Card, chunks: Chunks, trace: Trace) -> int:
    """The formula's S_max, were it as far off everywhere as it is here."""
    here = solve.within(chunks, trace.seq_len)
    off = needed(trace) - solve.peak_at(model, recipe, card, trace.seq_len, here)[1]
    spare = room(card) - card.budget_bytes - off
    return solve.longest(model, recipe, card._replace(reserve_bytes=card.reserve_bytes - spare), chunks)


def _as_traced(plan: Plan, trace: Trace) -> Plan:
    return plan._replace(peak=Peak(trace.peak.bytes, trace.peak.instant, trace.seq_len), host_bytes=trace.host_peak)
