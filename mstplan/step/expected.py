"""How long a step is expected to take, where the GPU's rates have been measured (`spec/speeds.py`).

A step's operations one after the other, each for what it does most: a matrix product for its operations, at the rate that
products of that size reach; attention for its own; everything else for the bytes it reads and writes, each tensor as often
as an operation takes it up. The optimizer is bytes, too. Copies of layer inputs to CPU RAM run beside the arithmetic. No
step is shorter than its launches. Nothing in here is fitted to a measured step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..spec.hardware import Gpu
from ..spec.speeds import Speeds, speeds_of
from .optimizers import OPTIMIZERS
from .recipe import Recipe
from .steps import Chunks, Sizes, Step
from .tape import Op, Part, Tape, Tensor
from .timing import Walk, offloaded_bytes


def expected_seconds(step: Step, recipe: Recipe, gpu: Gpu, sizes: Sizes, chunks: Chunks) -> float | None:
    """Seconds of one optimizer step (all of its micro-batches). None: something that it is made of was not measured."""
    speeds = speeds_of(gpu)
    if speeds is None or why_unmeasured(step, recipe, gpu):
        return None
    ahead, behind, _ = Work(step, recipe, gpu, speeds, sizes, chunks).tape(step.tape)
    if recipe.offload != "none":
        moved = offloaded_bytes(step, recipe, sizes) / speeds.host
        ahead, behind = max(ahead, moved), max(behind, moved)
    launches = sum(Launches(sizes, chunks, recipe.checkpoint == "selective").tape(step.tape)[:2])
    micro_batch = max(ahead + behind, launches * speeds.launch)
    gradients = step.trained_card_parameters * recipe.weight_bytes
    added = 3 * gradients * (recipe.accumulation - 1)  # to those of the micro-batches before
    return recipe.accumulation * micro_batch + (added + _optimizer_bytes(step, recipe)) / speeds.memory


def why_unmeasured(step: Step, recipe: Recipe, gpu: Gpu) -> str:
    """What a step is made of that was not measured on a GPU some of whose rates were; empty: all was, or nothing."""
    speeds = speeds_of(gpu)
    if speeds is None:
        return ""
    if recipe.gpus > 1:
        return "communication between GPUs"
    if recipe.optimizer_on_host or recipe.weights_on_host:
        return "the optimizer or weights in CPU RAM"
    if recipe.attention_on_host:
        return "attention's copies between CPU RAM and GPU"
    if recipe.runs_in_fp32:
        return "matrix products in fp32"
    if step.model.mixer is not None:
        return "layers that mix tokens otherwise than by attention"
    if step.model.experts is not None:
        return "experts' grouped products"
    if step.layout.masked:
        return "attention under an explicit mask"
    head_size = _head_size(step)
    for kernel in dict.fromkeys(op.kernel for op in _operations(step.tape) if op.kernel):
        if speeds.attention_of(kernel, head_size) is None:
            return f"{kernel} attention with heads of {head_size}"
    return ""


def _head_size(step: Step) -> int:
    kinds = [step.model.of_kind(kind).attention for kind in step.model.layer_kinds]
    return max(max(attention.head_dim, attention.v_head_dim) for attention in kinds)


def _operations(tape: Tape) -> Iterator[Op]:
    """Operations of a tape and its parts, those of tapes that repeat once."""
    tapes: dict[int, Tape] = {}
    for op in tape.ops:
        if op.part is None:
            yield op
        else:
            tapes[id(op.part.tape)] = op.part.tape
    for inner in tapes.values():
        yield from _operations(inner)


class Work(Walk):
    """Seconds at measured rates."""

    def __init__(self, step: Step, recipe: Recipe, gpu: Gpu, speeds: Speeds, sizes: Sizes, chunks: Chunks):
        super().__init__(sizes, chunks, recipe.checkpoint == "selective")
        self.step, self.recipe, self.gpu, self.speeds = step, recipe, gpu, speeds

    def operation(self, op: Op) -> tuple[float, float]:
        if op.kernel:
            return self._attention(op)
        if op.flops:
            return self._product(op)
        forward = 0 if is_view(op) else self._bytes_ahead(op)
        return forward / self.speeds.memory, self._bytes_behind(op) / self.speeds.memory

    def sums(self, part: Part, pieces: int) -> float:
        """A piece's product writes fp32 where it would write bf16, and reads the sum, but for the first; last it is rounded."""
        if pieces == 1:
            return 0.0
        return self._bytes(part.sums) * (1.5 * pieces + 0.5) / self.speeds.memory

    def additions(self, tape: Tape) -> float:
        return sum(3 * self._bytes([tensor]) for tensor in _shared(tape)) / self.speeds.memory

    def _attention(self, op: Op) -> tuple[float, float]:
        """Heads of other sizes than were measured are padded to the next one."""
        a = self.step.model.attention
        measured = self.speeds.attention_of(op.kernel, _head_size(self.step))
        assert measured is not None  # see why_unmeasured
        measured_size, curves = measured
        padded_flops = self._flops(op) * 2 * measured_size / (a.head_dim + a.v_head_dim)
        behind = curves.backward.seconds(2.5 * padded_flops) if op.grads else 0.0  # five products for two
        return curves.forward.seconds(padded_flops), behind

    def _product(self, op: Op) -> tuple[float, float]:
        """As long as its arithmetic or its bytes take; in backward a product for each gradient."""
        tables = sum(weight.numel for weight in op.weights) * self.recipe.weight_bytes
        touched = (self._bytes((*op.reads, *op.makes)) + tables) / self.speeds.memory
        seconds = max(self.speeds.products.seconds(self._flops(op)), touched)
        gradients = len(op.grads) + bool(op.trained)
        casts = 6 * sum(weight.numel for weight in op.trained) if op.cast else 0  # of gradients, from bf16 to fp32
        return seconds, gradients * seconds + casts / self.speeds.memory

    def _bytes_ahead(self, op: Op) -> int:
        """What reads no tensor looks up as much as it makes."""
        made = self._bytes(op.makes)
        vectors = sum(weight.numel for weight in op.weights if len(weight.shape) == 1) * self.recipe.weight_bytes
        return (self._bytes(op.reads) if op.reads else made) + made + 2 * self._bytes(op.temps) + vectors

    def _bytes_behind(self, op: Op) -> int:
        """For each gradient the incoming one is read; what was kept is read once, temporaries are written and read."""
        made = [gradient for _, gradient in op.grads if gradient is not None]
        if not made and not op.trained:
            return 0
        incoming = self._bytes(op.makes[:1]) * max(1, len(made))
        weights = sum(weight.numel for weight in op.trained) * self.recipe.weight_bytes
        return incoming + self._bytes(op.keeps) + self._bytes(made) + 2 * self._bytes(op.back_temps) + weights

    def _bytes(self, tensors: Iterable[Tensor]) -> int:
        return sum(tensor.bytes * self.units[tensor.basis] for tensor in tensors)

    def _flops(self, op: Op) -> int:
        return min(amount * self.units[basis] for basis, amount in op.flops)


class Launches(Walk):
    """Kernels that are launched."""

    def operation(self, op: Op) -> tuple[float, float]:
        made = [gradient for _, gradient in op.grads if gradient is not None]
        return 0 if is_view(op) else 1 + len(op.temps), len(made) + len(op.trained) + len(op.back_temps)

    def additions(self, tape: Tape) -> float:
        return len(_shared(tape))


def is_view(op: Op) -> bool:
    """Whether nothing runs in its forward: all it makes is parts of tensors that are there."""
    return all(tensor.storage is not tensor for tensor in op.makes)


def _shared(tape: Tape) -> list[Tensor]:
    """Tensors whose gradient comes from another operation besides one listed before, once for each."""
    receivers = [tensor for op in tape.ops for tensor in (op.reads[:1] if op.part is not None else _inputs(op))]
    return [tensor for n, tensor in enumerate(receivers) if tensor in receivers[:n]]


def _inputs(op: Op) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor, _ in op.grads)


def _optimizer_bytes(step: Step, recipe: Recipe) -> int:
    weights = step.trained_card_parameters * recipe.weight_bytes
    states = sum(state.bytes for state in step.optimizer.states)
    clipping = 3 * weights if recipe.max_grad_norm is not None else 0  # gradients are read, and read and written
    return OPTIMIZERS[recipe.optimizer].traffic(recipe, weights, states) + clipping
