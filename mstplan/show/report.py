"""What each command says: tables in their order, and the notes below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from ..plan import advice, ways
from ..plan.hardware import Card
from ..plan.model import Model
from ..plan.solve import Answer, Plan
from ..plan.ways import Way
from ..units import format_tokens
from . import tables

if TYPE_CHECKING:
    from ..plan.theorem import View


def max_seq_notes(model: Model, card: Card, found: Sequence[Answer], to_fit: Sequence[Way] = ()) -> list[str]:
    recipe = found[-1].plan.recipe
    lines = (
        advice.kept_notes(model)
        + advice.card_notes(card)
        + advice.kernel_notes(model, recipe, card)
        + advice.recipe_notes(model, recipe)
    )
    if not any(answer.s_max for answer in found):
        return lines + advice.nothing_fits_notes(found, to_fit)
    for answer in found:
        for line in advice.answer_notes(answer):
            if line not in lines:
                lines.append(line)
    return lines


def max_seq(
    console: Console, model: Model, card: Card, found: Sequence[Answer], best: Answer, to_fit: Sequence[Way] = ()
) -> None:
    tables.heading(console, model, card, tables.rung([a.plan.calibration for a in found]))
    tables.answers(console, found, best)
    if best.s_max:
        title = f"{best.strategy} at {format_tokens(best.plan.peak.tokens)} tokens, {best.plan.instant}:"
        tables.entries(console, title, best.plan.binding_entries())
        tables.legend(console, best.plan)
    else:
        tables.ways(console, f"Ways to train {model.name} on {card.label}", to_fit)
    console.print()
    tables.notes(console, max_seq_notes(model, card, found, to_fit))


def plan(
    console: Console,
    plans: Mapping[str, Plan],
    reaches: Mapping[str, int],
    name: str,
    to_fit: Sequence[Way],
    beyond: Way | None,
) -> None:
    step = plans[name]
    tables.heading(console, step.model, step.card, tables.rung([plan.calibration for plan in plans.values()]))
    if len(plans) > 1:
        tables.plans(console, plans, reaches, name)
    found = step.instants()
    tables.verdict(console, step, name if name != "custom" else "this recipe")
    tables.instants(console, step, found)
    tables.entries(console, f"{step.instant}:", next(i.entries for i in found if i.name == step.instant))
    tables.legend(console, step)
    if not step.fits:
        console.print()
        tables.ways(
            console, f"Ways to fit {format_tokens(step.seq_len)} tokens on {step.card.label}, cheapest first", to_fit
        )
        tables.ways(
            console,
            "No change that is tried makes this length fit on this card. The longest they reach",
            [beyond] if beyond is not None else [],
        )
        for line in fallback_notes(step, reaches[name], to_fit, beyond):
            console.print(Text(line))
    console.print()
    tables.notes(console, plan_notes(step, reaches[name]))


def plan_notes(step: Plan, reaches: int) -> list[str]:
    lines = advice.kept_notes(step.model)
    lines += (
        advice.card_notes(step.card)
        + advice.kernel_notes(step.model, step.recipe, step.card)
        + advice.recipe_notes(step.model, step.recipe)
    )
    lines += advice.position_notes(step.model, step.seq_len)
    if step.peak.tokens != step.recipe.padded(step.seq_len):
        lines.append(
            f"Of batches up to that length one of {format_tokens(step.peak.tokens)} tokens needs most: its mask has to be padded."
        )
    lines += advice.padding_notes("This recipe", step, reaches) if step.seq_len > reaches else []
    return lines + [f"{line}." for line in advice.host_notes(step)]


def fallback_notes(step: Plan, reaches: int, to_fit: Sequence[Way], beyond: Way | None) -> list[str]:
    """How far the recipe reaches as it is, how far changes would take it, and the card that holds the length."""
    lines = []
    if not to_fit and beyond is None:
        lines.append(f"{advice.nothing_tried()} makes this length fit on this card.")
    lines.append(
        f"As it is, this recipe reaches {format_tokens(reaches)} tokens here."
        if reaches
        else "As it is, this recipe fits no length here."
    )
    bigger = ways.smallest_gpu(step)
    if bigger is not None:
        lines.append(f"The smallest card on which it fits as it is: {bigger.name} ({bigger.label}).")
    return lines


def theorem(console: Console, model: Model, card: Card, view: View) -> None:
    tables.heading(console, model, card, tables.rung([answer.plan.calibration for answer in view.answers]))
    tables.theorem(console, view.coefficients, view.rows, view.answers, view.seq_len)
    console.print(Text("Why they differ", "bold"))
    tables.notes(console, [*view.differences, *advice.kept_notes(model)])
