"""What is put in the way of a module's `forward`: a method bound to that module, and what it has to know stands on the module. So
a deep copy of a model runs on its own weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

from torch import nn


def patch_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    """Let `function(module, ...)` run for module.forward, under the signature of the latter."""
    module._mstplan_whole = module.__dict__.get("forward")  # type: ignore[assignment]

    @wraps(type(module).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    del forward.__wrapped__  # which accelerate's unwrap_model would follow past us
    module.forward = MethodType(forward, module)


def restore_forward(module: Any) -> None:
    """Take out what `patch_forward` put there."""
    forward_before = module.__dict__.pop("_mstplan_whole")
    del module.forward
    if forward_before is not None:
        module.forward = forward_before


def plain_forward(module: Any) -> Callable[..., Any]:
    """The forward that the module would run had it not been patched."""
    plain: Callable[..., Any] | None = module.__dict__.get("_mstplan_whole", module.__dict__.get("forward"))
    return plain or partial(type(module).forward, module)
