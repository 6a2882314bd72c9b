"""One training step of a transformers model as a recipe describes it: the same code on fake tensors, on the CPU and on CUDA.

Only the recorder around it differs. Passes follow the step model's instants: forward (with the loss), backward, optimizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from ..errors import ModelError, one_line
from ..step.instants import Pass
from ..step.losses import LOSSES
from ..step.optimizers import OPTIMIZERS
from ..step.recipe import Recipe
from ..step.runnable import check_runnable
from ..step.selection import Selection
from .runtime import RUNTIME, Runtime
from .selecting import freeze
from .wrap import Minisequence

if TYPE_CHECKING:
    from ..step.optimizers.base import Make

DTYPES = {"bf16": torch.bfloat16, "mixed": torch.float32, "fp32": torch.float32}

NO_HOST_MEMORY = "can't allocate memory"
"""What the RuntimeError of torch's allocator for CPUs says."""


def read_settings(config: Mapping[str, Any], code_from: str | None = None) -> PreTrainedConfig:
    """transformers' configuration object of a config.json. code_from: the folder or Hugging Face id that it lies in, when
    the code that lies there may be run. Raises ModelError when transformers has no code for it."""
    fields = {name: value for name, value in config.items() if name != "quantization_config"}
    kind = one_line(config.get("model_type"))
    if code_from is not None and "auto_map" in config:
        return _read_or_refuse(lambda: AutoConfig.from_pretrained(code_from, trust_remote_code=True), kind)
    if kind not in CONFIG_MAPPING:
        way_out = (
            "--trust-remote-code runs the code that comes with it."
            if "auto_map" in config
            else "A newer one may have it."
        )
        raise ModelError(
            f"transformers {transformers.__version__} has no code for this model (model_type {kind}).\n{way_out}"
        )
    return _read_or_refuse(lambda: AutoConfig.for_model(**fields), kind)


def _read_or_refuse(read: Callable[[], PreTrainedConfig], kind: str) -> PreTrainedConfig:
    try:
        with quiet_transformers():
            return read()
    except Exception as e:  # noqa: BLE001  transformers raises what it likes
        raise ModelError(f"transformers cannot read this model ({kind}): {one_line(e)}") from None


def build_model(
    settings: PreTrainedConfig, recipe: Recipe, attention: str, device: str, remote_code: bool = False
) -> PreTrainedModel:
    """The model with random weights, in training mode; `settings` stay as they are. remote_code: may code that is not
    transformers' be run? Raises ModelError where there is none."""
    settings = turn_cache_off(copy.deepcopy(settings))
    with torch.device(device), quiet_transformers():
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                settings, dtype=DTYPES[recipe.precision], attn_implementation=attention, trust_remote_code=remote_code
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as e:
            if NO_HOST_MEMORY in str(e):
                raise
            raise ModelError(
                f"transformers cannot build {settings.model_type} with attention {attention!r}: {one_line(str(e).strip(), 200)}"
            ) from None
    freeze(model, Selection(recipe.train, recipe.freeze))
    if recipe.input_gradients:
        model.enable_input_require_grads()
    return model.train()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence what transformers says about settings that no training step reads."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def turn_cache_off(settings: PreTrainedConfig) -> PreTrainedConfig:
    """Turn the cache of keys and values off, in place, in a configuration and its parts. Training never reads it."""
    for config in (settings, *(getattr(settings, name, None) for name in settings.sub_configs)):
        if config is not None:
            config.use_cache = False
    return settings


class TrainingStep:
    """A model, its optimizer, and a batch of random tokens (b, s). `run` makes one optimizer step.

    Chunks must be numbers here, not "auto". runtime: what mstplan's own part of the step runs on. Raises RecipeError for
    what no step can be built for, ModelError for a model that the runtime refuses.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe, seq_len: int, runtime: Runtime = RUNTIME):
        check_runnable(recipe)
        self.recipe, self.model = recipe, model
        self.device = next(model.parameters()).device
        chunked = recipe.loss_in_chunks
        if not chunked:
            LOSSES[recipe.loss].install(model)
        if recipe.checkpoint != "none" or chunked or recipe.mlp_chunks != 1:
            Minisequence(runtime)(
                model,
                mlp_chunks=int(recipe.mlp_chunks),
                loss_chunks=int(recipe.loss_chunks),
                checkpoint=recipe.checkpoint,
                offload=recipe.offload_layer_inputs,
            )
        make_optimizer = OPTIMIZERS[recipe.optimizer].make(recipe)
        self.optimizer = None if recipe.optimizer_in_backward else make_optimizer(weights_to_train(model))
        self.backward_optimizers = step_in_backward(model, make_optimizer) if recipe.optimizer_in_backward else []
        vocabulary = vocabulary_of(model)
        self.tokens, self.labels = (
            torch.randint(0, vocabulary, (recipe.batch, seq_len), device=self.device) for _ in range(2)
        )

    def run(self, begin: Callable[[Pass], Any] = lambda _pass: None) -> torch.Tensor:
        """One optimizer step; `begin` is told when each pass of it begins. Returns the loss of the last micro-batch, detached."""
        for _ in range(self.recipe.accumulation):
            begin(Pass.FORWARD)
            loss = self.forward()
            begin(Pass.BACKWARD)
            loss.backward()
            loss = loss.detach()
        begin(Pass.OPTIMIZER)
        self.update()
        return loss

    def forward(self) -> torch.Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.recipe.autocast):
            loss: torch.Tensor | None = self.model(input_ids=self.tokens, labels=self.labels).loss
        if loss is None:
            raise ModelError(f"{type(self.model).__name__} gives no loss for token ids and labels.")
        return loss

    def update(self) -> None:
        """The optimizer's step; gradients go."""
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Vocabulary usable as input and as label; embedding and head may be padded to different sizes."""
    input_size = model.get_input_embeddings().num_embeddings
    output_size = getattr(model.get_output_embeddings(), "out_features", input_size)
    return min(input_size, output_size, getattr(model.config.get_text_config(), "unpadded_vocab_size", input_size))


def weights_to_train(model: nn.Module) -> list[nn.Parameter]:
    """Weights that get gradients; some families have others, such as routers' corrections."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def step_in_backward(model: nn.Module, make_optimizer: Make) -> list[torch.optim.Optimizer]:
    """Step each weight as soon as its gradient is there, then let the gradient go."""
    optimizers = []
    for weight in weights_to_train(model):
        optimizer = make_optimizer([weight])
        optimizers.append(optimizer)

        def step_weight(_weight: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        weight.register_post_accumulate_grad_hook(step_weight)
    return optimizers


def make_states(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Let optimizers make the states that they make in their first step: gradients of any value do."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.empty_like(weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
