"""LM head and loss in one, and Liger's kernels, of the packages that people train with, in place in a model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import MissingError, ModelError, RecipeError
from ..step.liger import SERVED as LIGER_SERVES
from ..step.liger import kernels_for
from ..step.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from ..step.optimizers.base import KindsOf, Make
    from ..step.recipe import Recipe

Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], torch.Tensor]
"""The mean loss of hidden states (b, s, d), the head's weight (V, d), labels (b, s), which it shifts, and a cap of logits."""


def compute_loss_by(model: PreTrainedModel, compute: Compute) -> None:
    """Let the model's forward hand hidden states to `compute`, in place of its head and loss."""

    def forward(self: Any, input_ids: torch.Tensor, labels: torch.Tensor, **more: Any) -> CausalLMOutputWithPast:
        hidden = self.base_model(input_ids=input_ids, **more).last_hidden_state
        head = self.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise ModelError(f"the LM head of {type(self).__name__} has a bias, which this loss does not count.")
        cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
        return CausalLMOutputWithPast(loss=compute(hidden, head.weight, labels, cap))  # type: ignore[arg-type]

    model.forward = MethodType(forward, model)


# ---- the packages' own --------------------------------------------------------------------------------------------------


class Packages:
    """What puts them in place, and makes optimizers. A step of which only the memory is wanted hands in a subclass that puts stand-ins there."""

    def make_optimizer(self, recipe: Recipe, kinds_of: KindsOf) -> Make:
        """A function from weights to the recipe's optimizer. Raises MissingError where its package is not installed."""
        return OPTIMIZERS[recipe.optimizer].make(recipe, kinds_of)

    def install_loss(self, model: PreTrainedModel, loss: str) -> None:
        """The loss of that name, as its package computes it. Raises MissingError where that is not installed."""
        {"liger": _install_liger, "cce": _install_cce, "trl": _install_trl}[loss](model)

    def install_kernels(self, model: PreTrainedModel) -> None:
        """Liger's norms, rotary embedding and MLP. Raises MissingError."""
        served = kernels_for(model.config.model_type)
        _apply_liger(
            model, rope=served.rotary, rms_norm=True, swiglu=True, geglu=True, fused_linear_cross_entropy=False
        )


PACKAGES = Packages()


def liger_is_at_hand(model: PreTrainedModel) -> bool:
    """Whether Liger's kernels can run in place of the model's own operations: on a GPU, where they are installed and know its family."""
    return (
        model.device.type == "cuda"
        and find_spec("liger_kernel") is not None
        and model.config.model_type in LIGER_SERVES
    )


class LigerKernels:
    """Liger's norms, rotary embedding and MLP in place of a model's own. Raises MissingError, and RecipeError for a family that Liger does
    not serve, or on a CPU."""

    def __init__(self, model: PreTrainedModel, packages: Packages = PACKAGES):
        code = sys.modules[type(model).__module__]
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        functions = dict(vars(code))
        packages.install_kernels(model)
        self.own = {  # by module and attribute; by name, so that they are a copy's as well
            (name, key): before[name].get(key, _Absent)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if before[name].get(key, _Absent) is not value
        }
        self.functions = {name: functions[name] for name, value in vars(code).items() if functions[name] is not value}

    def take_out(self, model: PreTrainedModel) -> None:
        """Put the model's own back."""
        for (name, key), value in self.own.items():
            attributes = vars(model.get_submodule(name))
            if value is _Absent:
                attributes.pop(key, None)
            else:
                attributes[key] = value
        for name, function in self.functions.items():  # the rotary embedding is one function for all models of a family
            setattr(sys.modules[type(model).__module__], name, function)


class _Absent:
    """Stands for an attribute that a module had not."""


def _apply_liger(model: PreTrainedModel, **kernels: bool) -> None:
    _check_device(model, "Liger's kernels")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        raise MissingError("Liger's kernels are not installed: pip install liger-kernel") from None
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, **kernels)


def _install_liger(model: PreTrainedModel) -> None:
    _apply_liger(model, rope=False, rms_norm=False, swiglu=False, geglu=False, fused_linear_cross_entropy=True)


def _install_cce(model: PreTrainedModel) -> None:
    _check_device(model, "cut cross-entropy")
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        address = "git+https://github.com/apple/ml-cross-entropy"
        raise MissingError(f'cut cross-entropy is not installed: pip install "cut-cross-entropy @ {address}"') from None
    compute_loss_by(
        model,
        lambda hidden, weight, labels, cap: linear_cross_entropy(hidden, weight, labels, shift=True, softcap=cap),
    )


def _install_trl(model: PreTrainedModel) -> None:
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        raise MissingError('TRL\'s loss is not installed: pip install "trl>=1.15"') from None
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # those that SFTTrainer asks for
    fused = model.forward

    def forward(self: Any, **inputs: Any) -> Any:
        return fused(fused_lm_head=True, **inputs)

    model.forward = MethodType(forward, model)


def _check_device(model: PreTrainedModel, what: str) -> None:
    """Triton has no code for CPUs. Raises RecipeError."""
    if model.device.type == "cpu":
        raise RecipeError(f"there is no code for CPUs in {what}.\nTrace it as on a card, or take another recipe.")
