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
from ..step.recipe import strategy_label
from ..tracing.cache import PACKAGES
from ..tracing.recording import Category
from ..tracing.trace import Trace
from ..units import GIB, format_gib, format_tokens
from .plot import HEIGHT, LINE, SMALL, WIDTH, card_name, no_picture, recipe_line, render, short_name, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..tracing.findings import TraceView

SUFFIXES = (".png", ".svg", ".pdf")
MOST_POINTS = 1500
"""More would not be seen. Of the events between two points the largest is drawn, so no peak is lost."""
STATES, TEMPORARY = "optimizer states", "optimizer's temporary"
"""Names of the two that the optimizer's memory is drawn as: what stays as it is, and what its step makes."""
COLORS: dict[str, str] = {
    Category.WEIGHTS: "#999999",
    STATES: "#d0d0d0",
    Category.GRADIENTS: "#0072B2",
    Category.INPUTS: "#56B4E9",
    Category.ATTENTION: "#E69F00",
    Category.MLP: "#009E73",
    Category.NORMS: "#F0E442",
    Category.LOSS: "#D55E00",
    TEMPORARY: "#b8a9d9",
    Category.WORKSPACE: "#CC79A7",
    Category.OTHER: "#000000",
}
"""By what is drawn, from the bottom up."""
HATCHES: dict[str, str] = {
    Category.INPUTS: "\\\\\\",
    Category.ATTENTION: "////",
    Category.LOSS: "....",
    TEMPORARY: "----",
}
"""So that in greys, too, neighbours are told apart."""


def check_output(path: Path) -> None:
    """Raises OutputError when the name does not say what picture to draw."""
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"{no_picture(path, 'draw')}\nEnd the name in {', '.join(SUFFIXES)}.")


def write(view: TraceView, path: Path) -> None:
    """Draw the trace's timeline. All of the file is written, or nothing. Raises OutputError."""
    what = f"{strategy_label(view.strategy)}, {format_tokens(view.trace.seq_len)} tokens"
    title = f"{short_name(view.model.name)}, {what} on {card_name(view.card)}: one training step"
    with files.refusing(path):
        data = render(path.suffix.lower()[1:], title, lambda figure: _draw(figure, view, title))
    files.write(path, data)


def stacks(trace: Trace) -> dict[Category, list[int]]:
    """Bytes on the device after each event, by category; together `trace.live`."""
    now = dict.fromkeys(Category, 0)
    for group in trace.resident:
        now[group.category] += group.bytes
    sizes_by_category: dict[Category, list[int]] = {category: [] for category in Category}
    for index, sign in trace.step.events:
        storage = trace.step.storages[index]
        now[storage.category] += 0 if storage.host else sign * trace.rounded(storage.bytes)
        for category, sizes in sizes_by_category.items():
            sizes.append(now[category])
    return sizes_by_category


def drawn(live: Sequence[int], most: int = MOST_POINTS) -> list[int]:
    """Which events to draw: all, or of each stretch of equal length the largest."""
    if len(live) <= most:
        return list(range(len(live)))
    edges = [len(live) * n // most for n in range(most + 1)]
    return [max(range(start, end), key=live.__getitem__) for start, end in pairwise(edges)]


def layers(trace: Trace) -> dict[str, list[int]]:
    """The stacks in the order in which they are drawn, without empty ones; together `trace.live`."""
    by_category = stacks(trace)
    states = sum(group.bytes for group in trace.resident if group.category is Category.STATES)
    sizes_by_name: dict[str, list[int]] = {category.value: sizes for category, sizes in by_category.items()}
    sizes_by_name[STATES] = [states] * len(trace.live)
    sizes_by_name[TEMPORARY] = [size - states for size in by_category[Category.STATES]]
    return {name: sizes_by_name[name] for name in COLORS if any(sizes_by_name[name])}


def footer(view: TraceView) -> str:
    """What the picture stands on."""
    from .. import __version__

    rung, _, how = view.provenance.partition(":")
    versions = ", ".join(f"{name} {view.versions[name].partition('+')[0]}" for name in PACKAGES)
    return f"{rung.capitalize()} with {versions}:{how}. mstplan {__version__}"


def _draw(figure: Figure, view: TraceView, title: str) -> None:
    recipe, foot = wrapped(figure, recipe_line(view.trace.recipe, view.strategy)), wrapped(figure, footer(view))
    below = 0.1 + LINE * len(foot)  # inches
    axes = figure.add_axes(
        (0.1, (below + 1.05) / HEIGHT, 0.88, 1 - (below + 1.05 + 0.48 + LINE * len(recipe)) / HEIGHT)
    )
    figure.text(0.1 / WIDTH, 1 - 0.1 / HEIGHT, title, fontsize=11, weight="bold", va="top")
    figure.text(0.1 / WIDTH, 1 - 0.31 / HEIGHT, "\n".join(recipe), fontsize=SMALL, va="top")
    figure.text(0.1 / WIDTH, 0.1 / HEIGHT, "\n".join(foot), fontsize=SMALL, color="0.2", va="bottom")
    _stack(axes, view.trace)
    _parts(axes, view.trace, _budget(axes, view))
    _peak(axes, view)
    axes.set_ylabel("GiB on the GPU")
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="lower left",
        ncols=-(-len(names) // 2),
        frameon=False,
        fontsize=SMALL,
        borderaxespad=0,
        borderpad=0,
        handlelength=1.8,
        columnspacing=1.3,
        bbox_to_anchor=(0.1 / WIDTH, (below + 0.06) / HEIGHT),
    )


def _stack(axes: Axes, trace: Trace) -> None:
    sizes_by_name, at = layers(trace), drawn(trace.live)
    areas = axes.stackplot(
        at,
        [[sizes[event] / GIB for event in at] for sizes in sizes_by_name.values()],
        colors=[COLORS[name] for name in sizes_by_name],
        labels=sizes_by_name,
        linewidth=0,
    )
    for name, area in zip(sizes_by_name, areas, strict=True):
        if name in HATCHES:
            area.set_hatch(HATCHES[name])
            area.set_edgecolor("0.25")


BACK = {"facecolor": "white", "edgecolor": "none", "pad": 1}
"""Behind words, so that no line runs through them."""


def _budget(axes: Axes, view: TraceView) -> float:
    """Set the axis of bytes and draw the budget on it, or say that it lies above, away from the peak. Returns the most bytes
    that are drawn, in GiB."""
    trace, budget = view.trace, view.card.budget_bytes / GIB
    peak, count = trace.peak.bytes / GIB, len(trace.live)
    top = 1.12 * max(peak, budget if budget <= 1.5 * peak else 0)
    axes.set_xlim(0, count)
    axes.set_ylim(0, top)
    words = f"budget {format_gib(view.card.budget_bytes)}"
    at_left = trace.peak.event > count / 2
    where = 0.005 * count if at_left else 0.995 * count
    aligned = "left" if at_left else "right"
    if budget <= top:
        axes.axhline(budget, color="black", linewidth=1.2)
        axes.text(where, budget + 0.01 * top, words, ha=aligned, va="bottom", bbox=BACK)
    elif not view.card.unlimited:
        axes.text(where, top, f"{words}: above what is drawn", ha=aligned, va="top", bbox=BACK)
    return top


def _peak(axes: Axes, view: TraceView) -> None:
    """Mark the peak, and say beside it how much it is and when."""
    from matplotlib.markers import CARETDOWN

    peak, count = view.trace.peak, len(view.trace.live)
    on_the_left = peak.event > 0.6 * count
    axes.plot([peak.event], [peak.bytes / GIB], marker=CARETDOWN, color="black", markersize=7, clip_on=False)
    axes.annotate(
        f"peak {format_gib(peak.bytes)}: {peak.instant}",
        (peak.event, peak.bytes / GIB),
        xytext=(-8 if on_the_left else 8, 4),
        textcoords="offset points",
        va="center",
        ha="right" if on_the_left else "left",
        weight="bold",
        bbox=BACK,
    )


PARTS = {
    Instant.END_OF_FORWARD: "forward",
    Instant.LOSS: "loss",
    Instant.LOSS_BACKWARD: "loss",
    Instant.OPTIMIZER: "optimizer",
}


def parts(trace: Trace) -> list[tuple[str, int, int]]:
    """(name, first event, event after the last) of the step's parts: forward, loss, backward, optimizer."""
    spans: list[tuple[str, int, int]] = []
    for place, span in trace.step.blocks():
        name = PARTS.get(trace.instant_of(place), "backward")
        if spans and spans[-1][0] == name:
            spans[-1] = (name, spans[-1][1], span.stop)
        elif span:
            spans.append((name, span.start, span.stop))
    return spans


def _parts(axes: Axes, trace: Trace, top: float) -> None:
    """Below the axis the parts of the step, over their events."""
    axes.set_xticks([])
    below = -0.02 * top
    for n, (name, start, end) in enumerate(parts(trace)):
        if n:
            axes.axvline(start, color="black", linewidth=0.6, linestyle=(0, (2, 2)))
        at_edge = (
            end == len(trace.live) and end - start < 0.1 * end
        )  # a name as wide as its part must not leave the picture
        axes.text(end if at_edge else (start + end) / 2, below, name, ha="right" if at_edge else "center", va="top")
    axes.set_xlabel("the step's allocations and releases, in order", labelpad=20)
