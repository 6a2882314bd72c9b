from __future__ import annotations

import pytest

from mstplan.plan import advice
from mstplan.plan.catalog import load_model
from mstplan.plan.hardware import card
from mstplan.plan.recipe import STRATEGIES, strategy
from mstplan.plan.solve import max_seq, plan_at

GIB = 2**30
MODEL = load_model("llama3.1-8b")


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("seq_len", [16384, 65536, 262144])
def test_what_is_said_to_fit_fits(name: str, seq_len: int) -> None:
    start = plan_at(MODEL, strategy(name), card("h100"), seq_len)
    if start.fits:
        return
    singles, run = advice.ways_to_fit(start)
    assert all(way.plan.peak_bytes < start.peak_bytes for way in singles)
    if run is not None:
        assert run.plan.fits and run.plan.seq_len == seq_len
        again = plan_at(MODEL, run.plan.recipe, card("h100"), seq_len)
        assert again.peak_bytes == run.plan.peak_bytes


def test_cheap_changes_come_first() -> None:
    start = plan_at(MODEL, strategy("checkpoint"), card("h100"), 65536)
    singles, run = advice.ways_to_fit(start)
    names = [change.name for change in advice.changes(start.recipe)]
    order = [names.index(way.changes[0].name) for way in singles]
    assert order == sorted(order)
    assert run is not None and [c.name for c in run.changes] == ["the chunked loss"]


def test_no_change_of_a_run_is_superfluous() -> None:
    start = plan_at(MODEL, strategy("standard"), card("rtx-4090"), 32768)
    _, run = advice.ways_to_fit(start)
    assert run is not None and len(run.changes) > 1
    for left_out in run.changes:
        fewer = [c for c in run.changes if c is not left_out]
        assert not plan_at(MODEL, advice._applied(start.recipe, fewer), start.card, start.seq_len).fits


def test_the_smallest_card_that_holds_it() -> None:
    start = plan_at(MODEL, strategy("checkpoint"), card("h100"), 65536)
    bigger = advice.smallest_gpu(start)
    assert bigger is not None and plan_at(MODEL, start.recipe, card(bigger.name), 65536).fits
    assert not plan_at(MODEL, start.recipe, card("h200"), 65536).fits


def test_a_smaller_batch_is_offered() -> None:
    start = plan_at(MODEL, strategy("mst", batch=16), card("h100"), 16384)
    singles, run = advice.ways_to_fit(start)
    assert run is not None and [c.name for c in run.changes] == ["batch 1, accumulated"]
    assert run.plan.recipe.batch == 1 and run.plan.recipe.accumulation == 16
    assert singles


def test_changes_fit_the_attention_at_hand() -> None:
    offered = {how: {c.fields.get("attention") for c in advice.changes(strategy("mst", attention=how))} for how in ("eager", "sdpa", "flash")}
    assert "sdpa" in offered["eager"] and "flash" not in offered["eager"]
    assert "flash" in offered["sdpa"] and "sdpa" not in offered["flash"]


def test_the_smallest_card_keeps_the_reserve() -> None:
    free, held = (plan_at(MODEL, strategy("mst"), card("rtx-4090", reserve=n * GIB), 8192) for n in (0, 4))
    first, second = advice.smallest_gpu(free), advice.smallest_gpu(held)
    assert first is not None and second is not None and first.usable_bytes <= second.usable_bytes
    assert plan_at(MODEL, strategy("mst"), card(second.name, reserve=4 * GIB), 8192).fits


def test_host_memory_is_named() -> None:
    answer = max_seq(MODEL, strategy("mst-offload"), card("h100", host_memory=16 * GIB), "mst-offload")
    assert any("host memory is short" in note and f"{answer.s_max:,}" in note for note in advice.answer_notes(answer))


@pytest.mark.parametrize(
    ("on", "changes", "said"),
    [("h100", {}, True), ("b200", {}, True), ("a100", {}, False), ("rtx-5090", {}, False), ("h100", {"attention": "flash"}, False),
     ("h100", {"precision": "fp32"}, False), ("h100", {"precision": "mixed"}, True)],
)  # fmt: skip
def test_another_attention_kernel_than_the_one_counted_is_said(on: str, changes: dict[str, object], said: bool) -> None:
    notes = advice.kernel_notes(load_model("llama3.1-8b"), strategy("mst", **changes), card(on))
    assert [("cuDNN" in note and "--attention flash" in note) for note in notes] == [True] * said
    assert advice.kernel_notes(load_model("gpt-oss-20b"), strategy("mst"), card("h100")) == []  # which has no sdpa
    assert advice.kernel_notes(load_model("llama3.1-8b"), strategy("mst"), card(memory=80 * 2**30)) == []  # a card nobody named


def test_notes_are_said_when_they_hold_and_only_then() -> None:
    long = max_seq(load_model("llama2-7b"), strategy("mst"), card("h100"), "mst")
    assert any("4,096 positions" in note and "RoPE" in note for note in advice.answer_notes(long))
    table = max_seq(load_model("gpt2"), strategy("mst"), card("h100"), "mst")
    assert any("1,024 positions" in note and "position table" in note for note in advice.answer_notes(table))
    short = max_seq(MODEL, strategy("checkpoint"), card("h100"), "checkpoint")
    assert advice.answer_notes(short) == []
    assert any("no sdpa for gemma2" in note for note in advice.recipe_notes(load_model("gemma2-2b"), strategy("mst")))
    assert any("explicit S x S mask" in note for note in advice.recipe_notes(load_model("gemma3-1b"), strategy("mst")))
    assert advice.recipe_notes(MODEL, strategy("mst")) == []
