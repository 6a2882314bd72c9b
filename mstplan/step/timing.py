"""How long a step takes at best: every operation at the card's nominal arithmetic rate or memory bandwidth.

The roofline bound (Williams, Waterman, Patterson 2009): max(operations / FLOP/s, bytes touched / bandwidth), summed over
the operations on the tape, with the card's bf16 rate also where a recipe computes in fp32. It is for comparing recipes.
"""

from __future__ import annotations

from ..spec.hardware import Gpu
from .recipe import Recipe
from .steps import Chunks, Sizes, Step, stored_inputs
from .tape import Op, Tape, Tensor


class _Cost:
    """Seconds of forward and backward of tapes at one size."""

    def __init__(self, gpu: Gpu, units: tuple[int, ...], chunks: Chunks, weight_bytes: int):
        self.gpu, self.units, self.chunks, self.weight_bytes = gpu, units, chunks, weight_bytes
        self.costs: dict[int, tuple[float, float]] = {}

    def tape(self, tape: Tape, pieces: int = 1) -> tuple[float, float]:
        """(forward, backward with what it recomputes) of all pieces."""
        key = id(tape)
        if key not in self.costs:
            rows = [self.op(op) for op in tape.ops]
            self.costs[key] = (sum(f for f, _ in rows), sum(b for _, b in rows))
        ahead, behind = self.costs[key]
        return pieces * ahead, pieces * behind

    def op(self, op: Op) -> tuple[float, float]:
        part = op.part
        if part is None:
            return self._single(op)
        pieces = 1 if not part.chunked else self.chunks.loss if part.in_forward else self.chunks.mlp
        ahead, behind = self.tape(part.tape, pieces)
        if part.in_forward:
            return ahead + behind, 0.0
        if not part.recompute:
            return ahead, behind
        again = ahead - self._skipped(part.tape)
        return ahead, behind + again

    def _skipped(self, tape: Tape) -> float:
        """A checkpointed part that ends in another one leaves that to it: its forward runs in its own backward only."""
        last = [op for op in tape.ops if op.keeps or op.part is not None]
        if last and last[-1].part is not None and last[-1].part.recompute:
            return self.op(last[-1])[0]
        return 0.0

    def _single(self, op: Op) -> tuple[float, float]:
        touched = (
            sum(self._bytes(t) for t in (*op.reads, *op.makes)) + sum(w.numel for w in op.weights) * self.weight_bytes
        )
        flops = min((amount * self.units[basis] for basis, amount in op.flops), default=0)
        seconds = max(flops / self.gpu.bf16_flops, touched / self.gpu.memory_bandwidth)
        makes = any(gradient is not None for _, gradient in op.grads)
        if not op.trained and not makes:
            return seconds, 0.0
        frozen = bool(op.flops and op.weights) and not (op.trained and makes)  # of two products one is left
        return seconds, (1 if frozen else 2) * seconds

    def _bytes(self, tensor: Tensor) -> int:
        return tensor.bytes * self.units[tensor.basis] if tensor.storage is tensor else 0


def step_seconds(step: Step, recipe: Recipe, gpu: Gpu, sizes: Sizes, chunks: Chunks) -> float:
    """Seconds of one optimizer step (all of its micro-batches), no faster than which any real step runs on this card.

    Copies of layer inputs and weights between host and card overlap with computing, each direction by itself; the
    optimizer on the host is counted by what crosses the link, not by the host's own arithmetic.
    """
    cost = _Cost(gpu, sizes.units, chunks, recipe.weight_bytes)
    ahead, behind = cost.tape(step.tape)
    if recipe.offload_layer_inputs:
        layers = stored_inputs(recipe, step.model.layers)
        hidden = step.tape.ops[0].makes[0]
        moved = layers * hidden.bytes * sizes.units[hidden.basis] / gpu.host_link
        ahead, behind = max(ahead, moved), max(behind, moved)
    if recipe.weights_on_host:  # gathered in both passes; gradients leave in backward
        gathered = step.parameters * recipe.weight_bytes / gpu.host_link
        ahead, behind = max(ahead, gathered), max(behind, gathered)
    return recipe.accumulation * (ahead + behind) + _optimizer_seconds(step, recipe, gpu)


def _optimizer_seconds(step: Step, recipe: Recipe, gpu: Gpu) -> float:
    weights = step.trained_card_parameters * recipe.weight_bytes
    if recipe.optimizer_on_host:
        return 2 * weights / gpu.host_link  # gradients there, weights back
    states = sum(state.bytes for state in step.optimizer.states)
    return (3 * weights + 2 * states) / gpu.memory_bandwidth  # read weights, gradients, states; write weights, states
