"""The formula's answer beside the trace's, entry by entry.

Both say which tensors are alive at an instant. They call them by different names, so tensors are told apart by what counts:
their dtype and their size. Where one side has more of a kind than the other, the difference is shown with the names that both
have for that kind. Weights, gradients and the optimizer's states are compared as groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..step.optimizers import OPTIMIZERS
from ..step.steps import WORKSPACES, Entry
from .allocator import round_size
from .recording import Category
from .trace import Alive


def _groups() -> dict[str, str]:
    """Group of a traced tensor as the formula sums it up: its category, or the name of the optimizer's state."""
    states = {ours: theirs for each in OPTIMIZERS.values() for ours, theirs in each.torch_states.items()}
    return {"weights": Category.WEIGHTS, "gradients": Category.GRADIENTS, WORKSPACES: Category.WORKSPACE, **states}


class Row(NamedTuple):
    """One kind of tensor. bytes: of all of that kind, on each side; names: what each side calls them."""

    formula: tuple[str, ...]
    trace: tuple[str, ...]
    dtype: str
    formula_copies: int
    trace_copies: int
    formula_bytes: int
    trace_bytes: int

    @property
    def difference(self) -> int:
        """Formula less trace."""
        return self.formula_bytes - self.trace_bytes


def compare(entries: Iterable[Entry], alive: Iterable[Alive]) -> tuple[Row, ...]:
    """Compare every kind of tensor that either side has, largest difference first. The rows add up to both sides' totals."""
    groups = _groups()
    theirs: dict[object, list[Entry]] = defaultdict(list)
    ours: dict[object, list[Alive]] = defaultdict(list)
    for entry in entries:
        theirs[_kind_of_entry(entry, groups)].append(entry)
    for group in alive:
        ours[_kind_of_group(group, groups)].append(group)
    rows = [_row(theirs[kind], ours[kind]) for kind in dict.fromkeys([*theirs, *ours])]
    return tuple(sorted(rows, key=lambda row: -abs(row.difference)))


def _kind_of_entry(entry: Entry, groups: dict[str, str]) -> object:
    if entry.name in groups:
        return groups[entry.name]
    if not entry.shape:  # the optimizer's temporaries: as many as there are weights
        return Category.STATES
    return entry.dtype, round_size(entry.bytes // entry.copies)


def _kind_of_group(group: Alive, groups: dict[str, str]) -> object:
    if group.category == Category.STATES:
        return group.operation if group.operation in groups.values() else Category.STATES
    if group.category in (Category.WEIGHTS, Category.GRADIENTS) or group.operation == "cuBLAS":
        return group.category
    return group.dtype, round_size(group.bytes // group.copies)


def _row(theirs: Sequence[Entry], ours: Sequence[Alive]) -> Row:
    return Row(
        tuple(dict.fromkeys(f"{e.name} {e.shape}".strip() for e in theirs)),
        tuple(dict.fromkeys(f"{name_of(a)} {a.shape or ''}".strip() for a in ours)),
        theirs[0].dtype if theirs else ours[0].dtype,
        sum(e.copies for e in theirs),
        sum(a.copies for a in ours),
        sum(e.bytes for e in theirs),
        sum(a.bytes for a in ours),
    )


def name_of(group: Alive) -> str:
    """Module and operation in few letters: 'self_attn.q_proj: mm'."""
    module = group.module.rpartition("*.")[2] if "*." in group.module else group.module.rpartition(".")[2]
    operation = group.operation.removesuffix(".Tensor").removesuffix(".Scalar")
    return f"{module}: {operation}" if module.strip("*.") else operation
