"""In 16 bits, mini-sequences are as near to the truth as the plain model.

The truth is the same weights' gradient in float64. Errors are norms over all gradients together, relative to the truth.

What holds in bf16: weights that no chunk uses have the plain model's gradient. Those of matrices in MLPs and of the head are
summed over chunks in fp32 and rounded once, as the plain model's are. Those of experts, and of norms run with an MLP, are
rounded once a chunk before they are summed: up to 1% of the whole error in models as small as these. Autocast rounds the
plain model's products as well, and sums in fp32: no difference on average.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import nullcontext
from statistics import mean
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from mstplan.train import loss, minisequence, mlp
from mstplan.train.locate import find_mlps, find_parts

from .double import float64
from .families import FAMILIES, small_model

SETTINGS: list[dict[str, Any]] = [
    {"mlp_chunks": 4, "loss_chunks": 4, "checkpoint": "none"},
    {"mlp_chunks": 4, "loss_chunks": 4, "checkpoint": "layer"},
    {"mlp_chunks": 16, "loss_chunks": 16, "checkpoint": "layer"},
]
ROUNDOFF = 2**-8  # half a step of bf16
LOSS_SCALE = 65536.0  # as torch.amp.GradScaler begins with

Gradients = dict[str, torch.Tensor]


def model_of(family: str, seed: int, dtype: torch.dtype, **sizes: int) -> nn.Module:
    model = small_model(family, **sizes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02, generator=generator)
    return model.to(dtype)


def batch_of(sequences: int, tokens: int, seed: int = 0, vocabulary: int = 61) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, vocabulary, (sequences, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, : tokens // 3] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(
    model: nn.Module, batch: dict[str, torch.Tensor], scale: float = 1.0, autocast: torch.dtype | None = None
) -> Gradients:
    """Of the loss, multiplied by `scale` for backward only."""
    model.zero_grad()
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        loss = model(**batch).loss
    (loss * scale).backward()
    return {n: p.grad.double() / scale for n, p in model.named_parameters() if p.grad is not None}


def in_float64(model: nn.Module, batch: dict[str, torch.Tensor]) -> Gradients:
    """The truth."""
    with float64():
        return gradients(copy.deepcopy(model).double(), batch)


def in_chunks(model: nn.Module, batch: dict[str, torch.Tensor], settings: dict[str, Any], **how: Any) -> Gradients:
    minisequence(model, **settings)
    found = gradients(model, batch, **how)
    minisequence.undo(model)
    return found


def norm(found: Gradients, names: Iterable[str]) -> float:
    return sum(float(found[n].norm()) ** 2 for n in names) ** 0.5


def error(found: Gradients, truth: Gradients, names: Iterable[str] | None = None) -> float:
    """Of the gradients of weights, all or some, together."""
    names = list(truth if names is None else names)
    assert found.keys() == truth.keys() and names
    return norm({n: found[n] - truth[n] for n in names}, names) / norm(truth, names)


def ratios(
    model: nn.Module, batch: dict[str, torch.Tensor], settings: list[dict[str, Any]] = SETTINGS, **how: Any
) -> list[float]:
    """Errors in chunks over the plain model's."""
    truth = in_float64(model, batch)
    plain = error(gradients(model, batch, **how), truth)
    return [error(in_chunks(model, batch, setting, **how), truth) / plain for setting in settings]


def served(model: nn.Module) -> set[str]:
    """The weights of MLPs, of what is run in their chunks, and of the head."""
    parts = find_parts(model)
    modules = [m for _, mlp in find_mlps(parts) for m in (mlp.first, mlp.down, *mlp.followers) if m is not None]
    found = {id(w) for module in (*modules, parts.head) for w in module.parameters()}
    return {n for n, w in model.named_parameters() if id(w) in found}


def rounds_chunks(model: nn.Module) -> bool:
    """Has it weights in its chunks that are no matrices, or stacks of them?"""
    names = served(model)
    return any(w.dim() != 2 for n, w in model.named_parameters() if n in names and not n.endswith("bias"))


# ---- bf16 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_as_plain(family):
    model, batch = model_of(family, 0, torch.bfloat16), batch_of(2, 48)
    truth, plain = in_float64(model, batch), gradients(model, batch)
    chunked = served(model)
    others = truth.keys() - chunked
    for setting in SETTINGS:
        found = in_chunks(model, batch, setting)
        assert error(found, truth, others) <= 1.01 * error(
            plain, truth, others
        )  # on most CPUs they are the same bit for bit
        assert error(found, truth, chunked) ** 2 <= error(plain, truth, chunked) ** 2 + ROUNDOFF**2
        assert error(found, truth) <= (1.03 if rounds_chunks(model) else 1.005) * error(plain, truth)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_plain_model(family):
    model, batch = model_of(family, 0, torch.bfloat16), batch_of(2, 48)
    plain = model(**batch).loss.item()
    for setting in SETTINGS:
        minisequence(model, **setting)
        assert model(**batch).loss.item() == pytest.approx(plain, rel=2**-20)
        minisequence.undo(model)


MANY = [{"mlp_chunks": m, "loss_chunks": m, "checkpoint": "none"} for m in (4, 16, 48)]


def mean_ratios(family: str, seeds: int) -> list[float]:
    found = [ratios(model_of(family, seed, torch.bfloat16), batch_of(2, 48, seed), MANY) for seed in range(seeds)]
    return [mean(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_error_does_not_grow_with_the_number_of_chunks(family):
    assert max(mean_ratios(family, 4)) <= 1.005


def test_sums_in_bfloat16_are_noticed():
    no = lambda _x, _runtime: False  # noqa: E731
    with patch.object(mlp, "can_sum_products", no), patch.object(loss, "can_sum_products", no):
        assert max(mean_ratios("llama", 2)) > 1.01  # every chunk's gradient is rounded
        with patch.object(torch, "promote_types", lambda dtype, _: dtype):
            _, more, many = mean_ratios("llama", 2)
    assert more > 1.1 and many > 1.3


def test_a_longer_step_of_a_deeper_model_is_nearer():
    """What the layers' own rounding adds drowns the chunks'."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "vocab_size": 512,
        "num_hidden_layers": 6,
        "max_position_embeddings": 256,
    }
    model = model_of("llama", 0, torch.bfloat16, **sizes)
    assert max(ratios(model, batch_of(1, 256, vocabulary=512))) <= 1.015


# ---- autocast and fp16 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast(family):
    """Weights and sums in fp32: as many roundings as in the plain model, at other places."""
    found = []
    for seed in range(2):
        model = model_of(family, seed, torch.float32)
        found += ratios(model, batch_of(2, 48, seed), autocast=torch.bfloat16)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert mean(found) <= 1.02 and max(found) <= 1.04


def test_under_autocast_on_average():
    families = ("llama", "gpt2", "phi", "bloom")
    found = [
        r
        for family in families
        for seed in range(3)
        for r in ratios(
            model_of(family, seed, torch.float32), batch_of(2, 48, seed), SETTINGS[1:], autocast=torch.bfloat16
        )
    ]
    assert mean(found) <= 1.005


HALVES: list[tuple[torch.dtype, torch.dtype | None]] = [(torch.float16, None), (torch.float32, torch.float16)]
LATE = 1.1  # the hidden states' gradient is divided by a power of two after the product: exact


@pytest.mark.parametrize(("weights", "autocast"), HALVES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_float16_with_a_loss_scale(family, weights, autocast):
    for seed in range(2):
        model = model_of(family, seed, weights)
        assert max(ratios(model, batch_of(2, 48, seed), scale=LOSS_SCALE, autocast=autocast)) <= LATE  # and so finite


@pytest.mark.parametrize(("weights", "autocast"), HALVES)
def test_float16_over_many_tokens(weights, autocast):
    """Each token's share of the loss is far below what fp16 can hold, unless it is scaled first."""
    model, batch = model_of("llama", 0, weights, vocab_size=2000), batch_of(24, 64, vocabulary=2000)
    assert max(ratios(model, batch, SETTINGS[2:], scale=LOSS_SCALE, autocast=autocast)) <= LATE
    with patch("mstplan.train.loss._computes_in_fp16", lambda hidden: False):
        assert (
            max(ratios(model, batch, SETTINGS[2:], scale=LOSS_SCALE, autocast=autocast)) > 2
        )  # the comparison notices


@pytest.mark.parametrize(("weights", "autocast"), HALVES)
def test_float16_over_the_same_token_again_and_again(weights, autocast):
    """Sums over all tokens are more than fp16 can hold, unless they are divided first."""
    model, ids = model_of("llama", 0, weights), torch.full((32, 64), 7)
    with torch.no_grad():
        model.model.norm.weight.fill_(40.0)
    assert max(ratios(model, {"input_ids": ids, "labels": ids}, SETTINGS[2:], autocast=autocast)) <= LATE
