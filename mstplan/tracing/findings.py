"""Answers of the trace with all that is said beside them: the formula's bytes, what the allocator makes of the step, notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..plan import advice, ways
from ..plan.solve import Answer, Plan, hardest_lengths
from ..spec.hardware import Card, Gpu
from ..spec.model import Model
from ..step.recipe import strategy_label
from ..step.steps import InstantPeak
from ..units import SHORTEST, format_gib, format_tokens
from . import explain
from .search import Found
from .simulation import Held, held, room
from .trace import Trace

PROVENANCE = "simulated: the model's real code on fake tensors; nothing measured on a GPU"
UNMEASURED = (
    "attention's workspace, cuBLAS' and the allocator's rules are from PyTorch's source; half of 43 steps on an H100 were within 0.04% of the "
    "measured peak, the worst 7% off."
)


class View(NamedTuple):
    """A trace, the plan for the same step, and the card that both are for."""

    model: Model
    card: Card
    strategy: str
    trace: Trace
    plan: Plan
    versions: dict[str, str]
    expandable: Held
    usual: Held  # without expandable segments
    differences: tuple[explain.Row, ...]  # at the trace's binding instant
    formula: tuple[InstantPeak, ...]  # the formula's; none where it does not know the model
    notes: tuple[str, ...] = ()  # how the allocator fares, and what was not seen
    provenance: str = PROVENANCE

    @property
    def fits(self) -> bool:
        """Does the allocator find room, with expandable segments?"""
        return self.expandable.out_of_memory is None


def view(model: Model, card: Card, strategy: str, trace: Trace, plan: Plan, versions: dict[str, str]) -> View:
    formula = plan.instants() if model.stand_in is None else ()
    at_peak = next((i.entries for i in formula if i.name == trace.peak.instant), ())
    differences = explain.compare(at_peak, trace.alive(trace.peak.event)) if formula else ()
    kept = [held(trace, expandable=expandable, limit=room(card)) for expandable in (True, False)]
    found = View(model, card, strategy, trace, plan, versions, kept[0], kept[1], differences, formula)
    return found._replace(notes=tuple(_notes(found)))


def _notes(v: View) -> list[str]:
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


def _card_notes(v: View) -> list[str]:
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


def _allocator_note(kept: Held, how: str) -> str:
    if kept.out_of_memory is not None:
        lost = kept.out_of_memory
        return (
            f"caching allocator {how}: out of memory, with {format_gib(lost.allocated)} allocated, {format_gib(lost.reserved)} reserved and "
            f"{format_gib(lost.needed)} asked for."
        )
    again = f", the cache given back {kept.retries} times" if kept.retries else ""
    return f"caching allocator {how}: runs, {format_gib(kept.reserved)} reserved for {format_gib(kept.allocated)} allocated at most{again}."


def _versions_note(versions: dict[str, str]) -> str:
    return f"traced with torch {versions['torch']} and transformers {versions['transformers']}."


def _ran_note(trace: Trace) -> str:
    return f"{len(trace.kept)} of {trace.units} layers were run; the others do the same as one of them."


class TracedLongest(NamedTuple):
    """The longest sequence of each strategy by trace."""

    model: Model
    card: Card
    found: tuple[Found, ...]
    best: Found
    smallest: (
        Gpu | None
    )  # where nothing fits: the smallest card that holds the nearest strategy by formula, where it knows the model
    versions: dict[str, str]
    notes: tuple[str, ...]
    provenance: str = PROVENANCE


def longest(model: Model, card: Card, found: Sequence[Found], versions: dict[str, str]) -> TracedLongest:
    """What `mstplan max-seq --rung trace` answers."""
    best = max(found, key=lambda f: f.answer.s_max)
    plans = [f.answer.plan for f in found]
    known = model.stand_in is None
    smallest = ways.smallest_gpu(ways.nearest_plan(plans)) if known and not best.answer.s_max else None
    notes = _notes_of_longest(model, card, found, versions, smallest)
    return TracedLongest(model, card, tuple(found), best, smallest, versions, tuple(notes))


def _notes_of_longest(
    model: Model, card: Card, found: Sequence[Found], versions: dict[str, str], smallest: Gpu | None
) -> list[str]:
    answers = [f.answer for f in found]
    recipe = answers[-1].plan.recipe
    lines = [*advice.left_out_notes(model), *advice.card_notes(card), *advice.kernel_notes(model, recipe, card)]
    lines += [*advice.recipe_notes(model, recipe), _versions_note(versions)]
    if not any(answer.s_max for answer in answers):
        if model.stand_in is not None:
            return lines + _nothing_fits(answers)
        to_fit = ways.ways_to_train([answer.plan for answer in answers])
        return lines + advice.nothing_fits_notes(answers, to_fit, smallest)
    if ends := [strategy_label(f.answer.strategy) for f in found if f.at_the_end]:
        lines.append(
            f"{', '.join(ends)}: S_max is the longest that the model's own code runs; there would be memory for more."
        )
    if model.stand_in is not None:
        longest = max(answer.s_max for answer in answers)
        what = "S_max is what the caching allocator finds room for, with expandable_segments:True."
        return [*lines, *advice.position_notes(model, longest), what, UNMEASURED]
    lines.append(
        "S_max is what the caching allocator finds room for, with expandable_segments:True; the formula counts tensors alone and comes to "
        + ", ".join(f"{format_tokens(f.formula)} ({strategy_label(f.answer.strategy)})" for f in found)
        + "."
    )
    return [*lines, UNMEASURED]


def _nothing_fits(answers: Sequence[Answer]) -> list[str]:
    least = min(answers, key=lambda a: a.plan.peak_bytes).plan
    missing = format_gib(max(0, least.peak_bytes - least.budget_bytes))
    return [
        f"Nothing fits: even {SHORTEST} tokens need {format_gib(least.peak_bytes)} ({least.instant}), {missing} more than the budget."
    ]
