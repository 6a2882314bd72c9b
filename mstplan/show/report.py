"""What each command says: tables in their order, and the notes below them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from ..plan import advice, solve
from ..plan.advice import Way
from ..plan.hardware import Card
from ..plan.model import Model
from ..plan.solve import Answer, Plan
from ..units import format_gib, format_tokens
from . import tables

if TYPE_CHECKING:
    from ..plan.theorem import View


def max_seq_notes(model: Model, card: Card, found: Sequence[Answer]) -> list[str]:
    recipe = found[-1].plan.recipe
    lines = advice.card_notes(card) + advice.kernel_notes(model, recipe, card) + advice.recipe_notes(model, recipe)
    if not any(answer.s_max for answer in found):
        return lines + advice.nothing_fits_notes(found)
    for answer in found:
        for line in advice.answer_notes(answer):
            if line not in lines:
                lines.append(line)
    return lines


def max_seq(console: Console, model: Model, card: Card, found: Sequence[Answer], best: Answer) -> None:
    tables.heading(console, model, card, tables.rung([a.plan.calibration for a in found]))
    tables.answers(console, found, best)
    if best.s_max:
        title = f"{best.strategy} at {format_tokens(best.s_max)} tokens, {best.plan.instant}:"
        tables.entries(console, title, best.plan.binding_entries())
        tables.legend(console, best.plan)
        console.print()
    tables.notes(console, max_seq_notes(model, card, found))


def plan(console: Console, step: Plan, strategy: str, singles: Sequence[Way], run: Way | None) -> None:
    tables.heading(console, step.model, step.card, tables.rung([step.calibration]))
    found = step.instants()
    tables.verdict(console, step, strategy)
    tables.instants(console, step, found)
    tables.entries(console, f"{step.instant}:", next(i.entries for i in found if i.name == step.instant))
    tables.legend(console, step)
    if not step.fits:
        console.print()
        console.print(Text("What would lower the peak, cheapest first", "bold"))
        tables.ways(console, singles, run)
        for line in fallback_notes(step, run):
            console.print(Text(line))
    console.print()
    tables.notes(console, plan_notes(step))


def plan_notes(step: Plan) -> list[str]:
    lines = advice.card_notes(step.card) + advice.kernel_notes(step.model, step.recipe, step.card) + advice.recipe_notes(step.model, step.recipe)
    lines += advice.position_notes(step.model, step.seq_len)
    if not step.fits_host and step.card.host_bytes is not None:
        lines.append(f"host memory is short: {format_gib(step.host_bytes)} needed, {format_gib(step.card.host_bytes)} there.")
    return lines


def fallback_notes(step: Plan, run: Way | None) -> list[str]:
    lines = []
    if run is None:
        lines.append("No change to the recipe makes this length fit on this card.")
    longest = solve.max_seq(step.model, step.recipe, step.card).s_max
    lines.append(f"As it is, this recipe reaches {format_tokens(longest)} tokens here." if longest else "As it is, this recipe fits no length here.")
    bigger = advice.smallest_gpu(step)
    if bigger is not None:
        lines.append(f"The smallest card on which it fits as it is: {bigger.name} ({bigger.label}).")
    return lines


def theorem(console: Console, model: Model, card: Card, view: View) -> None:
    tables.heading(console, model, card, tables.rung([answer.plan.calibration for answer in view.answers]))
    tables.theorem(console, view.coefficients, view.rows, view.answers, view.seq_len)
    console.print(Text("Why they differ", "bold"))
    tables.notes(console, view.differences)
