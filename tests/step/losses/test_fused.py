"""Losses that are fused with the LM head: the sizes that they work in, what a frozen head saves, whom they serve."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstplan.errors import RecipeError
from mstplan.plan.layout import layout_of, step_sizes
from mstplan.plan.solve import longest_sequence, plan_at
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.step.instants import Instant
from mstplan.step.losses import LOSSES
from mstplan.step.losses.liger import LigerChunk
from mstplan.step.losses.trl import TILE_TOKENS, TrlCasts, TrlTile
from mstplan.step.recipe import Recipe, options_of
from mstplan.step.roles import Role
from mstplan.step.steps import Chunks, step
from mstplan.step.tape import Tape, backward, forward
from mstplan.step.workspaces import Size, Workspace, span_at

FUSED = [name for name, loss in LOSSES.items() if loss.is_fused]
CARD = card("h100")
LLAMA, UNTIED = load_model("llama3.2-1b"), load_model("llama3.1-8b").first(2)


def peaks_of(model: Any, tokens: int = 4096, **fields: Any) -> dict[Instant, int]:
    recipe = Recipe(**fields)
    planned = step(model, layout_of(model, recipe, Chunks(1, 1), tokens, CARD.platform), CARD.gpu.workspaces_bytes)
    return {peak.name: peak.bytes for peak in planned.instants(step_sizes(recipe, tokens, Chunks(1, 1)))}


# ---- sizes --------------------------------------------------------------------------------------------------------------


def test_ligers_chunk_is_that_which_was_measured() -> None:
    """Of 8,192 tokens of llama3.2-1b 65,667,072 bytes (tests/data/h200-2026-11-26/events)."""
    chunk = LigerChunk(128256, 2048, "bfloat16")
    assert chunk.tokens(8192) == 256
    assert chunk.sizes(span_at(chunk.starts(), 8192)) == (
        Size("logits of a chunk", "256 128256", "bfloat16", 65_667_072),
    )


@given(st.integers(1, 1 << 18), st.integers(1, 1 << 14), st.integers(1, 1 << 22))
def test_ligers_chunk_is_as_its_source_has_it(vocab: int, width: int, tokens: int) -> None:
    chunk, chunks = LigerChunk(vocab, width, "bfloat16"), -(-vocab // width)
    rows = 1
    while rows < -(-tokens // chunks):
        rows *= 2
    assert chunk.tokens(tokens) == min(rows, tokens)
    (size,) = chunk.sizes(span_at(chunk.starts(), tokens))
    assert size.bytes * (tokens if size.unit == "t" else 1) == 2 * vocab * min(rows, tokens)


@given(st.integers(1, 1 << 22))
def test_trls_tile_stands_still_from_its_tokens_on(tokens: int) -> None:
    def bytes_of(kernel: Workspace) -> int:
        return sum(
            size.bytes * (tokens if size.unit == "t" else 1) for size in kernel.sizes(span_at(kernel.starts(), tokens))
        )

    rows = min(tokens, TILE_TOKENS)
    assert bytes_of(TrlTile("bfloat16")) == 2 * 32768 * rows
    assert bytes_of(TrlCasts(50000, 64)) == 2 * 64 * (32768 + rows) and bytes_of(TrlCasts(99, 64)) == 2 * 64 * (
        99 + rows
    )


@pytest.mark.parametrize("loss", FUSED)
def test_no_tensor_is_as_large_as_the_logits(loss: str) -> None:
    plan = plan_at(LLAMA, Recipe(loss=loss), CARD, 65536)
    assert all(
        entry.bytes < 65536 * LLAMA.vocab
        for peak in plan.instants()
        for entry in peak.entries
        if entry.copies == 1 and entry.role is Role.LOSS
    )


@pytest.mark.parametrize("loss", FUSED)
def test_the_longest_fits_and_the_next_does_not(loss: str) -> None:
    """Through the spans that chunks and tiles make."""
    recipe = Recipe(loss=loss, checkpoint="layer", optimizer="sgd")
    for memory in (8, 12, 40):
        small = card(memory=memory << 30)
        longest = longest_sequence(UNTIED, recipe, small, Chunks(1, 1))
        peaks = [plan_at(UNTIED, recipe, small, tokens).peak_bytes for tokens in (longest, longest + 1)]
        assert peaks[0] <= small.budget_bytes < peaks[1]


# ---- what is trained ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", FUSED)
def test_a_frozen_head_saves_its_gradient(loss: str) -> None:
    whole, frozen = (peaks_of(UNTIED, loss=loss, freeze=freeze)[Instant.LOSS_BACKWARD] for freeze in ((), ("head",)))
    states = 2 * 2 * UNTIED.vocab * UNTIED.hidden
    times = 1 if loss != "trl" else 3  # the fp32 sum as well
    assert whole - frozen - states == pytest.approx(times * states / 2, rel=0.02)


@pytest.mark.parametrize("loss", FUSED)
@pytest.mark.parametrize("model", [LLAMA.first(2), UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("freeze", [(), ("head",), ("norms", "embeddings"), ("layers.0.*",)], ids=str)
def test_all_that_comes_goes(loss: str, model: Any, freeze: tuple[str, ...]) -> None:
    """But for the weights' gradients."""
    recipe = Recipe(loss=loss, freeze=freeze, kernels="liger")
    planned = step(model, layout_of(model, recipe, Chunks(1, 1), 4096, CARD.platform), 0)
    rules = planned.rules(detail=True)
    assert _net(planned.tape, rules) == 2 * sum(w.numel * n for w, n in planned.weights if w.trained)


def _net(tape: Tape, rules: Any) -> int:
    ahead, behind = forward(tape, rules, keep=True), backward(tape, rules)
    total = [a + b for a, b in zip(ahead.net, behind.net, strict=True)]
    seed = 4  # the loss's gradient, which backward lets go
    assert not any(total[1:])
    return total[0] + seed - 4 * any(label.name == "loss" for label, _ in ahead.alive)


def test_the_head_alone_gets_no_gradient_of_ligers_loss() -> None:
    with pytest.raises(RecipeError, match="nothing below it is trained"):
        peaks_of(UNTIED, loss="liger", train=("head",))
    assert peaks_of(UNTIED, loss="liger", train=("head",), input_gradients=True)
    assert peaks_of(UNTIED, loss="trl", train=("head",)) and peaks_of(UNTIED, loss="cce", train=("head",))


# ---- whom they serve ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "fields", "says"),
    [
        ("gpt2", {"loss": "liger"}, "Liger 0.8.5 has no loss for gpt2"),
        ("llama3.2-1b", {"loss": "cce", "precision": "fp32"}, "computes in bf16"),
    ],
)
def test_what_is_refused_has_a_way_out(model: str, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as e:
        peaks_of(load_model(model), 512, **fields)
    assert len(str(e.value).splitlines()) == 2


@pytest.mark.parametrize("loss", FUSED)
def test_rules_of_recipes(loss: str) -> None:
    with pytest.raises(RecipeError, match="loss_chunks needs"):
        Recipe(loss=loss, loss_chunks=4)
    assert options_of(Recipe(loss=loss, checkpoint="layer", kernels="liger")).endswith(f"--loss {loss} --kernels liger")


@pytest.mark.parametrize("loss", FUSED)
def test_a_cap_of_logits_takes_nothing_more(loss: str) -> None:
    gemma = load_model("gemma2-2b").first(2)
    capless = gemma._replace(logit_softcap=None)
    assert gemma.logit_softcap and peaks_of(gemma, loss=loss) == peaks_of(capless, loss=loss)
