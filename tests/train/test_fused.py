"""Losses of packages, in place in a model: TRL's own on the CPU; what is missing, or runs on GPUs alone, is said."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch

from mstplan.errors import MissingError, ModelError, RecipeError
from mstplan.step.recipe import Recipe
from mstplan.train import fused
from mstplan.train.step import TrainingStep

from .llama import small_llama


def gradients(recipe: Recipe, model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    step = TrainingStep(model, recipe, 24)
    loss = step.forward()
    loss.backward()
    return float(loss.detach()), {name: w.grad for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("fields", [{}, {"checkpoint": "layer"}, {"mlp_chunks": 3, "mlp_recompute": True}], ids=str)
def test_trls_loss_is_that_of_transformers(fields: dict[str, Any]) -> None:
    pytest.importorskip("trl", minversion="1.15")
    recipe = Recipe(precision="fp32", batch=2, **fields)
    torch.manual_seed(1)
    plain = small_llama().float()
    torch.manual_seed(1)
    other = small_llama().float()
    loss, expected = gradients(recipe, plain)
    trl_loss, found = gradients(recipe.changed(loss="trl"), other)
    assert trl_loss == pytest.approx(loss, rel=1e-5) and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("fields", [{"loss": "liger"}, {"loss": "cce"}, {"kernels": "liger"}], ids=str)
def test_triton_has_no_code_for_cpus(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="no code for CPUs"):
        TrainingStep(small_llama(), Recipe(**fields), 8)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"loss": "liger"}, "pip install liger-kernel"),
        ({"kernels": "liger"}, "pip install liger-kernel"),
        ({"loss": "cce"}, 'pip install "cut-cross-entropy @ git'),
        ({"loss": "trl"}, 'pip install "trl>=1.15"'),
    ],
    ids=str,
)
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], says: str) -> None:
    plain = builtins.__import__

    def find(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("liger_kernel", "cut_cross_entropy", "trl"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", find)
    monkeypatch.setattr(fused, "_check_device", lambda *_: None)
    with pytest.raises(MissingError) as e:
        TrainingStep(small_llama(), Recipe(**fields), 8)
    assert says in str(e.value)


def test_a_head_with_a_bias_is_refused() -> None:
    model = small_llama()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
    fused.compute_loss_by(model, lambda *_: torch.zeros(()))
    with pytest.raises(ModelError, match="has a bias"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64), labels=torch.zeros(1, 4, dtype=torch.int64))
