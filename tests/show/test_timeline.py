"""The picture of a step: its stacks add up, no peak is lost to drawing, the same bytes every time."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mstplan.errors import OutputError
from mstplan.plan import solve
from mstplan.show import plot, timeline
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.recipe import recipe_in_words, strategy
from mstplan.tracing.findings import build_view
from mstplan.tracing.recording import Category
from mstplan.units import GIB, format_gib

from ..tracing.tiny import TINY, step_of

RECIPE = strategy("checkpoint", adamw_kernel="foreach")
CARD = card(memory=8 * GIB)


@pytest.fixture(scope="module")
def shown():
    model = read_config(TINY, "tiny")
    trace = step_of(RECIPE, 4096).with_workspace(CARD.gpu.workspaces_bytes)
    return build_view(
        model, CARD, "checkpoint", trace, solve.plan_at(model, RECIPE, CARD, 4096), {"torch": "1", "transformers": "2"}
    )


def test_stacks_add_up(shown):
    stacks = timeline.stacks(shown.trace)
    assert list(stacks) == list(Category)
    assert [sum(sizes) for sizes in zip(*stacks.values(), strict=True)] == shown.trace.live
    assert stacks[Category.GRADIENTS][-1] == max(stacks[Category.GRADIENTS]) and stacks[Category.INPUTS][0] == 0 < max(
        stacks[Category.INPUTS]
    )


def test_no_peak_is_lost(shown):
    for most in (7, 100, 10**6):
        drawn = timeline.drawn(shown.trace.live, most)
        assert len(drawn) <= max(most, 1) and drawn == sorted(drawn)
        assert max(shown.trace.live[e] for e in drawn) == shown.trace.peak.bytes


def test_parts_cover_the_step(shown):
    parts = timeline.parts(shown.trace)
    assert [name for name, _, _ in parts] == ["forward", "loss", "backward", "optimizer"]
    assert parts[0][1] == 0 and parts[-1][2] == len(shown.trace.live)
    assert all(one[2] == other[1] for one, other in pairwise(parts))


def test_layers_add_up_with_gradients_on_flat_states(shown):
    layers = timeline.layers(shown.trace)
    assert [sum(sizes) for sizes in zip(*layers.values(), strict=True)] == shown.trace.live
    assert list(layers)[:3] == ["weights", "optimizer states", "gradients"]
    assert len(set(layers["optimizer states"])) == 1
    temporary = layers["optimizer's temporary"]
    start = timeline.parts(shown.trace)[-1][1]
    assert not any(temporary[:start]) and max(temporary) == max(layers["gradients"])  # AdamW's, foreach


def words(view):
    """The picture's figure and texts, before they become pixels."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    with matplotlib.rc_context({"font.size": plot.FONT, "text.parse_math": False}):
        figure = Figure(figsize=(plot.WIDTH, plot.HEIGHT), dpi=100)
        FigureCanvasAgg(figure).draw()
        timeline._draw(figure, view, "title")
        figure.canvas.draw()
    return figure, [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def test_what_the_picture_says(shown):
    said = "\n".join(text.get_text() for text in words(shown)[1])
    assert recipe_in_words(RECIPE) in said
    assert "Simulated with torch 1, transformers 2: " in said and "nothing measured on a GPU. mstplan" in said
    assert f"peak {format_gib(shown.trace.peak.bytes)}: {shown.trace.peak.instant}" in said
    assert "GiB on the GPU" in said and "card" not in said and "host" not in said


@pytest.mark.parametrize("memory", [2 * GIB, 8 * GIB, 80 * GIB])
def test_no_line_runs_through_words(shown, memory):
    figure, written = words(shown._replace(card=card(memory=memory)))
    axes = figure.axes[0]
    inside = [text for text in written if text.get_text().startswith(("budget", "peak"))]
    assert len(inside) == 2
    for text in inside:
        back = text.get_bbox_patch()
        assert back is not None and back.get_alpha() in (None, 1) and text.get_zorder() > 2
    level = axes.transData.transform((0, card(memory=memory).budget_bytes / GIB))[1]
    one, other = (text.get_window_extent() for text in inside)
    assert not one.overlaps(other) and all(not (box.y0 < level < box.y1) for box in (one, other))
    for text in written:
        box = text.get_window_extent()
        if box.width:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_picture_every_time(shown, tmp_path, kind):
    for name in ("one", "other"):
        timeline.write(shown, tmp_path / f"{name}.{kind}")
    one, other = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("one", "other"))
    assert one == other and len(one) > 5000


def test_a_name_that_says_no_kind_is_refused(tmp_path):
    with pytest.raises(OutputError, match="what to draw"):
        timeline.check_output(tmp_path / "step.csv")
