"""DDP: the trace beside two real processes over gloo, and the formula beside the trace."""

from __future__ import annotations

import json
from functools import cache
from itertools import accumulate
from typing import Any

import pytest

from mstplan.checking.rungs import compare_rungs
from mstplan.spec.hardware import card
from mstplan.step.recipe import strategy
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import trace

from ..processes import on_two_ranks
from ..recipes import in_chunks
from .two_ranks import CONFIG, TOKENS
from .two_replicas import recipes

SMALL = 8192  # bytes; of such a size are scalars, and the random generator's state that a checkpoint keeps


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks allocated, by recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks("tests.tracing.two_replicas", folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@cache
def traced(name: str) -> Trace:
    return trace(CONFIG, recipes()[name], TOKENS, on="cpu", whole=True)


@pytest.mark.parametrize("name", recipes())
def test_the_reducer_holds_as_many_bytes_as_the_gradients(real, name):
    buckets = sum(traced(name).gradient_buckets.values())
    assert buckets and [rank[name]["buckets"] for rank in real] == [buckets, buckets]
    resident = sum(alive.bytes for alive in traced(name).resident)
    gradients = buckets if recipes()[name].accumulation > 1 else 0
    assert real[0][name]["resident"] + buckets + gradients == resident


@pytest.mark.parametrize(
    "name", [name for name in recipes() if name != "accumulation"]
)  # of which one micro-batch is traced
def test_two_real_ranks_allocate_what_the_trace_says_in_that_order(real, name):
    events = real[0][name]["runs"][-1]
    found = traced(name)
    expected = [made.bytes for made in found.step.storages if made.bytes > SMALL]
    assert [e[0] for e in events if e[0] > SMALL] == expected


def peak(events: list[list[Any]], resident: int) -> int:
    return resident + max(accumulate(size for size, *_ in events))


@pytest.mark.parametrize("name", recipes())
def test_two_real_ranks_hold_what_the_trace_says(real, name):
    """Within what random generators' states make, which are not followed: 0.2%."""
    found = traced(name)
    resident = real[0][name]["resident"] + real[0][name]["buckets"]
    least = min(peak(events, resident) for events in real[0][name]["runs"])
    assert max(found.live) == pytest.approx(least, rel=0.002)


def test_buckets_are_made_anew_once(real):
    """In the second step, in the order in which gradients came in the first."""
    first, later = (sum(e[0] for e in real[0]["standard"]["runs"][n] if e[0] > SMALL) for n in (0, -1))
    assert first - later == real[0]["standard"]["buckets"]


@pytest.mark.parametrize(
    ("model", "name"), [("llama3.2-1b", "mst"), ("gpt2", "checkpoint"), ("qwen3-0.6b", "mst-layer")]
)
def test_the_formula_is_the_trace(model, name):
    recipe = in_chunks(strategy(name, gpus=8, sharding="ddp"), 4, 8)
    rungs = compare_rungs(model, recipe, 4096, card("h100"))
    assert all(pair.formula == pytest.approx(pair.trace, rel=0.0005) for pair in rungs.instants)
