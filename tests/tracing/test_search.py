"""S_max by trace: one token more does not run."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan.errors import ModelError
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.spec.model import StandIn
from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing import search
from mstplan.tracing.search import find_longest
from mstplan.tracing.simulation import fits_on
from mstplan.tracing.trace import Peak
from mstplan.units import GIB, LONGEST

from .tiny import TINY, step_of

# Hypothesis draws a test's examples by its source. Under other names it draws others, a few of which take more than 36 traces.
longest = find_longest


def room(card):
    return card.allocatable_bytes


MODEL = read_config(TINY, "tiny")
CARD = card(memory=3 * GIB)


def trace_at(recipe: Recipe, seq_len: int, on) -> object:
    return step_of(recipe, seq_len).with_workspace(on.gpu.workspaces_bytes)


@pytest.mark.parametrize("name", ["standard", "mst"])
def test_one_token_more_does_not_run(name):
    found = longest(MODEL, strategy(name), CARD, trace_at, name)
    s_max, chunks = found.answer.s_max, found.answer.plan.chunks
    assert s_max > 1000 and found.traces <= 20
    recipe = chunks.put_into(strategy(name))
    assert fits_on(trace_at(recipe, s_max, CARD), CARD)
    assert not fits_on(trace_at(recipe, s_max + 1, CARD), CARD)
    assert found.answer.plan.peak_bytes == found.trace.peak.bytes
    assert 0.9 * found.formula < s_max <= found.formula * 1.01


def test_nothing_fits():
    small = card(memory=GIB, reserve=GIB - GIB // 2 - 40 * 2**20)
    found = longest(MODEL, strategy("checkpoint"), small, trace_at, "checkpoint")
    assert found.answer.s_max == 0 and found.traces == 1


def test_host_memory_limits_too():
    offload = strategy("checkpoint", offload_layer_inputs=True)
    small = card(memory=3 * GIB, reserve=2 * GIB)
    free = longest(MODEL, offload, small, trace_at, "custom")
    tight = card(memory=3 * GIB, reserve=2 * GIB, host_memory=free.trace.host_peak // 2)
    found = longest(MODEL, offload, tight, trace_at, "custom")
    assert 0 < found.answer.s_max < free.answer.s_max
    assert found.trace.host_peak <= tight.host_bytes


# --- a model that the formula does not know -------------------------------------------------------------------------------------


def stands_in(context: int | None = None):
    return MODEL._replace(stand_in=StandIn(1, "why"), notes=("why",), context=context)


class Grows:
    """A trace that needs so many bytes as a polynomial of its length gives."""

    def __init__(self, seq_len: int, coefficients: tuple[float, float, float]):
        self.seq_len, self.host_peak = seq_len, 0
        self.bytes = round(sum(c * seq_len**n for n, c in enumerate(coefficients)))
        self.peak = Peak("loss", self.bytes, 0)


@pytest.fixture
def polynomials(monkeypatch):
    """The allocator needs what the polynomial says, no more."""
    monkeypatch.setattr(search, "required_bytes", lambda trace: trace.bytes)
    monkeypatch.setattr(search, "fits_on", lambda trace, card: trace.bytes <= room(card))


@settings(max_examples=60)
@given(
    start=st.floats(0, 2.9 * GIB),
    slope=st.floats(6, 24).map(lambda n: 2**n),
    curve=st.just(0.0) | st.floats(-20, 12).map(lambda n: 2**n),
    name=st.sampled_from(["standard", "mst"]),
)
def test_however_a_step_grows_the_longest_is_found(polynomials, start, slope, curve, name):
    """Thousands of times more slowly or more steeply than what stands in for it, and with the square of the length."""
    tried = []

    def trace_at(recipe, seq_len, on):
        tried.append(seq_len)
        return Grows(seq_len, (start, slope, curve))

    found = longest(stands_in(), strategy(name), CARD, trace_at, name)
    s_max = found.answer.s_max
    assert len(tried) == found.traces <= 36
    assert s_max == 0 or Grows(s_max, (start, slope, curve)).bytes <= room(CARD)
    assert s_max == LONGEST - 1 or Grows(s_max + 1, (start, slope, curve)).bytes > room(CARD)


@pytest.mark.parametrize(("context", "ends"), [(512, 512), (512, 700), (None, 300), (None, 5000)])
def test_where_a_models_own_code_ends(polynomials, context, ends):
    """At its positions, beyond them, or wherever nothing in its config says."""

    def trace_at(recipe, seq_len, on):
        if seq_len > ends:
            raise ModelError("RuntimeError")
        return Grows(seq_len, (GIB, 1024, 0))

    found = longest(stands_in(context), strategy("checkpoint"), CARD, trace_at, "checkpoint")
    assert found.answer.s_max == ends and found.at_the_end


def test_recipes_that_a_models_code_cannot_follow_are_left_out(polynomials):
    def trace_at(recipe, seq_len, on):
        if recipe.mlp_chunks != 1:
            raise ModelError("no MLP found.\nSet mlp_chunks=1.")
        return Grows(seq_len, (GIB, 2**16, 0))

    recipes = {name: strategy(name) for name in ("standard", "checkpoint")}
    chunked = {"mst": strategy("mst").changed(mlp_chunks=4)}
    found, model = search.find_longest_of_each(stands_in(), {**recipes, **chunked}, CARD, trace_at)
    assert [f.answer.strategy for f in found] == [*recipes] and model.notes == ("why", "mst is left out: no MLP found.")
    with pytest.raises(ModelError, match="no MLP found"):
        search.find_longest_of_each(stands_in(), chunked, CARD, trace_at)
