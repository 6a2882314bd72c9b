"""Memory against sequence length: the points of each strategy's curve, as a CSV file or a picture.

matplotlib is imported only when a picture is drawn, through its object interface: no display and no pyplot.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import files
from ..errors import OutputError, quoted
from ..plan import solve
from ..plan.calibration import Calibration
from ..plan.solve import Answer
from ..spec.hardware import Card
from ..spec.model import Model
from ..step.instants import Instant
from ..step.recipe import Recipe, recipe_in_words, strategy_label
from ..step.steps import Chunks
from ..step.towers import shortest_length
from ..units import GIB, format_gib, format_tokens
from .floor import Band, bands, merged
from .formats import FORMATS
from .formats.as_csv import as_csv
from .report import Cell, Column, Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf", ".csv")
SHORTEST = 1024
SCAN = 512
"""Lengths at which a change of the binding instant is looked for, however few points are asked for."""
BAR_FROM = 2000
"""Points per curve from which a progress bar is worth it."""


class Point(NamedTuple):
    seq_len: int
    bytes: int
    instant: Instant  # the binding one


@dataclass(frozen=True, slots=True)
class Curve:
    """The peak of one strategy against the length, with the same numbers of chunks everywhere."""

    strategy: str
    recipe: Recipe
    s_max: int
    chunks: Chunks
    points: tuple[Point, ...]  # by length
    calibration: Calibration | None = None

    def as_data(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            "s_max": self.s_max,
            "mlp_chunks": self.chunks.mlp,
            "loss_chunks": self.chunks.loss,
            "points": [point._asdict() for point in self.points],
        }


# ---- the file ----------------------------------------------------------------------------------------------------------


def check_output(path: Path, force: bool) -> None:
    """Raises OutputError when the file could not, or must not, be written. Writes nothing."""
    _kind(path)
    files.check_writable(path, force)


def _kind(path: Path) -> str:
    kind = path.suffix.lower()
    if kind not in SUFFIXES and not os.path.isdir(path):
        raise OutputError(f"{no_picture(path, 'write')}\nEnd the name in {', '.join(SUFFIXES)}.")
    return kind


def no_picture(path: Path, do: str) -> str:
    """Why nothing can be drawn, or written, to a file of that name."""
    form = next((each for each in FORMATS.values() if path.suffix.lower() in each.suffixes), None)
    why = f": {form.name} makes no picture" if form is not None else ""
    return f"cannot tell from {quoted(path.name)} what to {do}{why}."


def write(curves: Sequence[Curve], model: Model, card: Card, path: Path) -> None:
    """The curves as the file's suffix says. All of the file is written, or nothing. Raises OutputError."""
    kind = _kind(path)
    with files.refusing(path):  # fonts and caches are read while drawing
        data = _csv(curves, card) if kind == ".csv" else _picture(curves, model, card, kind[1:])
    files.write(path, data)


def _csv(curves: Sequence[Curve], card: Card) -> bytes:
    """RFC 4180, UTF-8."""
    return as_csv(table_of_points(curves, card), "\r\n").encode()


def table_of_points(curves: Sequence[Curve], card: Card) -> Table:
    """Every point of every curve: for programs only."""
    names = ("strategy", "seq_len", "bytes", "gib", "instant", "budget_bytes", "fits", "calibrated_from")
    budget = card.budget_bytes

    def cells(curve: Curve, point: Point) -> tuple[Cell, ...]:
        by = curve.calibration.source if curve.calibration is not None else None
        size, gib = point.bytes, f"{point.bytes / GIB:.6f}"
        return tuple(
            Cell(value, "")
            for value in (
                curve.strategy,
                point.seq_len,
                size,
                gib,
                point.instant.value,
                budget,
                point.seq_len <= curve.s_max,
                by,
            )
        )

    rows = tuple(Row(cells(curve, point)) for curve in curves for point in curve.points)
    return Table("points", tuple(Column(name, None) for name in names), rows)


# ---- the points --------------------------------------------------------------------------------------------------------


def curves(answers: Sequence[Answer], longest: int | None = None, points: int = 200) -> list[Curve]:
    """Each answer's peak at `points` lengths up to `longest`, log-spaced; and at every S_max, at the length after the
    strategy's own, and on both sides of every change of the binding instant.

    Chunk counts are those of the answer at every length; of a strategy that does not fit at all, those recommended at
    the longest length drawn. Without `longest`: a little beyond the largest S_max, and the model's context if near.
    The peak at a length is that of the batch, among those of up to so many tokens, that needs most.
    """
    if not answers:
        return []
    reached = sorted(a.s_max for a in answers if a.s_max)
    if longest is None:
        longest = _longest(reached[-1] if reached else 0, answers[0].plan.model.context)
    shortest = max(shortest_length(a.plan.model, a.plan.recipe) for a in answers)
    first = max(min(SHORTEST, max(1, longest // 4)), shortest if shortest > 2 else 1)
    if reached and reached[0] < first:
        first = 1 << (reached[0].bit_length() - 1)
    grid = _spaced(first, longest, points)
    scan = sorted({*grid, *_spaced(first, longest, SCAN)}) if points < SCAN else grid
    result = []
    with _progress(len(answers) * len(scan), points > BAR_FROM) as advance:
        for answer in answers:
            plan = answer.plan
            chunks = (
                plan.chunks if answer.s_max else solve.recommend_chunks_at(plan.model, plan.recipe, plan.card, longest)
            )
            also = {s for s in (*reached, answer.s_max + 1 if answer.s_max else 0) if first <= s <= longest}
            spots = _points(answer, chunks, {*grid, *also}, sorted({*scan, *also}), advance)
            result.append(Curve(answer.strategy, plan.recipe, answer.s_max, chunks, spots, plan.calibration))
    return result


def _longest(top: int, context: int | None) -> int:
    if top == 0:
        return max(context or 0, 2 * SHORTEST) if context else 128 * 1024
    longest = top + top // 4
    return max(longest, context) if context is not None and context <= 2 * top else longest


def _spaced(first: int, last: int, count: int) -> list[int]:
    """Lengths evenly spaced on a log scale; fewer where they would repeat."""
    ratio = log2(last / first)
    inner = (round(first * 2 ** (ratio * i / (count - 1))) for i in range(1, count - 1))
    return sorted({first, last, *(min(last, max(first, s)) for s in inner)})


def _points(
    answer: Answer, chunks: Chunks, wanted: set[int], scan: Sequence[int], advance: Callable[[], None]
) -> tuple[Point, ...]:
    plan = answer.plan
    points: dict[int, Point] = {}

    def at(seq_len: int) -> Point:
        if seq_len not in points:
            peak = solve.peak_up_to(plan.model, plan.recipe, plan.card, seq_len, chunks)
            points[seq_len] = Point(seq_len, peak.bytes, peak.instant)
        return points[seq_len]

    for seq_len in scan:
        at(seq_len)
        advance()
    wanted = set(wanted)
    open_ends = list(pairwise(scan))
    while open_ends:
        low, high = open_ends.pop()
        if at(low).instant == at(high).instant:
            continue
        middle = (low + high) // 2
        if middle == low:
            wanted |= {low, high}
        else:
            open_ends += [(low, middle), (middle, high)]
    return tuple(points[s] for s in sorted(wanted))


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[], None]]:
    """A function to call at each of `total` steps; a bar on stderr if wanted and someone is there to see it."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("memory at each length", total=total)
        yield lambda: bar.advance(task)


# ---- the picture: what it says -----------------------------------------------------------------------------------------


class Style(NamedTuple):
    color: str
    dashes: Any
    width: float
    marker: str


# Okabe and Ito's colours; dashes, widths and markers tell the lines apart without them.
STYLES = {
    "standard": Style("#000000", "-", 1.1, "o"),
    "checkpoint": Style("#0072B2", (0, (6, 2)), 1.6, "s"),
    "checkpoint-sqrt": Style("#D55E00", (0, (4, 1.5, 1, 1.5)), 1.6, "^"),
    "chunked-loss": Style("#E69F00", (0, (3, 1)), 1.9, "X"),
    "mst": Style("#009E73", "-", 2.6, "D"),
    "mst-offload": Style("#CC79A7", (0, (1.2, 1)), 2.6, "v"),
}
OTHERS = (Style("#0072B2", "-", 2.2, "o"), Style("#D55E00", (0, (8, 2, 1, 2)), 2.0, "P"))
FILLS = {
    Instant.END_OF_FORWARD: ("#ffffff", "\\\\\\\\"),
    Instant.LOSS: ("#fdf3b4", "...."),
    Instant.LOSS_BACKWARD: ("#ffd9a8", "////"),
    Instant.LAST_LAYER: ("#cfe6f7", "||||"),
    Instant.MIDDLE_LAYER: ("#e8e8e8", "++++"),
    Instant.FIRST_LAYER: ("#c5e8dc", "xxxx"),
    Instant.EMBEDDING: ("#f3d9e6", "oo"),
    Instant.OPTIMIZER: ("#d4d4d4", "---"),
}
"""The fill and hatch of each instant, where it peaks."""
TINTS = ("0.78", "0.85", "0.90", "0.94")
"""Greys of the bands below the curves, from the bottom up."""


def _style(name: str, index: int) -> Style:
    return STYLES.get(name) or OTHERS[index % len(OTHERS)]


def card_name(card: Card) -> str:
    if card.unlimited:
        return card.label
    return card.gpu.name if card.named else f"{format_gib(card.total_bytes, 0)} GPU"


def recipe_line(recipe: Recipe, strategy: str) -> str:
    """How one trains; of a recipe that has no strategy's name, what a strategy would decide, too."""
    parts = [recipe_in_words(recipe)]
    parts += ["weights in CPU RAM"] if recipe.weights_on_host else []
    if strategy not in STYLES:
        every = recipe.checkpoint if isinstance(recipe.checkpoint, str) else f"every {recipe.checkpoint} layers"
        parts += [f"checkpoint {every}", f"{recipe.loss} loss"]
        parts += ["MLP chunks recomputed"] if recipe.mlp_recompute else []
        parts += ["layer inputs in CPU RAM"] if recipe.offload_layer_inputs else []
    return ", ".join(parts)


def _recipe_line(curves: Sequence[Curve]) -> str:
    """What all strategies share; of a single recipe all of it."""
    return recipe_line(curves[0].recipe, curves[0].strategy if len(curves) == 1 else next(iter(STYLES)))


def _notes(curves: Sequence[Curve], card: Card, top: float) -> list[str]:
    """The lines below the picture. `top`: the most bytes that are drawn."""
    from .. import __version__
    from ..plan.findings import provenance

    lines = []
    none = [c for c in curves if not c.s_max]
    if none:
        least, where = min(c.points[0].bytes for c in none), format_tokens(none[0].points[0].seq_len)
        who = (
            "No strategy fits"
            if len(none) == len(curves) > 1
            else f"Does not fit: {', '.join(strategy_label(c.strategy) for c in none)}"
        )
        over = format_gib(least - card.budget_bytes)
        lines.append(f"{who}. Even {where} tokens need {format_gib(least)}, {over} more than the budget.")
        hidden = [strategy_label(c.strategy) for c in none if c.points[0].bytes > top]
        lines += [f"Above what is drawn: {', '.join(hidden)}."] if hidden else []
    beyond = [
        f"{strategy_label(c.strategy)} {format_tokens(c.s_max)}" for c in curves if c.s_max > c.points[-1].seq_len
    ]
    if beyond:
        lines.append(f"S_max beyond the lengths drawn: {', '.join(beyond)}.")
    for cut, when in (([c for c in curves if c.s_max], "S_max"), (none, "the longest")):
        counts = "; ".join(
            f"{strategy_label(c.strategy)} {c.chunks.mlp}, {c.chunks.loss}" for c in cut if max(c.chunks) > 1
        )
        chosen = any("auto" in (c.recipe.mlp_chunks, c.recipe.loss_chunks) for c in cut)
        why = f", as recommended at {when}" if chosen else ""
        lines += [f"Chunks (MLP, loss) at every length{why}: {counts}."] if counts else []
    stands_on = provenance([curve.calibration for curve in curves])
    return [*lines, f"{stands_on[0].upper()}{stands_on[1:]}. mstplan {__version__}"]


# ---- the picture: where it goes ----------------------------------------------------------------------------------------

WIDTH, HEIGHT, DPI, FONT = 7.0, 6.0, 200, 8.5  # inches, inches, dots per inch, points
LEFT, RIGHT, LINE = 1.62, 0.2, 0.145  # inches: margins, a line of small text
SMALL = 8.0


def _picture(curves: Sequence[Curve], model: Model, card: Card, kind: str) -> bytes:
    title = f"{short_name(model.name)} on {card_name(card)}: memory of a training step"
    return render(kind, title, lambda figure: _draw(figure, curves, model, card, title))


def render(kind: str, title: str, draw: Callable[[Figure], None]) -> bytes:
    """A picture of a kind (png, svg, pdf), drawn on a figure of WIDTH x HEIGHT inches. The same input gives the same bytes."""
    import warnings

    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .. import __version__

    maker = f"mstplan {__version__}"
    # Nothing in the file may depend on the day or on the user's own matplotlib settings.
    metadata: dict[str, dict[str, str | None]] = {
        "png": {"Software": maker, "Title": title},
        "svg": {"Date": None, "Creator": maker, "Title": title},
        "pdf": {"CreationDate": None, "Creator": maker, "Producer": maker, "Title": title},
    }
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a model's name may be in any script
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": FONT,
                "axes.linewidth": 0.7,
                "hatch.linewidth": 0.45,
                "text.parse_math": False,
                "svg.hashsalt": "mstplan",
                "pdf.fonttype": 42,
            }
        )
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=100, facecolor="white")
        FigureCanvasAgg(figure)
        draw(figure)
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=DPI, metadata=metadata[kind])
    return out.getvalue()


def short_name(name: str, most: int = 48) -> str:
    return name if len(name) <= most else name[: most - 3] + "..."


def _draw(figure: Figure, curves: Sequence[Curve], model: Model, card: Card, title: str) -> None:
    left, width = LEFT / WIDTH, (WIDTH - LEFT - RIGHT) / WIDTH
    top = _top(curves, card)
    shown = _visible_instants(curves)
    lines = [part for note in _notes(curves, card, top) for part in wrapped(figure, note)]
    recipe = wrapped(figure, _recipe_line(curves))

    def up(inches: float) -> float:
        return inches / HEIGHT

    y = 0.1
    for line in reversed(lines):
        figure.text(0.1 / WIDTH, up(y), line, fontsize=SMALL, color="0.2", va="bottom")
        y += LINE
    y += 0.06
    _legend(figure, shown, up(y))
    y += 0.24 + 0.19 * -(-len(shown) // 3)
    y += 0.34  # the x axis: its label and ticks
    bars = figure.add_axes((left, up(y), width, up(0.19 * len(curves) + 0.06)))
    y += 0.19 * len(curves) + 0.06 + 0.09
    memory = figure.add_axes((left, up(y), width, 1 - up(y + 0.38 + LINE * len(recipe))), sharex=bars)
    figure.text(0.1 / WIDTH, 1 - up(0.1), title, fontsize=11, fontweight="bold", va="top")
    figure.text(0.1 / WIDTH, 1 - up(0.31), "\n".join(recipe), fontsize=SMALL, va="top")

    _axis_of_lengths(bars, curves)
    _instants(bars, curves)
    memory.set_ylim(0, top / GIB)
    memory.set_ylabel("memory of the step, GiB")
    memory.tick_params(axis="x", which="both", labelbottom=False)
    memory.grid(axis="both", color="0.88", linewidth=0.6)
    memory.set_axisbelow(True)
    _memory(memory, curves, model, card)


def _top(curves: Sequence[Curve], card: Card) -> float:
    """Bytes at the upper end of the axis: a little above the card, or above what needs least if nothing fits."""
    least = 0 if any(c.s_max for c in curves) else min(c.points[0].bytes for c in curves)
    return 1.3 * max(card.budget_bytes, least)


def wrapped(figure: Figure, text: str) -> list[str]:
    """Lines of small text no wider than the figure."""
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    room = (WIDTH - 0.2) * figure.dpi

    def fits(line: str) -> bool:
        return bool(Text(0, 0, line, fontsize=SMALL, figure=figure).get_window_extent(renderer).width <= room)

    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and not fits(longer):
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _segments(curve: Curve) -> Iterator[tuple[int, int, Instant, bool]]:
    """(from, to, instant, fits) along the curve, in one piece while neither changes."""
    start = curve.points[0]
    for before, point in pairwise(curve.points):
        if point.instant != before.instant or (before.seq_len <= curve.s_max) != (point.seq_len <= curve.s_max):
            yield start.seq_len, point.seq_len, start.instant, start.seq_len <= curve.s_max
            start = point
    yield start.seq_len, curve.points[-1].seq_len, start.instant, start.seq_len <= curve.s_max


def _visible_instants(curves: Iterable[Curve]) -> list[Instant]:
    names = {point.instant for curve in curves for point in curve.points}
    return [name for name in Instant if name in names]


def _legend(figure: Figure, shown: Sequence[Instant], y: float) -> None:
    from matplotlib.patches import Patch

    keys = [Patch(facecolor=FILLS[n][0], hatch=FILLS[n][1], edgecolor="0.25", linewidth=0.6, label=n) for n in shown]
    legend = figure.legend(
        handles=keys,
        loc="lower left",
        bbox_to_anchor=(0.1 / WIDTH, y),
        ncols=min(3, len(keys)),
        fontsize=SMALL,
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=3.2,
        handleheight=1.3,
        labelspacing=0.35,
        columnspacing=1.6,
        title="Strips: the instant of the step at which memory peaks. Number: S_max; faded: lengths beyond it",
        title_fontsize=SMALL,
        alignment="left",
    )
    legend.get_title().set_fontstyle("italic")


def _axis_of_lengths(axes: Axes, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter

    first, last = curves[0].points[0].seq_len, curves[0].points[-1].seq_len
    axes.set_xscale("log", base=2)
    axes.set_xlim(*((first, last) if first < last else (first / 2, last * 2)))
    octaves = [1 << n for n in range(41) if first <= 1 << n <= last]
    every = 1 if len(octaves) <= 6 else 2 if len(octaves) <= 15 else 4
    ticks = [n for n in octaves if (n.bit_length() - 1) % every == 0] or octaves
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([_binary(n) for n in ticks]))
    axes.xaxis.set_minor_locator(FixedLocator([n for n in octaves if n not in ticks]))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("sequence length, tokens (k = 1,024)", labelpad=2)


def _binary(n: int) -> str:
    for unit, name in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "k")):
        if n >= unit:
            return f"{n // unit}{name}"
    return str(n)


def _instants(axes: Axes, curves: Sequence[Curve]) -> None:
    """One bar per strategy, split by the instant that peaks."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation, blended_transform_factory

    axes.set_ylim(len(curves) - 0.35, -0.65)
    axes.set_yticks([])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    names = blended_transform_factory(axes.transAxes, axes.transData)
    for row, curve in enumerate(curves):
        for start, end, instant, fits in _segments(curve):
            fill, hatch = FILLS[instant]
            axes.barh(
                row,
                end - start,
                left=start,
                height=0.74,
                color=fill,
                hatch=hatch,
                edgecolor="0.25",
                linewidth=0.6,
                alpha=None if fits else 0.35,
            )
        style = _style(curve.strategy, row)
        if curve.points[0].seq_len <= curve.s_max <= curve.points[-1].seq_len:
            axes.plot(
                [curve.s_max] * 2,
                [row - 0.48, row + 0.48],
                color="black",
                linewidth=2,
                solid_capstyle="butt",
                clip_on=False,
                zorder=5,
            )
            _say_s_max(axes, curve.s_max, row)
        inches = axes.figure.dpi_scale_trans  # type: ignore[union-attr]
        axes.text(
            0,
            row,
            strategy_label(curve.strategy),
            transform=names + ScaledTranslation(-0.5, 0, inches),
            ha="right",
            va="center_baseline",
            fontsize=SMALL,
        )
        sample = Line2D(
            [0, 1], [row, row], color=style.color, linestyle=style.dashes, linewidth=style.width, clip_on=False
        )
        width = 0.36 * WIDTH / (WIDTH - LEFT - RIGHT) / WIDTH  # inches as a share of the axes
        sample.set_xdata([0, width])
        sample.set_transform(names + ScaledTranslation(-0.43, 0, inches))
        axes.add_artist(sample)


def _say_s_max(axes: Axes, s_max: int, row: int) -> None:
    """Write the length beside the black tick of its strip: beyond it, or before it where the strip ends."""
    first, last = axes.get_xlim()
    near_the_end = s_max / first > (last / first) ** 0.9  # of an axis that is logarithmic
    axes.annotate(
        format_tokens(s_max),
        (s_max, row),
        xytext=(-5 if near_the_end else 5, 0),
        textcoords="offset points",
        ha="right" if near_the_end else "left",
        va="center_baseline",
        fontsize=SMALL,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.9},
        zorder=6,
    )


def _memory(axes: Axes, curves: Sequence[Curve], model: Model, card: Card) -> None:
    budget = card.budget_bytes / GIB
    top = axes.get_ylim()[1]
    first, last = axes.get_xlim()
    axes.axhspan(budget, top, color="0.955", zorder=0, linewidth=0)
    axes.axhline(budget, color="black", linewidth=1.3, zorder=2.5)
    floor = _shaded(axes, bands(curves, model, card))
    order = sorted(range(len(curves)), key=lambda i: -_style(curves[i].strategy, i).width)
    for i in order:  # thin lines over thick ones
        style = _style(curves[i].strategy, i)
        points = list(_up_to(curves[i].points, 1.5 * top * GIB))
        axes.plot(
            [p.seq_len for p in points],
            [p.bytes / GIB for p in points],
            color=style.color,
            linestyle=style.dashes,
            linewidth=style.width,
            zorder=3,
        )
    for i, curve in enumerate(curves):
        if first <= curve.s_max <= last:
            style = _style(curve.strategy, i)
            axes.plot([curve.s_max] * 2, [0, budget], color="0.45", linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=2)
            axes.plot(
                [curve.s_max],
                [budget],
                marker=style.marker,
                markersize=6.5,
                color=style.color,
                markeredgecolor="white",
                markeredgewidth=0.8,
                zorder=6,
                clip_on=False,
                linestyle="none",
            )
    if model.context is not None and first < model.context < last:
        axes.axvline(model.context, color="0.45", linewidth=0.8, linestyle=(0, (5, 3)), zorder=2)
    budget_label = f"{card_name(card)}: budget {format_gib(card.budget_bytes)}"
    taken = _label_lines(axes, curves, budget, budget_label, model.context)
    _label_bands(axes, curves, floor, taken, budget)


class Shaded(NamedTuple):
    """A band as it is drawn: between two levels, in GiB, in a grey."""

    band: Band
    low: float
    high: float
    tint: str


def _shaded(axes: Axes, bands: Sequence[Band]) -> list[Shaded]:
    """Shade the bands one above the other: thin ones together, and nothing where even all together have no room for a label."""
    per_pixel = axes.get_ylim()[1] * GIB / axes.get_window_extent().height
    least = per_pixel * (_size(axes, "W")[1] + 3)
    low, result = 0.0, []
    for n, band in enumerate(band for band in merged(bands, least) if band.bytes >= least):
        shaded = Shaded(band, low, low + band.bytes / GIB, TINTS[min(n, len(TINTS) - 1)])
        axes.axhspan(shaded.low, shaded.high, color=shaded.tint, zorder=0.6, linewidth=0)
        axes.axhline(shaded.high, color="0.55", linewidth=0.6, zorder=0.7)
        result.append(shaded)
        low = shaded.high
    return result


def _up_to(points: Iterable[Point], most: float) -> Iterator[Point]:
    """The points up to the first beyond `most` bytes: the rest cannot be seen."""
    for point in points:
        yield point
        if point.bytes > most:
            return


# ---- labels that do not overlap ------------------------------------------------------------------------------------------


Box = tuple[float, float, float, float]  # left, bottom, right, top; in pixels


def _label_lines(axes: Axes, curves: Sequence[Curve], budget: float, on_budget: str, context: int | None) -> list[Box]:
    """Label the budget's line above or below it, and the model's context at the foot of its line, where no curve runs.
    Returns where the labels are."""
    import numpy as np

    frame, ink = axes.get_window_extent(), _ink(axes, curves)
    first, last = axes.get_xlim()
    level = axes.transData.transform((first, budget))[1]
    marks = [axes.transData.transform((c.s_max, budget)) for c in curves if first <= c.s_max <= last]

    def cost(box: Box) -> float:
        x0, y0, x1, y1 = box
        if x0 < frame.x0 + 2 or x1 > frame.x1 - 2 or y0 < frame.y0 + 2 or y1 > frame.y1 - 2:
            return 1e6
        near = (ink[:, 0] > x0 - 3) & (ink[:, 0] < x1 + 3) & (ink[:, 1] > y0 - 3) & (ink[:, 1] < y1 + 3)
        covered = sum(1 for x, y in marks if x0 - 6 < x < x1 + 6 and y0 - 6 < y < y1 + 6)
        return 500 * covered + 40 * bool(near.any()) + np.count_nonzero(near) + 300 * (y0 - 2 < level < y1 + 2)

    width, height = _size(axes, on_budget, fontweight="bold")
    choices = []
    for k in range(6):  # rows of 5 pixels above and below the line
        for y in (level + 5 + k * 5, level - 5 - k * 5 - height):
            for x in np.linspace(frame.x0 + 5, frame.x1 - 5 - width, 60):
                box = (x, y, x + width, y + height)
                choices.append((cost(box) + 5 * k + (x - frame.x0) / 40, box))
    taken = [min(choices)[1]]
    _write(axes, taken[0], on_budget, fontweight="bold")
    if context is not None and first < context < last:
        text = f"context {format_tokens(context)}"
        width, height = _size(axes, text)
        x = axes.transData.transform((context, 0))[0]
        sides = [(left, frame.y0 + 4, left + width, frame.y0 + 4 + height) for left in (x - 4 - width, x + 4)]
        taken.append(min(sides, key=cost))
        _write(axes, taken[-1], text, color="0.35")
    return taken


def _label_bands(
    axes: Axes, curves: Sequence[Curve], floor: Sequence[Shaded], taken: Sequence[Box], budget: float
) -> None:
    """Write in each band what it is, where it meets no other label, no curve and no line; in a band without such a place, nothing."""
    import numpy as np

    frame, ink = axes.get_window_extent(), _ink(axes, curves)
    first, last = axes.get_xlim()
    level = axes.transData.transform((first, budget))[1]
    upright = [axes.transData.transform((c.s_max, 0))[0] for c in curves if first <= c.s_max <= last]

    def is_free(box: Box) -> bool:
        x0, y0, x1, y1 = box
        inked = (ink[:, 0] > x0 - 3) & (ink[:, 0] < x1 + 3) & (ink[:, 1] > y0 - 1) & (ink[:, 1] < y1 + 1)
        apart = all(x1 < a or c < x0 or y1 < b or d < y0 for a, b, c, d in taken)
        return apart and not inked.any() and not y0 - 2 < level < y1 + 2

    widest = max((_size(axes, shaded.band.label)[0] for shaded in floor), default=0)  # so that labels stand in a column

    for shaded in floor:
        width, height = _size(axes, shaded.band.label)
        bottom, top = (axes.transData.transform((first, y))[1] for y in (shaded.low, shaded.high))
        choices = []
        for nth, y in enumerate(((bottom + top - height) / 2, bottom + 2, top - 2 - height)):
            for x in np.linspace(frame.x0 + 6, frame.x1 - 6 - widest, 40):
                crossed = sum(1 for line in upright if x - 3 < line < x + widest + 3)
                choices.append((crossed, nth, x, (x, y, x + width, y + height)))
        free = [choice for choice in choices if is_free(choice[-1])]
        if free:
            _write(axes, min(free)[-1], shaded.band.label, on=shaded.tint)


def _ink(axes: Axes, curves: Sequence[Curve]) -> Any:
    """The curves as they are drawn, a spot (x, y) every 1.5 pixels."""
    import numpy as np

    top, inked = axes.get_ylim()[1], []
    for curve in curves:
        points = [(p.seq_len, p.bytes / GIB) for p in _up_to(curve.points, 1.5 * top * GIB)]
        path = axes.transData.transform(np.array(points))
        run = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
        spots = np.arange(0, run[-1], 1.5)
        inked.append(np.column_stack([np.interp(spots, run, path[:, k]) for k in (0, 1)]))
    return np.concatenate(inked)


def _size(axes: Axes, text: str, **more: Any) -> tuple[float, float]:
    from matplotlib.text import Text

    renderer = axes.figure.canvas.get_renderer()  # type: ignore[union-attr, attr-defined]
    box = Text(0, 0, text, fontsize=SMALL, figure=axes.figure, **more).get_window_extent(renderer)
    return box.width, box.height


def _write(axes: Axes, box: Box, text: str, on: str = "white", **more: Any) -> None:
    x, y = axes.transData.inverted().transform((box[0], (box[1] + box[3]) / 2))
    back = {"facecolor": on, "edgecolor": "none", "pad": 0.8, "alpha": 0.9}
    axes.text(x, y, text, fontsize=SMALL, va="center", ha="left", bbox=back, zorder=7, **more)
