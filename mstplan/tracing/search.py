"""The longest sequence by trace: the one for which the caching allocator just finds room.

The formula points the way: what the allocator needs at a length differs from the formula's peak by nearly the same bytes at the
lengths around, so the length at which the formula, corrected by that, fills the card is tried next. Two traces tell also how much
steeper than the formula the allocator's need grows, and that corrects it where the formula has but a stand-in for a model that it
does not know; while such a search is far off, every other length halves what is not known yet. It ends with two traces: of a length that
runs, and of one token more, which does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import isqrt
from typing import NamedTuple, TypeVar

from ..errors import ModelError
from ..plan import solve
from ..plan.solve import Answer, Plan, StepPeak
from ..spec.hardware import Card
from ..spec.model import Model
from ..step.recipe import Recipe
from ..step.steps import Chunks
from ..units import LONGEST, SHORTEST, trainable_tokens
from .simulation import needed, room, runs
from .trace import Trace

T = TypeVar("T")
TraceAt = Callable[[Recipe, int, Card], Trace]
MOST_TRACES = 40
SHORT = 256
"""Tokens that say how large a model is for which the formula has but a stand-in."""
FAR, NOTICEABLE = 1 / 64, 1 / 512
"""Shares of the card's memory: what a trace is off where the search still looks for the region, and the least by which two traces
differ that tell how the need grows."""


class Need(NamedTuple):
    """Bytes that a step needs, by trace and by formula."""

    traced: int
    formula: int


class Found(NamedTuple):
    """S_max of one strategy by trace; `trace` is that of the batch up to it that needs most, or of `SHORTEST` tokens when even those
    do not fit (s_max 0)."""

    answer: Answer
    trace: Trace
    traces: int  # how many it took
    formula: int  # the formula's S_max
    at_the_end: bool = False  # of what the model's own code can run: one token more fails, however much memory there is


def longest_of(model: Model, recipes: Mapping[str, Recipe], card: Card, trace_at: TraceAt) -> tuple[list[Found], Model]:
    """`longest_sequence` of each recipe; and the model, with a note on each of several that its code cannot follow."""
    left_out: list[str] = []
    found = [*those_it_follows(recipes, lambda name: longest(model, recipes[name], card, trace_at, name), left_out)]
    return found, model._replace(notes=(*model.notes, *left_out))


def those_it_follows(names: Iterable[str], of: Callable[[str], T], left_out: list[str]) -> Iterator[T]:
    """Yield what `of` gives for each of these recipes; left_out: takes a note on each that the model's code cannot follow. Raises the first's
    ModelError when it follows none."""
    found, failed = 0, []
    for name in names:
        try:
            one = of(name)
        except ModelError as e:
            failed.append(e)
            left_out.append(f"{name} is left out: {str(e).splitlines()[0]}")
            continue
        found += 1
        yield one
    if failed and not found:
        raise failed[0]


def longest(model: Model, recipe: Recipe, card: Card, trace_at: TraceAt, strategy: str) -> Found:
    """The longest sequence that runs, with the formula's recommended chunks. Host memory limits it as well."""
    near = card if model.stand_in is None else _near(model, recipe, card, trace_at)
    start = solve.max_seq(model, recipe, near, strategy)
    chunks = start.plan.chunks if start.s_max else solve.recommend_chunks(model, recipe, near)
    seen: dict[int, Trace] = {}

    def trace(seq_len: int) -> Trace:
        run = recipe.padded(seq_len)
        if run not in seen:
            seen[run] = trace_at(_in(recipe, solve.cap_chunks(chunks, run)), run, card)
        return seen[run]

    def hardest(seq_len: int) -> list[Trace]:
        return [trace(tokens) for tokens in solve.hardest_lengths(model, recipe, seq_len)]

    def fits(seq_len: int) -> bool:
        """Whether it fits, and every shorter length. Beyond its positions the code of some models fails; a stand-in may not know them."""
        try:
            traces = hardest(seq_len)
        except ModelError:
            if seq_len <= (model.context or SHORT):
                raise
            return False
        return all(
            (card.host_bytes is None or each.host_peak <= card.host_bytes) and runs(each, card) for each in traces
        )

    needs: list[Need] = []
    low, high, guess, step, far = (
        SHORTEST - 1,
        LONGEST,
        max(SHORTEST, start.s_max),
        1,
        0,
    )  # the longest known to run, the shortest known not to
    while high - low > 1 and len(seen) < MOST_TRACES:
        if fits(guess):
            low = guess
        else:
            high = guess
        if recipe.padded(guess) not in seen:
            guess = (
                model.context
                if model.context is not None and low < model.context < high
                else _between(max(low, SHORT), high)
            )
            continue
        needs.append(Need(needed(trace(guess)), _formula(model, recipe, card, chunks, guess)))
        if model.stand_in is None:
            off = needs[-1].traced - needs[-1].formula
        else:
            off, far = _off(needs, room(card)), far + 1 if abs(needs[-1].traced - room(card)) > room(card) * FAR else 0
        corrected = solve.longest_sequence(model, recipe, _moved(card, off), chunks)
        if card.host_bytes is not None and (there := trace(guess).host_peak):  # as good as proportional to the length
            corrected = min(corrected, guess * card.host_bytes // there)
        if low < corrected < high and corrected != guess and (far < 2 or far % 2 or high == LONGEST):
            guess = corrected
        elif far or (low >= SHORTEST and high < LONGEST and 2 * step >= high - low):
            guess = _between(low, high)
        else:  # close by: feel the way in growing steps
            guess, step = (
                (min(low + step, high - 1), 2 * step) if guess == low else (max(high - step, low + 1), 2 * step)
            )
    shown = max(SHORTEST, low)
    plan = solve.plan_at(model, recipe, card, shown, chunks)
    largest = max(hardest(shown), key=lambda each: each.peak.bytes)
    at_the_end = high == low + 1 and recipe.padded(high) not in seen
    answer = Answer(strategy, trainable_tokens(low), _as_traced(plan, largest))
    return Found(answer, largest, len(seen) + (model.stand_in is not None), start.s_max, at_the_end)


def _between(low: int, high: int) -> int:
    """A length that halves what is not known yet: the geometric mean while that is orders of magnitude."""
    if high == LONGEST:
        return 4 * low
    middle = isqrt(low * high) if high > 2 * low else (low + high) // 2
    return min(max(middle, low + 1), high - 1)


def _in(recipe: Recipe, chunks: Chunks) -> Recipe:
    return recipe.changed(mlp_chunks=chunks.mlp, loss_chunks=chunks.loss)


def _formula(model: Model, recipe: Recipe, card: Card, chunks: Chunks, seq_len: int) -> int:
    run = recipe.padded(seq_len)
    return solve.peak_at(model, recipe, card, run, solve.cap_chunks(chunks, run))[1]


def _near(model: Model, recipe: Recipe, card: Card, trace_at: TraceAt) -> Card:
    """The card for a stand-in, whose weights may be few or many: one short trace tells."""
    whole = Chunks(1, 1)
    return _moved(card, needed(trace_at(_in(recipe, whole), SHORT, card)) - _formula(model, recipe, card, whole, SHORT))


def _moved(card: Card, off: int) -> Card:
    """The card on which the formula, were it off by so many bytes everywhere, would answer rightly."""
    return card._replace(reserve_bytes=card.reserve_bytes - (room(card) - card.budget_bytes - off))


def _off(needs: Sequence[Need], room: int) -> int:
    """Bytes that the allocator needs beyond the formula's peak where it needs all the room: as many as in the last trace, and
    more by the slope between it and the nearest one that is not too near."""
    last = needs[-1]
    off, missing = last.traced - last.formula, room - last.traced
    apart = [
        need for need in needs if abs(need.traced - last.traced) > room * NOTICEABLE and need.formula != last.formula
    ]
    if apart:
        near = min(apart, key=lambda need: abs(need.traced - last.traced))
        slope = (last.traced - near.traced) / (last.formula - near.formula)
        if slope > 0:
            off += round(missing - missing / slope)
    return off


def _as_traced(plan: Plan, trace: Trace) -> Plan:
    """Plan as the trace has it in place of the formula; of a time it says nothing."""
    seconds = plan.step_seconds if plan.model.stand_in is None else 0.0
    peak = StepPeak(trace.peak.bytes, trace.peak.instant, trace.seq_len)
    return plan._replace(peak=peak, host_bytes=trace.host_peak, step_seconds=seconds)
