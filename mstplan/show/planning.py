"""The reports of the commands that plan: max-seq, plan, theorem, shapes, plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..plan.findings import LengthFinding, LengthsFinding, LongestFinding, provenance
from ..step.names import in_options
from ..step.recipe import options_of, strategy_label
from ..units import GIB, format_gib, format_tokens
from . import parts, payload
from .parts import cell
from .report import GAP, Block, Cell, Column, Folded, Notes, Report, Row, Table, line

if TYPE_CHECKING:
    from ..plan.several_gpus import Compared
    from ..plan.shapes import Shape
    from ..plan.solve import Answer
    from ..plan.theorem import Coefficients, View
    from ..plan.theorem import Row as Formula
    from ..spec.hardware import Card
    from ..spec.model import Model
    from ..step.steps import Entry
    from .plot import Curve


def max_seq(longest: LongestFinding, tensors: bool = False) -> Report:
    """tensors: all of those at the peak, and not the largest only."""
    best = longest.best
    answers = parts.answers(longest.answers, best)
    recipes = [answer.plan.recipe for answer in longest.answers]
    blocks = [*parts.heading(longest.model, longest.card, longest.provenance, recipes), answers]
    if best.s_max:
        label, tokens = strategy_label(best.strategy), format_tokens(best.plan.peak.tokens)
        title = f"The peak of {label} at {tokens} tokens, {best.plan.instant}:"
        blocks += parts.at_peak(title, best.plan, best.plan.binding_entries(), tensors)
    else:
        blocks.append(parts.ways_to_train(longest.model, longest.card, longest.to_fit))
    return Report("max-seq", payload.max_seq(longest), [*blocks, *parts.remarks(longest.notes)], answers)


def ways_of_gpus(model: Model, card: Card, compared: Compared, notes: Sequence[str] = ()) -> Report:
    """Every way to use several GPUs, the longest sequence first."""
    stands_on = provenance([answer.plan.calibration for _, answer in compared.answers])
    columns = (
        Column("way", "way"),
        Column("strategy", "strategy", whole=True),
        Column("s_max", "longest", right=True),
        Column("cpu_ram_bytes", "CPU GiB", right=True),
        Column("options", "options", code=True, folded=True),
    )
    rows = [
        Row(
            (
                cell(way.name),
                parts.strategy_cell(answer.strategy),
                parts.tokens_cell(answer.s_max),
                parts.host_cell(answer.plan.host_bytes),
                cell(options_of(answer.plan.recipe)),
            )
        )
        for way, answer in compared.answers
    ]
    table = Table("ways", columns, tuple(rows))
    left_out = [
        f"Left out, {'; '.join(names)}: {in_options(why.rstrip('.'))}." for why, names in compared.left_out.items()
    ]
    best = [answer for _, answer in compared.answers[:1] if answer.s_max]
    said = [
        "longest: of the whole sequence, per GPU where each has its own; with the strategy of those asked for that reaches furthest.",
        *(f"The first: {options_of(answer.plan.recipe)}" for answer in best),
        *left_out,
        *notes,
    ]
    facts = payload.ways_of_gpus(model, card, compared, stands_on, said)
    return Report("max-seq", facts, [*parts.heading(model, card, stands_on), table, *parts.remarks(said)], table)


def plan(finding: LengthFinding, tensors: bool = False) -> Report:
    """tensors: all of those at the peak, and not the largest only."""
    step, peaks = finding.plan, finding.plan.instants()
    strategies = parts.plans(finding.plans, finding.reaches, finding.name)
    alive = next(i.entries for i in peaks if i.name == step.instant)
    blocks: list[Block] = [
        *parts.heading(step.model, step.card, finding.provenance, [each.recipe for each in finding.plans.values()]),
        GAP,
        *parts.verdict(step, finding.name if finding.name != "custom" else "this recipe"),
        strategies if len(finding.plans) > 1 else Folded((strategies,)),
        parts.instants(step, peaks),
        *parts.at_peak(f"{step.instant}:", step, alive, tensors),
    ]
    if not step.fits:
        blocks += [GAP, *_ways(finding), *map(line, finding.advice)]
    return Report("plan", payload.plan_document(finding, peaks), [*blocks, *parts.remarks(finding.notes)], strategies)


def plans(finding: LengthsFinding) -> Report:
    """Several lengths: a row for each, and each strategy."""
    step, table = finding.lengths[0].plan, parts.lengths(finding.lengths)
    heading = parts.heading(
        step.model, step.card, finding.provenance, [p.recipe for p in finding.lengths[0].plans.values()]
    )
    return Report("plan", payload.plans_document(finding), [*heading, table, *parts.remarks(finding.notes)], table)


def _ways(finding: LengthFinding) -> list[Table]:
    length, where = format_tokens(finding.plan.seq_len), finding.plan.card.label
    order = "adapters, then cheapest first" if any(way.adapters for way in finding.to_fit[:1]) else "cheapest first"
    none = "No change that is tried makes this length fit on this GPU. The longest they reach"
    return [
        parts.ways(f"Ways to fit {length} tokens on {where}, {order}", finding.to_fit),
        parts.ways(none, [finding.beyond] if finding.beyond is not None else []),
    ]


# ---- the paper's formulas -----------------------------------------------------------------------------------------------


def theorem(model: Model, card: Card, view: View, notes: Sequence[str]) -> Report:
    """said: what was left out of the answer."""
    stands_on = provenance([answer.plan.calibration for answer in view.answers])
    tables = paper(view)
    blocks: list[Block] = [
        *parts.heading(model, card, stands_on, [answer.plan.recipe for answer in view.answers]),
        *tables,
        line("Why they differ", "strong"),
        Notes((*view.differences, *notes)),
    ]
    return Report("theorem", payload.theorem_document(model, card, view, stands_on, notes), blocks, tables[-1])


def paper(view: View) -> tuple[Table, Table]:
    """The paper's coefficients; its formulas beside the step model."""
    return _coefficients(view.coefficients), _formulas(view.rows, view.answers, view.seq_len)


def _coefficients(c: Coefficients) -> Table:
    columns = (
        Column("coefficient", ""),
        Column("value", "value", right=True),
        Column("sources", "from"),
    )
    rows = (
        ("W_mem", Cell(c.w_mem, format_gib(c.w_mem)), _sources(c.w_from, GIB, "GiB")),
        ("I_mem", Cell(c.i_mem, f"{c.i_mem:,} B/token"), _sources(c.i_from, 1, "B")),
        ("A_mem", Cell(c.a_mem, f"{c.a_mem:,} B/token/layer"), _sources(c.a_from, 1, "B")),
        ("L, M", cell(f"{c.layers}, {c.chunks}"), ""),
        ("M_max", Cell(c.m_max, format_gib(c.m_max)), "the budget"),
    )
    title = "Coefficients of the paper (arXiv 2407.15892)"
    table_rows = tuple(Row((cell(name), value, cell(sources))) for name, value, sources in rows)
    return Table("coefficients", columns, table_rows, title)


def _sources(rows: Sequence[Entry], unit: int, name: str, most: int = 6) -> str:
    if not rows:
        return "given"

    def amount(size: int) -> str:
        return f"{size / unit:,.2f}" if unit > 1 else f"{size:,}"

    named = [e for e in rows[:most] if e.bytes >= unit / 200]  # others print as 0.00
    terms = [f"{e.name} {amount(e.bytes)}" for e in named]
    if (rest := sum(e.bytes for e in rows[len(named) :])) >= unit / 200:
        terms.append(f"{len(rows) - len(named)} smaller {amount(rest)}")
    return ", ".join(terms) + f" {name}"


def _formulas(rows: Sequence[Formula], answers: Sequence[Answer], seq_len: int | None) -> Table:
    columns = (
        Column("formula", "formula"),
        Column("formula_s_max", "S_max", right=True),
        Column("formula_bytes", f"at {format_tokens(seq_len)}" if seq_len else "", right=True),
        Column("strategy", "step model: strategy"),
        Column("s_max", "S_max", right=True),
    )
    table_rows = tuple(
        Row(
            (
                cell(r.formula),
                Cell(r.s_max, format_tokens(r.s_max)),
                Cell(r.memory, format_gib(r.memory) if r.memory is not None else ""),
                parts.strategy_cell(a.strategy),
                Cell(a.s_max, format_tokens(a.s_max)),
            )
        )
        for r, a in zip(rows, answers, strict=True)
    )
    return Table("formulas", columns, table_rows)


# ---- shapes, and curves -------------------------------------------------------------------------------------------------


def shapes(rows: Sequence[Shape], model: Model, batch: int, seq_len: int) -> Report:
    quoted = any(s.quoted for s in rows)
    columns = (
        Column("tensor", "tensor"),
        Column("shape", "shape"),
        Column("sizes", "sizes"),
        Column("bytes", "GB", right=True),
        Column("dtype", None),
        Column("quoted", "introduction" if quoted else None, right=True),
    )
    table = Table("shapes", columns, tuple(Row(_shape(s)) for s in rows))
    source = "introduction: as quoted in arXiv 2407.15892, rounded there; K and V there without grouped queries"
    title = line(f"{model.name}: b={batch}, s={seq_len:,}, {rows[0].dtype}; decimal GB", "strong")
    blocks: list[Block] = [title, table, *([line(source, "quiet")] if quoted else [])]
    return Report("shapes", payload.shapes_document(rows, model, batch, seq_len), blocks, table)


def _shape(s: Shape) -> tuple[Cell, ...]:
    sizes = Cell(" ".join(map(str, s.sizes)), " x ".join(f"{n:,}" for n in s.sizes))
    return (
        cell(s.name),
        cell(s.symbols),
        sizes,
        Cell(s.bytes, f"{s.bytes / 1e9:,.2f}"),
        cell(s.dtype),
        cell(s.quoted or None),
    )


def plot(model: Model, card: Card, curves: Sequence[Curve], out: Path, notes: Sequence[str]) -> Report:
    """What was drawn, and where to. said: what was left out of it."""
    from .plot import table_of_points

    folded = Folded((line(f"{model.name} on {card.label}"), _curves(curves)))
    blocks = [folded, *parts.written([out]), *(line(each, whole=True) for each in notes)]
    return Report("plot", payload.plot_document(model, card, curves, out, notes), blocks, table_of_points(curves, card))


def _curves(curves: Sequence[Curve]) -> Table:
    columns = (
        Column("strategy", "strategy"),
        Column("s_max", "S_max", right=True),
        Column("mlp_chunks", "chunks of the MLP", right=True),
        Column("loss_chunks", "of the loss", right=True),
    )
    rows = tuple(
        Row((parts.strategy_cell(c.strategy), parts.tokens_cell(c.s_max), cell(c.chunks.mlp), cell(c.chunks.loss)))
        for c in curves
    )
    return Table("curves", columns, rows)
