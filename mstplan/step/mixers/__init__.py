"""What mixes a layer's tokens otherwise than by attention, a file each: transformers' plain torch code, operation by operation.

Packages with kernels for these (causal-conv1d, mamba-ssm, flash-linear-attention), which transformers takes where it finds
them, make other tensors: they are not counted (`plan/advice.py` says so).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..roles import Role
from ..tape import Tensor
from .short_conv import short_conv

if TYPE_CHECKING:
    from ..layers import Writer


def mix(w: Writer, x: Tensor) -> Tensor:
    """What the model's mixer makes of x (t, d): (t, d)."""
    sizes = w.model.mixer
    assert sizes is not None
    with w.tape.assign_role(Role.ATTENTION):
        return short_conv(w, x, sizes)
