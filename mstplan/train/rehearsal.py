"""A rehearsal of a model's layers on a few tokens: what of each runs before attention, and what after it.

The model runs once as it is, and each layer shows what it is called with. Then each layer runs in pieces, in the leanest of the
ways that give what the layer as it is gives: around attention without the norms and projections that only attention reads, without the
projections only, or with all of them once more; else around the module that mixes tokens. On tensors without values shapes alone decide.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers import PreTrainedModel

from ..errors import ModelError, one_line
from .layers import LayerParts
from .locate import count_matrices, mixes_tokens, takes_tokens_alone
from .mixing import (
    AttentionCall,
    Call,
    Spans,
    emptied_forward,
    leaves,
    mixer_forward,
    skipped_forward,
    spans_of,
    staged,
    without_cache,
)
from .mlp import stopped_training
from .patching import patch_forward, restore_forward
from .pieces import Tensors, cut_tokens
from .quiet import quiet_attempts

TOKENS = 11
"""A number that no width or number of heads is likely to be."""
PIECES = (slice(0, 6), slice(6, TOKENS))
SEQUENCES = 2
_ROWS = {place.stop - place.start for place in PIECES}


class Rehearsed(NamedTuple):
    """Layers that run in pieces; why others do not; and the modules between the last layer and the head that work token by token."""

    layers: tuple[LayerParts, ...]
    refused: dict[nn.Module, str]
    tail: tuple[nn.Module, ...]


def rehearse(model: PreTrainedModel, layers: Sequence[nn.Module]) -> Rehearsed:
    """How each layer runs in pieces. Raises ModelError, naming a layer and why, where none can."""
    calls: dict[nn.Module, Call] = {}
    order: list[nn.Module] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, (args, without_cache(kwargs)))

    found: list[LayerParts] = []
    refused: dict[nn.Module, str] = {}
    with stopped_training(model), torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        with ExitStack() as watching:
            watching.callback(module_hooks.register_module_forward_pre_hook(lambda m, _: order.append(m)).remove)
            watching.callback(_reshard, model)  # FSDP2 gathers the weights outside of layers and waits for backward
            _run_few_tokens(model)
        touched: set[nn.Module] = set()
        for layer in layers:
            try:
                with _whole_weights(layer), quiet_attempts():
                    parts = _rehearse_layer(layer, calls.get(layer))
            except _Unfit as e:
                refused[layer] = str(e)
                continue
            if touched.isdisjoint(parts.touched):
                found.append(parts)
                touched |= parts.touched
            else:
                refused[layer] = "it shares modules with another layer"
    if not found:
        layer, why = next(iter(refused.items()))
        raise ModelError(
            f"cannot run {type(layer).__name__} in pieces around its attention: {why}.\nUse the strategy mst, which runs the MLP in pieces."
        )
    return Rehearsed(tuple(found), refused, _tail(model, layers, order))


def _run_few_tokens(model: PreTrainedModel) -> None:
    embeddings: Any = model.get_input_embeddings()
    try:
        vocabulary = embeddings.num_embeddings
        tokens = torch.arange(SEQUENCES * TOKENS, device=embeddings.weight.device) + vocabulary // 3
        names = inspect.signature(model.forward).parameters
        batch: dict[str, Any] = {"input_ids": (tokens % vocabulary).view(SEQUENCES, TOKENS)}
        if "use_cache" in names:
            batch["use_cache"] = False
        if (
            "labels" in names and names["labels"].default is inspect.Parameter.empty
        ):  # a loss that stands for the head as well
            batch["labels"] = batch["input_ids"]
        model(**batch)
    except Exception as e:  # noqa: BLE001  whatever its code needs beside token ids
        raise ModelError(
            f"{type(model).__name__} cannot be rehearsed on {TOKENS} tokens: {one_line(e)}\nUse the strategy mst."
        ) from None


def _tail(model: PreTrainedModel, layers: Sequence[nn.Module], order: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    head, inside = model.get_output_embeddings(), {m for layer in layers for m in layer.modules()}
    own = set(model.modules()) - inside  # activations may be shared by all models
    end = max(n for n, m in enumerate(order) if m in inside)
    following = list(dict.fromkeys(m for m in order[end:] if m in own))
    tail = following[: following.index(head)] if head in following else []
    return tuple(m for m in tail if takes_tokens_alone(m) and not count_matrices(m))


@contextmanager
def _whole_weights(layer: nn.Module) -> Iterator[None]:
    """Within the context FSDP2's shards of a layer's weights are gathered: its own hooks see calls of the layer, not of its forward."""
    for module in _sharded(layer):
        module.unshard()
    try:
        yield
    finally:
        _reshard(layer)


def _sharded(module: nn.Module) -> list[Any]:
    return [each for each in module.modules() if hasattr(each, "unshard")]


def _reshard(module: nn.Module) -> None:
    for each in _sharded(module):
        each.reshard()


class _Unfit(Exception):
    """Why a layer does not run in pieces."""


def _rehearse_layer(layer: nn.Module, call: Call | None) -> LayerParts:
    if call is None:
        raise _Unfit("it does not run on token ids")
    args, kwargs = call
    if not args or not torch.is_tensor(args[0]) or args[0].shape[:2] != (SEQUENCES, TOKENS) or args[0].dim() != 3:
        raise _Unfit("the model does not give it hidden states (b, s, d) alone")
    x, rest = args[0], (args[1:], kwargs)
    names = list(inspect.signature(type(layer).forward).parameters)[2:]
    parts = LayerParts(layer, spans_of(rest, names, TOKENS))
    try:
        return _around_attention(parts, x, rest)
    except Exception as e:  # noqa: BLE001  whatever its code does when it is run by itself
        problem = one_line(e)
    for mixer in filter(mixes_tokens, layer.children()):
        with suppress(Exception):
            return _around_mixer(LayerParts(layer, parts.spans), mixer, x, rest)
    raise _Unfit(problem)


# ---- around attention ---------------------------------------------------------------------------------------------------


def _around_attention(parts: LayerParts, x: torch.Tensor, call: Call) -> LayerParts:
    caught, before, plain = _run_plain(parts, x, call)
    if len(caught) != 1:
        raise _Unfit(f"it calls attention {len(caught)} times")
    attended = caught[0]
    if any(tensor.shape[2] != TOKENS for tensor in attended.tensors):
        raise _Unfit("its attention is over something else than its tokens")
    parts.mixer = attended.module
    parts.heads, parts.kv_heads = (tensor.shape[1] for tensor in attended.tensors[:2])
    parts.mixer_spans = _call_spans(parts, x, call)
    norms = _norms_before(parts, before)
    ways = ((norms, True), ((), True), ((), False))
    return _leanest(parts, ways, before, _Plain(attended.tensors, 2, plain), x, call)


def _call_spans(parts: LayerParts, x: torch.Tensor, call: Call) -> Spans:
    """What spans tokens among the arguments of the module that calls attention."""
    found: list[Call] = []
    module = parts.mixer
    if module is parts.layer:
        return Spans({})
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    try:
        parts.run(x, call)
    finally:
        handle.remove()
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return spans_of(found[0], names, TOKENS) if found else Spans({})


# ---- around a module that mixes tokens ----------------------------------------------------------------------------------


def _around_mixer(parts: LayerParts, mixer: nn.Module, x: torch.Tensor, call: Call) -> LayerParts:
    if count_matrices(parts.layer) == count_matrices(mixer):
        raise _Unfit("all its matrices are in what mixes tokens")
    calls: list[Call] = []
    outputs: list[Any] = []
    hooks = (
        mixer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True),
        mixer.register_forward_hook(lambda _m, _i, out: outputs.append(out)),
    )
    parts.mixer, parts.calls_attention = mixer, False
    try:
        _, before, plain = _run_plain(parts, x, call)
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) != 1:
        raise _Unfit(f"it mixes tokens {len(calls)} times")
    names = list(inspect.signature(type(mixer).forward).parameters)[1:]
    spans, own = spans_of(calls[0], names, TOKENS), {id(value) for _, value in leaves(call)}
    parts.mixer_fresh = tuple(path for path, value in leaves(calls[0]) if path in spans.places and id(value) not in own)
    if any(spans.places[path] != 1 for path in parts.mixer_fresh):
        raise _Unfit("what it hands to what mixes tokens is not (b, s, ...)")
    _, parts.mixer_outputs = _hidden_alone(outputs[0], "what mixes tokens")
    values = dict(leaves(calls[0]))
    made = tuple(values[path] for path in parts.mixer_fresh)
    ways = ((_norms_before(parts, before), True), ((), False))
    return _leanest(parts, ways, before, _Plain(made, 1, plain), x, call)


class _Plain(NamedTuple):
    """What the layer as it is makes: for what mixes tokens, in which dimension those are, and its output."""

    made: Tensors
    dim: int
    output: torch.Tensor


# ---- both ---------------------------------------------------------------------------------------------------------------


def _run_plain(
    parts: LayerParts, x: torch.Tensor, call: Call
) -> tuple[list[AttentionCall], list[nn.Module], torch.Tensor]:
    """The layer as it is: calls of attention, modules that run before what mixes tokens does, and the output."""
    calls: list[AttentionCall] = []
    before: list[nn.Module] = []
    mixes: list[bool] = []

    def catch(caught: AttentionCall) -> Any:
        calls.append(caught)
        mixes.append(True)
        return caught.function(caught.module, *caught.tensors, *caught.others, **caught.named)

    def enter(module: nn.Module, _inputs: Any) -> None:
        if module is parts.mixer and not parts.calls_attention:
            mixes.append(True)
        if not mixes:
            before.append(module)

    handle = module_hooks.register_module_forward_pre_hook(enter)
    try:
        with staged(catch if parts.calls_attention else None):
            out = parts.run(x, call)
    finally:
        handle.remove()
    out, parts.outputs = _hidden_alone(out, "it")
    return calls, before, out


def _hidden_alone(out: Any, what: str) -> tuple[torch.Tensor, int]:
    """Hidden states of an output, and how many others are beside them in a tuple, which must be nothing but attention's weights; -1: it is
    no tuple."""
    if not isinstance(out, tuple):
        return out, -1
    if any(other is not None and getattr(other, "shape", ())[-2:] != (TOKENS, TOKENS) for other in out[1:]):
        raise _Unfit(f"{what} gives out more than hidden states")
    return out[0], len(out) - 1


def _norms_before(parts: LayerParts, before: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    own, inside = set(parts.layer.modules()), set(parts.mixer.modules()) - {parts.layer}
    norms = (m for m in before if m in own and takes_tokens_alone(m) and not count_matrices(m) and m not in inside)
    return tuple(dict.fromkeys(norms))


def _leanest(
    parts: LayerParts,
    ways: Sequence[tuple[tuple[nn.Module, ...], bool]],
    before: Sequence[nn.Module],
    plain: _Plain,
    x: torch.Tensor,
    call: Call,
) -> LayerParts:
    """The first way of (norms that are skipped, are projections run on few tokens?) that gives what the layer gives."""
    if any(mixes_tokens(m) for m in set(before) & set(parts.layer.modules()) - _around(parts)):
        raise _Unfit("it mixes tokens in more than one place")
    problem = ""
    for parts.skipped, parts.empties in ways:
        try:
            with _patched(parts):
                used = _run_in_pieces(parts, x, call, plain)
        except Exception as e:  # noqa: BLE001  whatever its code does with fewer tokens
            problem = one_line(e)
            continue
        _share_out(parts, before, used)
        return parts
    raise _Unfit(problem)


def _run_in_pieces(parts: LayerParts, x: torch.Tensor, call: Call, plain: _Plain) -> set[nn.Module]:
    """Run it in two pieces and compare; the modules that run, on any tokens, from attention on. Raises whatever its code raises."""
    cuts = [parts.spans.cut(call, place, {}) for place in PIECES]
    pieces = [cut_tokens(x, 1, place) for place in PIECES]
    reached = [parts.reach(piece, cut) for piece, cut in zip(pieces, cuts, strict=True)]
    made = tuple(
        torch.cat(parts_made, reached[0].dim) for parts_made in zip(*(r.made(1) for r in reached), strict=True)
    )
    _check_same(made, plain.made, plain.dim, rounds=False)
    (mixed,) = reached[0].of_all(cuts[0], call).run(made, 1)
    used: set[nn.Module] = set()

    def enter(module: nn.Module, inputs: Any) -> None:
        shapes = (t.shape for t in inputs if torch.is_tensor(t))
        if any({*shape[:2]} & {n * k for n in _ROWS for k in (1, SEQUENCES)} for shape in shapes):
            used.add(module)

    hook = module_hooks.register_module_forward_pre_hook(enter)
    try:
        rows = zip(pieces, PIECES, cuts, strict=True)
        outs = [parts.finish(piece, (cut_tokens(mixed, 1, place),), cut) for piece, place, cut in rows]
    finally:
        hook.remove()
    for out, piece in zip(outs, pieces, strict=True):
        if out.shape != piece.shape:
            raise ValueError(f"pieces of {tuple(piece.shape)} give {tuple(out.shape)}")
    if any(mixes_tokens(m) for m in used - _around(parts)):
        raise ValueError("it mixes tokens in more than one place")
    routes = any(p.dim() == 3 for p in parts.layer.parameters()) or any("xpert" in type(m).__name__ for m in used)
    _check_same((torch.cat(outs, 1),), (plain.output,), 1, rounds=routes)
    return used


def _around(parts: LayerParts) -> set[nn.Module]:
    """Modules in which the mixer is, and those in it."""
    return {m for m in parts.layer.modules() if parts.mixer in set(m.modules())} | set(parts.mixer.modules())


_TOLERANCE = {2: 0.05, 4: 1e-4, 8: 1e-5}  # by bytes of a number; norms of a float64 model may be in fp32


def _check_same(found: Tensors, plain: Tensors, dim: int, rounds: bool) -> None:
    """Check that each token's values are those that all tokens together gave, where there are values. rounds: rounding may send a few
    tokens to other experts. Raises ValueError."""
    for one, other in zip(found, plain, strict=True):
        if type(one) is not torch.Tensor or one.is_meta:
            continue
        rows = [t.detach().movedim(dim, 1).flatten(2).double() for t in (one, other)]
        errors = (rows[0] - rows[1]).norm(dim=2) / rows[1].norm(dim=2).clamp(min=1e-30)
        worst = errors.quantile(0.7) if rounds else errors.max()
        if not worst <= _TOLERANCE[one.dtype.itemsize]:
            raise ValueError("what it gives for a token depends on the tokens beside it")


def _share_out(parts: LayerParts, before: Sequence[nn.Module], used: set[nn.Module]) -> None:
    """Whose own weights are used up to attention, and whose after it: what runs in neither (experts that no token chose) counts as after.
    A module that mixes tokens itself runs whole, between the two."""
    whole = set() if parts.calls_attention else set(parts.mixer.modules())
    first = set(before)
    for name, module in parts.layer.named_modules():
        shared = parts.mixer in set(module.modules()) and module not in whole
        again = module not in first or (module in used and module not in parts.skipped)
        parts.runs[name] = (shared or module in first - whole, shared or (again and module not in whole))


@contextmanager
def _patched(parts: LayerParts) -> Iterator[None]:
    """The modules patched as they will be, for the rehearsal."""
    patched = patch_parts(parts)
    try:
        yield
    finally:
        for module in patched:
            restore_forward(module)
        parts.mixer.__dict__.pop("_mstplan_mixer", None)


def patch_parts(parts: LayerParts) -> list[nn.Module]:
    """Let what only the mixer reads run on few tokens from its call on, and catch the call of a mixer; gives out the modules that were
    patched."""
    for module in parts.skipped:
        patch_forward(module, skipped_forward)
    patched = list(parts.skipped)
    mixer: Any = parts.mixer
    if not parts.calls_attention:
        mixer._mstplan_mixer = parts.mixer_fresh
        patch_forward(mixer, mixer_forward)
        return [*patched, mixer]
    if parts.empties and mixer is not parts.layer:
        mixer._mstplan_mixer = parts.mixer_spans
        patch_forward(mixer, emptied_forward)
        patched.append(mixer)
    return patched
