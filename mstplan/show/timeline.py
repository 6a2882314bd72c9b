"""The memory of one training step over its course, stacked by what it is for.

Time is counted in operations: the trace knows their order, not how long they take. matplotlib is imported only when it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from .. import files
from ..errors import OutputError
from ..step.instants import Instant
from ..tracing.recording import Category
from ..tracing.trace import Trace
from ..units import GIB, format_gib, format_tokens
from .plot import card_name, no_picture, render, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..tracing.findings import View

SUFFIXES = (".png", ".svg", ".pdf")
MOST_POINTS = 1500
"""More would not be seen. Of the events between two points the largest is drawn, so no peak is lost."""
COLORS = {
    Category.WEIGHTS: "#999999",
    Category.STATES: "#cccccc",
    Category.GRADIENTS: "#0072B2",
    Category.INPUTS: "#56B4E9",
    Category.ATTENTION: "#E69F00",
    Category.MLP: "#009E73",
    Category.NORMS: "#F0E442",
    Category.LOSS: "#D55E00",
    Category.WORKSPACE: "#CC79A7",
    Category.OTHER: "#000000",
}


def check_output(path: Path) -> None:
    """Raises OutputError when the name does not say what picture to draw."""
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"{no_picture(path, 'draw')}\nEnd the name in {', '.join(SUFFIXES)}.")


def write(view: View, path: Path) -> None:
    """Draw the trace's timeline. All of the file is written, or nothing. Raises OutputError."""
    title = f"{short_name(view.model.name)}, {view.strategy}, {format_tokens(view.trace.seq_len)} tokens on {card_name(view.card)}: one training step"
    with files.refusing(path):
        data = render(path.suffix.lower()[1:], title, lambda figure: _draw(figure, view, title))
    files.write(path, data)


def stacks(trace: Trace) -> dict[Category, list[int]]:
    """Bytes on the device after each event, by category; together `trace.live`."""
    now = dict.fromkeys(Category, 0)
    for group in trace.resident:
        now[group.category] += group.bytes
    found: dict[Category, list[int]] = {category: [] for category in Category}
    for index, sign in trace.step.events:
        made = trace.step.made[index]
        now[made.category] += 0 if made.host else sign * trace.rounded(made.bytes)
        for category, sizes in found.items():
            sizes.append(now[category])
    return found


def drawn(live: Sequence[int], most: int = MOST_POINTS) -> list[int]:
    """Which events to draw: all, or of each stretch of equal length the largest."""
    if len(live) <= most:
        return list(range(len(live)))
    edges = [len(live) * n // most for n in range(most + 1)]
    return [max(range(start, end), key=live.__getitem__) for start, end in pairwise(edges)]


def _draw(figure: Figure, view: View, title: str) -> None:
    trace = view.trace
    axes = figure.add_axes((0.075, 0.2, 0.905, 0.7))
    figure.text(0.015, 0.965, title, fontsize=12, weight="bold", va="top")
    found, at = stacks(trace), drawn(trace.live)
    shown = [category for category in Category if any(found[category])]
    axes.stackplot(
        at,
        [[found[c][e] / GIB for e in at] for c in shown],
        colors=[COLORS[c] for c in shown],
        labels=shown,
        linewidth=0,
    )
    axes.set_xlim(0, len(trace.live))
    budget = view.card.budget_bytes / GIB
    top = 1.12 * max(trace.peak.bytes / GIB, budget if budget <= 1.5 * trace.peak.bytes / GIB else 0)
    axes.set_ylim(0, top)
    words, left = f"budget {format_gib(view.card.budget_bytes)}", 0.005 * len(trace.live)
    if budget <= top:
        axes.axhline(budget, color="black", linewidth=1.2)
        axes.text(left, budget, words, va="bottom")
    elif not view.card.unlimited:
        axes.text(left, top, f"{words}: above what is drawn", va="top")
    _peak(axes, view)
    _parts(axes, trace)
    axes.set_ylabel("GiB on the card")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="lower center", ncols=5, frameon=False, bbox_to_anchor=(0.53, 0.01)
    )


def _peak(axes: Axes, view: View) -> None:
    peak, count = view.trace.peak, len(view.trace.live)
    left = peak.event > 0.6 * count
    axes.plot([peak.event], [peak.bytes / GIB], marker="v", color="black", markersize=6, clip_on=False)
    axes.annotate(
        f"{peak.instant}: {format_gib(peak.bytes)}",
        (peak.event, peak.bytes / GIB),
        xytext=(-9 if left else 9, 0),
        textcoords="offset points",
        va="center",
        ha="right" if left else "left",
        weight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
    )


PARTS = {
    Instant.END_OF_FORWARD: "forward",
    Instant.LOSS: "loss",
    Instant.LOSS_BACKWARD: "loss",
    Instant.OPTIMIZER: "optimizer",
}


def parts(trace: Trace) -> list[tuple[str, int, int]]:
    """(name, first event, event after the last) of the step's parts: forward, loss, backward, optimizer."""
    found: list[tuple[str, int, int]] = []
    for place, span in trace.step.blocks():
        name = PARTS.get(trace.instant_of(place), "backward")
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1], span.stop)
        elif span:
            found.append((name, span.start, span.stop))
    return found


def _parts(axes: Axes, trace: Trace) -> None:
    """Below the axis the parts of the step, over their events."""
    axes.set_xticks([])
    below = -0.02 * axes.get_ylim()[1]
    for n, (name, start, end) in enumerate(parts(trace)):
        if n:
            axes.axvline(start, color="black", linewidth=0.6, linestyle=(0, (2, 2)))
        at_edge = (
            end == len(trace.live) and end - start < 0.1 * end
        )  # a name as wide as its part must not leave the picture
        axes.text(end if at_edge else (start + end) / 2, below, name, ha="right" if at_edge else "center", va="top")
    axes.set_xlabel("the step's allocations and releases, in order", labelpad=20)
