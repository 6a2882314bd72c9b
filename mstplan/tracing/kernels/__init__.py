"""Stand-ins for attention kernels in the trace, a file each: `STAND_INS` has one for every kernel of `plan/kernels`."""

from __future__ import annotations

from .base import StandIn
from .eager import Eager
from .efficient import Efficient
from .flash import Flash

STAND_INS: dict[str, StandIn] = {each.name: each for each in (Flash(), Efficient(), Eager())}
"""By the name that `plan/kernels` has for the kernel."""


def real_implementation(implementation: str) -> str:
    """The attn_implementation of a model that is run in place of a traced one's."""
    return next((each.real for each in STAND_INS.values() if each.implementation == implementation), implementation)
