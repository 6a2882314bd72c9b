"""The picture of a step: its stacks add up, no peak is lost to drawing, the same bytes every time."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mstplan.errors import OutputError
from mstplan.plan import solve
from mstplan.show import timeline
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.recipe import strategy
from mstplan.tracing.findings import view
from mstplan.tracing.recording import Category
from mstplan.units import GIB

from ..tracing.tiny import TINY, step_of

RECIPE = strategy("checkpoint")
CARD = card(memory=8 * GIB)


@pytest.fixture(scope="module")
def shown():
    model = read_config(TINY, "tiny")
    trace = step_of(RECIPE, 4096).with_workspace(CARD.gpu.workspaces_bytes)
    return view(
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


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_picture_every_time(shown, tmp_path, kind):
    for name in ("one", "other"):
        timeline.write(shown, tmp_path / f"{name}.{kind}")
    one, other = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("one", "other"))
    assert one == other and len(one) > 5000


def test_a_name_that_says_no_kind_is_refused(tmp_path):
    with pytest.raises(OutputError, match="what to draw"):
        timeline.check_output(tmp_path / "step.csv")
