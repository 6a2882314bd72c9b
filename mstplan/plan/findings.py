"""Answers with all that is said beside them: notes, advice, how far a recipe reaches, the card that would hold it, what it stands on.

Whoever shows them only lays them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..spec.hardware import Card, Gpu
from ..spec.model import Model
from ..step.recipe import Recipe
from ..units import format_tokens
from . import advice, solve, ways
from .allocation import longest_that_runs
from .calibration import Calibration
from .solve import Answer, Plan
from .ways import Way

BARE_FORMULA = "estimated: every tensor's bytes, from config.json; nothing measured on a GPU"

_UNMEASURED_WORDS = "; nothing measured on a GPU"


def provenance(calibrations: Sequence[Calibration | None]) -> str:
    """What answers of the planner stand on, in a line."""
    sources = dict.fromkeys(c.source for c in calibrations if c is not None)
    if not sources:
        return BARE_FORMULA
    unmeasured = not any(c.provenance["rung"] == "measurement" for c in calibrations if c is not None)
    some = "" if None not in calibrations else " in part"
    return f"estimated, calibrated{some} from {'; '.join(sources)}{_UNMEASURED_WORDS if unmeasured else ''}"


class LongestFinding(NamedTuple):
    """The longest sequence of each strategy."""

    model: Model
    card: Card
    answers: tuple[Answer, ...]
    best: Answer
    to_fit: tuple[Way, ...]  # where nothing fits: what would make something fit
    smallest: Gpu | None  # where nothing fits: the smallest card that holds the nearest strategy
    other_s_max: int  # of the best strategy with torch's allocator set the other way
    notes: tuple[str, ...]

    @property
    def provenance(self) -> str:
        return provenance([answer.plan.calibration for answer in self.answers])


def find_longest(model: Model, card: Card, recipes: Mapping[str, Recipe]) -> LongestFinding:
    """What `mstplan max-seq` answers."""
    answers = tuple(solve.max_seq(model, recipe, card, name) for name, recipe in recipes.items())
    best = max(answers, key=lambda a: a.s_max)
    plans = [answer.plan for answer in answers]
    to_fit = () if best.s_max else ways.ways_to_train(plans)
    smallest = None if best.s_max else ways.smallest_gpu(ways.nearest_plan(plans))
    other_s_max = _with_other_allocator(best) if best.s_max else 0
    notes = _notes_of_longest(model, card, answers, to_fit, smallest)
    if best.s_max:
        notes += advice.kernels_note(best)
        notes += [*advice.adapter_notes(best.plan), advice.longest_allocator_note(best, other_s_max)]
    return LongestFinding(model, card, answers, best, to_fit, smallest, other_s_max, tuple(notes))


def _with_other_allocator(answer: Answer) -> int:
    plan, card = answer.plan, advice.other_allocator(answer.plan.card)
    return longest_that_runs(plan.model, plan.recipe, card, plan.chunks, answer.s_max_tensors or 0)


def _notes_of_longest(
    model: Model, card: Card, answers: Sequence[Answer], to_fit: Sequence[Way], smallest: Gpu | None
) -> list[str]:
    lines = _notes(model, answers[-1].plan.recipe, card)
    if not any(answer.s_max for answer in answers):
        return [
            *lines,
            *advice.nothing_fits_notes(answers, to_fit, smallest),
            *_fewest_gpus_notes(answers),
            *advice.time_notes(way.plan for way in to_fit),
        ]
    for answer in answers:
        lines += [line for line in advice.answer_notes(answer) if line not in lines]
    return [*lines, *advice.layer_note(answers), *advice.time_notes(answer.plan for answer in answers if answer.s_max)]


def _fewest_gpus_notes(answers: Sequence[Answer]) -> list[str]:
    """Where nothing fits in shards: from how many GPUs the nearest strategy does."""
    plan = ways.nearest_plan([answer.plan for answer in answers])
    return [advice.fewest_gpus_line(ways.fewest_gpus(plan))] if plan.recipe.divides_states else []


def _notes(model: Model, recipe: Recipe, card: Card) -> list[str]:
    """What is said of a model, a recipe and a card in every answer."""
    return [
        *advice.left_out_notes(model),
        *advice.card_notes(card),
        *advice.kernel_notes(model, recipe, card),
        *advice.recipe_notes(model, recipe),
    ]


class LengthFinding(NamedTuple):
    """Each strategy at one length, and one of them in detail."""

    plans: Mapping[str, Plan]
    reaches: Mapping[str, int]  # S_max of each
    name: str  # of the one in detail
    to_fit: tuple[Way, ...]
    beyond: Way | None  # the longest that changes reach, where none makes it fit
    smallest: Gpu | None  # where it does not fit: the smallest card that holds it
    notes: tuple[str, ...]
    advice: tuple[str, ...]  # where it does not fit
    fewest_gpus: int | None = None  # where it does not fit in shards: from how many GPUs it does

    @property
    def plan(self) -> Plan:
        return self.plans[self.name]

    @property
    def reach(self) -> int:
        return self.reaches[self.name]

    @property
    def provenance(self) -> str:
        return provenance([plan.calibration for plan in self.plans.values()])


def assess_length(plans: Mapping[str, Plan], name: str) -> LengthFinding:
    """What `mstplan plan` answers, with the plan of that name in detail."""
    plan = plans[name]
    reaches = {
        strategy: solve.max_seq(strategy_plan.model, strategy_plan.recipe, strategy_plan.card, strategy).s_max
        for strategy, strategy_plan in plans.items()
    }
    to_fit = () if plan.fits else ways.ways_to_fit(plan)
    beyond = ways.furthest_way(plan) if not (plan.fits or to_fit) else None
    smallest = None if plan.fits else ways.smallest_gpu(plan)
    fewest_gpus = None if plan.fits else ways.fewest_gpus(plan)
    advice_lines = () if plan.fits else tuple(_advice(plan, reaches[name], to_fit, beyond, smallest, fewest_gpus))
    notes = (
        *_notes_at_length(plan, reaches[name]),
        *advice.master_weights_notes(plan, ways.master_weights(plan)),
        *advice.time_notes(plans.values()),
    )
    return LengthFinding(plans, reaches, name, to_fit, beyond, smallest, notes, advice_lines, fewest_gpus)


class LengthsFinding(NamedTuple):
    """Each strategy at several lengths."""

    lengths: tuple[LengthFinding, ...]
    notes: tuple[str, ...]

    @property
    def all_fit(self) -> bool:
        """Whether every length fits with some strategy."""
        return all(finding.plan.fits for finding in self.lengths)

    @property
    def provenance(self) -> str:
        return provenance([plan.calibration for finding in self.lengths for plan in finding.plans.values()])


def assess_lengths(plans_by_length: Sequence[tuple[Mapping[str, Plan], str]]) -> LengthsFinding:
    """What `mstplan plan` answers to several lengths: of each, plans by name, and the name of the one to take."""
    first_plans = plans_by_length[0][0].values()
    reaches = {
        name: solve.max_seq(plan.model, plan.recipe, plan.card, name).s_max
        for name, plan in plans_by_length[0][0].items()
    }
    findings = tuple(LengthFinding(plans, reaches, name, (), None, None, (), ()) for plans, name in plans_by_length)
    first_plan = next(iter(first_plans))
    longest = max(plans_by_length, key=lambda pair: pair[0][pair[1]].seq_len)[0]
    lines = _notes(first_plan.model, first_plan.recipe, first_plan.card)
    lines += advice.position_notes(first_plan.model, next(iter(longest.values())).seq_len)
    lines += advice.time_notes(plan for plans, _ in plans_by_length for plan in plans.values())
    return LengthsFinding(findings, tuple(lines))


def _notes_at_length(plan: Plan, reach: int) -> list[str]:
    lines = _notes(plan.model, plan.recipe, plan.card) + advice.position_notes(plan.model, plan.seq_len)
    if plan.peak.tokens != plan.recipe.padded(plan.seq_len):
        lines.append(
            f"Of batches up to that length one of {format_tokens(plan.peak.tokens)} tokens needs most: its mask has to be padded."
        )
    lines += advice.padding_notes("This recipe", plan, reach) if plan.seq_len > reach else []
    lines += [f"{line}." for line in advice.host_notes(plan)]
    return [*lines, *advice.adapter_notes(plan), *advice.allocator_note(plan)]


def _advice(
    plan: Plan, reach: int, to_fit: Sequence[Way], beyond: Way | None, smallest: Gpu | None, fewest_gpus: int | None
) -> list[str]:
    """The adapter that makes the length fit, how far the recipe reaches as it is, and the card, or how many of them, that hold the length."""
    lines = advice.adapter_lines(to_fit)
    if not (to_fit or beyond):
        lines = [f"{advice.changes_do_not_help(ways.tries_adapters(plan))} makes this length fit on this GPU."]
    lines.append(
        f"As it is, this recipe reaches {format_tokens(reach)} tokens here."
        if reach
        else "As it is, this recipe fits no length here."
    )
    if smallest is not None:
        lines.append(f"The smallest GPU on which it fits as it is: {smallest.name} ({smallest.label}).")
    if plan.recipe.divides_states:
        lines.append(advice.fewest_gpus_line(fewest_gpus))
    return lines
