"""Computing in float64 what a model's code insists on computing in float32, so that a difference of 1e-10 can be seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch


@contextmanager
def float64() -> Iterator[None]:
    """Within the context the name float32 means float64, wherever code looks it up. (A torch function mode would not do:
    autograd leaves it while it recomputes.)"""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with patch.multiple(torch, float32=torch.float64, float=torch.float64), patch.object(torch.Tensor, "float", torch.Tensor.double):
        try:
            yield
        finally:
            torch.set_default_dtype(before)
