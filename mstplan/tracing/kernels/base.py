"""What a stand-in for an attention kernel does in the trace: allocate on fake tensors what the kernel allocates on a card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch.nn.attention import SDPBackend

from ...step.recipe import Recipe
from ..recorder import Recorder
from ..recording import Category

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """A call of scaled_dot_product_attention: q (b, H, s, e), k and v (b, G, s, e), a mask or bias (b or 1, 1 or H, s, s)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    dropout: float
    is_causal: bool
    scale: float | None
    plain: Callable[..., torch.Tensor]  # torch's own function
    samples: int = 1  # in a row, which a kernel that is given no mask tells apart itself
    enable_gqa: bool = False


def laid_out_like(q: torch.Tensor, width: int) -> torch.Tensor:
    """A tensor with q's axes in memory in the order that q has them, its last of that width."""
    strides = q.stride()
    order = sorted(range(q.dim()), key=lambda axis: -strides[axis])
    shape = [*q.shape[:-1], width]
    made = q.new_empty([shape[axis] for axis in order])
    return made.permute([order.index(axis) for axis in range(q.dim())])


def bias_of(mask: torch.Tensor, dtype: torch.dtype, recorder: Recorder) -> torch.Tensor:
    """A mask as a bias, which a boolean one is made into (aten transformers/attention.cpp, convert_boolean_attn_mask)."""
    if mask.dtype != torch.bool:
        return mask
    with recorder.purpose("attention bias", Category.ATTENTION):
        return torch.empty_like(mask, dtype=dtype)


class StandIn:
    """A stand-in for a kernel of `step/kernels`. A new one is a file with a subclass, and a line in this folder's `__init__.py`."""

    name: ClassVar[str]
    """What `step/kernels` calls the kernel."""
    implementation: ClassVar[str]
    """The attn_implementation of transformers with which a traced model asks for it by name."""
    real: ClassVar[str]
    """The attn_implementation with which a model that is really run asks for it."""
    backend: ClassVar[SDPBackend | None] = None
    """What scaled_dot_product_attention has it as, where a recipe that names it lets it have this kernel only."""

    def implementation_for(self, recipe: Recipe, kind: Any, on: str) -> str:
        """The attn_implementation of a traced model of class `kind` (None: unknown) on "cuda" or "cpu"."""
        return self.implementation

    def attend(self, call: Call, recorder: Recorder) -> torch.Tensor:
        """Stand in where scaled_dot_product_attention chooses the kernel: (b, H, s, e)."""
        raise NotImplementedError

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, recorder: Recorder) -> tuple[torch.Tensor, ...]:
        """Stand in for the kernel itself, without a mask: its output (b, H, s, e), its log-sum-exp, and what else backward is given."""
        raise NotImplementedError

    def run_back(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        recorder: Recorder,
        samples: int = 1,
    ) -> tuple[torch.Tensor, ...]:
        """Stand in for its backward: gradients of q, k and v."""
        raise NotImplementedError
