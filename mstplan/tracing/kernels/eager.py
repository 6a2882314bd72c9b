"""transformers' eager attention, and sdpa's math kernel: torch's own operations, seen one by one."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..recorder import Recorder
from .base import Call, StandIn


class Eager(StandIn):
    name = "eager"
    implementation = real = "eager"

    def attend(self, call: Call, recorder: Recorder) -> torch.Tensor:
        causal = call.is_causal and call.mask is None
        with sdpa_kernel(SDPBackend.MATH):
            return call.plain(
                *(call.q, call.k, call.v, call.mask, call.dropout, causal), scale=call.scale, enable_gqa=True
            )
