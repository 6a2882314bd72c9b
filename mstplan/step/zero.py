"""DeepSpeed's ZeRO, stages 1 and 2, in closed form: what of weights, gradients and optimizer a GPU holds, and when.

Weights that are trained are bf16, whole, in one flat tensor; those that are frozen lie beside it. Each GPU's optimizer steps a part of the former, its
partition, of which it holds an fp32 copy and states in fp32. What is made when is deepspeed/runtime/zero/stage_1_and_2.py of DeepSpeed 0.19.8, with
contiguous_gradients as it comes, and gradients summed in the weights' dtype (no data_types.grad_accum_dtype):

- the first gradient of a backward makes the bucket (setup_buckets), of reduce_bucket_size values however many there are; overlap_comm makes two;
- stage 2: each gradient is copied into the bucket and let go; one that is larger than the bucket stays as it is instead. A gradient that no longer
  fits in has the bucket reduced first, and so has one that comes after a large one (reduce_independent_p_g_buckets_and_remove_grads);
- a bucket whose gradients are of several partitions is copied once more as it is reduced (allreduce_bucket flattens slices, one for each run of
  the same partition), in fp32 as well where GPUs share sequences;
- of what was reduced the weights of its own partition are copied into one tensor (copy_grads_in_partition), which the first of them makes, and in which
  the weights that two partitions share are whole;
- with accumulation stage 2 does so in every micro-batch, and adds the new tensor to the first one's;
- stage 1 keeps all gradients until the last backward is over, and then does the same with all of them, in the order of the weights (reduce_gradients);
  large ones of others' partitions stay until the end of that;
- the optimizer's step: each gradient of the partition in fp64 for its norm, one after the other (get_grad_norm_direct); the partition's gradients
  flat, and in fp32; then it steps (step).

With the optimizer in CPU RAM (offload_optimizer) the GPU has neither partition nor its gradients, but a tensor as large as the largest weight; of what was
reduced each gradient of the partition is there in fp64, for its norm, and in fp32, to be copied.

GPUs hold different parts, so one may hold more than another. Counted is the most that any of them holds at each moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..errors import RecipeError
from .cuda import pinned_bytes
from .optimizers import OPTIMIZERS, optimizer_memory
from .optimizers.base import bytes_of
from .roles import Purpose, Role
from .selection import WeightKind
from .simulation import Stream
from .tape import ITEMSIZE, Op, Tape, Tensor, Weight, weight_gradient

if TYPE_CHECKING:
    from .recipe import Recipe
    from .zero3 import Reducer3

ALIGNMENT = 2
"""Values that each partition is a multiple of (nccl_start_alignment_factor)."""
BF16, FP32, FP64 = ITEMSIZE["bfloat16"], ITEMSIZE["float32"], 8
OF_PARTITION = "gradients of the partition"
IN_TOWERS = frozenset({WeightKind.VISION, WeightKind.PROJECTOR})


class Ledger(Protocol):
    """Where a replay writes down what comes and goes."""

    def put(self, tensor: Tensor) -> None: ...

    def drop(self, tensor: Tensor) -> None: ...

    def mark(self, operation: str, has_workspace: bool = False) -> None: ...


class Slice(NamedTuple):
    """A part of a weight that lies in one partition. Values."""

    rank: int
    numel: int


class Share(NamedTuple):
    """What one GPU's optimizer steps. Values. gathered: of weights of which it has at least a part, whole; largest: the largest part."""

    gathered: int
    largest: int
    parts: int


def slices_of(numels: Iterable[int], partition: int) -> list[tuple[Slice, ...]]:
    """Of each weight, in their order in the flat tensor, what of it lies in which partition (initialize_gradient_partition)."""
    slices: list[tuple[Slice, ...]] = []
    start = 0
    for numel in numels:
        end, own = start + numel, []
        while start < end:
            rank = start // partition
            cut = min(end, (rank + 1) * partition)
            own.append(Slice(rank, cut - start))
            start = cut
        slices.append(tuple(own))
    return slices


class Zero:
    """A model's weights under a recipe of ZeRO's: the same for all lengths. Sizes are in values, but for what says bytes."""

    def __init__(self, recipe: Recipe, weights: Sequence[Weight], hidden: int):
        """weights: those that are trained, in the order in which the model has them."""
        self.recipe, self.weights = recipe, tuple(weights)
        numels = [weight.numel for weight in weights]
        self.partition = ALIGNMENT * -(-sum(numels) // (ALIGNMENT * recipe.gpus))
        self.flat = self.partition * recipe.gpus
        self.bucket = recipe.bucket_values(hidden)
        self.largest = max(numels)
        self.slices = slices_of(numels, self.partition)
        self.shares = _shares(numels, self.slices)
        self.gathered = max(share.gathered for share in self.shares.values())
        self.stepped = Weight("the partition", (self.partition,), dtype="float32")
        self.steps = [self.stepped]
        self.buckets = [flat_tensor("bucket of gradients", "bfloat16", self.bucket, Role.REDUCED)] * (
            1 + recipe.overlap_comm
        )
        self.partition_gradients = self.held(BF16 * self.gathered)

    def reducer(self, first: bool, last: bool) -> Reducer:
        """What becomes of the gradients of a micro-batch of an optimizer step."""
        return Reducer(self, first, last)

    def visitor(self, _: Reducer | Reducer3) -> None:
        """Weights are whole: nobody gathers them."""

    def away(self) -> list[Tensor]:
        """What of that which stays is not there while the optimizer steps: nothing."""
        return []

    def held(self, size: int) -> Tensor:
        """Gradients of a partition, of so many bytes."""
        return Tensor(OF_PARTITION, "", "bfloat16", 0, size, role=Role.WEIGHT_GRADIENT)

    @property
    def on_host(self) -> bool:
        return self.recipe.optimizer_on_host

    def stays(self) -> list[Tensor]:
        """What is there before the first step."""
        flat = flat_tensor("weights, flat", "bfloat16", self.flat, Role.WEIGHT)
        if self.on_host:
            return [flat, flat_tensor("room for one gradient from CPU RAM", "bfloat16", self.largest, Role.REDUCED)]
        return [flat, flat_tensor("fp32 weights of the partition", "float32", self.partition, Role.WEIGHT)]

    def gradients(self, between: bool) -> list[Tensor]:
        """Gradients when a backward is over. between: as the next micro-batch finds them, else the optimizer."""
        if between and self.recipe.zero_stage == 1:
            return [*(weight_gradient(weight, "bfloat16") for weight in self.weights), *self.buckets]
        return [] if self.on_host else [self.partition_gradients]

    def step_moments(self) -> list[tuple[str, list[Tensor]]]:
        """What is there at moments of the optimizer's step, beside what stays and the optimizer's states."""
        if self.on_host:
            return [("step in CPU RAM", [])]
        widest = max(self.shares.values(), key=lambda share: BF16 * share.gathered + FP64 * share.largest)
        fp32 = self.fp32_gradients()
        return [
            ("norm of gradients", [self.held(BF16 * widest.gathered), _wide(widest.largest)]),
            ("cast gradients to fp32", [self.partition_gradients, *self.joined_gradients(), fp32]),
            ("step", [fp32, *self.temporaries()]),
        ]

    def fp32_gradients(self) -> Tensor:
        return flat_tensor("gradients of the partition, fp32", "float32", self.partition, Role.UPDATE)

    def joined_gradients(self) -> list[Tensor]:
        """A copy of the partition's gradients where there are several (_flatten_dense_tensors)."""
        several = max(share.parts for share in self.shares.values()) > 1
        return (
            [flat_tensor("gradients of the partition, flat", "bfloat16", self.partition, Role.UPDATE)]
            if several
            else []
        )

    def temporaries(self) -> list[Tensor]:
        """The optimizer's, as it steps the partition."""
        made = optimizer_memory(self.recipe, [(self.stepped, 1)]).temporaries
        return [Tensor(held.name, "", held.dtype, 0, held.bytes, role=Role.UPDATE) for held in made]

    def follow_step(self, ledger: Ledger) -> None:
        """The optimizer's step in order, up to where it makes its own tensors."""
        wide = _wide(max(share.largest for share in self.shares.values()))
        joined, fp32 = self.joined_gradients(), self.fp32_gradients()
        ledger.put(wide)
        ledger.drop(wide)
        for tensor in (*joined, fp32):
            ledger.put(tensor)
        for tensor in (*joined, self.partition_gradients):
            ledger.drop(tensor)

    def host_bytes(self) -> int:
        """Bytes of CPU RAM of one process: pinned (pin_memory as it comes) are fp32 weights and gradients of the partition, its bf16 copy, room for the
        largest weight's gradient, and with accumulation a gradient of each weight in the partition; the optimizer's states are not."""
        recipe = self.recipe
        pinned = [FP32 * self.partition, FP32 * self.partition, BF16 * self.partition, BF16 * self.largest]
        states = OPTIMIZERS[recipe.optimizer].memory(recipe, [(self.stepped, 1)]).states
        return sum(map(pinned_bytes, pinned)) + self._accumulated_bytes() + bytes_of(states)

    def _accumulated_bytes(self) -> int:
        """Bytes of gradients between micro-batches (buffer_to_accumulate_to_in_cpu), on the GPU that has most."""
        sums = dict.fromkeys(self.shares, 0)
        for weight, slices in zip(self.weights, self.slices, strict=True):
            for rank, _ in slices:
                sums[rank] += pinned_bytes(BF16 * weight.numel)
        return max(sums.values()) if self.recipe.accumulation > 1 else 0


def check_dtypes(weights: Iterable[Weight], recipe: Recipe) -> None:
    """Check that DeepSpeed's engine has all weights of a model in bf16. Raises RecipeError."""
    if any(weight.dtype not in ("", "bfloat16") for weight in weights):
        stage, others = ("ZeRO-3", "fsdp") if recipe.zero_stage == 3 else ("ZeRO", "fsdp or ddp")
        raise RecipeError(
            f"{stage} of a model some of whose weights have a dtype of their own is not planned.\nUse --sharding {others}."
        )


def _shares(numels: Iterable[int], slices: Iterable[Sequence[Slice]]) -> dict[int, Share]:
    """By rank. One that has padding alone holds no more than others (get_flat_partition), and is left out."""
    shares: dict[int, Share] = {}
    for numel, own in zip(numels, slices, strict=True):
        for rank, size in own:
            before = shares.get(rank, Share(0, 0, 0))
            shares[rank] = Share(before.gathered + numel, max(before.largest, size), before.parts + 1)
    return shares


def flat_tensor(name: str, dtype: str, numel: int, role: Purpose, stream: Stream = Stream.COMPUTE) -> Tensor:
    """A tensor of so many values, the same at all lengths."""
    return Tensor(name, "", dtype, 0, numel * ITEMSIZE[dtype], role=role, stream=stream)


def _wide(numel: int) -> Tensor:
    return Tensor("one gradient in fp64, for its norm", "", "float64", 0, FP64 * numel, role=Role.UPDATE)


class Reducer:
    """Gradients of one micro-batch, from the first of its backward to the end.

    `held`: bytes of a GPU beside what all have, by rank, of those that differ by now; `most`: the largest of that, as a tensor.
    """

    def __init__(self, zero: Zero, first: bool, last: bool):
        """first, last: of the micro-batches of an optimizer step."""
        self.zero, self.first, self.last = zero, first, last
        self.stage, self.on_host = zero.recipe.zero_stage, zero.on_host
        self.has_bucket = self.stage == 1 and not first
        self.left: dict[Weight, list[int]] = {}
        for number, weight in enumerate(zero.weights):
            self.left.setdefault(weight, []).append(number)
        self.inside: list[int] = []  # the bucket: numbers of weights
        self.values = 0
        self.large: Tensor | None = None  # the gradient that is in it, and too large for it
        self.kept: list[Tensor] = []  # large ones that others' partitions need, in stage 1
        self.held: dict[int, int] = {}
        self.most: Tensor | None = None

    def arrive(self, weight: Weight, gradient: Tensor, ledger: Ledger) -> None:
        """A weight has its gradient."""
        if not self.has_bucket:
            for bucket in self.zero.buckets:
                ledger.put(bucket)
            self.has_bucket = True
        if self.stage == 1 and not self.first:
            ledger.drop(gradient)  # added to the one that is there
            gradient = weight_gradient(weight, "bfloat16")
        if self.stage == 2 or (self.last and self.zero.recipe.overlap_comm):
            self._take(self.left[weight].pop(), gradient, ledger)  # layers come last first

    def finish(self, ledger: Ledger) -> None:
        """Backward is over."""
        if self.stage == 1 and not self.last:
            return
        if self.stage == 1 and not self.zero.recipe.overlap_comm:
            for number, weight in enumerate(self.zero.weights):
                self._take(number, weight_gradient(weight, "bfloat16"), ledger)
        self._reduce(ledger)
        for tensor in (*self.kept, *self.zero.buckets):
            ledger.drop(tensor)
        stays = not self.on_host and (self.first or self.stage == 1)
        self._hold(self.zero.partition_gradients if stays else None, ledger)

    def _take(self, number: int, gradient: Tensor, ledger: Ledger) -> None:
        """Copy a gradient into the bucket, which is reduced first where there is no room."""
        numel, bucket = self.zero.weights[number].numel, self.zero.bucket
        if self.values + numel > bucket:
            self._reduce(ledger)
        self.inside.append(number)
        self.values += numel
        if numel <= bucket:
            ledger.drop(gradient)
            return
        self.large = gradient
        if self.on_host:  # DeepSpeed makes sure that it has the memory for itself
            copy = flat_tensor("copy of a large gradient", "bfloat16", numel, Role.REDUCED)
            ledger.put(copy)
            ledger.mark("copy a large gradient")
            ledger.drop(copy)

    def _reduce(self, ledger: Ledger) -> None:
        """Reduce the bucket, and keep what the partition needs of it."""
        if not self.inside:
            return
        self._sum_slices(ledger)
        if self.on_host:
            self._to_host(ledger)
        else:
            self._to_partitions(ledger)
        if self.large is not None:
            self._let_go(self.large, ledger)
        self.inside, self.values, self.large = [], 0, None

    def _sum_slices(self, ledger: Ledger) -> None:
        """Slices of the bucket are flattened where there are several, at most a bucket and one more at once (allreduce_and_scatter)."""
        runs: list[Slice] = []
        for number in self.inside:
            for each in self.zero.slices[number]:
                if runs and runs[-1].rank == each.rank:
                    runs[-1] = Slice(each.rank, runs[-1].numel + each.numel)
                else:
                    runs.append(each)
        numel, count = 0, 0
        for n, run in enumerate(runs):
            numel, count = numel + run.numel, count + 1
            if numel > self.zero.bucket or n == len(runs) - 1:
                self._sum(numel, count, ledger)
                numel, count = 0, 0

    def _sum(self, numel: int, count: int, ledger: Ledger) -> None:
        recipe = self.zero.recipe
        stream = Stream.REDUCE if recipe.overlap_comm else Stream.COMPUTE
        flat = [flat_tensor("slices of the bucket, flat", "bfloat16", numel, Role.REDUCED, stream)] if count > 1 else []
        if recipe.sequence_parallel > 1:
            flat.append(flat_tensor("slices of the bucket, fp32", "float32", numel, Role.REDUCED, stream))
        for tensor in flat:
            ledger.put(tensor)
        ledger.mark("reduce the bucket of gradients")
        for tensor in flat:
            ledger.drop(tensor)

    def _to_partitions(self, ledger: Ledger) -> None:
        """The first weight of a partition has its tensor made; in later micro-batches that is a second one."""
        zero = self.zero
        base = 0 if self.first or self.stage == 1 else BF16 * zero.gathered
        for number in self.inside:
            for rank, _ in zero.slices[number]:
                size = BF16 * zero.shares[rank].gathered
                self.held.setdefault(rank, 2 * size - base if base else size)
        self._update(ledger)

    def _to_host(self, ledger: Ledger) -> None:
        """Gradients of the partition go to CPU RAM; with the last micro-batch, after their norms."""
        if not self.last:
            return
        wide = _wide(max(each.numel for number in self.inside for each in self.zero.slices[number]))
        ledger.put(wide)
        ledger.mark("norm of a gradient")
        ledger.drop(wide)

    def _let_go(self, gradient: Tensor, ledger: Ledger) -> None:
        """A large gradient is copied, or of no use here. Stage 1 keeps those of others; and CPU RAM before the last micro-batch its own."""
        ranks = [rank for rank, _ in self.zero.slices[self.inside[0]]]
        change = 0
        if self.stage == 1:
            self.kept.append(gradient)
            change = -gradient.bytes
        else:
            ledger.drop(gradient)
            change = gradient.bytes if self.on_host and not self.last else 0
        for rank in ranks if change else ():
            self.held[rank] = self.held.get(rank, 0) + change
        self._update(ledger)

    def _update(self, ledger: Ledger) -> None:
        """Hold what the GPU holds that has most beside others; those that nothing was said of have none."""
        most = max(self.held.values(), default=0)
        if len(self.held) < self.zero.recipe.gpus:
            most = max(0, most)
        if most != (self.most.bytes if self.most is not None else 0):
            is_all = most == self.zero.partition_gradients.bytes
            self._hold(self.zero.partition_gradients if is_all else self.zero.held(most), ledger)

    def _hold(self, tensor: Tensor | None, ledger: Ledger) -> None:
        if tensor is self.most:
            return
        if self.most is not None:
            ledger.drop(self.most)
        if tensor is not None:
            ledger.put(tensor)
            ledger.mark("copy gradients into the partition")
        self.most = tensor


def weights_in_order(tape: Tape, segments: bool, modules: Sequence[str] = ()) -> list[Weight]:
    """Weights as the model has them: of towers first; in layers of text norms come last. segments: layers of the tape are several, checkpointed
    together. modules: of towers, in the order in which their code makes them."""
    weights: list[Weight] = []
    of_towers: list[tuple[tuple[bool, int, int], Weight]] = []  # with the place of each
    outside: dict[Weight, None] = {}
    layers_before = 0
    for op in tape.ops:
        if op.is_layer and op.part is not None:
            layers = [inner for inner in op.part.tape.ops if inner.part is not None] if segments else [op]
            weights += [weight for layer in layers for weight in as_registered(_within(layer))]
            continue
        own = [weight for weight in dict.fromkeys(_within(op)) if op.is_tower_layer or weight not in outside]
        layers_before += op.is_tower_layer
        for weight in own:
            if weight.kinds & IN_TOWERS:
                place = next(n for n, name in enumerate(modules) if weight.name.startswith(name))
                is_projector = WeightKind.PROJECTOR in weight.kinds
                after = layers_before + (not op.is_tower_layer and layers_before > 0)
                of_towers.append(((is_projector, after, place), weight))
            else:
                weights.append(weight)
        if not op.is_tower_layer:
            outside.update(dict.fromkeys(own))
    return [*(weight for _, weight in sorted(of_towers, key=itemgetter(0))), *weights]


def _within(op: Op) -> list[Weight]:
    if op.part is None:
        return list(op.weights)
    return list(dict.fromkeys(weight for inner in op.part.tape.ops for weight in _within(inner)))


def as_registered(weights: Sequence[Weight]) -> list[Weight]:
    """Weights of a layer in the order of its modules."""
    return sorted(weights, key=lambda weight: weight.place)
