"""Answers of the trace with all that is said beside them: the formula's bytes, what the allocator makes of the step, notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..plan import advice, ways
from ..plan.layout import hardest_lengths
from ..plan.solve import Answer, Plan
from ..plan.ways import Way
from ..spec.hardware import ALLOCATORS, WITHOUT_SETTINGS, Card, Gpu
from ..spec.model import Model
from ..step.recipe import strategy_label
from ..step.simulation import Usage
from ..step.steps import InstantPeak
from ..units import SHORTEST, format_gib, format_tokens
from . import explain
from .search import SearchResult
from .simulation import simulate
from .trace import Trace

PROVENANCE = "simulated: the model's real code on fake tensors; nothing measured on a GPU"
UNMEASURED = (
    "attention's and cuBLAS' workspaces and the allocator's rules are from PyTorch's source and from measured calls; half of 51 steps on an H100 "
    "were within 0.01% of the measured peak, the worst 0.7% off."
)


class TraceView(NamedTuple):
    """A trace, the plan for the same step, and the card that both are for."""

    model: Model
    card: Card
    strategy: str
    trace: Trace
    plan: Plan
    versions: dict[str, str]
    expandable: Usage
    usual: Usage  # without expandable segments
    differences: tuple[explain.Row, ...]  # at the trace's binding instant
    formula: tuple[InstantPeak, ...]  # the formula's; none where it does not know the model
    notes: tuple[str, ...] = ()  # how the allocator fares, and what was not seen
    provenance: str = PROVENANCE

    @property
    def usage(self) -> Usage:
        """What the allocator holds, set as the card says."""
        return self.expandable if self.card.expandable else self.usual

    @property
    def fits(self) -> bool:
        """Whether the allocator finds room."""
        return self.usage.runs


def build_view(
    model: Model, card: Card, strategy: str, trace: Trace, plan: Plan, versions: dict[str, str]
) -> TraceView:
    formula = plan.instants() if model.stand_in is None else ()
    at_peak = next((i.entries for i in formula if i.name == trace.peak.instant), ())
    differences = explain.compare(at_peak, trace.alive(trace.peak.event)) if formula else ()
    usages = [simulate(trace, expandable=expandable, limit=card.allocatable_bytes) for expandable in (True, False)]
    view = TraceView(model, card, strategy, trace, plan, versions, usages[0], usages[1], differences, formula)
    return view._replace(notes=tuple(_notes(view)))


def _notes(v: TraceView) -> list[str]:
    lines = [*advice.left_out_notes(v.model), *_card_notes(v)]
    if v.trace.host_peak:
        lines.append(f"CPU RAM: {format_gib(v.trace.host_peak)} at most.")
    lines += [_versions_note(v.versions), _ran_note(v.trace), UNMEASURED]
    _, *others = hardest_lengths(v.model, v.trace.recipe, v.trace.seq_len)
    lines += [
        f"a batch of {format_tokens(n)} tokens takes a mask of another kind, and may need more: trace it as well."
        for n in others
    ]
    return lines + advice.position_notes(v.model, v.trace.seq_len)


def _card_notes(v: TraceView) -> list[str]:
    """How the step fares on its card; where none is named, what is counted all the same."""
    if v.card.unlimited:
        return [
            "no GPU is named, so that nothing is said of whether it fits: --gpu h100 or --gpu-mem 80GB asks that.",
            f"cuBLAS' workspace is counted as on {v.card.gpu.name}.",
        ]
    return [
        *advice.card_notes(v.card),
        *advice.kernel_notes(v.model, v.trace.recipe, v.card),
        _allocator_note(v.expandable, "with expandable_segments:True"),
        _allocator_note(v.usual, "without it"),
    ]


def _allocator_note(usage: Usage, how: str) -> str:
    if usage.out_of_memory is not None:
        failed = usage.out_of_memory
        return (
            f"caching allocator {how}: out of memory, with {format_gib(failed.allocated)} allocated, {format_gib(failed.reserved)} reserved and "
            f"{format_gib(failed.needed)} asked for."
        )
    retries = f", the cache given back {usage.retries} times" if usage.retries else ""
    return f"caching allocator {how}: runs, {format_gib(usage.reserved)} reserved for {format_gib(usage.allocated)} allocated at most{retries}."


def _versions_note(versions: dict[str, str]) -> str:
    return f"traced with torch {versions['torch']} and transformers {versions['transformers']}."


def _ran_note(trace: Trace) -> str:
    return f"{len(trace.kept)} of {trace.units} layers were run; the others do the same as one of them."


class TracedLongest(NamedTuple):
    """The longest sequence of each strategy by trace."""

    model: Model
    card: Card
    results: tuple[SearchResult, ...]
    best: SearchResult
    # Where nothing fits, and the formula knows the model: ways to fit by formula, and the smallest card that holds the nearest strategy.
    to_fit: tuple[Way, ...]
    smallest: Gpu | None
    versions: dict[str, str]
    notes: tuple[str, ...]
    provenance: str = PROVENANCE


def longest(model: Model, card: Card, results: Sequence[SearchResult], versions: dict[str, str]) -> TracedLongest:
    """What `mstplan max-seq --rung trace` answers."""
    best = max(results, key=lambda result: result.answer.s_max)
    plans = [result.answer.plan for result in results]
    to_fit: tuple[Way, ...] = ()
    smallest = None
    if model.stand_in is None and not best.answer.s_max:
        to_fit, smallest = ways.ways_to_train(plans), ways.smallest_gpu(ways.nearest_plan(plans))
    notes = _notes_of_longest(model, card, results, versions, to_fit, smallest)
    return TracedLongest(model, card, tuple(results), best, to_fit, smallest, versions, tuple(notes))


def _notes_of_longest(
    model: Model,
    card: Card,
    results: Sequence[SearchResult],
    versions: dict[str, str],
    to_fit: Sequence[Way],
    smallest: Gpu | None,
) -> list[str]:
    answers = [result.answer for result in results]
    recipe = answers[-1].plan.recipe
    lines = [*advice.left_out_notes(model), *advice.card_notes(card), *advice.kernel_notes(model, recipe, card)]
    lines += [*advice.recipe_notes(model, recipe), _versions_note(versions)]
    if not any(answer.s_max for answer in answers):
        if model.stand_in is not None:
            return lines + _nothing_fits(answers)
        return lines + advice.nothing_fits_notes(answers, to_fit, smallest)
    if ends := [strategy_label(result.answer.strategy) for result in results if result.at_the_end]:
        lines.append(
            f"{', '.join(ends)}: S_max is the longest that the model's own code runs; there would be memory for more."
        )
    if model.stand_in is not None:
        longest = max(answer.s_max for answer in answers)
        what = f"S_max is what the caching allocator finds room for, {_setting(card)}."
        return [*lines, *advice.position_notes(model, longest), what, UNMEASURED]
    lines.append(
        f"S_max is what the caching allocator finds room for, {_setting(card)}; the formula comes to "
        + ", ".join(f"{format_tokens(result.formula)} ({strategy_label(result.answer.strategy)})" for result in results)
        + "."
    )
    return [*lines, UNMEASURED]


def _setting(card: Card) -> str:
    """How torch's allocator is set."""
    return f"with {ALLOCATORS[card.allocator]}" if card.expandable else WITHOUT_SETTINGS


def _nothing_fits(answers: Sequence[Answer]) -> list[str]:
    least = min(answers, key=lambda a: a.plan.peak_bytes).plan
    missing = format_gib(max(0, least.peak_bytes - least.budget_bytes))
    return [
        f"Nothing fits: even {SHORTEST} tokens need {format_gib(least.peak_bytes)} ({least.instant}), {missing} more than the budget."
    ]
