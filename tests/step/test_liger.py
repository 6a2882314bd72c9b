"""Liger's kernels on the tape: what they keep, what they write over, whom they serve."""

from __future__ import annotations

import pytest

from mstplan.errors import RecipeError
from mstplan.plan.solve import plan_at
from mstplan.spec.catalog import load_model
from mstplan.spec.families import FAMILIES
from mstplan.spec.hardware import card
from mstplan.step.autograd import record_part_tape
from mstplan.step.instants import Instant
from mstplan.step.layers import MlpChunks, Numerics, layer
from mstplan.step.liger import ALL, LOSS_ONLY, SERVED, check_loss, kernels_for
from mstplan.step.recipe import Recipe, recipe_in_words
from mstplan.step.tape import BASIS, Rules, Tape, backward, forward

BF16 = Numerics()
LIGER = BF16._replace(kernels="liger")
TOKENS = BASIS.index("bs")


def kept(tape: Tape) -> int:
    """Bytes that a layer keeps for each token."""
    return forward(tape, Rules(), keep=True).net[TOKENS]


def layer_of(name: str, numerics: Numerics) -> Tape:
    model = load_model(name)
    tape = layer(model, model.layer_kinds[0], numerics, MlpChunks())
    return record_part_tape(tape, frozenset(tape.sources))


def test_a_layer_of_llama_keeps() -> None:
    """Its input and the hidden states between, each with its norm, q, k, v and the output of attention, gate, up and their product; without
    the layer's output."""
    model = load_model("llama3.2-1b")
    d, i, a = model.hidden, model.mlp.width, model.attention
    kv = a.kv_heads * a.head_dim
    sixteen_bit = (d + d + kv + kv + d) + (d + d) + 3 * i  # norm, q, k, v, mixed; middle, norm; the MLP's
    assert kept(layer_of("llama3.2-1b", LIGER)) - 2 * d == 2 * sixteen_bit + 4 * (2 + a.heads)


@pytest.mark.parametrize("name", ["llama3.2-1b", "qwen3-4b", "phi3-mini-4k", "gemma2-2b", "olmo2-7b"])
def test_a_layer_keeps_less_and_lets_all_of_it_go(name: str) -> None:
    torch, liger = layer_of(name, BF16), layer_of(name, LIGER)
    assert kept(liger) < kept(torch)
    for tape in (torch, liger):
        ahead, behind = forward(tape, Rules(), keep=True), backward(tape, Rules())
        assert ahead.net[TOKENS] + behind.net[TOKENS] == 2 * load_model(name).hidden  # its output


@pytest.mark.parametrize("name", ["llama3.2-1b", "gemma2-2b", "qwen3-4b"])  # Phi-3's gate and up are copied
@pytest.mark.parametrize("checkpoint", ["none", "layer"])
def test_no_instant_takes_more(name: str, checkpoint: str) -> None:
    model = load_model(name)
    torch, liger = (
        plan_at(model, Recipe(checkpoint=checkpoint, kernels=kernels), card("h200"), 8192)
        for kernels in ("torch", "liger")
    )
    sizes = {peak.name: peak.bytes for peak in torch.instants()}
    assert all(peak.bytes <= sizes[peak.name] for peak in liger.instants())
    assert {peak.name: peak.bytes for peak in liger.instants()}[Instant.MIDDLE_LAYER] < sizes[Instant.MIDDLE_LAYER]


def test_every_family_is_served_or_refused() -> None:
    assert FAMILIES.keys() >= SERVED.keys() and not SERVED.keys() & LOSS_ONLY
    assert all(served.norms <= ALL and served.copying <= ALL for served in SERVED.values())
    for family in FAMILIES.keys() - SERVED.keys():
        with pytest.raises(RecipeError, match="not planned") as e:
            kernels_for(family)
        assert str(e.value).endswith("Set kernels='torch' (--kernels torch).")
    with pytest.raises(RecipeError, match="no loss for granite"):
        check_loss("granite")
    check_loss("mixtral")


def test_it_is_said_in_words() -> None:
    assert recipe_in_words(Recipe(kernels="liger")).endswith("Liger's kernels") and "Liger" not in recipe_in_words(
        Recipe()
    )
