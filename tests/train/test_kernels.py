"""Liger's kernels in the runtime: where they are at hand, under the pieces, and out again with `undo`. (Triton needs a GPU: here stands
in a package whose norm is the model's own in torch.)"""

from __future__ import annotations

import copy
import sys
from types import MethodType, ModuleType

import pytest
import torch
from transformers.models.llama import modeling_llama

from mstplan.errors import MissingError, RecipeError
from mstplan.step.recipe import strategy
from mstplan.train import fused, minisequence

from .families import small_batch, small_model
from .test_exact import assert_equal, step

ran: list[str] = []


def liger_norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    ran.append("norm")
    return type(self).forward(self, x)


def liger_rotary(*args: object, **kwargs: object) -> object:
    ran.append("rotary")
    return ROTARY(*args, **kwargs)


ROTARY = modeling_llama.apply_rotary_pos_emb


@pytest.fixture
def liger(monkeypatch) -> None:
    """The package, as far as it is asked for."""

    def apply(model: torch.nn.Module, **_kernels: bool) -> None:
        modeling_llama.apply_rotary_pos_emb = liger_rotary
        for module in model.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.in_place = True
                module.forward = MethodType(liger_norm, module)

    package, transformers = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    transformers._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    monkeypatch.setattr(fused, "_check_device", lambda _model, _what: None)
    ran.clear()


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("settings", [{}, {"layer_in_chunks": True, "attention_groups": 2}])
def test_they_run_in_the_pieces_and_go_with_undo(settings):
    model, (ids, labels) = small_model("llama"), small_batch(2, 13)
    wanted = step(model, ids, labels)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    minisequence(model, mlp_chunks=3, loss_chunks=4, kernels="liger", **settings)
    assert_equal(step(model, ids, labels), wanted)
    assert {"norm", "rotary"} <= set(ran)
    copied = copy.deepcopy(model)
    for each in (model, copied):
        minisequence.undo(each)
        ran.clear()
        assert_equal(step(each, ids, labels), wanted)
        assert not ran and modeling_llama.apply_rotary_pos_emb is ROTARY
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert {name: set(keys) for name, keys in after.items()} == {name: set(keys) for name, keys in before.items()}


@pytest.mark.usefixtures("liger")
def test_they_are_taken_where_they_are_at_hand(monkeypatch):
    model, (ids, labels) = small_model("llama"), small_batch(2, 13)
    minisequence(model, mlp_chunks=3, loss_chunks=4)  # on a CPU
    step(model, ids, labels)
    assert not ran
    minisequence.undo(model)
    monkeypatch.setattr("mstplan.train.wrap.liger_is_at_hand", lambda _model: True)
    minisequence(model, mlp_chunks=3, loss_chunks=4)
    step(model, ids, labels)
    assert "norm" in ran
    minisequence.undo(model)
    ran.clear()
    minisequence(model, mlp_chunks=3, loss_chunks=4, kernels="torch")
    step(model, ids, labels)
    assert not ran


@pytest.mark.usefixtures("liger")
def test_a_recipe_brings_them():
    model, (ids, labels) = small_model("llama"), small_batch(2, 13)
    minisequence(model, plan=strategy("mst", kernels="liger"))
    step(model, ids, labels)
    assert "norm" in ran
    minisequence.undo(model)


@pytest.mark.usefixtures("liger")
def test_a_model_that_cannot_be_wrapped_keeps_its_own():
    model = small_model("llama")
    with pytest.raises(Exception, match="make no 3 groups"):
        minisequence(model, mlp_chunks=3, layer_in_chunks=True, attention_groups=3, kernels="liger")
    assert modeling_llama.apply_rotary_pos_emb is ROTARY
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_what_is_refused(monkeypatch):
    with pytest.raises(RecipeError, match="no code for CPUs in Liger's kernels"):
        minisequence(small_model("llama"), kernels="liger")
    with pytest.raises(RecipeError, match="kernels must be 'torch', 'liger', or None"):
        minisequence(small_model("llama"), kernels="triton")
    monkeypatch.setattr(fused, "_check_device", lambda _model, _what: None)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(MissingError, match="pip install liger-kernel"):
        minisequence(small_model("llama"), kernels="liger")
