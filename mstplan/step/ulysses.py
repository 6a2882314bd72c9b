"""Sequence parallelism with DeepSpeed's Ulysses, as ALST has it (arXiv 2506.13996): what attention copies from rank to rank.

Every rank has a part of the tokens. For attention they change places with heads: each rank gets all tokens of its part of the heads,
and afterwards its own tokens of all heads. The formula follows UlyssesSPAttentionHF
(deepspeed/runtime/sequence_parallel/ulysses_sp.py, DeepSpeed 0.19) with one all-to-all each for queries, keys, values and output:

- queries, keys and values are copied into the order of ranks (keys and values of fewer heads than ranks are repeated first), received in a
  second tensor, and copied heads first, unless one head is left; the kernel keeps that copy;
- the output, tokens first, is received in another tensor, and copied into the order of heads, which the output projection keeps;
- in backward an all-to-all makes a tensor for what it receives, and before that a contiguous copy of a gradient that does not lie in order
  (deepspeed/sequence/layer.py, _dim_zero_all_to_all_backward).

N ranks hold s tokens each, and S = N s: H / N heads of S tokens take as many bytes as H heads of s, and so they stand on the tape, with
max(G, N) heads of keys and values. Only what is rounded up for each head goes by S: the units of `steps.Sizes`.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

from ..errors import RecipeError
from .kernels import NO_SDPA as FLASH
from .roles import Role

if TYPE_CHECKING:
    from ..spec.model import Attention, LayerKind, Model
    from .layers import Writer
    from .tape import Tensor


def can_share(model: Model, ranks: int) -> bool:
    """Whether so many ranks can share a model's heads."""
    return _divides(ranks, model.attention.heads, model.attention.kv_heads)


def check(model: Model, ranks: int, masked: bool = False, groups: int = 1, gpus: int = 0) -> None:
    """Check that so many ranks can share a model's attention; masked: some of its layers need an explicit mask; groups: of heads, one after
    the other; gpus: that ranks divide. Raises RecipeError with the numbers of ranks that can, or what else would do."""
    a = model.attention
    if ranks == 1:
        return
    start = f"--sequence-parallel {ranks}: {model.name} has"
    if not can_share(model, ranks):
        *others, last = (str(n) for n in range(1, a.heads + 1) if gpus % n == 0 and can_share(model, n))
        raise RecipeError(
            f"{start} {a.heads} heads of queries and {a.kv_heads} of keys, which {ranks} GPUs cannot share evenly.\n"
            f"Use {', '.join(others)}{' or ' if others else ''}{last}."
        )
    if groups > 1 and not shares_groups(a, groups, ranks):
        raise RecipeError(
            f"--attention-groups {groups}: {model.name} has {a.heads} heads of queries and {a.kv_heads} of keys, which {ranks} GPUs cannot share "
            f"evenly in {groups} groups.\nUse --attention-groups auto, or fewer."
        )
    for bad, what in (
        (
            a.latent is not None or a.v_head_dim != a.head_dim,
            "values of another size than keys, which Ulysses does not exchange.\nLeave it out.",
        ),
        (a.sinks, "weights for each head within attention, which Ulysses does not share out.\nLeave it out."),
        (
            model.learned_positions > 0,
            "learned positions, which are not planned for parts of sequences.\nLeave it out.",
        ),
        (model.mixer is not None, "layers without attention, whose tokens Ulysses does not exchange.\nLeave it out."),
        (
            a.keys != "shared" or a.gated_output or model.alibi or model.eager_only,
            "attention that does not go by transformers' interface as a Llama's does, which is not planned so.\nLeave it out.",
        ),
        (
            masked,
            "sliding windows, for which sdpa needs masks, and Ulysses gives it none.\nUse --attention flash.",
        ),
    ):
        if bad:
            raise RecipeError(f"{start} {what}")


def shares_groups(a: Attention, groups: int, ranks: int) -> bool:
    """Whether each of so many groups of heads is one that the ranks can share."""
    return a.heads % groups == a.kv_heads % groups == 0 and _divides(ranks, a.heads // groups, a.kv_heads // groups)


def _divides(ranks: int, heads: int, kv_heads: int) -> bool:
    """As UlyssesSPAttentionHF checks it."""
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def attend(w: Writer, q: Tensor, k: Tensor, v: Tensor, kind: LayerKind) -> Tensor:
    """Attention of this rank's tokens, q (t, H, e), k and v (t, G, e), to all of them -> (t, H, e)."""
    tape, a, ranks = w.tape, w.model.attention, w.numerics.ranks
    with tape.assign_role(Role.POSITIONS):
        positions = tuple(tape.new(f"position ids, {how}", f"{w.t} {ranks}", "int64") for how in ("by rank", "whole"))
    tape.op("gather position ids", [], *positions)
    whole = copy(w)
    whole.model = w.model._replace(attention=a._replace(kv_heads=max(a.kv_heads, ranks)))
    with tape.assign_role(Role.ATTENTION):
        all_q, all_k, all_v = (_of_own_heads(whole, x, n) for x, n in ((q, a.heads), (k, a.kv_heads), (v, a.kv_heads)))
        all_q = _heads_first(whole, all_q, a.heads)
        all_k = _heads_first(whole, all_k, a.kv_heads)
        all_v = _heads_first(whole, all_v, a.kv_heads)
    mixed = whole.attend_here(all_q, all_k, all_v, kind)
    with tape.assign_role(Role.ATTENTION):
        own = _of_own_tokens(w, mixed)
    w.hold(q, k, v, *positions, all_q, all_k, all_v, mixed)
    if not w.numerics.several_rows:
        return own
    with tape.assign_role(Role.ATTENTION):
        rows_first = tape.new("attention mixed, rows first", own.shape, own.dtype)
    return tape.op("order rows", [own], rows_first, grads=((own, None),))


def _of_own_heads(w: Writer, x: Tensor, heads: int) -> Tensor:
    """Queries, keys or values of all tokens, for the heads of this rank: (t, heads, e) -> (t, heads or ranks, e). heads: of all ranks."""
    tape, ranks = w.tape, w.numerics.ranks
    shape = f"{w.t} {max(heads, ranks)} e"
    sent = x
    if heads < ranks:
        repeated = tape.new(f"{x.name}, repeated", shape, x.dtype)
        sent = tape.op(f"repeat {x.name}", [x], repeated, grads=((x, tape.grad(x)),))
    ordered = tape.new(f"{x.name}, by rank", shape, x.dtype)
    # back into the order of heads, of several heads a rank in a copy
    back = tape.grad(sent) if heads > ranks else None
    tape.op(f"order {x.name} by rank", [sent], ordered, grads=((sent, back),))
    return _exchanged(
        w, ordered, f"{x.name} of own heads", shape, in_order=heads <= ranks and not w.numerics.several_rows
    )


def _heads_first(w: Writer, x: Tensor, heads: int) -> Tensor:
    """What was received, (S, b, heads, e), as attention takes it: (b, heads, S, e), of one row with one head the same."""
    tape, ranks = w.tape, w.numerics.ranks
    if heads <= ranks and not w.numerics.several_rows:
        return x
    axis = "H" if heads == w.model.attention.heads else str(max(heads, ranks))
    shape = w.by_head(axis, "e") if heads > ranks else f"{w.t} {axis} e"
    return tape.op(
        f"{x.name}, heads first", [x], tape.new(f"{x.name}, heads first", shape, x.dtype), grads=((x, None),)
    )


def _of_own_tokens(w: Writer, mixed: Tensor) -> Tensor:
    """What attention made for this rank's tokens in all heads: (t, H, e), laid out tokens first before and after."""
    tape, sent = w.tape, mixed
    copied = w.numerics.attention == FLASH and w.heads_here > 1  # already, into that order
    if w.numerics.several_rows and not copied:  # whose tokens are not one after the other
        ordered = tape.new("attention mixed, by rank", mixed.shape, mixed.dtype)
        sent = tape.op("order attention mixed by rank", [mixed], ordered, grads=((mixed, None),))
    received = _exchanged(w, sent, "attention mixed of own tokens", mixed.shape, in_order=False)
    own = tape.new("attention mixed, own tokens", f"{w.t} H {mixed.shape.split()[-1]}", mixed.dtype)
    return tape.op("order heads", [received], own, grads=((received, None),), holds=(sent,))


def _exchanged(w: Writer, x: Tensor, name: str, shape: str, in_order: bool) -> Tensor:
    """All-to-all. in_order: whether the gradient that comes back lies in order, and is not copied first."""
    tape = w.tape
    copies = () if in_order else (tape.new(f"grad of {name}, in order", shape, x.dtype),)
    return tape.op(
        f"all-to-all of {x.name}", [x], tape.new(name, shape, x.dtype), grads=((x, tape.grad(x)),), back_temps=copies
    )
