"""`mstplan validate`: errors of each rung as tables, JSON, a plot, and the table that the documentation shows.

mstplan validate --markdown           what README shows of the archive
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, log10
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

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
from ..units import GIB
from . import tables
from .plot import FONT, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = (("", lambda _row: "all"), ("strategy", by_strategy), ("length", by_length), ("model", by_model))


def devices(rows: Sequence[ErrorRow]) -> list[str]:
    """Where the rows were measured, most rows first."""
    names = [row.measurement.environment["card"] for row in rows]
    return sorted(dict.fromkeys(names), key=names.count, reverse=True)


def report(console: Console, found: Validation, damaged: Sequence[str], said: Sequence[str]) -> None:
    """The errors by rung, strategy, length and model; then what is wrong, and what was not measured."""
    for device in devices(found.rows):
        rows = [row for row in found.rows if row.measurement.environment["card"] == device]
        steps = len({id(row.measurement) for row in rows})
        console.print(Text.assemble((f"{steps} measured steps", "bold"), " on ", (device, "bold")))
        console.print(_table(rows))
    for line in [*damaged, *found.left_out]:
        console.print(f"left out: {line}", soft_wrap=True)
    if found.out_of_memory:
        console.print(
            f"{found.out_of_memory} steps ran out of memory; predicted to fit: {len(found.broken)}.", soft_wrap=True
        )
    for line in said:
        console.print(Text(line, "bold"), soft_wrap=True)
    console.print()
    tables.notes(console, notes(found))


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


def _table(rows: Sequence[ErrorRow]) -> Any:
    table = tables.new_table(
        ("", "left"),
        ("rung", "left"),
        ("n", "right"),
        ("mean", "right"),
        ("median", "right"),
        ("worst", "right"),
        ("instant", "right"),
    )
    for title, group in GROUPS:
        shown = [s for s in summarize(rows, group) if s.what == ALLOCATED or not title]
        for n, s in enumerate(sorted(shown, key=_order)):
            if n == 0 and title:
                table.add_section()
            table.add_row(
                s.group, _rung(s), str(s.n), _percent(s.mean), _percent(s.median), _percent(s.worst, "+"), _instant(s)
            )
    return table


def _order(s: Summary) -> tuple[int, str, str, int, bool]:
    """Lengths by size, all else by name; then the rungs, first what each is held to."""
    first = s.group.split()[0].replace(",", "")
    return int(first) if first.isdigit() else 0, s.group, s.what, RUNGS.index(s.rung), not s.held


def _instant(s: Summary) -> str:
    return _percent(s.worst_instant, "+") if s.worst_instant is not None else ""


def notes(found: Validation) -> list[str]:
    on = devices(found.rows)
    lines = []
    if on == ["cpu"] or not on:
        lines.append(
            "nothing here was measured on a CUDA device: attention's workspace, cuBLAS' and the allocator are from PyTorch's source."
        )
    if any(row.measurement.environment.get("sdpa") == "cudnn_attention" for row in found.rows):
        lines.append(
            "sdpa ran cuDNN's attention; formula and trace count FlashAttention-2's (TORCH_CUDNN_SDPA_DEPRIORITIZED=1 runs that one)."
        )
    if not all(row.held for row in found.rows):
        lines.append(f"{OTHER_KERNELS}.")
    lines.append(
        "errors are of the step's peak, and signed: + means that more was predicted than was measured. instant: the worst of any instant's peak, "
        "whether it is the step's or not."
    )
    return lines


def as_data(found: Validation, said: Sequence[str], damaged: Sequence[str]) -> dict[str, Any]:
    def row(r: ErrorRow) -> dict[str, Any]:
        m = r.measurement
        instants = [{"name": name, "predicted": told, "measured": seen} for name, told, seen in r.instants]
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
            "instants": instants,
        }

    def summary(s: Summary, by: str) -> dict[str, Any]:
        return {"by": by or "all", **s._asdict()}

    return {
        "rows": [row(r) for r in found.rows],
        "summaries": [summary(s, title) for title, group in GROUPS for s in summarize(found.rows, group)],
        "out_of_memory": found.out_of_memory,
        "fit_predicted_but_ran_out": [{"case": b.measurement.case.words, "rung": b.rung} for b in found.broken],
        "left_out": [*damaged, *found.left_out],
        "beyond_bounds": list(said),
        "notes": notes(found),
    }


# ---- the documentation's table ------------------------------------------------------------------------------------------


def markdown(found: Validation) -> str:
    """The errors by device, rung and strategy."""
    lines = [
        "| measured on | rung | steps | mean error | median | worst | at | any instant |",
        "|---|---|---:|---:|---:|---:|---|---:|",
    ]
    for device in devices(found.rows):
        rows = [row for row in found.rows if row.measurement.environment["card"] == device]
        for s in sorted(summarize(rows), key=_order):
            worst = max(
                (r for r in rows if (r.rung, r.what, r.held) == (s.rung, s.what, s.held)), key=lambda r: abs(r.error)
            )
            errors = f"{_percent(s.mean)} | {_percent(s.median)} | {_percent(s.worst, '+')}"
            lines.append(
                f"| {device} | {_rung(s)} | {s.n} | {errors} | {worst.measurement.case.words} | {_instant(s)} |"
            )
    if not all(row.held for row in found.rows):
        lines += ["", *wrap(f"\\{OTHER_KERNELS}.", 118)]
    return "\n".join(lines) + "\n"


# ---- the plot -----------------------------------------------------------------------------------------------------------


def plot(found: Validation, path: Path) -> None:
    """Predicted against measured, and the error of each. All of the file is written, or nothing. Raises OutputError."""
    rows = [row for row in found.rows if row.what == ALLOCATED]
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
