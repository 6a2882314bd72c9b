"""Ways to make a step fit: sets of changes to a recipe, adapters first and then the cheapest, and the cards that hold it as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from ..errors import RecipeError
from ..spec.hardware import Gpu, gpus
from ..spec.model import Model
from ..step import ulysses
from ..step.adapters import ATTENTION
from ..step.expert_adapters import has_adapted_experts
from ..step.optimizers import stand_ins
from ..step.recipe import Recipe
from . import calibration
from .layout import step_of
from .solve import Plan, max_seq, max_seq_of_tensors, plan_at, recommend_chunks_at

_MLP_AGAIN_PRICE = "time: the MLPs run twice"
_UNMEASURED = "not measured on a GPU yet"
MAX_WAYS = 4
"""Ways that are listed, beside adapters."""
USEFUL_TOKENS = 2048
"""Tokens that a way should reach where no length was asked for, if any does."""
ADAPTER_RANK = 16
"""Rank of adapters that are proposed: what TRL and peft's examples take (`trainers.py`)."""


class Change(NamedTuple):
    """A change to a recipe. gives_up: what it takes of the user, nothing where it is empty; cost: to put ways in order."""

    name: str
    gives_up: str
    cost: int
    fields: dict[str, object]


class Way(NamedTuple):
    """Changes that together lead to `plan`, and the longest sequence with them, in tokens."""

    changes: tuple[Change, ...]
    plan: Plan
    s_max: int

    @property
    def adapters(self) -> Change | None:
        """The change that brings adapters, or quantised weights beside them; None: it is another way."""
        return next((change for change in self.changes if _ADAPTER_FIELDS & change.fields.keys()), None)

    @property
    def gives_up(self) -> str:
        """Price of the changes together, in words."""
        again = (
            () if self.plan.recipe.checkpoint == "none" else (_MLP_AGAIN_PRICE,)
        )  # a checkpointed layer runs again anyway
        return "; ".join(change.gives_up for change in self.changes if change.gives_up not in ("", *again)) or "nothing"


def _total_cost(changes: Iterable[Change]) -> int:
    return sum(change.cost for change in changes)


def _change_names(changes: Iterable[Change]) -> set[str]:
    return {change.name for change in changes}


_ADAPTER_FIELDS = {"lora_rank", "quantize"}
Lever = tuple[Change, ...]
"""Changes that exclude each other."""


def _state_levers(start: Plan) -> tuple[Lever, ...]:
    """Levers on the bytes that do not grow with the sequence."""
    back_to_gpu: Lever = (
        ()
        if start.fits_host
        else (Change("optimizer states on the GPU", "", 0, {"optimizer_on_host": False, "weights_on_host": False}),)
    )
    several: tuple[Lever, ...] = ()
    if start.recipe.keeps_whole_gradients:
        several += ((Change("gradients scattered each time", "a reduce-scatter a micro-batch", 1, _SYNCED),),)
    if start.recipe.gpus > 1 and (start.recipe.flat or not start.recipe.sharded):
        in_shards = start.recipe.flat or start.recipe.zero_stage == 3
        several += (
            (Change("weights in shards (FSDP2)", "" if in_shards else "an all-gather a layer", 2, _IN_SHARDS),),
        )
    if start.recipe.expert_parallel > 1:
        several += (
            (Change("experts in shards, whole where they run", "an all-gather of them a layer", 2, _TOGETHER),),
        )
    return (
        *several,
        (Change("weights and moments in bf16", "exact updates", 8, {"precision": "bf16"}),),
        tuple(Change(each.short, each.gives_up, 5, {"optimizer": name}) for name, each in stand_ins().items()),
        (
            Change(
                "the optimizer in backward", "accumulation and clipping; own loop", 4, {"optimizer_in_backward": True}
            ),
        ),
        (
            *back_to_gpu,
            Change(
                "the optimizer in CPU RAM",
                "step time: the optimizer steps on the CPU",
                10,
                {"optimizer_on_host": True, "optimizer_in_backward": False},
            ),
        ),
        (Change("weights in CPU RAM", "weights cross the host link", 6, {"weights_on_host": True}),),
        (Change("no kbit preparation", "embeddings, head and norms in fp32", 1, {"kbit_preparation": False}),),
    )


_SYNCED: dict[str, object] = {"sync_each_batch": True}
_TOGETHER: dict[str, object] = {"expert_parallel": 1, "expert_imbalance": 1}
_IN_SHARDS: dict[str, object] = {
    "sharding": "fsdp",
    "backward_prefetch": "pre",
    "use_orig_params": False,
}  # which are of FSDP1


def _token_levers(start: Plan) -> tuple[Lever, ...]:
    """Levers on the bytes that grow with the sequence; the last is on what runs in pieces."""
    recipe = start.recipe
    accumulation = {} if recipe.optimizer_in_backward else {"accumulation": recipe.accumulation * recipe.batch}
    what_left = "saved tensors" if recipe.offload == "saved-tensors" else "layer inputs"
    back_to_gpu: Lever = () if start.fits_host else (Change(f"{what_left} on the GPU", "", 0, {"offload": "none"}),)
    attention = (
        Change("sdpa instead of eager attention", "", 0, {"attention": "sdpa"})
        if recipe.attention == "eager"
        else Change("flash-attn: no explicit masks", "a package more", 1, {"attention": "flash"})
    )
    return (
        (attention,),
        *_sharing_levers(start),
        (Change("fused AdamW", "", 0, {"adamw_kernel": "fused"}),),
        (Change("the loss in chunks", "", 0, {"loss": "chunked", "loss_chunks": "auto"}),),
        (Change("batch 1, accumulated", "large matrix products", 2, {"batch": 1, **accumulation}),),
        _checkpoint_lever(recipe),
        (*back_to_gpu, Change("layer inputs in CPU RAM", "CPU RAM", 3, {"offload": "layer-inputs"})),
        _piece_lever(recipe),
    )


def _checkpoint_lever(recipe: Recipe) -> Lever:
    """Reentrant ones let go of 4-bit weights that ZeRO-3 gathered, which bitsandbytes' product holds until backward is over."""
    every_layer = Change("checkpoint every layer", "time: a second forward pass", 3, {"checkpoint": "layer"})
    if recipe.zero_stage != 3 or recipe.quantize == "none":
        return (every_layer,)
    cost = "" if recipe.checkpoint == "layer" else every_layer.gives_up
    return (every_layer, Change("reentrant checkpoints", cost, 3 * bool(cost), {"checkpoint": "reentrant"}))


def _sharing_levers(start: Plan) -> tuple[Lever, ...]:
    """Of several GPUs: all of them share each sequence, where they can share the model's heads."""
    ranks = start.recipe.gpus
    shared = Change(
        f"each sequence over {ranks:,} GPUs", f"{ranks:,} times fewer at once", 3, {"sequence_parallel": ranks}
    )
    changed = _changed_recipe(start.recipe, [shared])
    if changed is None or changed == start.recipe or start.model.stand_in is not None:
        return ()
    try:
        ulysses.check(start.model, ranks)
    except RecipeError:
        return ()
    return ((shared,),)


def _piece_lever(recipe: Recipe) -> Lever:
    """What of a layer runs over pieces of the sequence, the least of it first."""
    mlp: dict[str, object] = {"mlp_chunks": "auto", "mlp_recompute": True}
    layer = {**mlp, "layer_in_chunks": True, "attention_groups": "auto"}
    host = {**layer, "attention_on_host": True}
    return (
        Change("the MLP in chunks", _MLP_AGAIN_PRICE, 2 if recipe.checkpoint == "none" else 0, mlp),
        Change("the layers in chunks", _UNMEASURED, 3, layer),
        Change("attention from CPU RAM", f"queries, keys, values cross the host link; {_UNMEASURED}", 7, host),
    )


def ways_to_fit(start: Plan) -> tuple[Way, ...]:
    """Sets of changes with which the step fits at its length: what gives up nothing, then adapters, then the cheapest first; of sets within
    each other the smallest."""
    adapters = adapter_way(start)
    ways: list[Way] = []
    too_much: set[Recipe] = set()
    for changes in _change_sets(start):
        if len(ways) == MAX_WAYS:
            break
        if any(_change_names(way.changes) <= _change_names(changes) for way in ways):
            continue
        if not _seems_to_fit(start, changes, too_much):
            continue
        if (way := _way_that_fits(start, changes)) is not None:
            ways.append(way)
    return tuple(
        sorted((*([adapters] if adapters is not None else []), *ways), key=lambda way: way.gives_up != "nothing")
    )


def _way_that_fits(start: Plan, changes: tuple[Change, ...]) -> Way | None:
    """The way, where the step fits with the changes and for them."""
    recipe = _changed_recipe(start.recipe, changes)
    assert recipe is not None
    plan = plan_at(start.model, recipe, start.card, start.seq_len)
    return Way(changes, plan, max_seq(start.model, recipe, start.card).s_max) if _helps(start, plan) else None


def _helps(start: Plan, plan: Plan) -> bool:
    """Does it fit for what was changed? Where only one of the two is calibrated they differ by what they stand on, too: then by as much as the
    formula says that the change brings."""
    if not plan.fits or (start.calibration is None) == (plan.calibration is None):
        return plan.fits
    gain = _formula_bytes(start) - _formula_bytes(plan)
    return start.peak_bytes - gain <= plan.budget_bytes


def _formula_bytes(plan: Plan) -> int:
    with calibration.set_aside():
        return plan_at(plan.model, plan.recipe, plan.card, plan.seq_len, plan.chunks).peak_bytes


# ---- adapters -------------------------------------------------------------------------------------------------------------


def tries_adapters(start: Plan) -> bool:
    """Whether adapters, or quantised weights beside them, are a way at all: the formula knows the model, all weights are trained or there
    are adapters already, and weights lie on the GPU."""
    return next(_adapter_changes(start), None) is not None


def adapter_way(start: Plan) -> Way | None:
    """Adapters with which the step fits at its length: LoRA, else QLoRA, each as the recipe is, else with what shortens what grows with
    the sequence; None where they do not help, nothing needs them beside that, or the recipe cannot have them."""
    for adapters in _adapter_changes(start):
        for everything in (adapters, *reversed(tuple(_all_changes(start, adapters)))):
            if not _seems_to_fit(start, everything):
                continue
            fewest = _without_needless(start, everything)
            if adapters[0] not in fewest:
                return None
            for changes in (fewest, everything):
                if (way := _way_that_fits(start, changes)) is not None:
                    return way
    return None


def _adapter_changes(start: Plan) -> Iterator[tuple[Change, ...]]:
    """Changes that bring adapters, the one that leaves the model's own weights as they are first; for LoRA's those to QLoRA's."""
    model, recipe = start.model, start.recipe
    if model.stand_in is not None or recipe.train or recipe.freeze:
        return
    frozen = Change("frozen weights in bf16", "fp32 base weights", 1, _frozen_in_bf16(recipe))
    for change in _kinds_of_adapters(model, recipe):
        for changes in ((change,), (change, frozen)):
            changed = _changed_recipe(recipe, changes)
            if changed is not None and (change is changes[-1] or _alters(recipe, frozen)):
                yield changes


def _kinds_of_adapters(model: Model, recipe: Recipe) -> Iterator[Change]:
    rounded = "weights rounded to 4 bits"
    if recipe.lora_rank:
        if recipe.quantize in ("none", "int8"):
            yield Change(f"QLoRA of rank {recipe.lora_rank}", rounded, 2, {"quantize": "nf4"})
        return
    fields: dict[str, object] = {"lora_rank": ADAPTER_RANK}
    if has_adapted_experts(model):  # whose weights every layer would make anew beside its own
        fields["lora_targets"] = (ATTENTION,)
    price = "trains adapters instead of all weights"
    yield Change(f"LoRA of rank {ADAPTER_RANK}", price, 0, fields)
    yield Change(f"QLoRA of rank {ADAPTER_RANK}", f"{price}; {rounded}", 2, {**fields, "quantize": "nf4"})


def _frozen_in_bf16(recipe: Recipe) -> dict[str, object]:
    """What adds to the adapters computes as before: under autocast, or what fsdp has for it, where it did."""
    return {"precision": "bf16", "autocast": recipe.runs_autocast or recipe.gathers_in_bf16}


def _without_needless(start: Plan, changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """The changes without those that it seems to fit without, adapters first, then the dearest first."""
    for change in sorted(changes, key=lambda change: (not _ADAPTER_FIELDS & change.fields.keys(), -change.cost)):
        fewer = tuple(each for each in changes if each is not change)
        if fewer and _seems_to_fit(start, fewer):
            changes = fewer
    return changes


def nearest_plan(plans: Sequence[Plan]) -> Plan:
    """The plan that comes closest to fitting; of equals the one that asks least of the host, and of those the last, as strategies are listed."""
    return min(reversed(plans), key=lambda plan: (not plan.fits_host, plan.peak_bytes, plan.host_bytes))


def ways_to_train(starts: Sequence[Plan]) -> tuple[Way, ...]:
    """List the ways to train where no strategy holds the shortest sequence: for the nearest, with which at least `USEFUL_TOKENS` tokens fit, if with any."""
    start = nearest_plan(starts)
    useful = max(start.seq_len, min(USEFUL_TOKENS, start.model.context or USEFUL_TOKENS))
    lengths = dict.fromkeys((useful, start.seq_len))
    return next((ways for n in lengths if (ways := ways_to_fit(plan_at(start.model, start.recipe, start.card, n)))), ())


def furthest_way(start: Plan) -> Way | None:
    """The longest sequence that changes reach, where the step's own length is beyond all of them; None where nothing fits at all."""
    with calibration.set_aside():  # which some of these recipes have, and others have not
        changes = _furthest_changes(start)
    return _way_with(start, changes) if changes is not None else None


def _furthest_changes(start: Plan) -> tuple[Change, ...] | None:
    candidates = [
        changes
        for states in (*_adapter_changes(start), *_choose_changes(start.recipe, _state_levers(start)))
        for changes in _all_changes(start, states)
    ]
    best = max(candidates, key=lambda changes: (_reach_of_tensors(start, changes), -_total_cost(changes)), default=())
    reach = _reach_of_tensors(start, best)
    for change in sorted(best, key=lambda change: -change.cost):  # not what brings nothing
        fewer = tuple(each for each in best if each is not change)
        if (reach_of_fewer := _reach_of_tensors(start, fewer)) >= reach:
            best, reach = fewer, reach_of_fewer
    return best if reach else None


def _reach_of_tensors(start: Plan, changes: Sequence[Change]) -> int:
    """The longest sequence whose tensors fit, which is quicker found than the longest that runs; 0 where the changes contradict each other."""
    recipe = _changed_recipe(start.recipe, changes)
    try:
        return max_seq_of_tensors(start.model, recipe, start.card)[0] if recipe is not None else 0
    except RecipeError:  # the model's attention cannot be so
        return 0


def _way_with(start: Plan, changes: Iterable[Change]) -> Way | None:
    recipe = _changed_recipe(start.recipe, changes)
    if recipe is None:
        return None
    answer = max_seq(start.model, recipe, start.card)
    return Way(tuple(changes), answer.plan, answer.s_max)


def _change_sets(start: Plan) -> Iterator[tuple[Change, ...]]:
    """Sets of changes that may help, the cheapest first: none whose optimizer, precision and place of states leave no room for the
    step with all else that saves memory."""
    sets = []
    for states in _choose_changes(start.recipe, _state_levers(start)):
        if any(_seems_to_fit(start, changes) for changes in (*_all_changes(start, states), states)):
            sets += [(*states, *tokens) for tokens in _choose_changes(start.recipe, _token_levers(start))]
    return iter(sorted(filter(None, sets), key=lambda changes: (_total_cost(changes), len(changes))))


def _choose_changes(recipe: Recipe, levers: Sequence[Lever]) -> Iterator[tuple[Change, ...]]:
    """Choices of at most one change of each lever, of those that alter the recipe by themselves or could beside others."""
    options = [(None, *(change for change in lever if _alters(recipe, change))) for lever in levers]
    return (tuple(change for change in chosen if change is not None) for chosen in product(*options))


def _alters(recipe: Recipe, change: Change) -> bool:
    return any(getattr(recipe, field) != value for field, value in change.fields.items())


def _all_changes(start: Plan, states: tuple[Change, ...]) -> Iterator[tuple[Change, ...]]:
    """Changes of the states with all that shortens what grows with the sequence, by each of what may run in pieces, the most first; and
    without what needs CPU RAM, which may be short."""
    *others, in_pieces = _token_levers(start)
    for pieces in reversed(in_pieces):
        taken: tuple[Change, ...] = states
        for lever in (*others, (pieces,)):
            change = next((each for each in lever if _alters(start.recipe, each)), None)
            if change is not None and _changed_recipe(start.recipe, (*taken, change)) is not None:
                taken = (*taken, change)
        yield taken
        on_card = tuple(change for change in taken if change.fields.get("offload", "none") == "none")
        if on_card != taken:
            yield on_card


def _changed_recipe(recipe: Recipe, changes: Iterable[Change]) -> Recipe | None:
    """The changed recipe; None where they contradict each other."""
    fields: dict[str, object] = {}
    for change in changes:
        fields |= change.fields
    try:
        return recipe.changed(**fields)
    except RecipeError:
        return None


def _seems_to_fit(start: Plan, changes: tuple[Change, ...], too_much: set[Recipe] | None = None) -> bool:
    """Whether it fits by the chunks that are best at this length alone, which is quicker than to plan it. too_much: takes recipes, whatever their
    optimizer, whose step alone is more than the card holds, beside weights, gradients and states; these are not tried again."""
    recipe = _changed_recipe(start.recipe, changes)
    if recipe is None:
        return False
    with_any_optimizer = recipe.model_copy(update=_ANY_OPTIMIZER)
    if too_much is not None and with_any_optimizer in too_much:
        return False
    try:
        chunks = recommend_chunks_at(start.model, recipe, start.card, start.seq_len)
        plan = plan_at(start.model, recipe, start.card, start.seq_len, chunks)
    except RecipeError:  # the model's attention cannot be so
        return False
    if too_much is not None and plan.peak_bytes - _bytes_of_states(plan) > plan.budget_bytes:
        too_much.add(with_any_optimizer)
    return plan.tensors_fit and plan.fits_host


_ANY_OPTIMIZER = {
    "optimizer": "adamw",
    "adamw_kernel": "fused",
    "optimizer_in_backward": False,
    "optimizer_on_host": False,
    "weights_on_host": False,
}


def _bytes_of_states(plan: Plan) -> int:
    """Of weights, gradients and optimizer states."""
    built = step_of(plan.model, plan.recipe, plan.card, plan.chunks, plan.recipe.padded(plan.seq_len))
    return sum(entry.bytes for entry in built.constants())


def smallest_gpu(start: Plan) -> Gpu | None:
    """The smallest card on which the recipe fits as it is, with the same reserve and CPU RAM."""
    sold = (gpu for gpu in gpus() if not gpu.shared_memory)
    for gpu in sorted(sold, key=lambda g: (g.usable_bytes, -g.bf16_flops)):
        card = start.card._replace(gpu=gpu, total_bytes=gpu.usable_bytes, named=True)
        if card.budget_bytes > start.card.budget_bytes and plan_at(start.model, start.recipe, card, start.seq_len).fits:
            return gpu
    return None


MOST_GPUS = 1024
"""GPUs up to which a number is looked for that holds a recipe in shards."""


def fewest_gpus(start: Plan) -> int | None:
    """The number of GPUs from which a recipe in shards fits as it is, with as many replicas; None: up to `MOST_GPUS` none does, or all
    holds as much on each of them."""
    recipe = start.recipe
    if not recipe.divides_states:
        return None

    def fits(shards: int) -> bool:
        gpus_in_all = recipe.changed(gpus=shards * recipe.replicas)
        return plan_at(start.model, gpus_in_all, start.card, start.seq_len).fits

    low = high = recipe.gpus // recipe.replicas  # too few; enough
    most = MOST_GPUS // recipe.replicas
    while high < most:
        low, high = high, min(2 * high, most)
        if fits(high):
            break
    else:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high * recipe.replicas


def master_weights(start: Plan) -> Plan | None:
    """The plan as accelerate's mixed_precision bf16 has it, which keeps shards in fp32; None where it is not asked for, or not planned."""
    if not start.recipe.sharded or start.recipe.precision != "bf16" or start.recipe.lora_rank:
        return None
    try:
        mixed = start.recipe.changed(precision="mixed", reduce_dtype="bf16")
        return plan_at(start.model, mixed, start.card, start.seq_len)
    except RecipeError:  # experts over several GPUs
        return None
