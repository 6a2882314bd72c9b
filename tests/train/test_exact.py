"""Loss and gradients in mini-sequences equal the plain model's: in float64 to 1e-10, over families, lengths and chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from mstplan.step.selection import Selection
from mstplan.train import minisequence
from mstplan.train.locate import find_mlps, find_parts
from mstplan.train.selecting import freeze

from .double import BOUND, difference, float64
from .families import FAMILIES, small_batch, small_model


def step(model: nn.Module, ids, labels, **more) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    with float64():
        loss = model(input_ids=ids, labels=labels, **more).loss
        loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, wanted) -> None:
    assert difference(found, wanted) == ""


MODES = {
    "none": {"checkpoint": "none"},
    "layer": {"checkpoint": "layer"},
    "offload": {"checkpoint": "layer", "offload": True},
    "segments": {"checkpoint": 2, "offload": True},
    "selective": {"checkpoint": "selective"},
    "every second": {"checkpoint": "every-2", "offload": True},
    "reentrant": {"checkpoint": "reentrant", "offload": True},
}


def assert_exact(model: nn.Module, **settings) -> None:
    """Over batches of several sizes, and again without."""
    for (sequences, tokens), chunks in (
        ((1, 8), (2, 3)),
        ((2, 13), (5, 4)),
        ((2, 13), (50, 50)),
    ):  # 13 tokens divide into none of these
        ids, labels = small_batch(sequences, tokens)
        wanted = step(model, ids, labels)
        minisequence(model, mlp_chunks=chunks[0], loss_chunks=chunks[1], **settings)
        assert_equal(step(model, ids, labels), wanted)
        minisequence.undo(model)
    assert_equal(step(model, ids, labels), wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, mode):
    assert_exact(small_model(family), **MODES[mode])


MODELS = {family: small_model(family, num_hidden_layers=3) for family in ("llama", "gemma2", "opt", "gpt_oss")}


@settings(max_examples=40)
@given(
    family=st.sampled_from(sorted(MODELS)),
    sequences=st.integers(1, 3),
    tokens=st.integers(2, 24),
    mlp_chunks=st.integers(1, 30),
    loss_chunks=st.integers(1, 30),
    checkpoint=st.sampled_from(["none", "layer", "sqrt", 2, 5]),
    offload=st.booleans(),
)
def test_any_length_batch_and_chunks(family, sequences, tokens, mlp_chunks, loss_chunks, checkpoint, offload):
    model, (ids, labels) = MODELS[family], small_batch(sequences, tokens)
    wanted = step(model, ids, labels)
    minisequence(
        model,
        mlp_chunks=mlp_chunks,
        loss_chunks=loss_chunks,
        checkpoint=checkpoint,
        offload=offload and checkpoint != "none",
    )
    try:
        assert_equal(step(model, ids, labels), wanted)
    finally:
        minisequence.undo(model)


@pytest.mark.parametrize("every", ["layer", 2, 3, "sqrt", 100])
@pytest.mark.parametrize("offload", [False, True])
def test_checkpoints_over_several_layers(every, offload):
    model = small_model("gpt2", n_layer=5, num_hidden_layers=5)  # 5 layers divide into none of these
    ids, labels = small_batch(2, 13)
    wanted = step(model, ids, labels)
    minisequence(model, mlp_chunks=3, loss_chunks=4, checkpoint=every, offload=offload)
    for _ in range(2):
        assert_equal(step(model, ids, labels), wanted)


FROZEN = {
    "embeddings": {"freeze": ("embeddings",)},
    "all but the head": {"train": ("head",)},
    "all but the MLPs": {"train": ("mlp",)},
    "all but the norms": {"train": ("norms",)},
    "all but one layer": {"train": ("*.1.*",)},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_frozen_weights(family, frozen, mode):
    """What is frozen gets no gradient, and what is trained the plain model's."""
    model = small_model(family, num_hidden_layers=3)
    freeze(model, Selection(**FROZEN[frozen]))
    ids, labels = small_batch(2, 13)
    wanted = step(model, ids, labels)
    assert 0 < len(wanted[1]) < len(list(model.parameters()))
    if mode == "reentrant":  # else layers would get no gradients
        model.enable_input_require_grads()
    minisequence(model, mlp_chunks=3, loss_chunks=4, **MODES[mode])
    for _ in range(2):
        assert_equal(step(model, ids, labels), wanted)


def test_the_comparison_notices_a_lost_token():
    """An implementation that drops the tail when S is not a multiple of M must not pass."""
    model = small_model("llama")
    ids, labels = small_batch(1, 13)
    wanted = step(model, ids, labels)
    labels[0, -1] = -100
    with pytest.raises(AssertionError):
        assert_equal(step(model, ids, labels), wanted)


def test_num_items_in_batch_and_shift_labels():
    model = small_model("qwen3")
    ids, labels = small_batch(2, 13)
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    for more in ({"num_items_in_batch": torch.tensor(40)}, {"num_items_in_batch": 40}, {"shift_labels": shifted}):
        wanted = step(model, ids, labels, **more)
        minisequence(model, mlp_chunks=3, loss_chunks=4)
        assert_equal(step(model, ids, labels, **more), wanted)
        minisequence.undo(model)


def test_gradient_accumulation_adds_up():
    model = small_model("llama")
    ids, labels = small_batch(2, 13)
    wanted = step(model, ids, labels)[1]
    minisequence(model, mlp_chunks=3, loss_chunks=4, checkpoint="layer")
    with float64():
        for _ in range(2):
            model(input_ids=ids, labels=labels).loss.backward()
    for name, weight in model.named_parameters():
        assert (
            weight.grad - 3 * wanted[name]
        ).norm() <= BOUND * weight.grad.norm()  # one plain step's is there already


def test_frozen_parameters_get_no_gradient():
    model = small_model("llama")
    for name, weight in model.named_parameters():
        weight.requires_grad_("layers.1" in name or "lm_head" in name)
    ids, labels = small_batch(2, 13)
    wanted = step(model, ids, labels)
    assert wanted[1].keys() == {n for n, w in model.named_parameters() if w.requires_grad}
    minisequence(model, mlp_chunks=3, loss_chunks=4)
    assert_equal(step(model, ids, labels), wanted)


def assert_gradient_is_the_slope(model: nn.Module, weight: nn.Parameter) -> None:
    """With dropout the gradients of a fixed seed must be those of its own forward: checked by finite differences."""
    ids, labels = small_batch(1, 13)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=weight.dtype)

    def loss_at(shift: float) -> torch.Tensor:
        torch.manual_seed(7)
        with torch.no_grad():
            weight.add_(shift * direction)
        with float64():
            loss = model(input_ids=ids, labels=labels).loss
        with torch.no_grad():
            weight.sub_(shift * direction)
        return loss

    slope = (loss_at(1e-6).item() - loss_at(-1e-6).item()) / 2e-6
    loss_at(0.0).backward()
    assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=1e-6)


def test_dropout_draws_the_same_numbers_again():
    model = small_model("gpt2", dropout=0.2)
    minisequence(model, mlp_chunks=3, loss_chunks=4)
    assert_gradient_is_the_slope(model, model.transformer.h[0].mlp.c_fc.weight)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_run_the_mlp_twice_not_three_times(family, dropout):
    tokens = dict.fromkeys(("plain", "chunked"), 0)
    for way in tokens:
        model = small_model(family, dropout)
        ids, labels = small_batch(2, 16)
        minisequence(model, mlp_chunks=4 if way == "chunked" else 1, loss_chunks=4, checkpoint="layer")
        model(
            input_ids=ids, labels=labels
        ).loss.backward()  # the first step tries out a few tokens and looks at the graph
        for _, mlp in find_mlps(find_parts(model)):
            matrix = next(
                m for m in mlp.first.modules() if isinstance(m, nn.Linear | Conv1D) or "Router" in type(m).__name__
            )
            matrix.register_forward_pre_hook(
                lambda _, inputs, way=way: tokens.__setitem__(way, tokens[way] + inputs[0].numel() // 32)
            )
        model(input_ids=ids, labels=labels).loss.backward()
    assert tokens["chunked"] == tokens["plain"] == 2 * 2 * 2 * 16  # passes x layers x batch x tokens


def test_the_head_runs_once_forward_per_token():
    model = small_model("llama")
    rows = []
    minisequence(model, mlp_chunks=4, loss_chunks=4)
    model.lm_head.weight.register_hook(lambda g: rows.append("gradient"))
    whole = F.linear

    def counted(x, w, b=None):
        rows.extend([x.shape[:-1].numel()] if w.shape == (61, 32) else [])
        return whole(x, w, b)

    nn.functional.linear, ids_labels = counted, small_batch(2, 16)
    try:
        model(input_ids=ids_labels[0], labels=ids_labels[1]).loss.backward()
    finally:
        nn.functional.linear = whole
    assert sum(r for r in rows if r != "gradient") == 32 and rows.count("gradient") == 1
