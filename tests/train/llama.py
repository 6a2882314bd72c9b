"""A small llama, its batches, and what the tests of fitting in measure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, HIDDEN = 61, 32
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
CHUNKS = {"mlp_chunks": 3, "loss_chunks": 4}


def small_llama(dtype: torch.dtype = torch.float64, **more: Any) -> LlamaForCausalLM:
    """The same random weights every time, in training mode. In float64 the loss is computed in float64 too."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **more})).to(dtype).train()
    if dtype == torch.float64:
        model.loss_function = exact_loss
    return model


def exact_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    shift_labels: Any = None,
    **_: Any,
) -> torch.Tensor:
    """transformers' loss without its cast to fp32, which would drown a difference in float64."""
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:] if shift_labels is None else shift_labels
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return total / (num_items_in_batch if num_items_in_batch is not None else (targets != -100).sum())


def tokens(sequences: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random ids of shape (sequences, length), the special ones not among them."""
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


Step = tuple[float, dict[str, torch.Tensor]]


def step(model: nn.Module, ids: torch.Tensor) -> Step:
    """Loss and gradients by name."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }


def difference(found: Step, wanted: Step) -> float:
    """The largest relative difference of the losses and of each gradient, in its norm. Infinite when a gradient is missing."""
    if found[1].keys() != wanted[1].keys():
        return float("inf")
    gradients = [((found[1][name] - gradient).norm() / gradient.norm()).item() for name, gradient in wanted[1].items()]
    return max(abs(found[0] - wanted[0]) / abs(wanted[0]), *gradients)


@contextmanager
def head_rows() -> Iterator[list[int]]:
    """Counts of the tokens whose logits were made together, each time that happens in training."""
    rows: list[int] = []
    linear = F.linear

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        if weight.shape == (VOCABULARY, HIDDEN) and torch.is_grad_enabled():
            rows.append(x.shape[:-1].numel())
        return linear(x, weight, bias)

    with patch.object(F, "linear", counted):
        yield rows
