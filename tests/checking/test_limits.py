"""Predicted limits put to the test, with a card that is made up: it runs what is no longer than it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstplan import MeasurementError, card, load_model, strategy
from mstplan.checking import limits
from mstplan.checking.limits import SHARE_ABOVE, SHARE_BELOW, check_limit, chunk_counts, length_at
from mstplan.measuring.measurement import FAILED, OK, OUT_OF_MEMORY, Measurement
from mstplan.step.steps import Chunks
from mstplan.units import SHORTEST

from ..measuring.measured import case, measured
from ..tracing.tiny import step_of


def up_to(longest: int):
    def measure(seq_len: int) -> Measurement:
        return measured(case(seq_len=seq_len), {"loss": seq_len}, OK if seq_len <= longest else OUT_OF_MEMORY)

    return measure


@given(predicted=st.integers(1, 10**7), ratio=st.floats(0.3, 3))
def test_the_true_limit_is_found(predicted, ratio):
    longest = max(SHORTEST, int(predicted * ratio))
    found = check_limit("mst", "trace", predicted, up_to(longest))
    assert (
        len(found.points) <= limits.MAX_POINTS
        and found.longest_run <= longest
        and found.shortest_failure is not None
        and found.shortest_failure > longest
    )
    assert found.shortest_failure - found.longest_run <= max(1, found.longest_run * limits.PRECISION)
    assert found.holds == (length_at(predicted, SHARE_BELOW) <= longest < length_at(predicted, SHARE_ABOVE))
    assert found.error == pytest.approx(predicted / longest - 1, rel=0.02, abs=0.02) or longest < 100


def test_nothing_runs():
    found = check_limit("mst", "trace", 100, up_to(0))
    assert (
        not found.holds
        and found.longest_run == 0
        and found.shortest_failure == SHORTEST
        and found.error == float("inf")
    )


def test_lengths_to_try():
    assert (
        length_at(1000, SHARE_BELOW),
        length_at(1000, SHARE_ABOVE),
        length_at(2, SHARE_BELOW),
        length_at(2, SHARE_ABOVE),
    ) == (980, 1030, 2, 3)


def test_what_neither_runs_nor_runs_out():
    with pytest.raises(MeasurementError, match="98 tokens: failed: killed"):
        check_limit(
            "mst", "trace", 100, lambda tokens: replace(measured(case("mst", tokens), {}, FAILED), error="killed")
        )


@pytest.mark.parametrize("limit", [0, 100_000_000, 150_000_000, 10**9])
def test_the_longest_that_a_trace_says(limit):
    recipe = strategy("checkpoint")
    found = limits.longest_on_cpu(limit, lambda tokens: step_of(recipe, tokens), 700)
    assert step_of(recipe, found + 1 if found else SHORTEST).peak.bytes > limit
    assert found == 0 or step_of(recipe, found).peak.bytes <= limit


def test_chunks_around_the_recommended_ones():
    assert chunk_counts(Chunks(4, 16)) == [Chunks(1, 1), Chunks(2, 8), Chunks(4, 16), Chunks(8, 32)]
    assert chunk_counts(Chunks(1, 1)) == [Chunks(1, 1), Chunks(2, 2)]


@pytest.mark.parametrize(("slower", "holds"), [(1.02, True), (1.05, False)])
def test_what_chunks_cost(slower, holds):
    model, recipe, on = load_model("llama3.1-8b"), strategy("mst"), card("h100")

    def measure(chunks: Chunks) -> Measurement:
        m = measured(case("mst", 65536), {"loss": 1})
        return replace(m, ranks=(replace(m.ranks[0], step_seconds=(1.0 if chunks[:2] == (1, 1) else slower,)),))

    rows = limits.measure_throughput(model, recipe, on, 65536, measure)
    assert sum(row.recommended for row in rows) == 1 and rows[0].share == 1
    assert all(row.share == pytest.approx(1 / slower) for row in rows[1:])
    assert limits.throughput_holds(rows) is holds


def test_one_chunk_that_does_not_fit_is_nothing_to_compare_with():
    def measure(chunks: Chunks) -> Measurement:
        return measured(case("mst", 65536), {"loss": 1}, OUT_OF_MEMORY if chunks[:2] == (1, 1) else OK)

    rows = limits.measure_throughput(load_model("llama3.1-8b"), strategy("mst"), card("h100"), 65536, measure)
    assert all(row.share is None for row in rows) and not limits.throughput_holds(rows)
