"""Steps in float64, whatever a model's code casts to float32, and the bound on their difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

BOUND = 1e-10
ROUNDING = (
    1e-14  # of all gradients together: what is left of a gradient that is 0 in truth, as of a key's bias in softmax
)

Step = tuple[float, dict[str, torch.Tensor]]  # loss, and gradients by the weight's name


class Float64(TorchDispatchMode):
    """Within the context torch computes in float64 what it is told to compute in float32. Notes the shapes it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.shapes.add(out.shape)
        return out

    def whole(self, rows: Sequence[int], width: int) -> bool:
        """Was there a tensor so wide for so many tokens?"""
        return any(len(shape) > 1 and shape[-1] == width and shape[:-1].numel() in rows for shape in self.shapes)


@contextmanager
def float64() -> Iterator[Float64]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64() as mode:
            yield mode
    finally:
        torch.set_default_dtype(before)


def difference(found: Step, wanted: Step) -> str:
    """Where two steps differ most, "" if nowhere by more than the bound."""
    if abs(found[0] - wanted[0]) > BOUND * abs(wanted[0]):
        return f"loss {found[0]} for {wanted[0]}"
    if odd := found[1].keys() ^ wanted[1].keys():
        return f"gradients of {len(odd)} weights missing or too many: {min(odd)}"
    least = ROUNDING / BOUND * total_norm(wanted[1])
    errors = {n: float((found[1][n] - g).norm()) / max(float(g.norm()), least) for n, g in wanted[1].items()}
    worst = max(errors, key=lambda n: errors[n])
    wrong = sum(not error <= BOUND for error in errors.values())
    return f"{wrong} of {len(errors)} gradients differ, most {worst} by {errors[worst]:.1e}" if wrong else ""


def total_norm(gradients: dict[str, torch.Tensor]) -> float:
    return sum(float(g.norm()) ** 2 for g in gradients.values()) ** 0.5
