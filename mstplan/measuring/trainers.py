"""Training steps as transformers' Trainer makes them, told apart into the passes of a step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..errors import MissingError
from ..step.instants import Pass
from ..step.recipe import Recipe
from ..step.runnable import trainer_optimizer
from ..train.step import vocabulary_of


class Watch(NamedTuple):
    """What is called in each step of a trainer: as the step begins and ends, with its number from 0 on, and as each of its passes begins."""

    step_begins: Callable[[int], object]
    pass_begins: Callable[[Pass], object]
    step_ends: Callable[[int], object]


def train(model: PreTrainedModel, recipe: Recipe, seq_len: int, steps: int, watch: Watch) -> float:
    """Train so many steps on random tokens. Gives the mean loss. Raises MissingError where transformers' Trainer cannot run."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            arguments = TrainingArguments(output_dir=folder, max_steps=steps, **_settings(model, recipe))
            arguments._n_gpu = min(1, arguments.n_gpu)  # else it would copy the model to every GPU that it sees
        except ImportError:
            raise MissingError("transformers' Trainer needs accelerate: pip install accelerate") from None
        tokens = _Tokens(steps * recipe.accumulation * recipe.batch, seq_len, vocabulary_of(model))
        trainer = _MarkedTrainer(model, arguments, train_dataset=tokens, callbacks=[_Callback(watch)])
        trainer.pass_begins = watch.pass_begins
        return float(trainer.train().training_loss)


def _settings(model: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    """TrainingArguments of a recipe. With weights in bf16, too, people switch autocast on."""
    return {
        "per_device_train_batch_size": recipe.batch,
        "gradient_accumulation_steps": recipe.accumulation,
        "gradient_checkpointing": recipe.checkpoint == "layer",
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "optim": trainer_optimizer(recipe),
        "max_grad_norm": recipe.max_grad_norm or 0.0,  # 0: it does not clip
        "bf16": recipe.precision != "fp32",
        "use_cpu": model.device.type == "cpu",
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


class _Tokens(Dataset[dict[str, torch.Tensor]]):
    """Random token ids and labels, (s,) each."""

    def __init__(self, count: int, seq_len: int, vocabulary: int):
        self.tokens = torch.randint(0, vocabulary, (count, seq_len))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class _MarkedTrainer(Trainer):
    """A Trainer that tells when forward and backward begin."""

    pass_begins: Callable[[Pass], object]

    def compute_loss(self, *inputs: Any, **more: Any) -> Any:
        self.pass_begins(Pass.FORWARD)
        loss = super().compute_loss(*inputs, **more)
        self.pass_begins(Pass.BACKWARD)
        return loss


class _Callback(TrainerCallback):
    def __init__(self, watch: Watch):
        self.watch = watch

    def on_step_begin(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        self.watch.step_begins(state.global_step)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.watch.pass_begins(Pass.OPTIMIZER)

    def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
        self.watch.step_ends(state.global_step - 1)
