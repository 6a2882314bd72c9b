"""The formula's answer beside the trace's, entry by entry.

Both say which tensors are alive at an instant, and call them by different names. They are matched by what they are for, a
role in the formula and a category in the trace: what there is for every weight is compared as one, an optimizer's states by
torch's keys, and intermediates of the same part of the model by dtype and size. Where one side has more than the other, the
difference is shown with the names that both have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..step.allocator import round_size
from ..step.roles import Purpose, Role, State
from ..step.steps import Entry
from .recording import Category
from .trace import Alive

_PARTS: dict[Role | None, Category] = {
    Role.LAYER_INPUT: Category.INPUTS,
    Role.NORM: Category.NORMS,
    Role.ATTENTION: Category.ATTENTION,
    Role.MLP: Category.MLP,
    Role.LOSS: Category.LOSS,
    Role.EMBEDDING: Category.OTHER,
    Role.POSITIONS: Category.OTHER,
    Role.BATCH: Category.OTHER,
    None: Category.OTHER,
}
"""Roles of intermediates, as the trace has them: it does not tell apart what is outside of layers."""

_RESIDENT: dict[Category, Role] = {
    Category.WEIGHTS: Role.WEIGHT,
    Category.GRADIENTS: Role.WEIGHT_GRADIENT,
    Category.WORKSPACE: Role.WORKSPACE,
}
_MADE: dict[Category, Role | Category] = {
    Category.WEIGHTS: Role.GATHERED,
    Category.GRADIENTS: Role.WEIGHT_GRADIENT,
    Category.STATES: Role.UPDATE,
    Category.WORKSPACE: Category.ATTENTION,  # attention kernels ask for theirs at every call
}
"""Purposes of what is there all the time, and of what a step makes."""


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


class _Kind(NamedTuple):
    """What is compared as one. dtype, size: of intermediates, which are told apart by them."""

    purpose: Purpose | Category | None
    dtype: str = ""
    size: int = 0


@dataclass
class _Pair:
    """Tensors of a kind, on each side."""

    formula: list[Entry] = field(default_factory=list)
    trace: list[Alive] = field(default_factory=list)

    @property
    def more(self) -> int:
        """Copies that the formula has more than the trace."""
        return sum(e.copies for e in self.formula) - sum(a.copies for a in self.trace)


def compare(entries: Iterable[Entry], alive: Iterable[Alive]) -> tuple[Row, ...]:
    """Compare every kind of tensor that either side has, largest difference first. The rows add up to both sides' totals."""
    found: dict[_Kind, _Pair] = defaultdict(_Pair)
    states: dict[str, State] = {}
    for entry in (each for whole in entries for each in _by_size(whole)):
        found[_kind_of_entry(entry)].formula.append(entry)
        if isinstance(entry.role, State):
            states |= dict.fromkeys(entry.role.torch_keys, entry.role)
    for group in alive:
        found[_kind_of_group(group, states)].trace.append(group)
    rows = [_row(pair.formula, pair.trace) for pair in _across_borders(found)]
    return tuple(sorted(rows, key=lambda row: -abs(row.difference)))


def _by_size(entry: Entry) -> Iterable[Entry]:
    """The entry, or one for each size that its tensors have."""
    return [entry._replace(copies=n, bytes=size, sizes=()) for n, size in entry.sizes] or [entry]


def _kind_of_entry(entry: Entry) -> _Kind:
    role = entry.role
    if isinstance(role, State):
        return _Kind(role)
    if part := _PARTS.get(role):
        return _Kind(part, entry.dtype, round_size(entry.bytes // entry.copies))
    alike = {Role.REDUCED: Role.WEIGHT_GRADIENT, Role.TOWER: Role.WEIGHT}  # which the trace does not tell apart
    return _Kind(alike.get(role, role) if isinstance(role, Role) else role)


def _kind_of_group(group: Alive, states: Mapping[str, State]) -> _Kind:
    """states: the formula's, by torch's keys."""
    if group.resident and group.category is Category.STATES:
        return _Kind(states.get(group.operation, State()))
    known: Mapping[Category, Role | Category] = _RESIDENT if group.resident else _MADE
    purpose = known.get(group.category, group.category)
    if isinstance(purpose, Role):
        return _Kind(purpose)
    return _Kind(purpose, group.dtype, round_size(group.bytes // group.copies))


def _across_borders(found: Mapping[_Kind, _Pair]) -> Iterable[_Pair]:
    """The pairs, those of intermediates put together where one part of the model has as alike tensors too many and another too few: a
    gradient that goes from one module to the next is of the one that reads it, or of the one that makes it."""
    alike: dict[_Kind, list[_Pair]] = defaultdict(list)
    for kind, pair in found.items():
        is_part = isinstance(kind.purpose, Category)
        alike[kind._replace(purpose=None) if is_part else kind].append(pair)
    for pairs in alike.values():
        differing = [pair for pair in pairs if pair.more]
        if min((p.more for p in differing), default=0) < 0 < max((p.more for p in differing), default=0):
            yield from (pair for pair in pairs if not pair.more)
            yield _Pair([e for p in differing for e in p.formula], [a for p in differing for a in p.trace])
        else:
            yield from pairs


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
