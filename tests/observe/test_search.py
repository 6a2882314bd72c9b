"""S_max by trace: one token more does not run."""

from __future__ import annotations

import pytest

from mstplan.observe.card import runs
from mstplan.observe.search import longest
from mstplan.plan.config import read_config
from mstplan.plan.hardware import card
from mstplan.plan.recipe import Recipe, strategy
from mstplan.units import GIB

from .tiny import TINY, step_of

MODEL = read_config(TINY, "tiny")
CARD = card(memory=3 * GIB)


def trace_at(recipe: Recipe, seq_len: int, on) -> object:
    return step_of(recipe, seq_len).with_workspace(on.gpu.workspaces_bytes)


@pytest.mark.parametrize("name", ["standard", "mst"])
def test_one_token_more_does_not_run(name):
    found = longest(MODEL, strategy(name), CARD, trace_at, name)
    s_max, chunks = found.answer.s_max, found.answer.plan.chunks
    assert s_max > 1000 and found.traces <= 20
    recipe = strategy(name).changed(mlp_chunks=chunks.mlp, loss_chunks=chunks.loss)
    assert runs(trace_at(recipe, s_max, CARD), CARD)
    assert not runs(trace_at(recipe, s_max + 1, CARD), CARD)
    assert found.answer.plan.peak_bytes == found.trace.peak.bytes
    assert 0.9 * found.formula < s_max <= found.formula * 1.01  # tensors alone need no more than tensors in segments


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
