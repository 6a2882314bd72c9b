"""FSDP2 (ZeRO-3) in closed form: the groups of weights that are gathered and scattered together, and what a card makes for each.

Groups are those of `fully_shard(layer)` for every decoder layer, with images for every layer of a tower, and `fully_shard(model)` for the rest: embedding,
final norm, projector, head. What is held when follows torch/distributed/fsdp/_fully_shard (torch 2.13); `tape.py` replays it:

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

Where a part is trained, adapters above all, only that has gradients, and frozen weights are gathered with it: in bytes where dtypes of a group
differ (_get_all_gather_input_metadatas). A layer whose input gets no gradient, the lowest that is trained, is scattered last of all, after the
rest (_root_post_backward_final_callback).

All-gathers' buffers are made on a stream of their own, as is what a reduce-scatter gives; gathered weights and whole gradients are not
(foreach_all_gather, foreach_reduce).

Each weight is split along dimension 0 and padded to a multiple of the cards, in shards and gathered (FSDPParam). The first
card's share is counted: no other holds more. Experts that are one tensor (number, ., .) are split by their number: with more
cards than experts most of what is gathered is padding (FSDP2's shard_placement_fn can split them along another dimension).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..errors import RecipeError
from ..spec.model import Model
from .cuda import pinned_bytes
from .optimizers import OPTIMIZERS, bytes_to_step
from .optimizers.base import bytes_of, dtype_of
from .recipe import Recipe
from .roles import Role
from .selection import WeightKind
from .simulation import Stream
from .storage import packed_rows
from .tape import ITEMSIZE, Apart, Flat, Group, Op, Part, Tape, Tensor, Weight, step_weights, weight_gradient
from .tensor_parallel import part_of
from .zero import as_registered

REST = "embedding, norm and head"


def is_sharded(weight: Weight, recipe: Recipe) -> bool:
    """Whether FSDP2 splits a weight at all: accelerate leaves bitsandbytes' 4-bit weights in bytes out (fsdp2_prepare_model, ignored_params), but
    not those that pass for numbers."""
    whole = weight.is_adapter and recipe.adapters_are_whole
    return recipe.shards > 1 and not whole and not (weight.quantised and weight.packed_in == "uint8")


def shards_over(weight: Weight, recipe: Recipe) -> int:
    """Cards that have a weight in shards: all of a replica, or of experts those that have the same ones."""
    return recipe.shards // weight.spread_over


def shard_of(weight: Weight, recipe: Recipe) -> Weight:
    """The first card's share, padded, as it is kept; or the whole weight, where it is not split. Where cards split matrices, of its part of it."""
    weight = part_of(weight, recipe.tensor_parallel)
    if not is_sharded(weight, recipe):
        return weight
    if weight.quantised:
        return replace(weight, packed_over=recipe.shards)
    rows = -(-weight.shape[0] // shards_over(weight, recipe))
    return replace(weight, shape=(rows, *weight.shape[1:]), dtype=shard_dtype(weight, recipe))


def shard_dtype(weight: Weight, recipe: Recipe) -> str:
    """Dtype of a weight's shard. Under mixed precision accelerate keeps what is trained in fp32 (fsdp2_prepare_model), but for adapters in bf16
    beside 4-bit weights."""
    if weight.quantised:
        return weight.packed_in
    if recipe.gathers_in_bf16 and (weight.trained or weight.is_adapter):
        return "bfloat16" if weight.is_adapter and recipe.adapter_dtype == "bf16" else "float32"
    return recipe.weight_dtype if recipe.gathers_in_bf16 else weight.dtype or recipe.weight_dtype


def shards_of(weights: Iterable[tuple[Weight, int]], recipe: Recipe) -> list[tuple[Weight, int]]:
    return [(shard_of(weight, recipe), n) for weight, n in weights]


def into_groups(tape: Tape, recipe: Recipe) -> Tape:
    """A step's tape with a group for every layer, and one for the rest; where experts are shared out, by transformers' plan."""
    if recipe.flat and recipe.lora_rank:
        return _into_flat_groups(tape, recipe)
    if recipe.flat and recipe.checkpoint == "reentrant":
        # gradients are joined while the checkpoint still holds what it was given
        raise RecipeError(
            "fsdp1 with reentrant checkpoints is planned with adapters only.\nSet checkpoint='layer' (--checkpoint layer)."
        )
    layers = [op for op in tape.ops if op.is_layer or op.is_tower_layer]
    tapes = [op.part.tape for op in layers if op.part is not None]
    groups: dict[Tape, Group] = {}
    for inner in dict.fromkeys(tapes):
        groups[inner] = _layer_group([w for w, n in step_weights(inner.ops) for _ in range(n)], recipe)
    spread = {inner: _around_experts(inner, group) for inner, group in groups.items()}

    def in_group(i: int) -> Op:
        part = layers[i].part
        assert part is not None
        part = replace(part, tape=spread[tapes[i]], group=groups[tapes[i]], interior=_lies_between(tapes, i))
        return replace(layers[i], part=part)

    grouped = {op: in_group(i) for i, op in enumerate(layers)}
    inside: set[Op] = set()
    for written in _layers_written_out(tape):
        group = _group([weight for weight, _ in step_weights(written)], recipe, "a layer")
        begin, end = written[0], written[-1]
        grouped[begin], grouped[end] = replace(begin, gathers=group), replace(end, lets_go=group)
        inside.update(written)
    rest = [weight for weight, _ in step_weights([op for op in tape.ops if op not in grouped and op not in inside])]
    ops = tuple(grouped.get(op, op) for op in tape.ops)
    if recipe.expert_parallel == 1:
        return replace(tape, ops=ops, group=_group(rest, recipe, REST, outlived=True))
    first = [weight for weight in rest if WeightKind.EMBEDDINGS in weight.kinds]
    last = [weight for weight in rest if weight not in first]
    return replace(
        tape,
        ops=ops,
        first_group=_group(first, recipe, "the embedding", outlived=True),
        group=_group(last, recipe, "norm and head", outlived=True),
    )


def _layers_written_out(tape: Tape) -> Iterator[list[Op]]:
    """Operations of each layer that is no part of the tape: of towers, those from which no feature comes."""
    starts = [n for n, op in enumerate(tape.ops) if any(call.apart for call in op.begins)]
    ends = [n for n, op in enumerate(tape.ops) if any(call.apart for call in op.ends)]
    for start, end in zip(starts, ends, strict=True):
        yield list(tape.ops[start : end + 1])


def _layer_group(weights: list[Weight], recipe: Recipe) -> Group:
    """Of a layer; its experts are a group apart where cards share them out."""
    experts = [weight for weight in weights if weight.spread_over > 1]
    group = _group([weight for weight in weights if weight.spread_over == 1], recipe, "a layer")
    return replace(group, experts=_expert_group(experts, recipe)) if experts else group


def _expert_group(experts: list[Weight], recipe: Recipe) -> Group:
    """Of a layer's experts, in shards over the cards that have the same ones. Where each card has its own, weights are copied from what is kept, and
    gradients, joined, are divided into a third tensor (FSDPParamGroup.wait_for_unshard and foreach_reduce of one rank)."""
    owner, alone = "a layer's experts", shards_over(experts[0], recipe) == 1
    group = _group(experts, recipe, owner, outlived=not alone, alone=alone)
    if not alone:
        return group
    divided = Tensor(
        f"divided gradients of {owner}",
        "",
        group.scatter.dtype,
        0,
        group.scatter.bytes,
        role=Role.REDUCED,
        stream=Stream.REDUCE,
    )
    return replace(group, temporaries=divided)


def _around_experts(tape: Tape, group: Group) -> Tape:
    """A layer's tape, with its group where that has experts inside, which are gathered for themselves. Raises RecipeError for experts that are trained and
    whose input wants no gradient: FSDP2 would scatter theirs when its module's other input has its own, before they are made."""
    if group.experts is None:
        return tape
    start = next(n for n, op in enumerate(tape.ops) if any(call.apart for call in op.begins))
    product = next(n for n, op in enumerate(tape.ops) if n > start and op.weights)
    if group.experts.gradients and not any(op.grads for op in tape.ops[start:product]):
        raise RecipeError(
            "experts over several GPUs are not planned where all before them is frozen.\nTrain embeddings, too, or freeze these experts."
        )
    return replace(tape, around=group)


def _into_flat_groups(tape: Tape, recipe: Recipe) -> Tape:
    """The same of frozen layers with adapters under FSDP1: each of their matrices is a group of its own, that of its layer is all else.

    In backward the first one in a layer has the layer before gathered ahead, so that layers that are alike are told apart by what is before them."""
    ops: list[Op] = []
    alike: dict[Tape, Part] = {}
    made: dict[tuple[Tape, Group | None], Tape] = {}
    before: Group | None = None  # of a layer that backward comes to
    for op in tape.ops:
        part = op.part
        if not op.is_layer or part is None:
            ops.append(op)
            continue
        if part.tape not in alike:
            alike[part.tape] = _with_flat_adapters(part, recipe)
        grouped = alike[part.tape]
        key = part.tape, before
        if key not in made:
            made[key] = _gather_ahead(grouped.tape, before)
        hooked = part.reentrant and bool(part.wanted)
        ops.append(replace(op, part=replace(part, tape=made[key], group=grouped.group, hooked=hooked)))
        before = grouped.group if part.records else before
    rest = [weight for weight, _ in step_weights([op for op in tape.ops if not op.is_layer])]
    return replace(tape, ops=_with_flat_interior(ops), group=_flat_group(rest, recipe, REST))


def _with_flat_interior(ops: list[Op]) -> tuple[Op, ...]:
    """The operations, with layers marked whose moments lie between their neighbours'."""
    places = [i for i, op in enumerate(ops) if op.is_layer]
    tapes = [op.part.tape for op in ops if op.is_layer and op.part is not None]
    for n, i in enumerate(places):
        part = ops[i].part
        assert part is not None
        ops[i] = replace(ops[i], part=replace(part, interior=_lies_between(tapes, n)))
    return tuple(ops)


def _lies_between(tapes: list[Tape], i: int) -> bool:
    """Whether a layer's moments lie between its neighbours': buffers of the layers on both sides are there with it, and theirs are alike."""
    return 1 < i < len(tapes) - 2 and all(near is tapes[i] for near in tapes[i - 2 : i + 3])


def _with_flat_adapters(part: Part, recipe: Recipe) -> Part:
    """A layer with its groups. Raises RecipeError for adapters of which modules hold no matrices of their own."""
    weights = [weight for weight, n in step_weights(part.tape.ops) for _ in range(n)]
    matrices = [op for op in part.tape.ops if any(weight.is_adapter for weight in op.weights)]
    if sum(len(op.weights) for op in matrices) != sum(weight.is_adapter for weight in weights):
        raise RecipeError(
            "fsdp1 with adapters of experts or inside of pieces is not planned.\nUse --sharding fsdp, which is FSDP2."
        )
    aparts: dict[Op, Apart] = {}
    ahead: Group | None = None
    for op in matrices:
        aparts[op] = Apart(_flat_group(list(op.weights), recipe, op.weights[0].name), ahead, last=op is matrices[-1])
        ahead = aparts[op].group
    frozen = _flat_group([weight for weight in weights if not weight.is_adapter], recipe, "a layer")
    ops = tuple(replace(op, apart=aparts.get(op)) for op in part.tape.ops)
    return replace(part, tape=replace(part.tape, ops=ops), group=frozen)


def check_beside_autocast(model: Model, recipe: Recipe) -> None:
    """Check that autocast beside weights in bf16 makes no more than the copies of adapters' inputs, and that all of these are made. Raises RecipeError:
    where a checkpoint runs a layer again, peft sees what was gathered ahead of that in bf16, and casts nothing."""
    others = (
        model.norm != "rms" or model.experts or model.mixer or model.altup or model.per_layer or model.logit_softcap
    )
    ahead = recipe.checkpoint != "none" and recipe.prefetches_flat and recipe.quantize == "none"
    changes = (
        (ahead, "groups gathered ahead", "Set --backward-prefetch none, as Trainer does"),
        (recipe.attention == "eager", "--attention eager", "Leave that out"),
        (bool(others), f"layers of {model.name}", "Leave --use-orig-params out"),
    )
    for applies, what, way_out in changes:
        if applies:
            raise RecipeError(
                f"fsdp1 with --use-orig-params and adapters has autocast on, which is not planned with {what}.\n{way_out}."
            )


def _gather_ahead(tape: Tape, before: Group | None) -> Tape:
    """A layer's tape, whose first matrix of an adapter has the layer before gathered ahead of its backward."""
    first = next((op for op in tape.ops if op.apart is not None), None)
    if first is None or first.apart is None:
        return tape
    ahead = replace(first, apart=replace(first.apart, ahead=before))
    return replace(tape, ops=tuple(ahead if op is first else op for op in tape.ops))


def card_weights(tape: Tape, weights: list[tuple[Weight, int]], recipe: Recipe) -> list[tuple[Weight, int]]:
    """Weights of a step, as (weight, how many), as one card has them: whole, in shards, or in FSDP1's flat shards, one of a group."""
    if not recipe.flat:
        return shards_of(weights, recipe)
    return list(Counter(flat_shards(tape)).items())


def flat_shards(tape: Tape) -> list[Weight]:
    """FSDP1's shards in the order of the modules: the rest's, then those of layers, each before its adapters'."""
    return [group.flat.shard for group in groups_of(tape) if group.flat is not None]


def stepped(tape: Tape) -> list[tuple[Weight, int]]:
    """What the optimizer steps of FSDP1's shards, as (weight, how many): those that are trained, or the pieces of weights in them."""
    trained = [group.flat for group in groups_of(tape) if group.flat is not None and group.flat.shard.trained]
    return list(Counter(piece for flat in trained for piece in flat.pieces or (flat.shard,)).items())


def groups_of(tape: Tape) -> list[Group]:
    """Groups of a step: the rest's, then those of layers, each before its adapters'."""
    groups = [tape.group]
    for op in tape.ops:
        if op.is_layer and op.part is not None:
            groups += [op.group, *(inner.apart.group for inner in op.part.tape.ops if inner.apart is not None)]
    return [group for group in groups if group is not None]


_STREAMS_OF_FLAT = {Role.GATHERED: Stream.GATHER, Role.REDUCED: Stream.REDUCE}
"""Under FSDP1 (_unshard, _post_backward_hook)."""


def last_stream(recipe: Recipe) -> Stream:
    """The stream on which FSDP2 is done with a gradient (post_reduce_stream): where it is cast to what is kept, and where weights are stepped in backward."""
    return Stream.ALL_REDUCE if recipe.replicas > 1 else Stream.REDUCE


def _flat_group(weights: list[Weight], recipe: Recipe, owner: str) -> Group:
    """A group whose weights are one flat tensor, padded at its end (FlatParamHandle.flatten_tensors, _get_shard): all of them trained, or none. In
    the order of modules."""
    weights = as_registered(weights)
    kept, used = _flat_dtypes(weights, recipe)
    summed = recipe.reduced_dtype if recipe.gathers_in_bf16 else kept
    numbers, ends = _places(weights, recipe, used)
    share = -(-numbers // recipe.shards)
    trained = all(weight.trained for weight in weights)

    def tensor(name: str, dtype: str, numbers: int, role: Role, stream: Stream | None = None) -> Tensor:
        stream = stream if stream is not None else _STREAMS_OF_FLAT.get(role, Stream.COMPUTE)
        return Tensor(f"{name} of {owner}", "", dtype, 0, numbers * ITEMSIZE[dtype], role=role, stream=stream)

    def where(needed: bool, *of_tensor: Any) -> Tensor | None:
        return tensor(*of_tensor) if needed else None

    nothing = tensor("nothing", used, 0, Role.GATHERED)
    adapter = all(weight.is_adapter for weight in weights)
    own = kept if kept != recipe.weight_dtype else ""
    flat = Flat(
        Weight(f"flat weights of {owner}", (share,), trained=trained, dtype=own, is_adapter=adapter),
        tensor("joined gradients", used, numbers, Role.WEIGHT_GRADIENT),
        where(summed != used, "gradients to be summed", summed, numbers, Role.REDUCED),
        where(numbers % recipe.shards > 0, "padded gradients", summed, share * recipe.shards, Role.REDUCED),
        prefetched=recipe.prefetches_flat,
        pieces=tuple(_pieces(weights, ends, share, own)) if recipe.use_orig_params and trained else (),
    )
    return Group(
        gathered=tensor("gathered weights", used, share * recipe.shards, Role.GATHERED),
        buffer=nothing,
        copy_in=where(kept != used, "shards in bf16", used, share, Role.GATHERED, Stream.CAST),
        from_host=(),
        gradients=weights_gradients(weights, used) if trained else (),
        accumulated=(),
        scatter=nothing,
        reduced=where(summed != kept, "reduce-scatter output", summed, share, Role.REDUCED),
        shards=tensor("gradient shards", kept, share, Role.REDUCED),
        last_gradient=None,
        stay=not recipe.finds_gradients,
        all_reduced=False,
        temporaries=nothing,
        flat=flat,
    )


ALIGNMENT = 16
"""Bytes that each weight begins at a multiple of, where the optimizer steps views of it (_flat_param.py, _get_aligned_numel)."""


def _places(weights: Sequence[Weight], recipe: Recipe, used: str) -> tuple[int, list[int]]:
    """Numbers of a flat tensor, and where each weight ends in it. Of views of weights they are padded to a multiple of the cards
    (_init_flat_param_and_metadata)."""
    step = ALIGNMENT // ITEMSIZE[used] if recipe.use_orig_params else 1
    ends: list[int] = []
    end = 0
    for weight in weights:
        end = -(-end // step) * step + numbers_of(weight)
        ends.append(end)
    return (-(-end // recipe.shards) * recipe.shards if recipe.use_orig_params else end), ends


def _pieces(weights: Sequence[Weight], ends: Sequence[int], share: int, dtype: str) -> Iterator[Weight]:
    """What the first card's shard, of so many numbers of this dtype, has of each weight."""
    for weight, end in zip(weights, ends, strict=True):
        numbers = min(share, end) - (end - numbers_of(weight))
        if numbers > 0:
            yield replace(weight, shape=(numbers,), dtype=dtype)


def _flat_dtypes(weights: list[Weight], recipe: Recipe) -> tuple[str, str]:
    """Dtypes in which a flat tensor of these weights is kept, and is used. Raises RecipeError where they have several: torch's FlatParamHandle takes
    one (_validate_tensors_to_flatten)."""
    kept = {shard_dtype(weight, recipe) for weight in weights}
    used = {weight.packed_in if weight.quantised else weight.dtype or recipe.used_dtype for weight in weights}
    if len(kept) > 1 or len(used) > 1:
        raise RecipeError(
            f"fsdp1 joins weights of one dtype, and here are {' and '.join(sorted(kept | used))}.\nUse --sharding fsdp, which is FSDP2."
        )
    return kept.pop(), used.pop()


def _group(weights: list[Weight], recipe: Recipe, owner: str, *, outlived: bool = False, alone: bool = False) -> Group:
    """owner: for people; outlived: the last gradient is held until all is done, and counts; alone: of one card."""
    if recipe.flat:
        return _flat_group(weights, recipe, owner)
    weights = [weight for weight in weights if is_sharded(weight, recipe)]
    trained = [weight for weight in weights if weight.trained]

    def tensor(name: str, dtype: str, size: int, role: Role = Role.GATHERED, stream: Stream = Stream.COMPUTE) -> Tensor:
        return Tensor(f"{name} of {owner}", "", dtype, 0, size, role=role, stream=stream)

    def shard_bytes(weight: Weight, dtype: str) -> int:
        return numbers_of(shard_of(weight, recipe)) * ITEMSIZE[dtype]

    cards = shards_over(weights[0], recipe) if weights else recipe.shards

    def used(weight: Weight) -> str:
        return weight.packed_in if weight.quantised else weight.dtype or recipe.used_dtype

    gathering = Stream.COMPUTE if alone else Stream.GATHER  # wait_for_unshard copies what one card has

    def sent(weight: Weight) -> tuple[Tensor, Tensor | None]:
        """A shard as it is gathered; and as it came from CPU RAM before, where that has another dtype."""
        kept, name = shard_dtype(weight, recipe), "shards from CPU RAM"
        moves = recipe.weights_on_host and kept != used(weight)
        wide = tensor(name, kept, shard_bytes(weight, kept), stream=gathering) if moves else None
        return tensor(name, used(weight), shard_bytes(weight, used(weight)), stream=gathering), wide

    cast = sum(shard_bytes(w, used(w)) for w in weights if shard_dtype(w, recipe) != used(w))
    share = sum(shard_bytes(weight, used(weight)) for weight in weights)
    dtypes = {used(weight) for weight in weights}
    dtype = dtypes.pop() if len(dtypes) == 1 else "uint8"  # of several dtypes bytes are gathered
    kept, summed = (shard_dtype(trained[0], recipe), reduced_dtype(trained[0], recipe)) if trained else ("", "")
    reduced = sum(shard_bytes(weight, summed) for weight in trained)
    stepping = bytes_to_step(recipe)
    temporaries = max((stepping(shard_of(weight, recipe)) for weight in trained), default=0)
    gradients = weights_gradients(trained, recipe.used_dtype)
    accumulated = weights_gradients(trained, summed, own=False) if trained and summed != used(trained[0]) else ()
    keeps = recipe.keeps_whole_gradients and bool(accumulated)
    scattered = accumulated if keeps else gradients
    parts = [part_of(weight, recipe.tensor_parallel) for weight in trained]
    cut = weights_gradients(parts, summed, own=False) if keeps else weights_gradients(parts, recipe.used_dtype)
    return Group(
        gathered=tensor("gathered weights", dtype, share * cards),
        buffer=tensor("all-gather buffer", dtype, share * cards, stream=Stream.GATHER),
        from_host=tuple(map(sent, weights)) if recipe.weights_on_host or (alone and cast) else (),
        copy_in=tensor("shards in bf16", "bfloat16", cast, stream=Stream.GATHER)
        if cast and not (recipe.weights_on_host or alone)
        else None,
        gradients=gradients,
        accumulated=accumulated,
        scatter=tensor("reduce-scatter input", summed, reduced * cards, Role.REDUCED),
        last_gradient=scattered[-1] if outlived and scattered else None,
        reduced=tensor("reduce-scatter output", summed, reduced, Role.REDUCED, Stream.REDUCE)
        if summed != kept
        else None,
        shards=Tensor(
            "gradient shards",
            "",
            kept,
            0,
            sum(shard_bytes(weight, kept) for weight in trained),
            role=Role.REDUCED,
            stream=last_stream(recipe) if summed != kept else Stream.REDUCE,
        ),
        stay=not (recipe.finds_gradients or recipe.optimizer_in_backward or recipe.weights_on_host),
        all_reduced=recipe.replicas > 1,
        temporaries=Tensor(
            "optimizer temporaries of one shard",
            "",
            "uint8",
            0,
            temporaries if recipe.optimizer_in_backward else 0,
            role=Role.UPDATE,
            stream=last_stream(recipe),
        ),
        alone=alone,
        cut=tuple((whole, part) for whole, part in zip(scattered, cut, strict=True) if whole.bytes != part.bytes),
    )


def numbers_of(weight: Weight) -> int:
    """Numbers that a weight, or its shard, has, or passes for."""
    return packed_rows(weight) if weight.quantised else weight.numel


def reduced_dtype(weight: Weight, recipe: Recipe) -> str:
    """Dtype in which gradients of a weight are summed over cards, and in which whole ones are kept."""
    return recipe.reduced_dtype if recipe.gathers_in_bf16 else weight.dtype or recipe.used_dtype


def weights_gradients(weights: Iterable[Weight], dtype: str, own: bool = True) -> tuple[Tensor, ...]:
    """dtype: of a weight that has none of its own; own: else that."""
    return tuple(weight_gradient(weight, (own and weight.dtype) or dtype) for weight in weights)


def shards_on_host(recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> int:
    """Bytes of CPU RAM that one process takes under CPUOffloadPolicy: weights and their gradients, each pinned by itself (FSDPParam's
    pin_memory; foreach_reduce's copy, which is pinned where it does not wait), and torch's optimizer, which steps them there.

    weights: shards, as (weight, how many).
    """
    pinned = sum(
        (1 + weight.trained)
        * pinned_bytes(
            numbers_of(weight) * ITEMSIZE[weight.packed_in if weight.quantised else dtype_of(recipe, weight)]
        )
        * n
        for weight, n in weights
    )
    optimizer = OPTIMIZERS[recipe.optimizer].memory(recipe, [(w, n) for w, n in weights if w.trained])
    return pinned + bytes_of((*optimizer.states, *optimizer.temporaries))
