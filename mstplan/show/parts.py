"""Parts of reports: cells, and the lines and tables that several commands have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..plan.advice import kernel_words
from ..plan.findings import LengthFinding
from ..plan.layout import chunk_tokens
from ..plan.solve import Answer, Plan
from ..plan.ways import Way
from ..spec.hardware import Card
from ..spec.model import Model
from ..step.parameters import parameter_count
from ..step.recipe import Recipe, options_of, recipe_in_words, strategy_label
from ..step.simulation import Usage
from ..step.steps import Entry, InstantPeak
from ..units import GIB, format_count, format_gib, format_tokens
from . import times
from .report import GAP, Block, Cell, Column, Line, Notes, Row, Span, Table, line

SHOWN = GIB // 200
"""Bytes that print as more than 0.00 GiB."""
FEW, MOST = 3, 14
"""Tensors that a terminal shows of an instant, and with --tensors."""
PEAK = "<- peak"
NOTHING = Cell(None, "")
ONLY_ADAPTER = ".default.weight"
"""What peft's names of weights end in, which a terminal has no room for."""


# ---- cells --------------------------------------------------------------------------------------------------------------


def gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def short_gib(size: int) -> str:
    """GiB in at most seven characters up to a million."""
    return gib(size) if size < 1000 * GIB else f"{size / GIB:,.0f}"


def cell(value: Any) -> Cell:
    """A value that people read as it is; nothing for None."""
    return Cell(value, "" if value is None else str(value))


def gib_cell(size: int) -> Cell:
    return Cell(size, gib(size))


def peak_cell(size: int) -> Cell:
    return Cell(size, short_gib(size))


def host_cell(size: int) -> Cell:
    return Cell(size, short_gib(size) if size else "-")


def tokens_cell(tokens: int, none: str = "none") -> Cell:
    return Cell(tokens, format_tokens(tokens) if tokens else none)


def copies_cell(copies: int) -> Cell:
    return Cell(copies, str(copies) if copies > 1 else "")


def binds_cell(binds: bool) -> Cell:
    return Cell(binds, PEAK if binds else "")


def strategy_cell(name: str) -> Cell:
    return Cell(name, strategy_label(name))


def pieces(p: Plan) -> str:
    """Pieces of the sequence in words: 'MLP in 4 pieces of 21,134 tokens, loss in 16 of 5,284'; and groups of heads."""
    (mlp, loss, groups), (of_mlp, of_loss) = p.chunks, p.chunk_tokens
    what = "layers" if p.recipe.layer_in_chunks else "MLP"
    heads = f", heads in {groups} groups" if groups > 1 else ""
    whole = f"{what} in one piece, loss in {loss} of {of_loss:,} tokens"
    return (f"{what} in {mlp} pieces of {of_mlp:,} tokens, loss in {loss} of {of_loss:,}" if mlp > 1 else whole) + heads


# ---- lines --------------------------------------------------------------------------------------------------------------


def heading(model: Model, card: Card, provenance: str, recipes: Iterable[Recipe] = ()) -> list[Block]:
    """What is answered for, what the answer stands on, how one trains, and the model's own notes, which come before any answer."""
    total, active = parameter_count(model)
    parameters = format_count(total) + (f" ({format_count(active)} active)" if active != total else "")
    title = Line(
        (
            Span(model.name, "strong"),
            Span(f"  {parameters} parameters, {model.layers} layers   on "),
            Span(card.label, "strong"),
            Span("" if card.unlimited else f"   budget {format_gib(card.budget_bytes)}"),
        )
    )
    descriptions = dict.fromkeys(
        recipe_in_words(recipe, kernel_words(model, recipe, card), model.attends) for recipe in recipes
    )
    return [title, line(provenance, "quiet"), *(line(words, "quiet") for words in descriptions), Notes(model.notes)]


def fits(seq_len: int, strategy: str, peak: int, budget: int, does: bool, usage: Usage | None) -> Line:
    """The verdict on a length: whether it fits, and by how much. usage: of the allocator, where the tensors fit."""
    room = f"{format_gib(abs(budget - peak))} {'under' if budget >= peak else 'over'} the budget"
    return Line(
        (
            Span(f"{format_tokens(seq_len)} tokens with {strategy_label(strategy)}: "),
            Span("fits", "good") if does else Span("does not fit", "bad"),
            Span(f": peak {format_gib(peak)}, {room}{_reserved(usage) if usage is not None else ''}."),
        )
    )


def _reserved(usage: Usage) -> str:
    """What the allocator makes of tensors that fit."""
    if usage.out_of_memory is None:
        return f"; {format_gib(usage.reserved)} reserved"
    failed = usage.out_of_memory
    return (
        f", but in step {usage.steps} the allocator finds no room for {format_gib(failed.requested)} beside "
        f"{format_gib(failed.allocated)}: it holds {format_gib(failed.reserved)} in pieces"
    )


def verdict(p: Plan, strategy: str) -> list[Block]:
    usage = p.usage if p.tensors_fit else None
    return [fits(p.seq_len, strategy, p.peak_bytes, p.budget_bytes, p.fits, usage), line(settings(p), "quiet")]


def settings(p: Plan) -> str:
    """What a plan takes beside GPU memory: pieces, CPU RAM, time."""
    host = [f"CPU RAM {format_gib(p.host_bytes)}"] if p.host_bytes else []
    return ", ".join([*([pieces(p)] if p.in_chunks else []), *host, times.in_words(p)])


def legend(p: Plan) -> Line:
    """What the symbols in the shapes stand for."""
    m, a, s = p.model, p.model.attention, p.peak.tokens
    symbols = [
        ("b", p.recipe.batch),
        ("s", s),
        ("c", chunk_tokens(s, p.chunks.mlp) if p.chunks.mlp > 1 else None),
        ("k", chunk_tokens(s, p.chunks.loss) if p.chunks.loss > 1 else None),
        ("d", m.hidden),
        ("H", a.heads),
        ("G", a.kv_heads if a.kv_heads != a.heads else None),
        ("e", a.head_dim),
        ("I", m.mlp.width if m.mlp else None),
        ("V", m.vocab),
        ("A", m.experts.per_token if m.experts else None),
        ("F", m.experts.width if m.experts else None),
    ]
    return line("  ".join(f"{name}={value:,}" for name, value in symbols if value is not None), "quiet")


def remarks(lines: Sequence[str]) -> list[Block]:
    """Notes below an answer."""
    return [GAP, Notes(tuple(lines))]


def written(paths: Iterable[object]) -> list[Block]:
    """A line for each file that was written."""
    from ..errors import one_line

    return [line(f"wrote {one_line(path, 200)}", whole=True) for path in paths]


# ---- tables -------------------------------------------------------------------------------------------------------------


def answers(answers: Sequence[Answer], best: Answer) -> Table:
    """S_max of each strategy, and where its peak is. What "vs ckpt" says is in "longest", too: a terminal has the room for tokens a second."""
    expected = times.are_expected(answers)
    columns = (
        Column("strategy", "strategy"),
        Column("s_max", "longest", right=True),
        Column("times_checkpoint", "vs ckpt", right=True, folded=expected),
        Column("host_bytes", "CPU GiB", right=True),
        *times.columns(expected),
        Column("instant", "peak at"),
        Column("peak_bytes", None),
        Column("mlp_chunks", None),
        Column("loss_chunks", None),
        Column("", "pieces"),
    )
    checkpoint = next((a.s_max for a in answers if a.strategy == "checkpoint"), 0)
    rows = tuple(Row(_answer(a, checkpoint), "strong" if a is best and a.s_max else "") for a in answers)
    return Table("answers", columns, rows, layout="answers")


def _answer(a: Answer, checkpoint: int) -> tuple[Cell, ...]:
    p, ratio = a.plan, a.s_max / checkpoint if checkpoint else 0
    times_checkpoint = f"{ratio:.1f}x" if 0 < ratio < 100 else f"{ratio:,.0f}x" if ratio else "-"
    return (
        strategy_cell(a.strategy),
        tokens_cell(a.s_max),
        Cell(ratio or None, times_checkpoint),
        host_cell(p.host_bytes),
        *times.cells(a),
        cell(p.instant.value),
        cell(p.peak_bytes),
        cell(p.chunks.mlp),
        cell(p.chunks.loss),
        Cell(None, pieces(p) if p.in_chunks and a.s_max else ""),
    )


def lengths(findings: Sequence[LengthFinding]) -> Table:
    """Each strategy at every length; of each length the one to take stands out."""
    expected = times.are_expected(plan for each in findings for plan in each.plans.values())
    of_each = [plans(each.plans, each.reaches, each.name, times.columns(expected, narrow=True)) for each in findings]
    first = Column("", "tokens", right=True)
    rows = [
        Row((tokens_cell(each.plan.seq_len) if n == 0 else cell(None), *row.cells), row.tone)
        for each, table in zip(findings, of_each, strict=True)
        for n, row in enumerate(table.rows)
    ]
    return Table("lengths", (first, *of_each[0].columns), tuple(rows))


def plans(
    plans: Mapping[str, Plan], reaches: Mapping[str, int], detailed: str, of_times: tuple[Column, ...] = ()
) -> Table:
    """Each strategy at one length; the one that is detailed stands out. of_times: columns of step times, beside others in a table."""
    columns = (
        Column("strategy", "strategy"),
        Column("fits", ""),
        Column("peak_bytes", "peak GiB", right=True),
        Column("host_bytes", "CPU GiB", right=True),
        *(of_times or times.columns(times.are_expected(plans.values()))),
        Column("s_max", "up to", right=True),
        Column("seq_len", None),
        Column("budget_bytes", None),
        Column("instant", None),
        Column("mlp_chunks", None),
        Column("loss_chunks", None),
    )
    rows = tuple(
        Row(
            (
                strategy_cell(name),
                Cell(p.fits, "fits" if p.fits else "does not fit"),
                peak_cell(p.peak_bytes),
                host_cell(p.host_bytes),
                *times.cells(p),
                tokens_cell(reaches[name]),
                *map(cell, (p.seq_len, p.budget_bytes, p.instant.value, p.chunks.mlp, p.chunks.loss)),
            ),
            "strong" if name == detailed else "",
        )
        for name, p in plans.items()
    )
    return Table("strategies", columns, rows)


def instants(p: Plan, peaks: Sequence[InstantPeak]) -> Table:
    columns = (
        Column("instant", "peak at"),
        Column("operation", "during"),
        Column("bytes", "GiB", right=True),
        Column("binds", ""),
    )
    rows = tuple(
        Row(
            (
                cell(i.name.value),
                Cell(i.operation, i.operation.removesuffix(ONLY_ADAPTER)),
                gib_cell(i.bytes),
                binds_cell(i.name == p.instant),
            ),
            "strong" if i.name == p.instant else "",
        )
        for i in peaks
    )
    return Table("instants", columns, rows)


def entries(title: str, tensors: Sequence[Entry], most: int = MOST) -> Table:
    """The tensors of one instant, largest first, of which a terminal shows so many."""
    columns = (
        Column("tensor", "tensor"),
        Column("shape", "shape"),
        Column("dtype", "dtype"),
        Column("copies", "n", right=True),
        Column("bytes", "GiB", right=True),
    )
    rows = tuple(
        Row((cell(e.name), cell(e.shape), cell(e.dtype), copies_cell(e.copies), gib_cell(e.bytes))) for e in tensors
    )
    return summed("tensors", columns, rows, [e.bytes for e in tensors], title, most)


def at_peak(title: str, p: Plan, tensors: Sequence[Entry], everything: bool) -> list[Block]:
    """The largest tensors of the peak; with everything all that a terminal has room for, and what their shapes' symbols are."""
    return [entries(title, tensors, MOST), legend(p)] if everything else [entries(title, tensors, FEW)]


def summed(
    name: str, columns: tuple[Column, ...], rows: tuple[Row, ...], sizes: Sequence[int], title: str, most: int = MOST
) -> Table:
    """A table of bytes in its last column, with those of what a terminal does not show, and of all, in sum."""
    blank = (NOTHING,) * (len(columns) - 2)
    most = min(most, max(1, sum(size >= SHOWN for size in sizes)))

    def sum_of(what: str, terms: Sequence[int]) -> Row:
        return Row((cell(what), *blank, gib_cell(sum(terms))))

    rest, total = sum_of(f"{len(rows) - most} smaller", sizes[most:]), sum_of("all", sizes)
    return Table(name, columns, rows, title, most=most, rest=rest, total=total)


def ways(title: str, ways: Sequence[Way]) -> Table:
    """Changes with which it fits, cheapest first: what they bring and cost, and the options to paste."""
    columns = (
        Column("s_max", "longest", right=True),
        Column("host_bytes", "CPU GiB", right=True),
        *times.columns(times.are_expected(way.plan for way in ways), narrow=True),
        Column("gives_up", "you give up"),
        Column("options", "options", code=True),
    )
    rows = tuple(
        Row(
            (
                tokens_cell(way.s_max, "0"),
                host_cell(way.plan.host_bytes),
                *times.cells(way.plan),
                cell(way.gives_up),
                cell(options_of(way.plan.recipe)),
            )
        )
        for way in ways
    )
    return Table("ways", columns, rows, title, layout="ways")


def ways_to_train(model: Model, card: Card, to_fit: Sequence[Way], by: str = "") -> Table:
    """Changes with which anything fits at all, and of which length CPU RAM and times are."""
    length = f"; CPU GiB and step at {format_tokens(to_fit[0].plan.seq_len)} tokens" if to_fit else ""
    return ways(f"Ways to train {model.name} on {card.label}{by}{length}", to_fit)
