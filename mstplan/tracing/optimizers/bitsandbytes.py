"""bitsandbytes' optimizers on fake tensors: their states, made as in bitsandbytes/optim/optimizer.py (init_state). Their kernels work in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ...step.optimizers.bitsandbytes import BLOCK, CODE_BOOK, Bitsandbytes

if TYPE_CHECKING:
    from ...step.optimizers.base import KindsOf
    from ...step.recipe import Recipe


class FakeBitsandbytes(torch.optim.Optimizer):
    def __init__(
        self, weights: Iterable[torch.nn.Parameter], optimizer: Bitsandbytes, recipe: Recipe, kinds_of: KindsOf
    ):
        super().__init__(weights, {})
        self.theirs, self.recipe, self.kinds_of = optimizer, recipe, kinds_of
        self.code_books: list[torch.Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and not self.state[weight]:
                    self._make_states(weight)

    def _make_states(self, weight: torch.Tensor) -> None:
        state, moments = self.state[weight], range(1, self.theirs.moments + 1)
        kinds = self.kinds_of(weight) if self.recipe.fp32_embedding_states else frozenset()  # type: ignore[arg-type]
        in_bytes = self.theirs.is_eight_bit(self.recipe, weight.numel(), kinds)
        if in_bytes and not self.code_books:
            self.code_books = [torch.zeros(CODE_BOOK // 4, device=weight.device) for _ in moments]
        for n in moments:
            state[f"state{n}"] = torch.zeros_like(weight, dtype=torch.uint8 if in_bytes else torch.float32)
            if in_bytes:
                state[f"qmap{n}"] = self.code_books[n - 1]
        for n in moments if in_bytes else ():
            state[f"absmax{n}"] = torch.zeros(-(-weight.numel() // BLOCK), device=weight.device)
