"""Logits that are not there yet: what a model's code does between its LM head and its loss, recorded to be done by chunk.

In training with labels the LM head returns a `LazyLogits` instead of (b, s, V) numbers. Scaling, soft-capping and casts
are recorded as they are applied; the loss then asks for the logits of one chunk at a time. Whatever cannot be recorded is
refused by name, so that no model is silently trained on something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ModelError

Step = Callable[[torch.Tensor], torch.Tensor]

ELEMENTWISE = {
    torch.tanh, torch.Tensor.tanh, torch.mul, torch.Tensor.mul, torch.div, torch.Tensor.div, torch.add, torch.Tensor.add,
    torch.sub, torch.Tensor.sub, torch.clamp, torch.Tensor.clamp,
}  # fmt: skip


class LazyLogits:
    """The LM head, with its forward, over hidden states (b, s, d), and the elementwise steps that follow it."""

    def __init__(self, hidden: torch.Tensor, head: nn.Module, forward: Step, steps: tuple[Step, ...] = ()):
        self.hidden, self.head, self.forward, self.steps = hidden, head, forward, steps

    def of(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of some rows of hidden states: (n, d) to (n, V)."""
        logits = self.forward(hidden)
        for step in self.steps:
            logits = step(logits)
        return logits

    def then(self, step: Step) -> LazyLogits:
        return LazyLogits(self.hidden, self.head, self.forward, (*self.steps, step))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> LazyLogits:
        me = next((a for a in args if isinstance(a, LazyLogits)), None)
        scalars = all(isinstance(a, (LazyLogits, int, float)) or (torch.is_tensor(a) and a.numel() == 1) for a in args)
        if func not in ELEMENTWISE or me is None or not scalars:
            name = getattr(func, "__name__", str(func))
            raise ModelError(f"cannot run the loss in chunks: the model's code calls {name} on its logits.\nSet loss_chunks=1.")
        return me.then(lambda x: func(*[x if a is me else a for a in args], **(kwargs or {})))

    def __mul__(self, other: Any) -> LazyLogits:
        return self.then(lambda x: x * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> LazyLogits:
        return self.then(lambda x: x / other)

    def __add__(self, other: Any) -> LazyLogits:
        return self.then(lambda x: x + other)

    def float(self) -> LazyLogits:
        return self.then(lambda x: x.float())

    def to(self, *args: Any, **kwargs: Any) -> LazyLogits:
        return self.then(lambda x: x.to(*args, **kwargs))

    def contiguous(self) -> LazyLogits:
        return self

    def __getattr__(self, name: str) -> Any:
        raise ModelError(f"cannot run the loss in chunks: the model's code uses logits.{name}.\nSet loss_chunks=1.")
