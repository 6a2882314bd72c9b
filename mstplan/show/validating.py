"""`mstplan validate`: errors of each rung as tables, for programs those of each step, and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, log10
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from .. import files
from ..checking.validate import (
    ALLOCATED,
    RUNGS,
    ErrorRow,
    Summary,
    Validation,
    by_length,
    by_model,
    by_strategy,
    summarize,
)
from ..errors import OutputError
from ..step.recipe import strategy_label
from ..units import GIB
from . import parts, payload
from .formats.as_markdown import as_markdown
from .parts import cell
from .plot import FONT, render
from .report import Block, Cell, Column, Line, Report, Span, Table, line
from .report import Row as Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = (
    ("", lambda _row: "all"),
    ("strategy", lambda row: strategy_label(by_strategy(row))),
    ("length", by_length),
    ("model", by_model),
)


def devices(rows: Sequence[ErrorRow]) -> list[str]:
    """Where the rows were measured, most rows first."""
    names = [row.measurement.environment["card"] for row in rows]
    return sorted(dict.fromkeys(names), key=names.count, reverse=True)


def report(
    validation: Validation,
    damaged: Sequence[str],
    violations: Sequence[str],
    missing: str = "",
    files: Sequence[Path] = (),
) -> Report:
    """The errors by rung, strategy, length and model; then what is wrong, and what was not measured. missing: why a rung was not asked;
    files: what was written of it."""
    lost = f"{validation.out_of_memory} steps ran out of memory; predicted to fit: {len(validation.broken)}."
    blocks: list[Block] = [
        line("Predictions held against measurements", "strong"),
        *(block for device in devices(validation.rows) for block in _of_device(validation, device)),
        *(line(f"left out: {each}", whole=True) for each in [*damaged, *validation.left_out]),
        *([line(lost, whole=True)] if validation.out_of_memory else []),
        *([line(missing, "strong", whole=True)] if missing else []),
        *(line(each, "strong", whole=True) for each in violations),
        *parts.remarks(notes(validation)),
        *parts.written(files),
    ]
    facts = payload.document(
        "validate", "measurement", **as_data(validation, violations, damaged), not_asked=missing or None
    )
    return Report("validate", facts, blocks, _steps(validation))


def _of_device(validation: Validation, device: str) -> list[Block]:
    """Errors on one device, first all of them, then by what may make a difference."""
    rows = [row for row in validation.rows if row.measurement.environment["card"] == device]
    steps = len({id(row.measurement) for row in rows})
    title = Line((Span(f"{steps} measured steps", "strong"), Span(" on "), Span(device, "strong")))
    return [title, *(_table(rows, by) for by, _ in GROUPS)]


def _percent(share: float, sign: str = "") -> str:
    """To thousandths of a percent; what rounds to nothing has no sign."""
    return f"{share:{sign}.3%}" if round(share, 5) else "0.000%"


OTHER_KERNELS = (
    "* formula and calibrated formula count the kernels of CUDA. Here the CPU ran others (attention in fp32 or with dropout), or kept what is offloaded "
    "in the same memory: shown, and held to no bound"
)


def _rung(s: Summary) -> str:
    name = s.rung if s.held else f"{s.rung}*"
    return name if s.what == ALLOCATED else f"{name}, {s.what}"


def _table(rows: Sequence[ErrorRow], by: str) -> Table:
    """The errors of each rung, in groups by `by`; "": of all rows, and then also of what else than allocated bytes is predicted."""
    summaries = summarize(rows, dict(GROUPS)[by])
    shown = sorted((s for s in summaries if s.what == ALLOCATED or not by), key=_order)
    columns = (
        Column("group", by or None),
        Column("rung", "rung"),
        Column("n", "steps", right=True),
        Column("mean", "mean", right=True),
        Column("median", "median", right=True),
        Column("worst", "worst", right=True),
        Column("worst_instant", "instant", right=True),
        Column("at", None if by else "worst at", folded=True),
    )
    cells = (
        (cell(s.group), Cell(s.rung, _rung(s)), cell(s.n), *_figures(s), cell(None if by else _at(rows, s)))
        for s in shown
    )
    return Table(f"errors_by_{by}" if by else "errors", columns, tuple(map(Shown, cells)))


def _figures(s: Summary) -> tuple[Cell, ...]:
    return (
        Cell(s.mean, _percent(s.mean)),
        Cell(s.median, _percent(s.median)),
        Cell(s.worst, _percent(s.worst, "+")),
        Cell(s.worst_instant, _instant(s)),
    )


def _at(rows: Sequence[ErrorRow], s: Summary) -> str:
    """The step whose error is the worst of all rows of a summary."""
    members = (r for r in rows if (r.rung, r.what, r.held) == (s.rung, s.what, s.held))
    return max(members, key=lambda r: abs(r.error)).measurement.case.words


_ABOUT = ("model", "layers", "strategy", "seq_len", "card", "rung", "what", "held")


def _steps(validation: Validation) -> Table:
    """Each step that was compared, as programs read it."""
    names = [*_ABOUT, "predicted_bytes", "measured_bytes", "error"]
    rows = tuple(Shown(tuple(cell(row[name]) for name in names)) for row in map(_row, validation.rows))
    return Table("steps", tuple(Column(name, None) for name in names), rows)


def _order(s: Summary) -> tuple[int, str, str, int, bool]:
    """Lengths by size, all else by name; then the rungs, first what each is held to."""
    first = s.group.split()[0].replace(",", "")
    return int(first) if first.isdigit() else 0, s.group, s.what, RUNGS.index(s.rung), not s.held


def _instant(s: Summary) -> str:
    return _percent(s.worst_instant, "+") if s.worst_instant is not None else ""


def notes(validation: Validation) -> list[str]:
    on = devices(validation.rows)
    lines = []
    if on == ["cpu"] or not on:
        lines.append(
            "nothing here was measured on a CUDA device: attention's workspace, cuBLAS' and the allocator are from PyTorch's source."
        )
    if any(row.measurement.environment.get("sdpa") == "cudnn_attention" for row in validation.rows):
        lines.append(
            "sdpa ran cuDNN's attention; formula and trace count FlashAttention-2's (TORCH_CUDNN_SDPA_DEPRIORITIZED=1 runs that one)."
        )
    if not all(row.held for row in validation.rows):
        lines.append(f"{OTHER_KERNELS}.")
    lines.append(
        "errors are of the step's peak, and signed: + means that more was predicted than was measured. instant: the worst of any instant's peak, "
        "whether it is the step's or not."
    )
    return lines


def _row(r: ErrorRow) -> dict[str, Any]:
    m = r.measurement
    return {
        "model": m.case.model,
        "layers": m.case.layers,
        "strategy": m.case.strategy,
        "seq_len": m.case.seq_len,
        "card": m.environment["card"],
        "recipe": m.case.recipe.model_dump(),
        "rung": r.rung,
        "what": r.what,
        "held": r.held,
        "predicted_bytes": r.predicted,
        "measured_bytes": r.measured,
        "error": r.error,
        "instants": [
            {"name": name, "predicted": predicted, "measured": measured} for name, predicted, measured in r.instants
        ],
    }


def as_data(validation: Validation, violations: Sequence[str], damaged: Sequence[str]) -> dict[str, Any]:
    def summary(s: Summary, by: str) -> dict[str, Any]:
        return {"by": by or "all", **s._asdict()}

    return {
        "rows": [_row(r) for r in validation.rows],
        "summaries": [summary(s, title) for title, group in GROUPS for s in summarize(validation.rows, group)],
        "out_of_memory": validation.out_of_memory,
        "fit_predicted_but_ran_out": [{"case": b.measurement.case.words, "rung": b.rung} for b in validation.broken],
        "left_out": [*damaged, *validation.left_out],
        "beyond_bounds": list(violations),
        "notes": notes(validation),
    }


# ---- the documentation's table ------------------------------------------------------------------------------------------


def markdown(validation: Validation) -> str:
    """What README shows of the archive: of each device the first table of the report, and what its asterisks mean."""
    lines: list[str] = []
    for device in devices(validation.rows):
        rows = [row for row in validation.rows if row.measurement.environment["card"] == device]
        lines += [f"Measured on {device}:", "", as_markdown(_table(rows, "")), ""]
    if not all(row.held for row in validation.rows):
        lines += [fill(f"\\{OTHER_KERNELS}.", 120), ""]
    return "\n".join(lines)


# ---- the plot -----------------------------------------------------------------------------------------------------------


def plot(validation: Validation, path: Path) -> None:
    """Predicted against measured, and the error of each. All of the file is written, or nothing. Raises OutputError."""
    rows = [row for row in validation.rows if row.what == ALLOCATED]
    if not rows:
        raise OutputError("no measured step to draw.")
    title = f"Predicted and measured peaks of {len({id(row.measurement) for row in rows})} training steps on {', '.join(devices(rows))}"
    with files.refusing(path):
        data = render(path.suffix.lower()[1:], title, lambda figure: _draw(figure, rows, title))
    files.write(path, data)


def _draw(figure: Figure, rows: Sequence[ErrorRow], title: str) -> None:
    figure.suptitle(title, fontsize=FONT, x=0.02, ha="left")
    figure.subplots_adjust(left=0.12, right=0.97, top=0.93, bottom=0.08, hspace=0.3)
    upper, lower = figure.subplots(2, 1)
    _against(upper, rows)
    _errors(lower, rows)


COLOURS = {"formula": "#0072b2", "calibrated": "#009e73", "trace": "#d55e00"}
MARKS = {"formula": "s", "calibrated": "D", "trace": "o"}
Place = Callable[[ErrorRow], tuple[float, float]]


def _marks(axes: Axes, rows: Sequence[ErrorRow], place: Place) -> None:
    """A mark for each row; grey ones for what the rung is held to no bound for."""
    for rung, held in dict.fromkeys(
        (row.rung, row.held) for row in sorted(rows, key=lambda row: (row.held, RUNGS.index(row.rung)))
    ):
        points = [place(row) for row in rows if (row.rung, row.held) == (rung, held)]
        colour, label = (COLOURS[rung], rung) if held else ("#9a9a9a", f"{rung}, other kernels")
        axes.plot(*zip(*points, strict=True), MARKS[rung], color=colour, label=label, markersize=5, fillstyle="none")


def _against(axes: Axes, rows: Sequence[ErrorRow]) -> None:
    _marks(axes, rows, lambda row: (row.measured / GIB, row.predicted / GIB))
    ends = [
        min(min(r.measured, r.predicted) for r in rows) / GIB * 0.9,
        max(max(r.measured, r.predicted) for r in rows) / GIB * 1.1,
    ]
    axes.plot(ends, ends, color="black", linewidth=0.7, zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="measured peak, GiB allocated", ylabel="predicted, GiB")
    _plain(axes, axes.xaxis, axes.yaxis)
    axes.legend(frameon=False)


def _plain(axes: Axes, *scales: Any) -> None:
    """Numbers in full on logarithmic axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for scale in scales:
        scale.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        scale.set_major_formatter(FuncFormatter(lambda value, _at: f"{value:,g}"))
        scale.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)


def _errors(axes: Axes, rows: Sequence[ErrorRow]) -> None:
    """In percent, to scale up to a thousandth, by magnitude beyond: errors from nothing to tens of percent stand in one picture."""
    _marks(axes, rows, lambda row: (row.measurement.case.seq_len, 100 * row.error))
    axes.axhline(0, color="black", linewidth=0.7, zorder=0)
    widest = 2 * max(0.01, *(100 * abs(row.error) for row in rows))
    ticks = [10.0**n for n in range(-3, ceil(log10(widest)) + 1)]
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set(xscale="log", xlabel="tokens", ylabel="predicted less measured, %", ylim=(-widest, widest))
    axes.set_yticks([*(-tick for tick in reversed(ticks)), 0, *ticks], minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _at: f"{value:+g}" if value else "0")
    _plain(axes, axes.xaxis)
    axes.set_ylim(-widest, widest)
