"""`minisequence(model)`: a transformers model, in place, with its MLPs and its loss in chunks; `minisequence.undo(model)`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ..errors import ModelError, RecipeError
from .finding import Parts, find_parts
from .logits import LazyLogits
from .loss import chunked_loss
from .mlp import chunked_mlp, in_backward, output_is_read

AnyModel = TypeVar("AnyModel", bound=nn.Module)
_MARK = "_mstplan_undo"


def _minisequence(
    model: AnyModel, *, mlp_chunks: int = 1, loss_chunks: int = 1, checkpoint: Literal["none", "layer"] = "none"
) -> AnyModel:
    """Train `model` with its MLPs over `mlp_chunks` and its LM head and loss over `loss_chunks` pieces of the sequence.

    In place; parameters, state_dict keys, saving, generation and evaluation without labels stay as they are. In training
    with labels the loss comes back and the full logits never exist (`logits` is None). Raises ModelError naming what was
    not found in the model, RecipeError for settings that make no sense.
    """
    for name, value in (("mlp_chunks", mlp_chunks), ("loss_chunks", loss_chunks)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise RecipeError(f"{name} must be a whole number from 1, not {value!r}.")
    if checkpoint not in ("none", "layer"):
        raise RecipeError(f"checkpoint must be 'none' or 'layer', not {checkpoint!r}.")
    if hasattr(model, _MARK):
        raise ModelError(f"{type(model).__name__} runs in mini-sequences already.\nCall minisequence.undo(model) first.")
    parts = find_parts(model)
    undo: list[Callable[[], None]] = []
    if mlp_chunks > 1:
        for layer, mlp in zip(parts.layers, parts.mlps, strict=True):
            undo.append(_chunk_mlp(layer, mlp, mlp_chunks))
    if loss_chunks > 1:
        undo.append(_chunk_loss(model, parts, loss_chunks))
    if checkpoint == "layer":
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        undo.append(model.gradient_checkpointing_disable)  # type: ignore[arg-type]
    setattr(model, _MARK, undo)
    return model


def _undo(model: AnyModel) -> AnyModel:
    """The model as it was before `minisequence`."""
    for step in reversed(getattr(model, _MARK, [])):
        step()
    if hasattr(model, _MARK):
        delattr(model, _MARK)
    return model


def _chunk_mlp(layer: nn.Module, mlp: nn.Module, chunks: int) -> Callable[[], None]:
    whole = mlp.forward
    random = any(isinstance(m, nn.Dropout) and m.p > 0 for m in mlp.modules())
    read: bool | None = None  # does the layer's backward read the MLP's output? None: not seen yet
    more = 0  # what the MLP returns beside hidden states (router scores), which only auxiliary losses would read

    def first(x: torch.Tensor) -> torch.Tensor:
        nonlocal more
        out = whole(x)
        if isinstance(out, tuple):
            more = len(out) - 1
            return out[0]
        return out

    @wraps(whole)
    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or args or kwargs or x.dim() < 2 or x.shape[-2] == 1:
            return whole(x, *args, **kwargs)
        draws = random and mlp.training
        y = chunked_mlp(mlp, first, x, chunks, random=draws, skip=read is False and not draws and in_backward())
        return (y, *[None] * more) if more else y

    def watch(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal read
        hidden = output[0] if isinstance(output, tuple) else output
        if read is None and hidden.grad_fn is not None:
            read = output_is_read(hidden)

    mlp.forward = forward
    handle = layer.register_forward_hook(watch)

    def undo() -> None:
        handle.remove()
        del mlp.forward

    return undo


def _chunk_loss(model: Any, parts: Parts, chunks: int) -> Callable[[], None]:
    """In training with labels: the head hands on lazy logits, the loss function makes them chunk by chunk."""
    head, head_forward, model_forward = parts.head, parts.head.forward, model.forward
    had_loss = model.__dict__.get("_loss_function")
    active = False

    @wraps(head_forward)
    def lazy_head(hidden: torch.Tensor) -> Any:
        return LazyLogits(hidden, head, head_forward) if active else head_forward(hidden)

    def loss_function(logits: Any, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
        if not isinstance(logits, LazyLogits):
            return plain_loss(logits, labels, vocab_size, **kwargs)
        known = {k: kwargs[k] for k in ("num_items_in_batch", "ignore_index", "shift_labels") if k in kwargs}
        return chunked_loss(logits, labels, chunks, **known)

    @wraps(model_forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal active
        active = model.training and kwargs.get("labels") is not None
        try:
            out = model_forward(*args, **kwargs)
        finally:
            active = False
        if isinstance(getattr(out, "logits", None), LazyLogits):
            out.logits = None
        return out

    plain_loss = model.loss_function
    head.forward, model.forward, model.loss_function = lazy_head, forward, loss_function

    def undo() -> None:
        del head.forward, model.forward
        if had_loss is None:
            del model._loss_function
        else:
            model.loss_function = had_loss

    return undo


class _Minisequence:
    """`minisequence(model, ...)` wraps, `minisequence.undo(model)` unwraps."""

    __call__ = staticmethod(_minisequence)
    undo = staticmethod(_undo)


minisequence = _Minisequence()
