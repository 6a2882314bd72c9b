"""FSDP2 (ZeRO-3) in closed form: the groups of weights that are gathered and scattered together, and what a card makes for each.

Groups are those of `fully_shard(layer)` for every decoder layer and `fully_shard(model)` for the rest: embedding, final norm,
head. What is held when follows torch/distributed/fsdp/_fully_shard (torch 2.13); `tape.py` replays it:

- forward: a group's all-gather makes a flat buffer, which is copied out into the weights; the weights go when the layer has
  run, the buffer when the next group's weights are there (_fsdp_param_group.py, wait_for_unshard: three times a layer then).
  The rest's weights stay for backward;
- backward: while a layer runs, the buffer of the layer before it is there (_backward_prefetch). When it has run, its weights go,
  and its whole gradients are copied into the reduce-scatter's input, which stays until the next group's is made (post_backward);
- the rest is scattered last, when all of backward is over (_root_post_backward_final_callback). Of a group's whole gradients the
  last one outlives the others (a variable of foreach_reduce's loop): with the rest that is the head's; a layer's is small.

With accumulation that does not sync each micro-batch, as accelerate has it, a group's whole gradients stay when its backward is over, in
the dtype that they are summed in (to_accumulated_grad_if_needed), and the last micro-batch's are added and scattered.

CPUOffloadPolicy: shards come from CPU RAM one by one for each all-gather, and the scattered gradients go there at once. Hybrid sharding:
what was scattered is held until backward is over (AllReduceState), beside the gradients where these are other tensors.

Each weight is split along dimension 0 and padded to a multiple of the cards, in shards and gathered (FSDPParam). The first
card's share is counted: no other holds more. Experts that are one tensor (number, ., .) are split by their number: with more
cards than experts most of what is gathered is padding (FSDP2's shard_placement_fn can split them along another dimension).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from .cuda import pinned_bytes
from .optimizers import OPTIMIZERS, bytes_to_step
from .optimizers.base import bytes_of
from .recipe import Recipe
from .roles import Role
from .tape import ITEMSIZE, Group, Op, Tape, Tensor, Weight, step_weights, weight_gradient

REST = "embedding, norm and head"


def shard_of(weight: Weight, gpus: int) -> Weight:
    """The first card's share, padded."""
    return replace(weight, shape=(-(-weight.shape[0] // gpus), *weight.shape[1:]))


def shards_of(weights: list[tuple[Weight, int]], gpus: int) -> list[tuple[Weight, int]]:
    return [(shard_of(weight, gpus), n) for weight, n in weights] if gpus > 1 else weights


def into_groups(tape: Tape, recipe: Recipe) -> Tape:
    """A step's tape with a group for every layer, and one for the rest."""
    layers = [op for op in tape.ops if op.is_layer]
    tapes = [op.part.tape for op in layers if op.part is not None]
    groups: dict[Tape, Group] = {}
    for inner in dict.fromkeys(tapes):
        weights = [weight for weight, n in step_weights(inner.ops) for _ in range(n)]
        groups[inner] = _group(weights, recipe, "a layer")

    def in_group(i: int) -> Op:
        # Buffers of the layers on both sides are there with a layer: its moments lie between its neighbours' when theirs are alike.
        interior = 1 < i < len(tapes) - 2 and all(near is tapes[i] for near in tapes[i - 2 : i + 3])
        part = layers[i].part
        assert part is not None
        return replace(layers[i], part=replace(part, group=groups[tapes[i]], interior=interior))

    grouped = {op: in_group(i) for i, op in enumerate(layers)}
    rest = [weight for weight, _ in step_weights([op for op in tape.ops if op not in grouped])]
    return replace(
        tape, ops=tuple(grouped.get(op, op) for op in tape.ops), group=_group(rest, recipe, REST, outlived=True)
    )


def _group(weights: list[Weight], recipe: Recipe, owner: str, *, outlived: bool = False) -> Group:
    """owner: for people; outlived: the last gradient is held until all is done, and counts."""
    gathered_dtype, reduced_dtype = recipe.used_dtype, recipe.reduced_dtype
    shard_dtype = recipe.weight_dtype
    shards = [shard_of(weight, recipe.shards) for weight in weights]
    share = sum(shard.numel for shard in shards)
    whole = share * recipe.shards

    def tensor(name: str, dtype: str, numel: int, role: Role = Role.GATHERED) -> Tensor:
        return Tensor(f"{name} of {owner}", "", dtype, 0, numel * ITEMSIZE[dtype], role=role)

    def each(name: str, dtype: str) -> tuple[Tensor, ...]:
        return tuple(tensor(name, dtype, shard.numel) for shard in shards)

    cast = gathered_dtype != shard_dtype
    copy_in: tuple[Tensor, ...] = (tensor("shards in bf16", gathered_dtype, share),) if cast else ()
    if recipe.weights_on_host:  # one by one
        copy_in = each("shards from CPU RAM", gathered_dtype)
    stepping = bytes_to_step(recipe)
    temporaries = max(map(stepping, shards)) if recipe.optimizer_in_backward else 0
    accumulated = weights_gradients(weights, reduced_dtype) if reduced_dtype != gathered_dtype else ()
    gradients = weights_gradients(weights, gathered_dtype)
    scattered = accumulated if recipe.keeps_whole_gradients and accumulated else gradients
    return Group(
        gathered=tensor("gathered weights", gathered_dtype, whole),
        buffer=tensor("all-gather buffer", gathered_dtype, whole),
        copy_in=copy_in,
        from_host=each("shards from CPU RAM", shard_dtype) if cast and recipe.weights_on_host else (),
        gradients=gradients,
        accumulated=accumulated,
        scatter=tensor("reduce-scatter input", reduced_dtype, whole, Role.REDUCED),
        last_gradient=scattered[-1] if outlived else None,
        reduced=tensor("reduce-scatter output", reduced_dtype, share, Role.REDUCED)
        if reduced_dtype != shard_dtype
        else None,
        shards=Tensor("gradient shards", "", shard_dtype, 0, share * ITEMSIZE[shard_dtype], role=Role.REDUCED),
        stay=not (recipe.finds_gradients or recipe.optimizer_in_backward or recipe.weights_on_host),
        all_reduced=recipe.replicas > 1,
        temporaries=Tensor("optimizer temporaries of one shard", "", "uint8", 0, temporaries, role=Role.UPDATE),
    )


def weights_gradients(weights: Iterable[Weight], dtype: str) -> tuple[Tensor, ...]:
    return tuple(weight_gradient(weight, dtype) for weight in weights)


def shards_on_host(recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> int:
    """Bytes of CPU RAM that one process takes under CPUOffloadPolicy: weights and their gradients, each pinned by itself (FSDPParam's
    pin_memory; foreach_reduce's copy, which is pinned where it does not wait), and torch's optimizer, which steps them there.

    weights: shards, as (weight, how many).
    """
    size = ITEMSIZE[recipe.weight_dtype]
    pinned = sum(2 * pinned_bytes(weight.numel * size) * n for weight, n in weights)
    optimizer = OPTIMIZERS[recipe.optimizer].memory(recipe, [(w, n) for w, n in weights if w.trained])
    return pinned + bytes_of((*optimizer.states, *optimizer.temporaries))
