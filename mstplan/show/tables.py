"""Answers as tables for a terminal of 80 columns. Everything takes finished answers; nothing is computed here but layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..plan.calibration import Calibration
from ..plan.hardware import Card, Gpu
from ..plan.model import Model
from ..plan.parameters import parameter_count
from ..plan.recipe import options_of
from ..plan.shapes import Shape
from ..plan.solve import Answer, Plan, chunk_tokens
from ..plan.steps import Entry, InstantPeak
from ..plan.ways import Way
from ..units import GIB, format_count, format_gib, format_seconds, format_tokens

if TYPE_CHECKING:
    from ..plan.theorem import Coefficients, Row

RUNG = "formula rung: the bytes of every tensor, from config.json; nothing was measured"


def rung(calibrations: Sequence[Calibration | None]) -> str:
    """What answers of the planner stand on, in a line."""
    sources = dict.fromkeys(c.said for c in calibrations if c is not None)
    if not sources:
        return RUNG
    some = "" if None not in calibrations else " in part"
    return f"formula rung, calibrated{some} from {'; '.join(sources)}"


def new_table(*columns: tuple[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold", no_wrap=justify == "right")  # type: ignore[arg-type]
    return table


def gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def heading(console: Console, model: Model, card: Card, rung: str = RUNG) -> None:
    total, active = parameter_count(model)
    parameters = format_count(total) + (f" ({format_count(active)} active)" if active != total else "")
    console.print(
        Text.assemble(
            (model.name, "bold"),
            f"  {parameters} parameters, {model.layers} layers   on ",
            (card.label, "bold"),
            f"   budget {format_gib(card.budget_bytes)}",
        )
    )
    console.print(Text(rung, "dim"))
    notes(console, model.notes)  # before any answer: that adapters are not planned comes before "nothing fits"


HEADER = (
    ("strategy", ""),
    ("S_max", ""),
    ("x", "std"),
    ("peak", "GiB"),
    ("host", "GiB"),
    ("step", ">="),
    ("binding", "instant"),
)


def answers(console: Console, found: Sequence[Answer], best: Answer) -> None:
    """Two lines per strategy: S_max, the peak there and the instant that binds; then its chunks."""
    standard = next((a.s_max for a in found if a.strategy == "standard"), 0)
    rows = [_answer_cells(a, standard) for a in found]
    widths = [max(map(len, column)) for column in zip(*rows, *zip(*HEADER, strict=True), strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *numbers, last = cells
        return " ".join(
            [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(numbers, widths[1:], strict=False)), last]
        )

    console.print()
    top, bottom = zip(*((h, "") if not t else (h, t) for h, t in HEADER), strict=True)
    console.print(Text(line([t if b else "" for t, b in zip(top, bottom, strict=True)]), "dim"))
    console.print(Text(line([b or t for t, b in zip(top, bottom, strict=True)]), "dim"))
    for a, row in zip(found, rows, strict=True):
        console.print(Text(line(row), "bold" if a is best and a.s_max else ""))
        if a.plan.in_chunks and a.s_max:
            console.print(Text(" " * (widths[0] + 1) + chunks(a.plan), "dim"))
    console.print()


def _answer_cells(a: Answer, standard: int) -> list[str]:
    p = a.plan
    ratio = a.s_max / standard if standard else 0
    times = f"{ratio:.1f}" if 0 < ratio < 100 else f"{ratio:,.0f}" if ratio else "-"
    host = _short_gib(p.host_bytes) if p.host_bytes else "-"
    seconds = format_seconds(p.step_seconds) if a.s_max and p.step_seconds else "-"
    s_max = format_tokens(a.s_max) if a.s_max else "none"
    return [a.strategy, s_max, times, _short_gib(p.peak_bytes), host, seconds, p.instant]


def _short_gib(size: int) -> str:
    """GiB in at most seven characters up to a million."""
    gib = size / GIB
    return f"{gib:,.2f}" if gib < 1000 else f"{gib:,.0f}"


def chunks(p: Plan) -> str:
    """'M: MLP 4 x 21,134 tokens, loss 16 x 5,284 tokens'."""
    pieces = zip(("MLP", "loss"), p.chunks, p.chunk_tokens, strict=True)
    return "M: " + ", ".join(f"{what} {n} x {tokens:,} tokens" for what, n, tokens in pieces)


def entries(console: Console, title: str, rows: Sequence[Entry], most: int = 14) -> None:
    """The tensors of one instant, largest first."""
    console.print(Text(title, "bold"))
    table = new_table(("tensor", "left"), ("shape", "left"), ("dtype", "left"), ("n", "right"), ("GiB", "right"))
    for e in rows[:most]:
        table.add_row(e.name, e.shape, e.dtype, str(e.copies) if e.copies > 1 else "", gib(e.bytes))
    if len(rows) > most:
        table.add_row(f"{len(rows) - most} smaller", "", "", "", gib(sum(e.bytes for e in rows[most:])))
    table.add_section()
    table.add_row("all", "", "", "", gib(sum(e.bytes for e in rows)))
    console.print(table)


def legend(console: Console, p: Plan) -> None:
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
    console.print(Text("  ".join(f"{name}={value:,}" for name, value in symbols if value is not None), "dim"))


def notes(console: Console, lines: Sequence[str]) -> None:
    if not lines:
        return
    grid = Table.grid(padding=(0, 1))
    for line in lines:
        grid.add_row("-", Text(line))
    console.print(grid)


def verdict(console: Console, p: Plan, strategy: str) -> None:
    fits(console, p.seq_len, strategy, p.peak_bytes, p.budget_bytes, p.fits)
    cut = [chunks(p)] if p.in_chunks else []
    more = [f"step >= {format_seconds(p.step_seconds)}"] + (
        [f"host memory {format_gib(p.host_bytes)}"] if p.host_bytes else []
    )
    console.print(Text(", ".join([*cut, *more]), "dim"))


def fits(console: Console, seq_len: int, strategy: str, peak: int, budget: int, does: bool) -> None:
    """Does it fit, and by how much?"""
    word = ("fits", "bold green") if does else ("does not fit", "bold red")
    room = f"{format_gib(abs(budget - peak))} {'to spare' if budget >= peak else 'too much'}"
    if budget >= peak and not does:
        room += " in all, but the allocator, or host memory, has no room for it"
    console.print(
        Text.assemble(
            f"{format_tokens(seq_len)} tokens with {strategy}: ",
            word,
            f".  Peak {format_gib(peak)} of {format_gib(budget)}, {room}.",
        )
    )


def instants(console: Console, p: Plan, found: Sequence[InstantPeak]) -> None:
    table = new_table(("instant", "left"), ("largest at", "left"), ("GiB", "right"), ("", "left"))
    for i in found:
        table.add_row(
            i.name,
            i.operation,
            gib(i.bytes),
            "<- binds" if i.name == p.instant else "",
            style="bold" if i.name == p.instant else "",
        )
    console.print(table)


def plans(console: Console, found: Mapping[str, Plan], reaches: Mapping[str, int], detailed: str) -> None:
    """A line for each strategy at one length; the one that is detailed below stands out."""
    table = new_table(
        ("strategy", "left"),
        ("", "left"),
        ("peak GiB", "right"),
        ("host GiB", "right"),
        ("step >=", "right"),
        ("up to", "right"),
    )
    for name, p in found.items():
        host = _short_gib(p.host_bytes) if p.host_bytes else "-"
        reach = format_tokens(reaches[name]) if reaches[name] else "none"
        fit = "fits" if p.fits else "does not fit"
        table.add_row(
            name,
            fit,
            _short_gib(p.peak_bytes),
            host,
            format_seconds(p.step_seconds),
            reach,
            style="bold" if name == detailed else "",
        )
    console.print(table)


def ways(console: Console, title: str, found: Sequence[Way]) -> None:
    """Changes with which it fits, cheapest first: what they bring and cost, and the options to paste."""
    if not found:
        return
    console.print(Text(title, "bold"))
    console.print(Text(f"{'longest':>9} {'host GiB':>8}  you give up", "dim"))
    for way in found:
        host = _short_gib(way.plan.host_bytes) if way.plan.host_bytes else "-"
        console.print(Text(f"{format_tokens(way.s_max):>9} {host:>8}  {way.gives_up}"))
        console.print(Text(f"    {options_of(way.plan.recipe)}", "bold"), soft_wrap=True)


def theorem(
    console: Console, c: Coefficients, rows: Sequence[Row], answers: Sequence[Answer], seq_len: int | None
) -> None:
    console.print(Text("Coefficients of the paper (arXiv 2407.15892)", "bold"))
    table = new_table(("", "left"), ("value", "right"), ("from", "left"))
    table.add_row("W_mem", format_gib(c.w_mem), _sources(c.w_from, GIB, "GiB"))
    table.add_row("I_mem", f"{c.i_mem:,} B/token", _sources(c.i_from, 1, "B"))
    table.add_row("A_mem", f"{c.a_mem:,} B/token/layer", _sources(c.a_from, 1, "B"))
    table.add_row("L, M", f"{c.layers}, {c.chunks}", "")
    table.add_row("M_max", format_gib(c.m_max), "the budget")
    console.print(table)
    memory = f"at {format_tokens(seq_len)}" if seq_len else ""
    table = new_table(
        ("formula", "left"), ("S_max", "right"), (memory, "right"), ("step model: strategy", "left"), ("S_max", "right")
    )
    for r, a in zip(rows, answers, strict=True):
        table.add_row(
            r.formula,
            format_tokens(r.s_max),
            format_gib(r.memory) if r.memory is not None else "",
            a.strategy,
            format_tokens(a.s_max),
        )
    console.print(table)


def _sources(rows: Sequence[Entry], unit: int, name: str, most: int = 6) -> str:
    if not rows:
        return "given"
    parts = [f"{e.name} {e.bytes / unit:,.2f}" if unit > 1 else f"{e.name} {e.bytes:,}" for e in rows[:most]]
    rest = sum(e.bytes for e in rows[most:])
    if rest:
        parts.append(
            f"{len(rows) - most} smaller {rest / unit:,.2f}" if unit > 1 else f"{len(rows) - most} smaller {rest:,}"
        )
    return ", ".join(parts) + f" {name}"


def shapes(console: Console, rows: Sequence[Shape], model: Model, batch: int, seq_len: int) -> None:
    quoted = any(s.quoted for s in rows)
    columns = [("tensor", "left"), ("shape", "left"), ("sizes", "left"), ("GB", "right")]
    table = new_table(*columns, *([("introduction", "right")] if quoted else []))
    for s in rows:
        cells = [s.name, s.symbols, " x ".join(f"{n:,}" for n in s.sizes), f"{s.bytes / 1e9:,.2f}"]
        table.add_row(*cells, *([s.quoted] if quoted else []))
    console.print(Text(f"{model.name}: b={batch}, s={seq_len:,}, {rows[0].dtype}; decimal GB", "bold"))
    console.print(table)
    if quoted:
        console.print(
            Text(
                "introduction: as quoted in arXiv 2407.15892, rounded there; K and V there without grouped queries",
                "dim",
            )
        )


def models(console: Console, rows: Iterable[Model]) -> None:
    table = new_table(
        ("model", "left"),
        ("params", "right"),
        ("active", "right"),
        ("layers", "right"),
        ("hidden", "right"),
        ("context", "right"),
        ("MLP", "right"),
        ("vocab", "right"),
    )
    for m in rows:
        total, active = parameter_count(m)
        table.add_row(
            m.name,
            format_count(total),
            format_count(active) if active != total else "",
            str(m.layers),
            str(m.hidden),
            str(m.context or "-"),
            str(m.mlp_width or "-"),
            str(m.vocab),
        )
    console.print(table)


def gpus(console: Console, rows: Sequence[Gpu], sources: bool, lines: Sequence[str] = ()) -> None:
    table = new_table(
        ("gpu", "left"),
        ("sold GB", "right"),
        ("torch GiB", "right"),
        ("bf16 TFLOP/s", "right"),
        ("GB/s", "right"),
        ("host link", "left"),
    )
    for g in rows:
        mark = "" if g.usable_kind == "reported" else " *"
        table.add_row(
            g.name,
            f"{g.nominal_gib:g}",
            f"{g.usable_bytes / GIB:.2f}{mark}",
            f"{g.bf16_flops / 1e12:,.1f}",
            f"{g.memory_bandwidth / 1e9:,.0f}",
            g.host_link_name,
        )
    console.print(table)
    for g in rows if sources else ():
        console.print(Text(g.name, "bold"))
        console.print(
            Padding(
                Text(
                    f"{g.label}. Memory: {g.usable_source} Rates: {g.rates_source} Context: {g.context_source}", "dim"
                ),
                (0, 0, 0, 2),
            )
        )
    console.print(
        Text(
            "torch GiB: what torch reports as total memory; * derived, not a reported print.  --sources: where from.",
            "dim",
        )
    )
    if lines:
        notes(console, lines)
