"""torchao's optimizers on fake tensors: their states, made as in torchao/optim (_new_buffer, zeros of the state's class), and what
the compiled step of one weight makes, as it was seen on a card."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ...step.optimizers.torchao import Torchao


class FakeTorchao(torch.optim.Optimizer):
    def __init__(self, weights: Iterable[torch.nn.Parameter], optimizer: Torchao):
        super().__init__(weights, {})
        self.theirs = optimizer

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    if not self.state[weight]:
                        self._make_states(weight)
                    self._step_weight(weight)

    def _make_states(self, weight: torch.Tensor) -> None:
        state, n, device = self.state[weight], weight.numel(), weight.device
        for moment in ("exp_avg", "exp_avg_sq"):
            if not self.theirs.is_quantised(n):
                state[moment] = torch.zeros_like(weight)
                continue
            state[f"{moment}.codes"] = torch.zeros(n * self.theirs.bits // 8, dtype=torch.uint8, device=device)
            state[f"{moment}.scale"] = torch.zeros(n // self.theirs.block, device=device)
            state[f"{moment}.qmap"] = torch.zeros(2**self.theirs.bits, device=device)

    def _step_weight(self, weight: torch.Tensor) -> None:
        n, device = weight.numel(), weight.device
        if not self.theirs.is_quantised(n):
            return
        scales = [torch.empty(n // self.theirs.block, device=device) for _ in range(2)]
        moments = [torch.empty(n, device=device) for _ in range(2)]
        codes = [torch.empty(n, dtype=torch.int64, device=device) for _ in range(2 if self.theirs.bits == 4 else 0)]
        del scales, moments, codes
