"""What would make a step fit, cheapest change first; and what is worth saying about an answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..errors import RecipeError
from ..units import GIB, format_gib, format_tokens
from .hardware import Card, Gpu, card, gpus, same_size
from .model import Model
from .recipe import Recipe
from .solve import Answer, Chunks, Plan, longest, plan_at, smallest_chunks_tokens


class Change(NamedTuple):
    """A change to a recipe and what it costs the user."""

    name: str
    cost: str
    fields: dict[str, object]


ON_HOST: dict[str, object] = {"optimizer_on_host": True, "optimizer_in_backward": False}
CHANGES = (
    Change("fused AdamW (fused=True)", "free", {"adamw_kernel": "fused"}),
    Change("the chunked loss", "free", {"loss": "chunked", "loss_chunks": "auto"}),
    Change("checkpoint every layer", "one more forward", {"checkpoint": "layer"}),
    Change(
        "the MLP in chunks, each recomputed by itself",
        "free with checkpointing, else one more MLP forward",
        {"mlp_chunks": "auto", "mlp_recompute": True},
    ),
    Change("flash-attn instead of sdpa with explicit masks", "a package to install", {"attention": "flash"}),
    Change("the optimizer in backward", "no gradient accumulation or clipping", {"optimizer_in_backward": True}),
    Change("layer inputs on the host", "host memory; hidden behind computing", {"offload_layer_inputs": True}),
    Change("8-bit AdamW", "bitsandbytes; slightly different updates", {"optimizer": "adamw-8bit"}),
    Change("weights and moments in bf16", "less exact updates", {"precision": "bf16"}),
    Change("the optimizer on the host", "a slower step; 14 bytes per parameter of host memory", ON_HOST),
    Change("the weights on the host as well", "all weights cross the link twice a step", {**ON_HOST, "weights_on_host": True}),
)  # fmt: skip
"""In the order in which they should be tried: what costs nothing first, then time, then exactness, then the machine."""


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
    """(single changes that lower the peak, cheapest first; the shortest run of changes that fits, or None).

    The run is found by taking the changes in order until the step fits, then leaving out each that is not needed.
    """
    singles = []
    for change in CHANGES:
        changed = _with(start.recipe, change)
        if changed is not None:
            way = Way((change,), plan_at(start.model, changed, start.card, start.seq_len))
            if way.plan.peak_bytes < start.peak_bytes:
                singles.append(way)
    fitting = next((way for way in singles if way.plan.fits), None)
    return tuple(singles), fitting or _run(start)


def _run(start: Plan) -> Way | None:
    taken: list[Change] = []
    for change in CHANGES:
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
    """The smallest card on which the recipe fits as it is."""
    for gpu in sorted(gpus(), key=lambda g: (g.usable_bytes, -g.bf16_flops)):
        on = card(gpu.name, reserve=0)
        if on.budget_bytes > start.card.budget_bytes and plan_at(start.model, start.recipe, on, start.seq_len).fits:
            return gpu
    return None


# ---- notes --------------------------------------------------------------------------------------------------------------


def card_notes(on: Card) -> list[str]:
    """How the budget came about."""
    if on.named:
        size = f"{on.gpu.label}: torch sees {format_gib(on.total_bytes)} ({on.gpu.usable_kind})"
    else:
        size = f"--gpu-mem: {format_gib(on.total_bytes)} nominal (GB is read as GiB: a card sold as 80 GB holds 80 GiB)"
    notes = [
        f"{size}; minus {format_gib(on.gpu.context_bytes)} CUDA context and 22 MiB allocator granularity"
        + (f" and {format_gib(on.reserve_bytes)} reserve" if on.reserve_bytes else "")
        + f": a budget of {format_gib(on.budget_bytes)}."
    ]
    if not on.named:
        near = same_size(on)
        if near:
            seen = ", ".join(f"{g.name} {g.usable_bytes / GIB:.2f}" for g in near[:4])
            notes.append(f"Real cards show less; name yours with --gpu (GiB that torch sees: {seen}).")
        notes.append(f"Chunk sizes and step times assume the rates of {on.gpu.name}; --gpu names another.")
    return notes


def recipe_notes(model: Model, recipe: Recipe) -> list[str]:
    notes = list(model.notes)
    if recipe.attention == "sdpa" and not model.has_sdpa:
        notes.append(f"transformers has no sdpa for {model.model_type}: planned with flash attention (attn_implementation='flash_attention_2').")
    windows = any(kind.window is not None for kind in model.layer_kinds)
    if recipe.attention == "sdpa" and model.has_sdpa and windows:
        notes.append("With sdpa, sliding-window layers take an explicit S x S mask beyond their window; --attention flash needs none.")
    if recipe.precision == "fp32" and recipe.attention == "sdpa" and model.attention.kv_heads != model.attention.heads:
        notes.append("In fp32, sdpa has no fast kernel for grouped queries and writes out the score matrix.")
    return notes


def answer_notes(answer: Answer) -> list[str]:
    """Position limit passed, host memory short, what a larger M would buy."""
    p = answer.plan
    notes = []
    if answer.s_max == 0:
        return [f"{answer.strategy}: not even one token fits: {p.instant} needs {format_gib(p.peak_bytes)}."]
    if p.model.context is not None and answer.s_max > p.model.context:
        notes.append(f"S_max passes the {format_tokens(p.model.context)} positions that {p.model.name} was made for: longer needs RoPE scaling or the like.")
    if p.card.host_bytes is not None and p.host_bytes > p.card.host_bytes:
        notes.append(f"{answer.strategy}: host memory is short: {format_gib(p.host_bytes)} needed, {format_gib(p.card.host_bytes)} there.")
    notes += larger_chunks_note(answer)
    return notes


def nothing_fits_notes(found: Sequence[Answer]) -> list[str]:
    """When no strategy holds even one token: how much is needed, and what would do."""
    least = min(found, key=lambda a: a.plan.peak_bytes)
    p = least.plan
    missing = format_gib(p.peak_bytes - p.budget_bytes)
    lines = [f"Nothing fits: even one token needs {format_gib(p.peak_bytes)} ({p.instant}), {missing} more than the budget."]
    _, run = ways_to_fit(p)
    if run is not None:
        lines.append(f"What would make {least.strategy} fit: {'; '.join(c.name for c in run.changes)}.")
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
    least = smallest_chunks_tokens(p.model, p.card.gpu)
    short = min((more // double.mlp, least[0]), (more // double.loss, least[1]), key=lambda pair: pair[0] / pair[1])
    gain = f"{(more - answer.s_max) / answer.s_max:+.2%}"
    cost = f"; a chunk would fall below the {short[1]} tokens that keep {p.card.gpu.name} compute-bound" if short[0] < short[1] else ""
    return [f"{answer.strategy}: M doubled to {double.mlp} (MLP) and {double.loss} (loss) would change S_max by {gain}{cost}."]


def host_limited(answer: Answer) -> int | None:
    """S_max that the given host memory allows, when it is less than the card's."""
    p = answer.plan
    if p.card.host_bytes is None or p.host_bytes <= p.card.host_bytes or answer.s_max == 0:
        return None
    fixed = plan_at(p.model, p.recipe, p.card, 1, p.chunks).host_bytes
    per_token = (p.host_bytes - fixed) / max(1, p.seq_len - 1)
    return max(0, int((p.card.host_bytes - fixed) / per_token) + 1) if per_token > 0 else 0
