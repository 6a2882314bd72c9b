"""What would make a step fit, cheapest change first; and what is worth saying about an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..errors import RecipeError
from ..units import GIB, format_gib, format_tokens
from .cuda import BIAS_ROWS
from .hardware import GRANULARITY, Card, Gpu, gpus, same_size
from .model import Model
from .recipe import Recipe
from .solve import Answer, Plan, longest, plan_at, smallest_chunks_tokens
from .steps import Chunks


class Change(NamedTuple):
    """A change to a recipe and what it costs the user."""

    name: str
    cost: str
    fields: dict[str, object]


ON_HOST: dict[str, object] = {"optimizer_on_host": True, "optimizer_in_backward": False}
CHUNKED_MLP: dict[str, object] = {"mlp_chunks": "auto", "mlp_recompute": True}


def changes(recipe: Recipe) -> tuple[Change, ...]:
    """What can be changed about a recipe, in the order in which it should be tried: what costs nothing first, then time,
    then exactness, then the machine."""
    found = [
        Change("sdpa instead of eager attention", "free", {"attention": "sdpa"}),
        Change("fused AdamW (fused=True)", "free", {"adamw_kernel": "fused"}),
        Change("the chunked loss", "free", {"loss": "chunked", "loss_chunks": "auto"}),
        Change("batch 1, accumulated", "smaller matrix products", _batch_1(recipe)),
        Change("checkpoint every layer", "one more forward", {"checkpoint": "layer"}),
        Change("the MLP in chunks, each recomputed", "free with checkpointing, else one more MLP forward", CHUNKED_MLP),
        Change("flash-attn: no explicit masks", "a package to install", {"attention": "flash"}),
        Change("the optimizer in backward", "no gradient accumulation or clipping", {"optimizer_in_backward": True}),
        Change("layer inputs on the host", "host memory; hidden behind computing", {"offload_layer_inputs": True}),
        Change("8-bit AdamW", "bitsandbytes; slightly different updates", {"optimizer": "adamw-8bit"}),
        Change("weights and moments in bf16", "less exact updates", {"precision": "bf16"}),
        Change("the optimizer on the host", "host memory; a slower step", ON_HOST),
        Change("optimizer and weights on the host", "all weights cross the link twice a step", {**ON_HOST, "weights_on_host": True}),
    ]
    left_out = "sdpa" if recipe.attention == "flash" else "flash" if recipe.attention == "eager" else ""
    return tuple(change for change in found if not left_out or change.fields.get("attention") != left_out)


def _batch_1(recipe: Recipe) -> dict[str, object]:
    more = {} if recipe.optimizer_in_backward else {"accumulation": recipe.accumulation * recipe.batch}
    return {"batch": 1, **more}


class Way(NamedTuple):
    """Changes that together lead to `plan`."""

    changes: tuple[Change, ...]
    plan: Plan


def _with(recipe: Recipe, change: Change) -> Recipe | None:
    """The changed recipe; None when the change does not apply or alters nothing."""
    try:
        changed = recipe.changed(**change.fields)
    except RecipeError:
        return None
    return None if changed == recipe else changed


def ways_to_fit(start: Plan) -> tuple[tuple[Way, ...], Way | None]:
    """(single changes that lower the peak, cheapest first; changes that together fit, or None).

    A single change that fits is preferred. Else they are taken in order until the step fits, and those that are not
    needed are left out again, the dearest first.
    """
    singles = []
    for change in changes(start.recipe):
        changed = _with(start.recipe, change)
        if changed is not None:
            way = Way((change,), plan_at(start.model, changed, start.card, start.seq_len))
            if way.plan.peak_bytes < start.peak_bytes:
                singles.append(way)
    fitting = next((way for way in singles if way.plan.fits), None)
    return tuple(singles), fitting or _run(start)


def _run(start: Plan) -> Way | None:
    taken: list[Change] = []
    for change in changes(start.recipe):
        if _with(_applied(start.recipe, taken), change) is None:
            continue
        taken.append(change)
        found = _plan(start, taken)
        if found.fits:
            return _thinned(start, taken)
    return None


def _applied(recipe: Recipe, changes: Iterable[Change]) -> Recipe:
    for change in changes:
        recipe = _with(recipe, change) or recipe
    return recipe


def _plan(start: Plan, changes: list[Change]) -> Plan:
    return plan_at(start.model, _applied(start.recipe, changes), start.card, start.seq_len)


def _thinned(start: Plan, taken: list[Change]) -> Way:
    """Without the changes that are not needed, the dearest first."""
    needed = list(taken)
    for change in reversed(taken):
        fewer = [c for c in needed if c is not change]
        if fewer and _plan(start, fewer).fits:
            needed = fewer
    return Way(tuple(needed), _plan(start, needed))


def smallest_gpu(start: Plan) -> Gpu | None:
    """The smallest card on which the recipe fits as it is, with the same reserve and host memory."""
    for gpu in sorted(gpus(), key=lambda g: (g.usable_bytes, -g.bf16_flops)):
        on = start.card._replace(gpu=gpu, total_bytes=gpu.usable_bytes, named=True)
        if on.budget_bytes > start.card.budget_bytes and plan_at(start.model, start.recipe, on, start.seq_len).fits:
            return gpu
    return None


# ---- notes --------------------------------------------------------------------------------------------------------------


def card_notes(on: Card) -> list[str]:
    """How the budget came about."""
    gpu = on.gpu
    if on.named and on.total_bytes == gpu.usable_bytes:
        size = f"{gpu.label}: torch sees {format_gib(on.total_bytes)} ({gpu.usable_kind})"
    elif on.named:
        size = f"{gpu.label}, limited to {format_gib(on.total_bytes)} by --gpu-mem"
    else:
        size = f"--gpu-mem: {format_gib(on.total_bytes)} nominal (GB is read as GiB: a card sold as 80 GB holds 80 GiB)"
    notes = [
        f"{size}; minus {format_gib(gpu.context_bytes)} CUDA context and {format_gib(GRANULARITY, 0)} allocator granularity"
        + (f" and {format_gib(on.reserve_bytes)} reserve" if on.reserve_bytes else "")
        + f": a budget of {format_gib(on.budget_bytes)}."
    ]
    if not on.named:
        near = same_size(on)
        if near:
            seen = ", ".join(f"{g.name} {g.usable_bytes / GIB:.2f}" for g in near[:4])
            notes.append(f"Real cards show less; name yours with --gpu (GiB that torch sees: {seen}).")
        notes.append(f"Chunk sizes and step times assume the rates of {gpu.name}; --gpu names another.")
    if gpu.architecture in ("pascal", "volta", "turing"):
        notes.append(f"{gpu.name} has neither bf16 tensor cores nor FlashAttention-2: real steps there need more memory and time.")
    return notes


def recipe_notes(model: Model, recipe: Recipe) -> list[str]:
    notes = list(model.notes)
    if recipe.attention == "sdpa" and not model.has_sdpa:
        how = "eager" if recipe.precision == "fp32" else "flash_attention_2"
        notes.append(f"transformers has no sdpa for {model.model_type}: planned with attn_implementation='{how}'.")
    windows = any(kind.window is not None for kind in model.layer_kinds)
    if recipe.attention == "sdpa" and model.has_sdpa and windows:
        notes.append(
            "With sdpa, sliding-window layers take an explicit S x S mask beyond their window, and a padded copy of it where S is no multiple"
            f" of {BIAS_ROWS}; --attention flash needs none."
        )
    if recipe.precision == "fp32" and recipe.attention == "sdpa" and model.attention.kv_heads != model.attention.heads:
        notes.append("In fp32, sdpa has no fast kernel for grouped queries and writes out the score matrix.")
    return notes + (sharding_notes(model, recipe) if recipe.sharded else [])


def kernel_notes(model: Model, recipe: Recipe, on: Card) -> list[str]:
    """Where another attention kernel runs than the one that is counted. From source, see Gpu.prefers_cudnn; huggingface/transformers#48163
    found it so on Hopper."""
    if not (on.named and on.gpu.prefers_cudnn and recipe.attention == "sdpa" and recipe.precision != "fp32" and model.has_sdpa):
        return []
    note = (
        f"sdpa on {on.gpu.name}: from torch 2.11 it runs cuDNN's attention, whose workspace nobody has published; FlashAttention-2's is counted, which "
        "runs with TORCH_CUDNN_SDPA_DEPRIORITIZED=1 or --attention flash."
    )
    return [note]


def sharding_notes(model: Model, recipe: Recipe) -> list[str]:
    """What a card holds under FSDP2, and what is not counted."""
    notes = [
        (
            f"Per card, of {recipe.gpus:,}, each with its own {'sequences' if recipe.batch > 1 else 'sequence'}: FSDP2 over every layer and the model. "
            "Counted: shards, padded; the layer that runs and the all-gather buffer of its neighbour; embedding, norm and head, gathered "
            "throughout; whole gradients until they are scattered, and the reduce-scatter's input (docs/sharding.md)."
        ),
        "Not counted: NCCL's own memory, 1 to 2 GiB a card; leave room with --reserve 2GiB. Step times count no communication.",
    ]
    experts = model.experts.number if model.experts is not None else None
    if experts is not None and recipe.gpus > experts:
        notes.append(
            f"{experts:,} experts in one tensor over {recipe.gpus:,} cards: fully_shard pads it to {recipe.gpus:,} experts wherever it is gathered. "
            "Its shard_placement_fn can split another dimension; that is not planned."
        )
    return notes


def answer_notes(answer: Answer) -> list[str]:
    """Position limit passed, host memory short, what a larger M would buy."""
    p = answer.plan
    notes = []
    if answer.s_max == 0:
        if not p.fits_host:
            return [f"{answer.strategy}: host memory is short: {format_gib(p.host_bytes)} are needed for even one token."]
        return [f"{answer.strategy}: not even one token fits: {p.instant} needs {format_gib(p.peak_bytes)}."]
    notes += position_notes(p.model, answer.s_max)
    if p.card.host_bytes is not None and p.recipe.offload_layer_inputs:
        alone = longest(p.model, p.recipe, p.card, p.chunks)
        if alone > answer.s_max:
            there = format_gib(p.card.host_bytes)
            notes.append(f"{answer.strategy}: host memory is short: {there} allows {format_tokens(answer.s_max)} tokens, the card {format_tokens(alone)}.")
    return notes + larger_chunks_note(answer)


def position_notes(model: Model, seq_len: int) -> list[str]:
    """What a length beyond the model's positions asks for."""
    if model.context is None or seq_len <= model.context:
        return []
    more = "a longer position table" if model.learned_positions else "RoPE scaling or the like"
    return [f"{model.name} was made for {format_tokens(model.context)} positions: longer sequences need {more}."]


def nothing_fits_notes(found: Sequence[Answer]) -> list[str]:
    """When no strategy holds even one token: how much is needed, and what would do."""
    least = min(found, key=lambda a: a.plan.peak_bytes)
    p = least.plan
    missing = format_gib(p.peak_bytes - p.budget_bytes)
    lines = [f"Nothing fits: even one token needs {format_gib(p.peak_bytes)} ({p.instant}), {missing} more than the budget."]
    _, run = ways_to_fit(p)
    if run is not None:
        host = f" ({format_gib(run.plan.host_bytes)} of host memory)" if run.plan.host_bytes else ""
        lines.append(f"What would make {least.strategy} fit: {'; '.join(c.name for c in run.changes)}{host}.")
    else:
        bigger = smallest_gpu(p)
        more = f" The smallest card that holds it: {bigger.name}." if bigger else " No single card holds it."
        lines.append("No change to the recipe makes it fit on this card." + more)
    return lines


def larger_chunks_note(answer: Answer) -> list[str]:
    """What doubling the recommended chunk counts would buy and cost."""
    p = answer.plan
    mlp, loss = p.recipe.mlp_chunks == "auto", p.recipe.loss_chunks == "auto"
    if not (mlp or loss):
        return []
    double = Chunks(p.chunks.mlp * (2 if mlp else 1), p.chunks.loss * (2 if loss else 1))
    more = longest(p.model, p.recipe, p.card, double)
    gain = (more - answer.s_max) / answer.s_max
    what = f"{answer.strategy}: M doubled to {double.mlp} (MLP) and {double.loss} (loss) would "
    if abs(gain) < 0.0005:
        return [what + "buy nothing."]
    if gain < 0:
        return [f"{what}shorten S_max by {-gain:.1%}: chunks need fp32 sums of their weights' gradients."]
    least = smallest_chunks_tokens(p.model, p.card.gpu)
    rows = more * p.recipe.batch
    short = [need for count, need in ((double.mlp, least[0]), (double.loss, least[1])) if rows // count < need]
    cost = f"; a chunk would fall below the {short[0]:,} tokens that keep {p.card.gpu.name} compute-bound" if short else ""
    return [f"{what}lengthen S_max by {gain:.1%}{cost}."]
