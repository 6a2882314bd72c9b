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
from ..plan import layout, solve
from ..plan.solve import Answer, Plan, StepPeak
from ..spec.hardware import Card
from ..spec.model import Model
from ..step.recipe import Recipe
from ..step.steps import Chunks
from ..step.towers import shortest_length
from ..units import LONGEST, SHORTEST, trainable_tokens
from .simulation import fits_on, required_bytes
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


class SearchResult(NamedTuple):
    """S_max of one strategy by trace; `trace` is that of the batch up to it that needs most, or of `SHORTEST` tokens when even those
    do not fit (s_max 0)."""

    answer: Answer
    trace: Trace
    traces: int  # how many it took
    formula: int  # the formula's S_max
    at_the_end: bool = False  # of what the model's own code can run: one token more fails, however much memory there is


def find_longest_of_each(
    model: Model, recipes: Mapping[str, Recipe], card: Card, trace_at: TraceAt
) -> tuple[list[SearchResult], Model]:
    """`find_longest` of each recipe; and the model, with a note on each of several that its code cannot follow."""
    left_out: list[str] = []
    results = [*try_each(recipes, lambda name: find_longest(model, recipes[name], card, trace_at, name), left_out)]
    return results, model._replace(notes=(*model.notes, *left_out))


def try_each(names: Iterable[str], attempt: Callable[[str], T], left_out: list[str]) -> Iterator[T]:
    """Yield what `attempt` gives for each of these recipes; left_out: takes a note on each that the model's code cannot follow. Raises the first's
    ModelError when it follows none."""
    count, errors = 0, []
    for name in names:
        try:
            result = attempt(name)
        except ModelError as e:
            errors.append(e)
            left_out.append(f"{name} is left out: {str(e).splitlines()[0]}")
            continue
        count += 1
        yield result
    if errors and not count:
        raise errors[0]


def find_longest(model: Model, recipe: Recipe, card: Card, trace_at: TraceAt, strategy: str) -> SearchResult:
    """The longest sequence that runs, with the formula's recommended chunks. Host memory limits it as well."""
    shortest = shortest_length(model, recipe) if model.stand_in is None else max(SHORTEST, model.stand_in.shortest)
    near_card = card if model.stand_in is None else _card_for_stand_in(model, recipe, card, trace_at)
    start = solve.max_seq(model, recipe, near_card, strategy)
    chunks = start.plan.chunks if start.s_max else solve.recommend_chunks(model, recipe, near_card)
    traces: dict[int, Trace] = {}

    def trace(seq_len: int) -> Trace:
        padded = recipe.padded(seq_len)
        if padded not in traces:
            traces[padded] = trace_at(layout.cap_chunks(chunks, padded).put_into(recipe), padded, card)
        return traces[padded]

    def hardest(seq_len: int) -> list[Trace]:
        return [trace(tokens) for tokens in layout.hardest_lengths(model, recipe, seq_len)]

    def fits(seq_len: int) -> bool:
        """Whether it fits, and every shorter length. Beyond its positions the code of some models fails; a stand-in may not know them."""
        try:
            hardest_traces = hardest(seq_len)
        except ModelError:
            if seq_len <= max(shortest, model.context or SHORT):
                raise
            return False
        return all(
            (card.host_bytes is None or trace_of_batch.host_peak <= card.host_bytes) and fits_on(trace_of_batch, card)
            for trace_of_batch in hardest_traces
        )

    needs: list[Need] = []
    low, high, guess, step, far_count = (
        shortest - 1,
        LONGEST,
        max(shortest, start.s_max),
        1,
        0,
    )  # the longest known to run, the shortest known not to
    while high - low > 1 and len(traces) < MOST_TRACES:
        if fits(guess):
            low = guess
        else:
            high = guess
        if recipe.padded(guess) not in traces:
            guess = (
                model.context
                if model.context is not None and low < model.context < high
                else _length_between(max(low, SHORT), high)
            )
            continue
        needs.append(Need(required_bytes(trace(guess)), _formula_peak(model, recipe, card, chunks, guess)))
        if model.stand_in is None:
            excess = needs[-1].traced - needs[-1].formula
        else:
            excess, far_count = (
                _excess_at_capacity(needs, card.allocatable_bytes),
                far_count + 1 if abs(needs[-1].traced - card.allocatable_bytes) > card.allocatable_bytes * FAR else 0,
            )
        corrected = solve.longest_sequence(model, recipe, _shift_card(card, excess), chunks)
        # as good as proportional to the length
        if card.host_bytes is not None and (host_bytes := trace(guess).host_peak):
            corrected = min(corrected, guess * card.host_bytes // host_bytes)
        if low < corrected < high and corrected != guess and (far_count < 2 or far_count % 2 or high == LONGEST):
            guess = corrected
        elif far_count or (low >= shortest and high < LONGEST and 2 * step >= high - low):
            guess = _length_between(low, high)
        else:  # close by: feel the way in growing steps
            guess, step = (
                (min(low + step, high - 1), 4 * step) if guess == low else (max(high - step, low + 1), 4 * step)
            )
    length = max(shortest, low)
    plan = solve.plan_at(model, recipe, card, length, chunks)
    largest = max(hardest(length), key=lambda each: each.peak.bytes)
    at_the_end = high == low + 1 and recipe.padded(high) not in traces
    s_max = trainable_tokens(low) if low >= shortest else 0
    answer = Answer(strategy, s_max, _plan_as_traced(plan, largest))
    return SearchResult(answer, largest, len(traces) + (model.stand_in is not None), start.s_max, at_the_end)


def _length_between(low: int, high: int) -> int:
    """A length that halves what is not known yet: the geometric mean while that is orders of magnitude."""
    if high == LONGEST:
        return 4 * low
    middle = isqrt(low * high) if high > 2 * low else (low + high) // 2
    return min(max(middle, low + 1), high - 1)


def _formula_peak(model: Model, recipe: Recipe, card: Card, chunks: Chunks, seq_len: int) -> int:
    padded = recipe.padded(seq_len)
    return solve.peak_at(model, recipe, card, padded, layout.cap_chunks(chunks, padded))[1]


def _card_for_stand_in(model: Model, recipe: Recipe, card: Card, trace_at: TraceAt) -> Card:
    """The card for a stand-in, whose weights may be few or many: one short trace tells."""
    whole = Chunks(1, 1)
    tokens = SHORT if model.stand_in is None else max(SHORT, model.stand_in.shortest)
    return _shift_card(
        card,
        required_bytes(trace_at(whole.put_into(recipe), tokens, card))
        - _formula_peak(model, recipe, card, whole, tokens),
    )


def _shift_card(card: Card, excess: int) -> Card:
    """The card on which the formula, were it off by so many bytes everywhere, would answer rightly."""
    return card._replace(reserve_bytes=card.reserve_bytes - (card.allocatable_bytes - card.budget_bytes - excess))


def _excess_at_capacity(needs: Sequence[Need], capacity: int) -> int:
    """Bytes that the allocator needs beyond the formula's peak where it needs all the room: as many as in the last trace, and
    more by the slope between it and the nearest one that is not too near."""
    last = needs[-1]
    excess, missing = last.traced - last.formula, capacity - last.traced
    others = [
        need
        for need in needs
        if abs(need.traced - last.traced) > capacity * NOTICEABLE and need.formula != last.formula
    ]
    if others:
        nearest = min(others, key=lambda need: abs(need.traced - last.traced))
        slope = (last.traced - nearest.traced) / (last.formula - nearest.formula)
        if slope > 0:
            excess += round(missing - missing / slope)
    return excess


def _plan_as_traced(plan: Plan, trace: Trace) -> Plan:
    """Plan as the trace has it in place of the formula; of a time it says nothing."""
    seconds = plan.step_seconds if plan.model.stand_in is None else 0.0
    peak = StepPeak(trace.peak.bytes, trace.peak.instant, trace.seq_len)
    return plan._replace(peak=peak, host_bytes=trace.host_peak, step_seconds=seconds)
