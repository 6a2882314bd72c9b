"""What a trace says, in a terminal: the peaks beside the formula's, what is alive, what the allocator makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.status import Status
from rich.text import Text

from ..observe import explain
from ..observe.card import Held, held, room
from ..observe.search import Found
from ..observe.trace import Alive, Trace
from ..plan.hardware import Card
from ..plan.model import Model
from ..plan.recipe import Recipe
from ..plan.solve import Answer, Plan, hardest
from ..plan.steps import InstantPeak
from ..units import MIB, SHORTEST, format_gib, format_tokens
from . import tables


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

    @property
    def fits(self) -> bool:
        """Does the allocator find room, with expandable segments?"""
        return self.expandable.out_of_memory is None


def view(model: Model, card: Card, strategy: str, trace: Trace, plan: Plan, versions: dict[str, str]) -> View:
    formula = plan.instants() if model.stand_in is None else ()
    at_peak = next((i.entries for i in formula if i.name == trace.peak.instant), ())
    differences = explain.compare(at_peak, trace.alive(trace.peak.event)) if formula else ()
    kept = [held(trace, expandable=expandable, limit=room(card)) for expandable in (True, False)]
    return View(model, card, strategy, trace, plan, versions, kept[0], kept[1], differences, formula)


DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
RUNG = "trace rung: the model's real code on fake tensors; nothing was measured"


def max_seq(console: Console, model: Model, card: Card, found: Sequence[Found], best: Found) -> None:
    """S_max of every strategy by trace, and what is alive at the best one's peak."""
    tables.heading(console, model, card, RUNG)
    tables.answers(console, [f.answer for f in found], best.answer)
    if best.answer.s_max:
        console.print(Text(f"{best.answer.strategy} at {format_tokens(best.answer.s_max)} tokens:", "bold"))
        alive(console, best.trace)
        console.print()
    tables.notes(console, max_seq_notes(model, card, found))


def max_seq_notes(model: Model, card: Card, found: Sequence[Found]) -> list[str]:
    from ..observe.cache import versions
    from ..plan import advice, ways

    answers = [f.answer for f in found]
    recipe = answers[-1].plan.recipe
    lines = [*advice.kept_notes(model), *advice.card_notes(card), *advice.kernel_notes(model, recipe, card)]
    lines += [*advice.recipe_notes(model, recipe), _versions_note(versions())]
    if not any(answer.s_max for answer in answers):
        if model.stand_in is not None:
            return lines + _nothing_fits(answers)
        return lines + advice.nothing_fits_notes(answers, ways.ways_to_train([answer.plan for answer in answers]))
    if ends := [f.answer.strategy for f in found if f.at_the_end]:
        lines.append(
            f"{', '.join(ends)}: S_max is the longest that the model's own code runs; there would be memory for more."
        )
    if model.stand_in is not None:
        longest = max(answer.s_max for answer in answers)
        what = "S_max is what the caching allocator finds room for, with expandable_segments:True."
        return [*lines, *advice.position_notes(model, longest), what, UNMEASURED]
    lines.append(
        "S_max is what the caching allocator finds room for, with expandable_segments:True; the formula counts tensors alone and comes to "
        + ", ".join(f"{format_tokens(f.formula)} ({f.answer.strategy})" for f in found)
        + "."
    )
    return [*lines, UNMEASURED]


def _nothing_fits(answers: Sequence[Answer]) -> list[str]:
    least = min(answers, key=lambda a: a.plan.peak_bytes).plan
    missing = format_gib(max(0, least.peak_bytes - least.budget_bytes))
    return [
        f"Nothing fits: even {SHORTEST} tokens need {format_gib(least.peak_bytes)} ({least.instant}), {missing} more than the budget."
    ]


UNMEASURED = (
    "attention's workspace, cuBLAS' and the allocator's rules are from PyTorch's source, not yet measured on a card."
)


def _versions_note(versions: dict[str, str]) -> str:
    return f"traced with torch {versions['torch']} and transformers {versions['transformers']}."


def _ran_note(trace: Trace) -> str:
    return f"{len(trace.kept)} of {trace.units} layers were run; the others do the same as one of them."


def report(console: Console, v: View, others: Sequence[View] = (), most: int = 14) -> None:
    """A trace; before it whether other strategies fit that were traced at the same length."""
    tables.heading(console, v.model, v.card, RUNG)
    for other in others:
        tables.fits(
            console, other.trace.seq_len, other.strategy, other.trace.peak.bytes, other.card.budget_bytes, other.fits
        )
    tables.fits(console, v.trace.seq_len, v.strategy, v.trace.peak.bytes, v.card.budget_bytes, v.fits)
    if v.plan.in_chunks:
        console.print(Text(tables.chunks(v.plan), "dim"))
    _instants(console, v)
    alive(console, v.trace, most)
    if v.formula:
        _differences(console, v)
    console.print()
    tables.notes(console, notes(v))


def _instants(console: Console, v: View) -> None:
    beside = (("formula", "right"), ("differs", "right")) if v.formula else ()
    table = tables.new_table(("instant", "left"), ("trace GiB", "right"), *beside, ("", "left"))
    formula = {i.name: i.bytes for i in v.formula}
    for peak in v.trace.peaks:
        planned = formula.get(peak.instant)
        compared = ("-", "") if planned is None else (tables.gib(planned), f"{planned / peak.bytes - 1:+.2%}")
        binds = peak is v.trace.peak or peak.instant == v.trace.peak.instant
        cells = (peak.instant, tables.gib(peak.bytes), *(compared if v.formula else ()), "<- binds" if binds else "")
        table.add_row(*cells, style="bold" if binds else "")
    console.print(table)


def alive(console: Console, trace: Trace, most: int = 14) -> None:
    """The tensors at the trace's peak, largest first."""
    rows = trace.alive(trace.peak.event)
    console.print(Text(f"{trace.peak.instant}, {_at(trace)}:", "bold"))
    table = tables.new_table(
        ("for", "left"), ("made by", "left"), ("shape", "left"), ("dtype", "left"), ("n", "right"), ("GiB", "right")
    )
    for a in rows[:most]:
        table.add_row(
            a.category,
            explain.name_of(a),
            _shape(a),
            DTYPES.get(a.dtype, a.dtype),
            str(a.copies) if a.copies > 1 else "",
            tables.gib(a.bytes),
        )
    if len(rows) > most:
        table.add_row(f"{len(rows) - most} smaller", "", "", "", "", tables.gib(sum(a.bytes for a in rows[most:])))
    table.add_section()
    table.add_row("all", "", "", "", "", tables.gib(sum(a.bytes for a in rows)))
    console.print(table)


def _at(trace: Trace) -> str:
    made = trace.step.made[trace.step.events[trace.peak.event][0]]
    return f"{made.module}: {made.operation}" if made.module else made.operation


def _shape(a: Alive) -> str:
    return f"({', '.join(map(str, a.shape))})" if a.shape else ""


def _differences(console: Console, v: View, least: int = MIB, most: int = 8) -> None:
    differing = [row for row in v.differences if abs(row.difference) >= least]
    if not differing:
        total = sum(row.difference for row in v.differences)
        console.print(
            Text(
                f"Formula and trace have the same tensors there, but for {format_gib(abs(total))} of small ones and rounding.",
                "dim",
            )
        )
        return
    console.print(Text("Where formula and trace differ there", "bold"))
    table = tables.new_table(
        ("formula", "left"), ("trace", "left"), ("dtype", "left"), ("n", "right"), ("GiB", "right")
    )
    for row in differing[:most]:
        counts = f"{row.formula_copies} / {row.trace_copies}"
        table.add_row(_names(row.formula), _names(row.trace), row.dtype, counts, f"{row.difference / 2**30:+.2f}")
    console.print(table)


def _names(names: Sequence[str]) -> str:
    return "; ".join(names[:3]) + (f"; {len(names) - 3} more" if len(names) > 3 else "") or "-"


def notes(v: View) -> list[str]:
    """How the allocator fares, and what was not seen."""
    from ..plan import advice

    lines = [
        *advice.kept_notes(v.model),
        *advice.card_notes(v.card),
        *advice.kernel_notes(v.model, v.trace.recipe, v.card),
        _allocator_note(v.expandable, "with expandable_segments:True"),
        _allocator_note(v.usual, "without it"),
    ]
    if v.trace.host_peak:
        lines.append(f"host memory: {format_gib(v.trace.host_peak)} at most.")
    lines += [_versions_note(v.versions), _ran_note(v.trace), UNMEASURED]
    _, *others = hardest(v.model, v.trace.recipe, v.trace.seq_len)
    lines += [
        f"a batch of {format_tokens(n)} tokens takes a mask of another kind, and may need more: trace it as well."
        for n in others
    ]
    return lines + advice.position_notes(v.model, v.trace.seq_len)


def _allocator_note(kept: Held, how: str) -> str:
    if kept.out_of_memory is not None:
        lost = kept.out_of_memory
        return (
            f"caching allocator {how}: out of memory, with {format_gib(lost.allocated)} allocated, {format_gib(lost.reserved)} reserved and "
            f"{format_gib(lost.needed)} asked for."
        )
    again = f", the cache given back {kept.retries} times" if kept.retries else ""
    return f"caching allocator {how}: runs, {format_gib(kept.reserved)} reserved for {format_gib(kept.allocated)} allocated at most{again}."


# ---- while it runs ------------------------------------------------------------------------------------------------------


@contextmanager
def status() -> Iterator[Status]:
    """A spinner on the terminal, if there is one; what is printed meanwhile goes above it."""
    console = Console(stderr=True, highlight=False)
    with console.status("importing torch and transformers", spinner="dots") as waiting:
        yield waiting


def recipe_words(recipe: Recipe) -> str:
    """A recipe in a few words."""
    chunks = f", {recipe.mlp_chunks} and {recipe.loss_chunks} chunks" if recipe.loss_in_chunks else ""
    return f"checkpoint {recipe.checkpoint}{chunks}{', offload' if recipe.offload_layer_inputs else ''}"
