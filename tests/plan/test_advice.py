from __future__ import annotations

import pytest

from mstplan.plan import advice
from mstplan.plan.solve import max_seq
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import strategy

GIB = 2**30
MODEL = load_model("llama3.1-8b")


def test_host_memory_is_named() -> None:
    answer = max_seq(MODEL, strategy("mst-offload"), card("h100", host_memory=16 * GIB), "mst-offload")
    assert any("CPU RAM is short" in note and f"{answer.s_max:,}" in note for note in advice.answer_notes(answer))


@pytest.mark.parametrize(
    ("on", "changes", "said"),
    [
        ("h100", {}, True),
        ("b200", {}, True),
        ("a100", {}, False),
        ("rtx-5090", {}, False),
        ("h100", {"attention": "flash"}, False),
        ("h100", {"precision": "fp32"}, False),
        ("h100", {"precision": "mixed"}, True),
    ],
)
def test_where_the_kernel_depends_on_torch_it_is_said(on: str, changes: dict[str, object], said: bool) -> None:
    model = load_model("llama3.1-8b")
    notes = advice.kernel_notes(model, strategy("mst", **changes), card(on, torch="2.13"))
    assert ["cuDNN's attention" in note and "2.13+cu130" in note for note in notes] == [True] * said
    notes = advice.kernel_notes(model, strategy("mst", **changes), card(on, torch="2.10+cu128"))
    assert ["FlashAttention-2" in note and "2.10+cu128" in note for note in notes] == [True] * said
    assert advice.kernel_notes(load_model("gpt-oss-20b"), strategy("mst"), card("h100")) == []  # which has no sdpa


def test_notes_are_said_when_they_hold_and_only_then() -> None:
    long = max_seq(load_model("llama2-7b"), strategy("mst"), card("h100"), "mst")
    assert any("4,096 positions" in note and "RoPE" in note for note in advice.answer_notes(long))
    table = max_seq(load_model("gpt2"), strategy("mst"), card("h100"), "mst")
    assert any("1,024 positions" in note and "position table" in note for note in advice.answer_notes(table))
    short = max_seq(MODEL, strategy("checkpoint"), card("h100"), "checkpoint")
    assert advice.answer_notes(short) == []
    assert any("no sdpa for gemma2" in note for note in advice.recipe_notes(load_model("gemma2-2b"), strategy("mst")))
    for changes, said in (({}, True), ({"precision": "fp32"}, False), ({"attention": "eager"}, False)):
        notes = advice.recipe_notes(load_model("gpt-oss-20b"), strategy("mst", **changes))
        assert any("package kernels" in note and "--attention eager" in note for note in notes) == said
    assert not any("kernels" in note for note in advice.recipe_notes(load_model("gemma2-2b"), strategy("mst")))
    assert any("explicit S x S mask" in note for note in advice.recipe_notes(load_model("gemma3-1b"), strategy("mst")))
    assert advice.recipe_notes(MODEL, strategy("mst")) == []


@pytest.mark.parametrize("options", [{"optimizer_on_host": True}, {"optimizer_on_host": True, "weights_on_host": True}])
def test_what_is_short_is_named(options: dict[str, object]) -> None:
    """Host memory where that is short, the card where that is; never an amount below nothing."""
    for host in (GIB, None):
        for memory in (80, 8):
            found = [
                max_seq(MODEL, strategy(name, **options), card(memory=memory * GIB, host_memory=host), name)
                for name in ("standard", "mst")
            ]
            if any(answer.s_max for answer in found):
                continue
            said = " ".join(
                [
                    *advice.nothing_fits_notes(found, (), None),
                    *(line for answer in found for line in advice.answer_notes(answer)),
                ]
            )
            assert ("CPU RAM is short" in said) == (host is not None)
            assert ("more than the budget" in said) == (found[1].plan.peak_bytes > found[1].plan.budget_bytes)
            assert "-" not in said.replace("not-", "").split("GiB")[0]


def test_padded_batches_are_a_note_with_their_number() -> None:
    model, on = load_model("mistral-7b-v0.1"), card("a100-80gb")
    answer = max_seq(model, strategy("mst"), on, "mst")
    longer = max_seq(model, strategy("mst", pad_to=8), on, "mst")
    (note,) = [note for note in advice.answer_notes(answer) if "--pad-to 8" in note]
    assert f"{answer.s_max:,}" in note and f"{longer.s_max:,}" in note and answer.s_max < longer.s_max
    assert not any("--pad-to" in note for note in advice.answer_notes(longer))
