"""Stand-ins for attention kernels in the trace, a file each: `STAND_INS` has one for every kernel of `step/kernels`."""

from __future__ import annotations

from .base import StandIn
from .cudnn import Cudnn
from .eager import Eager
from .efficient import Efficient
from .flash import Flash
from .math import Math

STAND_INS: dict[str, StandIn] = {each.name: each for each in (Cudnn(), Flash(), Efficient(), Math(), Eager())}
"""By the name that `step/kernels` has for the kernel."""


def real_implementation(implementation: str) -> str:
    """The attn_implementation of a model that is run in place of a traced one's."""
    return next((each.real for each in STAND_INS.values() if each.implementation == implementation), implementation)
