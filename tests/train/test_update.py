"""The end of a training step: clipping, and the optimizer that a recipe names."""

from __future__ import annotations

import sys

import pytest
import torch

from mstplan.errors import MissingError
from mstplan.step.recipe import Recipe
from mstplan.train.selecting import kinds_in
from mstplan.train.step import TrainingStep, build_model, read_settings

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "tie_word_embeddings": False,
}


def step_of(**fields: object) -> TrainingStep:
    recipe = Recipe(**{"precision": "fp32", **fields})
    return TrainingStep(build_model(read_settings(TINY), recipe, "sdpa", "cpu"), recipe, 32)


def norm_that_is_stepped(**fields: object) -> float:
    """The norm of all gradients as the optimizer finds them."""
    torch.manual_seed(1)
    step, found = step_of(optimizer="sgd", **fields), []

    def note() -> None:
        found.append(torch.nn.utils.get_total_norm([w.grad for w in step.model.parameters() if w.grad is not None]))

    assert step.optimizer is not None
    step.optimizer.step = note  # type: ignore[method-assign]
    step.run()
    return float(found[0])


def test_gradients_are_scaled_down_to_the_norm_and_not_up():
    whole = norm_that_is_stepped()
    assert norm_that_is_stepped(max_grad_norm=whole / 10) == pytest.approx(whole / 10, rel=1e-4)
    assert norm_that_is_stepped(max_grad_norm=whole * 10) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("in_backward", [False, True])
def test_muon_steps_matrices_of_layers_and_adamw_the_rest(in_backward):
    step = step_of(optimizer="muon", optimizer_in_backward=in_backward)
    before = {name: weight.detach().clone() for name, weight in step.model.named_parameters()}
    step.run()
    made = step.backward_optimizers or [step.optimizer]
    keys = {weight: set(state) for each in made for weight, state in each.state.items()}
    for name, weight in step.model.named_parameters():
        of_layer = weight.ndim == 2 and "layers" in name
        assert keys[weight] == ({"momentum_buffer"} if of_layer else {"step", "exp_avg", "exp_avg_sq"}), name
        assert not torch.equal(weight, before[name])
        assert weight.grad is None


def test_kinds_are_those_of_the_models_own_weights():
    model = step_of().model
    kinds_of = kinds_in(model)
    assert {str(k) for k in kinds_of(model.get_input_embeddings().weight)} == {"embeddings"}
    assert {str(k) for k in kinds_of(model.lm_head.weight)} == {"head"}


def test_a_step_without_its_package_is_refused(monkeypatch):
    for name in ("torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingError, match="pip install torchao"):
        step_of(optimizer="adamw-4bit")
