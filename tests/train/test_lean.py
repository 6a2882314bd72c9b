"""Lean: in both passes the MLP's intermediates and the logits exist for one chunk at a time, and layer inputs on the host leave
no more than two of them on the device. Shown by what torch really allocates on the CPU."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mstplan.train import minisequence, offload

from .allocations import Keep, Recording, record
from .double import float64
from .families import SMALL, small_batch, small_model
from .test_exact import assert_equal, step

BATCH, TOKENS, HIDDEN = 2, 512, 48
WIDTH, VOCABULARY = 1009, 3001  # primes: no other tensor has a multiple of as many numbers
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 12}, "gpt2": {"n_embd": HIDDEN, "n_head": 4, "n_positions": TOKENS},
    "opt": {"word_embed_proj_dim": HIDDEN}, "mixtral": {"num_local_experts": 4},
}  # fmt: skip
# Tensors as wide as the MLP that one run of it has at once, in forward (without a graph) and in backward. Gated: gate or its
# activation, up, product; then these four kept, and the gradients of the product and of one factor. gpt2's GELU of many
# operations: 4 and 7. opt: before and after ReLU, and one gradient.
HELD = {"llama": (3, 6), "gemma2": (3, 6), "gpt2": (4, 7), "opt": (2, 3)}
# As wide as the vocabulary: logits, their log softmax, the gradient of one of them; gemma2 caps its logits.
HELD_LOGITS = {"llama": 3, "gemma2": 4, "gpt2": 3, "opt": 3, "mixtral": 3}
CHUNKS = (4, 16)
ROUTED = 1.1  # a small chunk's tokens may spread over the experts less evenly


# ---- what a step allocates --------------------------------------------------------------------------------------------


def build(family: str, width: int = WIDTH, vocabulary: int = VOCABULARY, layers: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": width, "ffn_dim": width, "n_inner": width, "vocab_size": vocabulary}
    more = {"max_position_embeddings": TOKENS, "num_hidden_layers": layers, "n_layer": layers, "use_cache": False}
    config = AutoConfig.for_model(family, **{**SMALL, **sizes, **more, **FAMILIES[family]})
    for name in ("dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(config, name, 0.0)
    torch.manual_seed(0)
    attention = "eager" if family == "gemma2" else "sdpa"  # it supports nothing else
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation="eager").to(dtype).train()


def tokens_for(model: nn.Module, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (BATCH, tokens), generator=torch.Generator().manual_seed(1))


def recorded(model: nn.Module, tokens: int = TOKENS) -> Recording:
    """One step."""
    ids = tokens_for(model, tokens)
    model.zero_grad()

    def train(mark: Any) -> None:
        with mark("forward"):
            loss = model(input_ids=ids, labels=ids).loss
        with mark("backward"):
            loss.backward()

    return record(train)


def in_chunks(model: nn.Module, chunks: int, **settings: Any) -> Recording:
    """One step in mini-sequences; not the first, which also tries out a few tokens and leaves Python's caches filled."""
    minisequence(model, mlp_chunks=chunks, loss_chunks=chunks, **settings)
    recorded(model)
    found = recorded(model)
    minisequence.undo(model)
    return found


def checkpointed(model: nn.Module, tokens: int = TOKENS) -> Recording:
    """The plain model under transformers' own checkpointing."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = recorded(model, tokens)
    model.gradient_checkpointing_disable()
    return found


def wide(model: nn.Module, width: int) -> Keep:
    """Is this the size of activations of so many numbers a token (and not of a weight, of one expert's, or of their sums)?"""
    unit = width * next(model.parameters()).itemsize
    weights = {w.numel() * size for p in model.parameters() for w in (p, p[0]) for size in (p.itemsize, 4)}
    return lambda size: size % unit == 0 and size not in weights


def bytes_of(model: nn.Module, width: int, tokens: int = TOKENS) -> int:
    return BATCH * tokens * width * next(model.parameters()).itemsize


@pytest.mark.parametrize("checkpoint", ["none", "layer"])
@pytest.mark.parametrize("family", HELD)
def test_intermediates_exist_for_one_chunk_at_a_time(family, checkpoint):
    model = build(family)
    kinds = {WIDTH: wide(model, WIDTH), VOCABULARY: wide(model, VOCABULARY)}
    assert {bytes_of(model, width) for width in kinds} <= recorded(model).sizes()
    for chunks in CHUNKS:
        found = in_chunks(model, chunks, checkpoint=checkpoint)
        for width, kind in kinds.items():
            assert {s for s in found.sizes() if kind(s)} == {bytes_of(model, width, TOKENS // chunks)}
        held = [found.peak(phase, kinds[WIDTH]) for phase in ("forward", "backward")]
        assert held == [n * bytes_of(model, WIDTH, TOKENS // chunks) for n in HELD[family]]
        assert found.peak(keep=kinds[VOCABULARY]) == HELD_LOGITS[family] * bytes_of(model, VOCABULARY, TOKENS // chunks)


@pytest.mark.parametrize("family", HELD)
def test_a_chunk_holds_what_a_plain_sequence_of_its_length_holds(family):
    """What HELD says of a chunk is what the plain model needs."""
    model, tokens = build(family), TOKENS // 4
    plain = checkpointed(model, tokens)
    held = [plain.peak(phase, wide(model, WIDTH)) for phase in ("forward", "backward")]
    assert held == [n * bytes_of(model, WIDTH, tokens) for n in HELD[family]]
    assert plain.peak(keep=wide(model, VOCABULARY)) == HELD_LOGITS[family] * bytes_of(model, VOCABULARY, tokens)


def test_experts_too():
    model = build("mixtral")
    kind, logits = wide(model, WIDTH), wide(model, VOCABULARY)
    plain = checkpointed(model)
    assert bytes_of(model, VOCABULARY) in plain.sizes()
    for chunks in CHUNKS:
        found = in_chunks(model, chunks, checkpoint="layer")
        assert max(s for s in found.sizes() if kind(s)) <= 2 * bytes_of(model, WIDTH, TOKENS // chunks)  # gate and up in one
        for phase in ("forward", "backward"):
            assert found.peak(phase, kind) <= ROUTED**2 * plain.peak(phase, kind) / chunks
        assert found.peak(keep=logits) == HELD_LOGITS["mixtral"] * bytes_of(model, VOCABULARY, TOKENS // chunks)


def test_in_bfloat16_too():
    model = build("llama", dtype=torch.bfloat16)
    for chunks in CHUNKS:
        found = in_chunks(model, chunks, checkpoint="layer")
        assert {s for s in found.sizes() if wide(model, WIDTH)(s)} == {bytes_of(model, WIDTH, TOKENS // chunks)}
        assert max(s for s in found.sizes() if wide(model, VOCABULARY)(s)) == 2 * bytes_of(model, VOCABULARY, TOKENS // chunks)  # in fp32


def test_the_first_step_is_as_lean():
    model = build("llama")
    minisequence(model, mlp_chunks=4, loss_chunks=4)
    found = recorded(model)
    assert not {bytes_of(model, WIDTH), bytes_of(model, VOCABULARY)} & found.sizes()


def test_the_count_notices():
    """Two chunks at a time, and a tensor that outlives its chunk."""
    model = build("llama")
    kind, chunk = wide(model, WIDTH), bytes_of(model, WIDTH, TOKENS // 4)
    assert in_chunks(model, 2, checkpoint="layer").peak("backward", kind) == 2 * HELD["llama"][1] * chunk
    kept: list[torch.Tensor] = []
    act = model.model.layers[1].mlp.act_fn
    act.register_forward_hook(lambda _module, _inputs, out: kept.append(out.detach()))
    assert in_chunks(model, 4, checkpoint="layer").peak("backward", kind) > HELD["llama"][1] * chunk


# ---- the peak of a step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["MLP", "loss"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_peak_falls_as_intermediates_do(family, what):
    """Where intermediates decide the peak, M chunks save 1 - 1/M of them, less what the sums of the weights' gradients take."""
    model = build(family, vocabulary=61) if what == "MLP" else build(family, width=83)
    whole = HELD[family][1] * bytes_of(model, WIDTH) if what == "MLP" else HELD_LOGITS[family] * bytes_of(model, VOCABULARY)
    peaks = {1: checkpointed(model).peak(), **{chunks: in_chunks(model, chunks, checkpoint="layer").peak() for chunks in CHUNKS}}
    for chunks in CHUNKS:
        assert peaks[1] - peaks[chunks] >= 0.9 * (1 - 1 / chunks) * whole
    between = (peaks[4] - peaks[16]) / (1 / 4 - 1 / 16)  # the same step but for the chunks' size
    print(family, what, peaks[1] / whole, [(peaks[1] - peaks[c]) / (1 - 1 / c) / whole for c in CHUNKS], between / whole)
    assert between == pytest.approx(whole, rel=0.15)
