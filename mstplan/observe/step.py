"""One training step of a transformers model as a recipe describes it: the same code on fake tensors, on the CPU and on CUDA.

Only the recorder around it differs. Phases follow the step model's instants: forward (with the loss), backward, optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.optimization import Adafactor

from ..errors import RecipeError
from ..plan.recipe import Recipe
from ..train import minisequence

FORWARD, BACKWARD, OPTIMIZER = PHASES = ("forward", "backward", "optimizer")
DTYPES = {"bf16": torch.bfloat16, "mixed": torch.float32, "fp32": torch.float32}

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class TrainingStep:
    """A model with random weights, its optimizer, and a batch of random tokens (b, s). `run` makes one optimizer step.

    config: of a causal language model, as in its config.json. Chunks must be numbers here, not "auto". Raises RecipeError
    for what no step can be built for, ModelError for a model that the runtime refuses.
    """

    def __init__(self, config: dict[str, Any], recipe: Recipe, seq_len: int, attention: str, device: str = "cpu"):
        if "auto" in (recipe.mlp_chunks, recipe.loss_chunks):
            raise RecipeError("a training step needs numbers of chunks, not 'auto'.")
        if recipe.weights_on_host or recipe.optimizer_on_host or recipe.optimizer == "adamw-8bit":
            raise RecipeError("optimizers or weights on the host, and 8-bit optimizers, cannot be run here.\nPlan them with the formula rung.")
        self.recipe, self.device = recipe, device
        self.model = _model(config, recipe, attention, device)
        make = optimizer_of(recipe)
        self.optimizer = None if recipe.optimizer_in_backward else make(self.model.parameters())
        if recipe.optimizer_in_backward:
            step_in_backward(self.model, make)
        shape = (recipe.batch, seq_len)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        self.tokens, self.labels = (torch.randint(0, vocabulary, shape, device=device) for _ in range(2))

    def run(self, phase: Callable[[str], Any] = lambda _name: None) -> torch.Tensor:
        """One optimizer step; `phase` is told when each part of it begins. Returns the loss of the last micro-batch, detached."""
        for _ in range(self.recipe.accumulation):
            phase(FORWARD)
            with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.recipe.precision == "mixed"):
                loss = self.model(input_ids=self.tokens, labels=self.labels).loss
            phase(BACKWARD)
            loss.backward()
            loss = loss.detach()
        phase(OPTIMIZER)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss


def _model(config: dict[str, Any], recipe: Recipe, attention: str, device: str) -> PreTrainedModel:
    settings = AutoConfig.for_model(**config)
    settings.use_cache = False
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, dtype=DTYPES[recipe.precision], attn_implementation=attention)
    chunked = recipe.loss == "chunked"
    if recipe.checkpoint != "none" or chunked or recipe.mlp_chunks != 1:
        minisequence(
            model, mlp_chunks=int(recipe.mlp_chunks), loss_chunks=int(recipe.loss_chunks), checkpoint=recipe.checkpoint,
            offload=recipe.offload_layer_inputs,
        )  # fmt: skip
    return model.train()


def optimizer_of(recipe: Recipe) -> MakeOptimizer:
    foreach = recipe.adamw_kernel == "foreach"
    if recipe.optimizer == "sgd":
        return lambda weights: torch.optim.SGD(weights, lr=1e-5, foreach=foreach)
    if recipe.optimizer == "adafactor":  # as transformers' Trainer makes it
        return lambda weights: Adafactor(weights, lr=1e-5, scale_parameter=False, relative_step=False)
    return lambda weights: torch.optim.AdamW(weights, lr=1e-5, foreach=foreach, fused=recipe.adamw_kernel == "fused" or None)


def step_in_backward(model: nn.Module, make: MakeOptimizer) -> None:
    for weight in model.parameters():
        optimizer = make([weight])

        def hook(_weight: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        weight.register_post_accumulate_grad_hook(hook)

