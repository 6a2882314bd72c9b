"""How long a step takes at best: every operation at the GPU's nominal arithmetic rate or memory bandwidth.

The roofline bound (Williams, Waterman, Patterson 2009): max(operations / FLOP/s, bytes touched / bandwidth), summed over
the operations on the tape, with the GPU's bf16 rate also where a recipe computes in fp32. It is for comparing recipes;
`expected.py` says what a step takes where a GPU's rates have been measured.
"""

from __future__ import annotations

from typing import NamedTuple

from ..spec.hardware import Gpu
from .recipe import Recipe
from .steps import Chunks, Sizes, Step, bytes_on_host, stored_inputs
from .tape import Op, Part, Tape, Tensor, holds_for_backward


class Times(NamedTuple):
    """Seconds of a stretch of a step. again: to run its forward once more in backward, as far as checkpointing does."""

    ahead: float
    behind: float
    again: float


class Walk:
    """Walks tapes as often and as far as a step runs them. A subclass says what an operation takes, in seconds or whatever adds up."""

    def __init__(self, sizes: Sizes, chunks: Chunks, selective: bool = False):
        self.units, self.chunks, self.selective = sizes.units, chunks, selective
        self.times: dict[int, Times] = {}

    def operation(self, op: Op) -> tuple[float, float]:
        """(forward, backward) of an operation that is no part."""
        raise NotImplementedError

    def sums(self, part: Part, pieces: int) -> float:
        """To sum a part's weight gradients over its pieces."""
        return 0.0

    def additions(self, tape: Tape) -> float:
        """To add the gradients that reach a tensor of the tape from several operations."""
        return 0.0

    def tape(self, tape: Tape) -> Times:
        """Times of a tape. Run again it stops at the last tensor that backward needs (torch.utils.checkpoint, early stop)."""
        key = id(tape)
        if key not in self.times:
            rows = [self._times(op) for op in tape.ops]
            last = max((i for i, op in enumerate(tape.ops) if holds_for_backward(op)), default=-1)
            run_again = [
                row.ahead for row, op in zip(rows[:last], tape.ops, strict=False) if not self._keeps_results(op)
            ]
            again = (
                sum(run_again) + (0.0 if self._keeps_results(tape.ops[last]) else rows[last].again)
                if last >= 0
                else 0.0
            )
            behind = sum(row.behind for row in rows) + self.additions(tape)
            self.times[key] = Times(sum(row.ahead for row in rows), behind, again)
        return self.times[key]

    def _keeps_results(self, op: Op) -> bool:
        """Whether a checkpoint keeps them, and does not run the operation again."""
        return self.selective and op.selected

    def _times(self, op: Op) -> Times:
        if op.part is not None:
            return self._part(op.part)
        ahead, behind = self.operation(op)
        made = {tensor.storage for tensor in op.makes}
        needed = any(tensor.storage in made for tensor in op.keeps)  # what it reads is saved before it runs
        return Times(ahead, behind, ahead if needed else 0.0)

    def _part(self, part: Part) -> Times:
        inside = self.tape(part.tape)
        pieces = 1 if not part.chunked else self.chunks.loss if part.in_forward else self.chunks.mlp
        ahead, behind = pieces * inside.ahead, pieces * inside.behind + self.sums(part, pieces)
        whole = part.chunked or part.reentrant  # pieces, too, run again whole (mstplan/train/mlp.py)
        again = ahead if whole else inside.again
        if part.in_forward:
            return Times(ahead + behind, 0.0, 0.0)
        if not part.records:
            return Times(ahead, 0.0, 0.0)
        return Times(ahead, behind + again, 0.0) if part.recompute else Times(ahead, behind, again)


class _Bound(Walk):
    """Seconds at nominal rates."""

    def __init__(self, gpu: Gpu, sizes: Sizes, chunks: Chunks, recipe: Recipe):
        super().__init__(sizes, chunks, recipe.checkpoint == "selective")
        weight_bytes = recipe.weight_bytes
        self.gpu, self.weight_bytes = gpu, weight_bytes

    def operation(self, op: Op) -> tuple[float, float]:
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
    """Seconds of one optimizer step (all of its micro-batches), no faster than which any real step runs on this GPU.

    Copies of layer inputs and weights between CPU RAM and GPU overlap with computing, each direction by itself; those that attention_on_host
    makes do not. The optimizer on the CPU is counted by what crosses the link, not by the CPU's own arithmetic.
    """
    ahead, behind, _ = _Bound(gpu, sizes, chunks, recipe).tape(step.tape)
    if recipe.offload != "none":
        moved = offloaded_bytes(step, recipe, sizes) / gpu.host_link
        ahead, behind = max(ahead, moved), max(behind, moved)
    if recipe.attention_on_host:
        in_forward, in_backward = attention_copies(step, sizes)
        ahead, behind = ahead + in_forward / gpu.host_link, behind + in_backward / gpu.host_link
    if recipe.weights_on_host:  # gathered in both passes; gradients leave in backward
        gathered = step.parameters * recipe.weight_bytes / gpu.host_link
        ahead, behind = max(ahead, gathered), max(behind, gathered)
    return recipe.accumulation * (ahead + behind) + _optimizer_seconds(step, recipe, gpu)


def attention_copies(step: Step, sizes: Sizes) -> tuple[int, int]:
    """Bytes that attention_on_host moves, either way, in forward and in backward of a micro-batch: all there and back; in backward that again,
    as layers run again (results come back for their own gradients' sake), all to the kernel's backward, and gradients there and back."""
    there = sum(bytes_on_host(layer, sizes)[0] for layer in step.layer_tapes)
    return 2 * there, 5 * there


def offloaded_bytes(step: Step, recipe: Recipe, sizes: Sizes) -> int:
    """Bytes of layer inputs or saved tensors that cross to CPU RAM in forward, and back in backward."""
    if recipe.offload == "saved-tensors":
        return step.saved_on_host(sizes)
    hidden = step.tape.ops[0].makes[0]
    return stored_inputs(recipe, step.model.layers) * hidden.bytes * sizes.units[hidden.basis]


def _optimizer_seconds(step: Step, recipe: Recipe, gpu: Gpu) -> float:
    weights = step.trained_card_parameters * recipe.weight_bytes
    if recipe.optimizer_on_host:
        return 2 * weights / gpu.host_link  # gradients there, weights back
    states = sum(state.bytes for state in step.optimizer.states)
    return (3 * weights + 2 * states) / gpu.memory_bandwidth  # read weights, gradients, states; write weights, states
