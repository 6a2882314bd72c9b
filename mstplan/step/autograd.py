"""What autograd records of a tape: "needs a gradient" passed on from the weights that are trained, operation by operation.

An operation is recorded when an input that it hands a gradient to needs one, or when it trains a weight. It then keeps what
the gradients that are wanted are made from, and its backward makes those only; below the first trained weight there is none
(torch/csrc/autograd: `compute_requires_grad`, and the conditions of saved variables that tools/autograd generates).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from .instants import Stage
from .tape import NONE, Op, Part, Receiver, Tape, Tensor, Weight, sums_of


def record_step(tape: Tape, leaf: Tensor | None = None) -> Tape:
    """The tape of a whole step, as it is recorded. leaf: a tensor that needs a gradient in any case; where what it is made
    from needs none, the graph holds it (AccumulateGrad)."""
    step_tape = _record_tape(tape, {leaf} if leaf is not None else set())
    ops = (
        replace(op, keeps=(leaf,)) if leaf in op.makes and not (op.grads or op.trained) else op for op in step_tape.ops
    )
    return replace(step_tape, ops=tuple(ops)) if leaf is not None else step_tape


@lru_cache(maxsize=2048)
def record_part_tape(tape: Tape, wanted: frozenset[Tensor]) -> Tape:
    """The tape of a part, as it is recorded when those of its sources need gradients. Alike parts stay alike."""
    return _record_tape(tape, set(wanted))


def _record_tape(tape: Tape, needing: set[Tensor]) -> Tape:
    """needing: tensors that need a gradient whatever is trained."""
    ops: list[Op] = []
    for op in tape.ops:
        recorded_op = _record_part(op, op.part, needing) if op.part is not None else _record_operation(op, needing)
        if recorded_op.part.records if recorded_op.part is not None else recorded_op.grads or recorded_op.trained:
            needing.update(recorded_op.makes)
        ops.append(recorded_op)
    return replace(tape, ops=_with_interior(_without_dead_ends(ops, tape.outputs)))


def _without_dead_ends(ops: list[Op], outputs: tuple[Tensor, ...]) -> list[Op]:
    """The operations, with those to which no backward comes, for nothing that is given out is made from what they make: what they keep goes
    with the variables that hold what they made."""
    reached, living = set(outputs), [False] * len(ops)
    for n in reversed(range(len(ops))):
        op = ops[n]
        living[n] = op.part is not None or not (op.grads or op.trained) or not reached.isdisjoint(op.makes)
        if living[n]:
            reached.update(op.reads if op.part is not None else (tensor for tensor, _ in op.grads))
    if all(living):
        return ops
    graphs: dict[Tensor, tuple[Tensor, ...]] = {}  # what keeps go with each tensor that leads nowhere
    found: list[Op] = []
    for op, lives in zip(ops, living, strict=True):
        held = tuple(dict.fromkeys(kept for tensor in (*op.reads, *op.holds) for kept in graphs.get(tensor, ())))
        if not lives:
            graphs.update(dict.fromkeys(op.makes, (*held, *op.keeps)))
            op = replace(_unrecorded(op), weights=_idle(op))  # noqa: PLW2901
        elif op.joins_gradients:
            op = replace(op, back_temps=op.back_temps + tuple(_zeros(t) for t in op.makes if t not in reached))  # noqa: PLW2901
        found.append(replace(op, graph_holds=op.graph_holds + held) if held else op)
    return found


def _idle(op: Op) -> tuple[Weight, ...]:
    """Weights of an operation to which no backward comes: of a layer's part they are trained where another part uses them."""
    return () if op.stage is None else tuple(replace(weight, trained=False) for weight in op.weights)


def _zeros(tensor: Tensor) -> Tensor:
    """What stands in for the gradient of a view that leads nowhere."""
    return Tensor(
        f"zeros for the gradient of {tensor.name}",
        tensor.shape,
        tensor.dtype,
        tensor.basis,
        tensor.bytes,
        role=tensor.role,
    )


def _record_operation(op: Op, needing: set[Tensor]) -> Op:
    grads = tuple((tensor, gradient) for tensor, gradient in op.grads if tensor in needing)
    for_gradients = op.for_gradients
    receivers: set[Receiver] = {tensor for tensor, _ in grads} | set(op.trained)
    if not receivers:
        return _unrecorded(op)
    keeps = op.keeps + tuple(dict.fromkeys(tensor for tensor, receiver in for_gradients.keeps if receiver in receivers))
    temps = op.back_temps + tuple(tensor for tensor, receiver in for_gradients.back_temps if receiver in receivers)
    late_temps = tuple(tensor for tensor, receiver in for_gradients.late_temps if receiver in receivers)
    if for_gradients.all:
        temps += tuple(gradient for tensor, gradient in op.grads if gradient is not None and tensor not in needing)
    reuses = tuple((receiver, kept) for receiver, kept in op.reuses if receiver in receivers)
    return replace(
        op, keeps=keeps, grads=grads, back_temps=temps, late_temps=late_temps, reuses=reuses, for_gradients=NONE
    )


def _unrecorded(op: Op) -> Op:
    """An operation of which autograd keeps nothing."""
    return replace(
        op,
        keeps=(),
        grads=(),
        back_temps=(),
        late_temps=(),
        reuses=(),
        recorded=(),
        for_gradients=NONE,
        fetched=None,
    )


def _record_part(op: Op, part: Part, needing: set[Tensor]) -> Op:
    wanted = tuple(tensor for tensor in op.reads if tensor in needing)
    sources = frozenset(source for tensor, source in zip(op.reads, part.tape.sources, strict=True) if tensor in wanted)
    tape = record_part_tape(part.tape, sources)
    inside = replace(part, tape=tape, wanted=wanted, sums=sums_of(tape) if part.sums else ())
    records = bool(wanted) or bool(_trains(tape))
    kept = part.arguments if records else ()
    return replace(
        op, part=replace(inside, records=records, arguments=kept, lingering=part.lingering if records else ())
    )


def _trains(tape: Tape) -> bool:
    return any(op.trained or (op.part is not None and _trains(op.part.tape)) for op in tape.ops)


# ---- parts that repeat ----------------------------------------------------------------------------------------------


_LONGEST_PERIOD = 8
"""Layers after which kinds of layers are taken to repeat."""


def _with_interior(ops: list[Op]) -> tuple[Op, ...]:
    """The operations, with those layers marked whose moments lie between their neighbours': of the same row, of a tower's or of text's."""
    for is_before in (True, False):
        _mark_interior(ops, [i for i, op in enumerate(ops) if (op.stage is Stage.EMBEDDING) is is_before])
    return tuple(ops)


def _mark_interior(ops: list[Op], row: list[int]) -> None:
    places = [i for i in row if (part := ops[i].part) is not None and not part.chunked]
    layers: list[_Alike] = []
    borrowing, given = False, ""
    for i in places:
        part = ops[i].part
        assert part is not None
        layers.append((id(part.tape), part.recompute, given if part.offload else ""))
        given = ops[i].reads[0].dtype
        borrowing |= len(part.tape.outputs) > 1
    for n, i in enumerate(places):
        interior = any(_lies_between(layers, n, period, borrowing) for period in range(1, _LONGEST_PERIOD + 1))
        part = ops[i].part
        assert part is not None
        ops[i] = replace(ops[i], part=replace(part, interior=interior))


_Alike = tuple[int, bool, str]
"""What layers have in common that do the same: the tape, whether it is run again, and the dtype of the layer's input before it, which comes
back from CPU RAM meanwhile."""


def _lies_between(tapes: list[_Alike], i: int, period: int, borrowing: bool) -> bool:
    """Whether a layer's moments lie between those of the layers a period before and after it. What is alive beside it grows
    or shrinks by the same from one to the next where the layers on both sides are the same. The first layer and the last are instants of
    their own, and what a kind of layers is given goes with the first of them. borrowing: gradients of what some layers take of others come
    with the last of them."""
    before, after = i - period, i + period
    if before < 1 or after > len(tapes) - 2 or tapes[before:i] != tapes[i:after] or tapes[i] != tapes[after]:
        return False
    if borrowing and not set(tapes[before : after + 1]) <= set(tapes[after + 1 :]):
        return False
    return period == 1 or (tapes[before - 1] == tapes[i - 1] and set(tapes[before:i]) <= set(tapes[: before + 1]))
