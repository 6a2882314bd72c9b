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
from .calibration import Calibration
from .solve import Answer, Plan
from .ways import Way

BARE_FORMULA = "estimated: every tensor's bytes, from config.json; nothing measured on a GPU"

_UNMEASURED = "; nothing measured on a GPU"


def provenance(calibrations: Sequence[Calibration | None]) -> str:
    """What answers of the planner stand on, in a line."""
    sources = dict.fromkeys(c.said for c in calibrations if c is not None)
    if not sources:
        return BARE_FORMULA
    unmeasured = not any(c.provenance["rung"] == "measurement" for c in calibrations if c is not None)
    some = "" if None not in calibrations else " in part"
    return f"estimated, calibrated{some} from {'; '.join(sources)}{_UNMEASURED if unmeasured else ''}"


class Longest(NamedTuple):
    """The longest sequence of each strategy."""

    model: Model
    card: Card
    found: tuple[Answer, ...]
    best: Answer
    to_fit: tuple[Way, ...]  # where nothing fits: what would make something fit
    smallest: Gpu | None  # where nothing fits: the smallest card that holds the nearest strategy
    notes: tuple[str, ...]

    @property
    def provenance(self) -> str:
        return provenance([answer.plan.calibration for answer in self.found])


def longest(model: Model, card: Card, recipes: Mapping[str, Recipe]) -> Longest:
    """What `mstplan max-seq` answers."""
    found = tuple(solve.max_seq(model, recipe, card, name) for name, recipe in recipes.items())
    best = max(found, key=lambda a: a.s_max)
    plans = [answer.plan for answer in found]
    to_fit = () if best.s_max else ways.ways_to_train(plans)
    smallest = None if best.s_max else ways.smallest_gpu(ways.nearest(plans))
    notes = _notes_of_longest(model, card, found, to_fit, smallest)
    return Longest(model, card, found, best, to_fit, smallest, tuple(notes))


def _notes_of_longest(
    model: Model, card: Card, found: Sequence[Answer], to_fit: Sequence[Way], smallest: Gpu | None
) -> list[str]:
    lines = _notes(model, found[-1].plan.recipe, card)
    if not any(answer.s_max for answer in found):
        return lines + advice.nothing_fits_notes(found, to_fit, smallest)
    for answer in found:
        lines += [line for line in advice.answer_notes(answer) if line not in lines]
    return lines


def _notes(model: Model, recipe: Recipe, card: Card) -> list[str]:
    """What is said of a model, a recipe and a card in every answer."""
    return [
        *advice.kept_notes(model),
        *advice.card_notes(card),
        *advice.kernel_notes(model, recipe, card),
        *advice.recipe_notes(model, recipe),
    ]


class AtLength(NamedTuple):
    """Each strategy at one length, and one of them in detail."""

    plans: Mapping[str, Plan]
    reaches: Mapping[str, int]  # S_max of each
    name: str  # of the one in detail
    to_fit: tuple[Way, ...]
    beyond: Way | None  # the longest that changes reach, where none makes it fit
    smallest: Gpu | None  # where it does not fit: the smallest card that holds it
    notes: tuple[str, ...]
    advice: tuple[str, ...]  # where it does not fit

    @property
    def step(self) -> Plan:
        return self.plans[self.name]

    @property
    def reach(self) -> int:
        return self.reaches[self.name]

    @property
    def provenance(self) -> str:
        return provenance([plan.calibration for plan in self.plans.values()])


def at_length(plans: Mapping[str, Plan], name: str) -> AtLength:
    """What `mstplan plan` answers, with the plan of that name in detail."""
    step = plans[name]
    reaches = {each: solve.max_seq(p.model, p.recipe, p.card, each).s_max for each, p in plans.items()}
    to_fit = () if step.fits else ways.ways_to_fit(step)
    beyond = ways.furthest(step) if not (step.fits or to_fit) else None
    smallest = None if step.fits else ways.smallest_gpu(step)
    said = () if step.fits else tuple(_advice(reaches[name], bool(to_fit or beyond), smallest))
    notes = tuple(_notes_at_length(step, reaches[name]))
    return AtLength(plans, reaches, name, to_fit, beyond, smallest, notes, said)


class AtLengths(NamedTuple):
    """Each strategy at several lengths."""

    each: tuple[AtLength, ...]
    notes: tuple[str, ...]

    @property
    def fit(self) -> bool:
        """Whether every length fits with some strategy."""
        return all(told.step.fits for told in self.each)

    @property
    def provenance(self) -> str:
        return provenance([plan.calibration for told in self.each for plan in told.plans.values()])


def at_lengths(found: Sequence[tuple[Mapping[str, Plan], str]]) -> AtLengths:
    """What `mstplan plan` answers to several lengths: of each, plans by name, and the name of the one to take."""
    first = found[0][0].values()
    reaches = {name: solve.max_seq(p.model, p.recipe, p.card, name).s_max for name, p in found[0][0].items()}
    each = tuple(AtLength(plans, reaches, name, (), None, None, (), ()) for plans, name in found)
    step = next(iter(first))
    longest = max(found, key=lambda one: one[0][one[1]].seq_len)[0]
    lines = _notes(step.model, step.recipe, step.card)
    lines += advice.position_notes(step.model, next(iter(longest.values())).seq_len)
    return AtLengths(each, tuple(lines))


def _notes_at_length(step: Plan, reach: int) -> list[str]:
    lines = _notes(step.model, step.recipe, step.card) + advice.position_notes(step.model, step.seq_len)
    if step.peak.tokens != step.recipe.padded(step.seq_len):
        lines.append(
            f"Of batches up to that length one of {format_tokens(step.peak.tokens)} tokens needs most: its mask has to be padded."
        )
    lines += advice.padding_notes("This recipe", step, reach) if step.seq_len > reach else []
    return lines + [f"{line}." for line in advice.host_notes(step)]


def _advice(reach: int, changes_help: bool, smallest: Gpu | None) -> list[str]:
    """How far the recipe reaches as it is, and the card that holds the length."""
    lines = [] if changes_help else [f"{advice.nothing_tried()} makes this length fit on this GPU."]
    lines.append(
        f"As it is, this recipe reaches {format_tokens(reach)} tokens here."
        if reach
        else "As it is, this recipe fits no length here."
    )
    if smallest is not None:
        lines.append(f"The smallest GPU on which it fits as it is: {smallest.name} ({smallest.label}).")
    return lines
