"""Layers in pieces: loss and gradients equal the plain model's, and nothing but attention exists for all tokens at once."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from mstplan.errors import ModelError, RecipeError
from mstplan.step.selection import Selection
from mstplan.train import minisequence
from mstplan.train.locate import find_parts
from mstplan.train.mixing import spans_of
from mstplan.train.selecting import freeze

from .families import FAMILIES, small_batch, small_model
from .test_exact import FROZEN, MODES, assert_equal, assert_exact, assert_gradient_is_the_slope, step
from .test_precision import batch_of, error, gradients, in_chunks, in_float64, model_of

LAYERS = {"layer_in_chunks": True, "attention_groups": 1}
MIXERS = ("bloom", "falcon")
"""Families whose attention is not asked for by name: the module that holds it runs whole."""


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, mode):
    assert_exact(small_model(family), **LAYERS, **MODES[mode])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in MIXERS])
def test_groups_of_heads(family):
    model = small_model(family)
    ids, labels = small_batch(2, 13)
    wanted = step(model, ids, labels)
    minisequence(model, mlp_chunks=3, loss_chunks=4, layer_in_chunks=True, attention_groups=2)
    assert_equal(step(model, ids, labels), wanted)


ON_HOST = [family for family in FAMILIES if family not in (*MIXERS, "gpt_oss")]


@pytest.mark.parametrize("family", ON_HOST)
def test_attention_from_the_host(family):
    model = small_model(family)
    ids, labels = small_batch(2, 13)
    wanted = step(model, ids, labels)
    minisequence(model, mlp_chunks=3, loss_chunks=4, **LAYERS | {"attention_groups": 2, "attention_on_host": True})
    assert_equal(step(model, ids, labels), wanted)
    model.eval()  # which transformers does not checkpoint
    assert_equal(step(model, ids, labels), wanted)


MODELS = {family: small_model(family, num_hidden_layers=3) for family in ("llama", "gemma2", "opt", "gpt_oss", "bloom")}


@settings(max_examples=30)
@given(
    family=st.sampled_from(sorted(MODELS)),
    sequences=st.integers(1, 3),
    tokens=st.integers(2, 24),
    chunks=st.integers(1, 30),
    groups=st.integers(1, 2),
    checkpoint=st.sampled_from(["none", "layer", "sqrt", 2, 5]),
    offload=st.booleans(),
    on_host=st.booleans(),
)
def test_any_length_batch_and_chunks(family, sequences, tokens, chunks, groups, checkpoint, offload, on_host):
    model, (ids, labels) = MODELS[family], small_batch(sequences, tokens)
    wanted = step(model, ids, labels)
    minisequence(
        model,
        mlp_chunks=chunks,
        loss_chunks=3,
        layer_in_chunks=True,
        attention_groups=1 if family in MIXERS else groups,
        checkpoint=checkpoint,
        offload=offload and checkpoint != "none",
        attention_on_host=on_host and checkpoint == "layer" and family in ON_HOST,
    )
    try:
        assert_equal(step(model, ids, labels), wanted)
    finally:
        minisequence.undo(model)


@pytest.mark.parametrize("mode", ["none", "layer", "segments", "selective"])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_frozen_weights(family, frozen, mode):
    model = small_model(family, num_hidden_layers=3)
    freeze(model, Selection(**FROZEN[frozen]))
    ids, labels = small_batch(2, 13)
    wanted = step(model, ids, labels)
    minisequence(model, mlp_chunks=3, loss_chunks=4, **LAYERS, **MODES[mode])
    for _ in range(2):
        assert_equal(step(model, ids, labels), wanted)


def test_dropout_draws_the_same_numbers_again():
    model = small_model("gpt2", dropout=0.2)
    minisequence(model, mlp_chunks=3, loss_chunks=4, **LAYERS)
    assert_gradient_is_the_slope(model, model.transformer.h[0].attn.c_attn.weight)


def rows_of(model: nn.Module, pick: str, ids: torch.Tensor, labels: torch.Tensor) -> int:
    """Rows that run through modules of a name in a step."""
    rows = [0]

    modules = [m for name, m in model.named_modules() if name.endswith(pick)]
    kind = type(modules[0])
    plain = kind.forward

    def counted(self: nn.Module, x: torch.Tensor, *more: object) -> object:
        rows[0] += x.shape[:-1].numel() if any(self is m for m in modules) else 0
        return plain(self, x, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", counted)
        model(input_ids=ids, labels=labels).loss.backward()
    return rows[0]


@pytest.mark.parametrize(
    ("family", "module", "passes"),
    [
        ("llama", "down_proj", 2),
        ("llama", "o_proj", 2),
        ("llama", "q_proj", 3),
        ("llama", "input_layernorm", 3),
        ("olmo2", "o_proj", 2),
        ("gpt2", "attn.c_attn", 3),
        ("gpt2", "mlp.c_fc", 2),
        ("mixtral", "gate", 2),
    ],
)
def test_nothing_runs_forward_more_often_than_a_checkpoint_and_once_more(family, module, passes):
    """Checkpointing runs all twice. Up to attention a piece is run a third time, for its own backward, for attention needs all of
    them before; what follows attention is not."""
    model, (ids, labels) = small_model(family), small_batch(2, 48)
    minisequence(model, mlp_chunks=4, loss_chunks=4, **LAYERS)
    layers = len(find_parts(model).layers)
    few = layers * 2 * 4 * 2 * 2 if passes == 3 else 0  # two tokens for each piece of what nobody reads, in two passes
    assert 0 <= rows_of(model, module, ids, labels) - passes * layers * 2 * 48 <= few


@pytest.mark.parametrize(
    ("family", "norm"), [("llama", "model.norm"), ("gpt2", "transformer.ln_f"), ("gemma2", "model.norm")]
)
def test_the_norm_before_the_head_runs_in_pieces(family, norm):
    model, (ids, labels) = small_model(family), small_batch(2, 48)
    minisequence(model, mlp_chunks=4, loss_chunks=4, **LAYERS)
    module, rows = model.get_submodule(norm), []
    plain = type(module).forward

    def counted(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        rows.extend([x.shape[1]] if self is module else [])
        return plain(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module), "forward", counted)
        model(input_ids=ids, labels=labels).loss.backward()
    assert rows == [12] * 8  # four pieces in both passes


def test_attention_runs_as_often_as_under_checkpoints(monkeypatch):
    ran = {}
    for layers, on_host in ((False, False), (True, False), (True, True)):
        model, (ids, labels) = small_model("llama"), small_batch(2, 16)
        settings = {**LAYERS, "attention_on_host": on_host} if layers else {}
        minisequence(model, mlp_chunks=4, loss_chunks=4, **settings)
        count = [0]
        plain = modeling_llama.eager_attention_forward

        def counted(module, q, *args, plain=plain, count=count, **kwargs):
            count[0] += q.shape[:-1].numel()
            return plain(module, q, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(modeling_llama, "eager_attention_forward", counted)
            model(input_ids=ids, labels=labels).loss.backward()
        ran[layers, on_host] = count[0]
    assert set(ran.values()) == {2 * 2 * 2 * 4 * 16}  # passes, layers, sequences, heads, tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_as_plain(family):
    """Weights' gradients are summed over pieces in fp32; those of norms and of experts are rounded once a piece, as in `mst`."""
    model, batch = model_of(family, 0, torch.bfloat16), batch_of(2, 48)
    truth, plain = in_float64(model, batch), gradients(model, batch)
    for groups, on_host in ((1, False), (1 if family in MIXERS else 2, family in ON_HOST)):
        setting = {"mlp_chunks": 4, "loss_chunks": 4, "layer_in_chunks": True, "attention_groups": groups}
        setting["attention_on_host"] = on_host
        assert error(in_chunks(model, batch, setting), truth) <= 1.03 * error(plain, truth)


def test_arguments_that_want_gradients_get_them():
    """Layers may be given more for each token than hidden states: here a gate that is trained."""
    model, (ids, labels) = small_model("llama"), small_batch(2, 13)
    gate = nn.Parameter(torch.rand(1, 13, 32, dtype=torch.float64))
    kind = type(model.model.layers[0])
    forward = kind.forward

    def gated(self, hidden_states, *args, gate=None, **kwargs):
        return forward(self, hidden_states if gate is None else hidden_states * gate, *args, **kwargs)

    def add_gate(_layer, args, kwargs):
        return args, kwargs | {"gate": gate[:, : args[0].shape[1]]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", gated)
        wrapped = copy.deepcopy(model)
        results = []
        for each in (model, wrapped):
            for layer in each.model.layers:
                layer.register_forward_pre_hook(add_gate, with_kwargs=True)
            if each is wrapped:
                minisequence(each, mlp_chunks=3, loss_chunks=4, checkpoint="none", **LAYERS)
            gate.grad = None
            results.append((step(each, ids, labels), gate.grad.clone()))
    assert_equal(results[1][0], results[0][0])
    assert torch.allclose(results[1][1], results[0][1], rtol=1e-10, atol=0)


def test_evaluation_and_generation_stay_as_they_are():
    model, (ids, _) = small_model("llama").eval(), small_batch(1, 13)
    wanted = model(input_ids=ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    minisequence(model, mlp_chunks=3, loss_chunks=4, **LAYERS)
    with torch.no_grad():
        found = model(input_ids=ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found[1], wanted[1]) and torch.allclose(found[0], wanted[0], rtol=1e-12)


def test_what_cannot_run_so_is_refused_by_name_and_left_as_it_was():
    model = small_model("llama")
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    with pytest.raises(ModelError, match="LlamaDecoderLayer has 2 heads of keys, which make no 3 groups"):
        minisequence(model, mlp_chunks=3, loss_chunks=4, layer_in_chunks=True, attention_groups=3)
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before
    for wrong in (0, "many", 1.5, True):
        with pytest.raises(RecipeError, match="attention_groups must be a whole number from 1"):
            minisequence(model, layer_in_chunks=True, attention_groups=wrong)
    with pytest.raises(RecipeError, match="layer_in_chunks must be True or False"):
        minisequence(model, layer_in_chunks="yes")
    with pytest.raises(RecipeError, match=r"attention_groups.* are of layers in chunks"):
        minisequence(model, mlp_chunks=3, attention_groups=2)
    for changes, words in (
        ({}, r"attention_on_host.* is of layers in chunks"),
        ({"layer_in_chunks": True, "checkpoint": "none"}, r"attention_on_host.* needs every layer checkpointed"),
        ({"layer_in_chunks": True, "checkpoint": "sqrt"}, r"attention_on_host.* needs every layer checkpointed"),
    ):
        with pytest.raises(RecipeError, match=words):
            minisequence(model, mlp_chunks=3, attention_on_host=True, **changes)
    for family, words in (
        ("gpt_oss", "GptOssAttention has weights within attention itself"),
        ("bloom", "BloomForCausalLM has no attention that transformers' interface knows"),
    ):
        with pytest.raises(ModelError, match=words):
            minisequence(small_model(family), mlp_chunks=3, attention_on_host=True, **LAYERS)


def test_what_waits_on_the_host_is_gone_after_a_step():
    """Also after one that stopped between the passes."""
    model, (ids, labels) = small_model("llama"), small_batch(2, 16)
    minisequence(model, mlp_chunks=4, loss_chunks=4, attention_on_host=True, **LAYERS)
    graphs = model._mstplan.graphs._by_storage
    wanted = step(model, ids, labels)
    assert graphs == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            step(model, ids, labels)
    assert_equal(step(model, ids, labels), wanted)
    assert graphs == {}


NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "full_attention", "mlp"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 61,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 4,
}


def test_what_layers_that_stay_whole_are_given_is_gone_after_a_step():
    """Layers of a mixer alone do not run in pieces, and whoever tried to must not look on."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("nemotron_h", **NEMOTRON_H)).train()
    minisequence(model, mlp_chunks=4, loss_chunks=4, **LAYERS)
    mixer = find_parts(model).layers[0].mixer
    assert not mixer._forward_hooks and not mixer._forward_pre_hooks


def test_masks_stay_whole():
    mask, hidden, rotary = torch.ones(1, 1, 11, 11), torch.ones(2, 11, 8), (torch.ones(1, 11, 4), torch.ones(1, 11, 4))
    call = (hidden, mask), {"attention_mask": torch.ones(2, 11), "position_embeddings": rotary, "use_cache": False}
    assert spans_of(call, ["hidden_states", "mask"], 11).places == {
        (0,): 1,
        ("position_embeddings", 0): 1,
        ("position_embeddings", 1): 1,
    }


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_mask_of_padding(family, groups):
    model, (ids, labels) = small_model(family), small_batch(2, 13)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    wanted = step(model, ids, labels, attention_mask=mask)
    minisequence(model, mlp_chunks=3, loss_chunks=4, layer_in_chunks=True, attention_groups=groups)
    assert_equal(step(model, ids, labels, attention_mask=mask), wanted)
