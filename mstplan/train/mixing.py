"""What mixes tokens in a layer, caught at the call: attention where transformers asks for it by name, else the module that mixes them.

Within `staged`, such a call goes to a function of ours instead, which may leave the layer's code by an exception (`Reached`) with
what was called, or give out what another run of the call has made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import modeling_utils

from ..errors import ModelError
from .host_attention import Attend, Graphs, attend_from_host
from .patching import plain_forward
from .pieces import Tensors, cut_tokens
from .runtime import Runtime

FEW = slice(0, 2)
"""Tokens on which code runs whose results nobody reads: more than one, which would fit to any number."""
Path = tuple[int | str, ...]  # to a tensor in a call's arguments: number or name, then places in tuples
Call = tuple[Sequence[Any], Mapping[str, Any]]  # arguments by position and by name


# ---- a call's arguments -----------------------------------------------------------------------------------------------


class Spans(NamedTuple):
    """Tensors among a call's arguments that span tokens, with the dimension that does."""

    places: Mapping[Path, int]

    def cut(self, call: Call, place: slice, given: Mapping[Path, torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments for some of the tokens. given: parts that were cut before."""

        def part(path: Path, value: Any) -> Any:
            if path not in self.places or not torch.is_tensor(value):
                return value
            return given[path] if path in given else cut_tokens(value, self.places[path], place)

        return changed(call, part)

    def wanting_gradients(self, call: Call) -> dict[Path, torch.Tensor]:
        """Those that do. Raises ModelError for arguments that do without spanning tokens."""
        wanting = {path: value for path, value in leaves(call) if torch.is_tensor(value) and value.requires_grad}
        if any(path not in self.places for path in wanting):
            raise ModelError(
                "a layer is given tensors that want gradients and belong to no token.\nUse the strategy mst."
            )
        return wanting


def spans_of(call: Call, names: Sequence[str], tokens: int) -> Spans:
    """What spans so many tokens, which is no other size; masks, which span them twice, stay whole. names: of arguments by position."""
    places: dict[Path, int] = {}
    for path, value in leaves(call):
        name = path[0] if isinstance(path[0], str) else names[path[0]] if path[0] < len(names) else ""
        if torch.is_tensor(value) and "mask" not in name:
            found = [n for n, size in enumerate(value.shape) if size == tokens]
            if len(found) == 1:
                places[path] = found[0]
    return Spans(places)


def changed(call: Call, change: Callable[[Path, Any], Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments, each that is no tuple or list of others as `change` has it."""
    args, kwargs = call
    found = {name: _changed(value, (name,), change) for name, value in kwargs.items()}
    return [_changed(value, (n,), change) for n, value in enumerate(args)], found


def _changed(value: Any, path: Path, change: Callable[[Path, Any], Any]) -> Any:
    """No function within `changed`: one that calls itself is a cycle, which would hold the tensors until Python collects garbage."""
    if isinstance(value, tuple | list):
        return type(value)(_changed(entry, (*path, n), change) for n, entry in enumerate(value))
    return change(path, value)


def leaves(call: Call) -> list[tuple[Path, Any]]:
    found: list[tuple[Path, Any]] = []
    changed(call, lambda path, value: found.append((path, value)))
    return found


CACHE = ("use_cache", "past_key_values", "layer_past")


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's arguments by name without those that checkpointed layers are not given either (transformers modeling_layers.py)."""
    return {**kwargs, **{name: False if name == "use_cache" else None for name in CACHE if name in kwargs}}


def restored(call: Call, cut: Call, whole: Call) -> tuple[list[Any], dict[str, Any]]:
    """A piece's call with the arguments of the whole: what was cut is what it was, and what was made of it is not there."""
    originals = {id(a): b for (_, a), (_, b) in zip(leaves(cut), leaves(whole), strict=True) if torch.is_tensor(a)}
    return changed(call, lambda _, value: originals.get(id(value), value) if torch.is_tensor(value) else value)


# ---- the call that is caught ------------------------------------------------------------------------------------------


class AttentionCall(NamedTuple):
    """What a layer hands to attention: queries, keys and values (b, heads, s, width), a mask, and what else."""

    function: Callable[..., Any]
    module: nn.Module
    tensors: Tensors
    others: Sequence[Any]
    named: Mapping[str, Any]

    @property
    def dim(self) -> int:
        """Dimension of what is made, that spans tokens."""
        return 2

    def made(self, groups: int) -> Tensors:
        """What pieces make of it, by groups of heads."""
        return tuple(part for tensor in self.tensors for part in tensor.chunk(groups, 1))

    def of_all(self, cut: Call, whole: Call) -> AttentionCall:
        """The call for all tokens but for what is still to be made."""
        others, named = restored((self.others, self.named), cut, whole)
        return self._replace(tensors=(), others=others, named=named)

    def run(self, made: Tensors, groups: int) -> Tensors:
        """Attention (b, s, heads, width), for each group of heads."""
        return tuple(self._of_group(n, groups)(*made[n::groups]) for n in range(groups))

    def run_from_host(
        self, made: Tensors, groups: int, graphs: Graphs, runtime: Runtime, device: torch.device
    ) -> Tensors:
        """The same of what is on the host, and is there again afterwards. Raises ModelError for other tensors that want gradients."""
        others = (value for _, value in leaves((self.others, self.named)))
        if any(torch.is_tensor(value) and value.requires_grad for value in others):
            raise ModelError(
                f"{type(self.module).__name__} gives attention more than queries, keys and values that wants gradients, which are not made "
                "from CPU RAM.\nLeave attention_on_host out."
            )
        return tuple(
            attend_from_host(self._of_group(n, groups), graphs, runtime, device, made[n::groups]) for n in range(groups)
        )

    def _of_group(self, n: int, groups: int) -> Attend:
        """Attention of the n-th group of heads."""

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            heads = _Heads(self.module, n * q.shape[1], q.shape[1], groups)
            named = {name: heads.part(value) for name, value in self.named.items()}
            module = self.module if groups == 1 else heads
            result: torch.Tensor = self.function(module, q, k, v, *self.others, **named)[0]
            return result

        return attend


class _Heads:
    """An attention module as it looks to a group of its heads: what has an entry for each head (sinks) has the group's."""

    def __init__(self, module: nn.Module, first: int, heads: int, groups: int):
        self._module, self._place, self._all = module, slice(first, first + heads), heads * groups

    def __getattr__(self, name: str) -> Any:
        return self.part(getattr(self._module, name))

    def part(self, value: Any) -> Any:
        return value[self._place] if torch.is_tensor(value) and value.shape == (self._all,) else value


class MixerCall(NamedTuple):
    """What a layer hands to the module that mixes its tokens. fresh: of the arguments, what the layer made, (b, s, ...)."""

    module: nn.Module
    call: Call
    fresh: Sequence[Path]

    @property
    def dim(self) -> int:
        return 1

    def made(self, _groups: int) -> Tensors:
        values = dict(leaves(self.call))
        return tuple(values[path] for path in self.fresh)

    def of_all(self, cut: Call, whole: Call) -> MixerCall:
        args, kwargs = restored(self.call, cut, whole)
        return self._replace(call=changed((args, kwargs), lambda path, value: None if path in self.fresh else value))

    def run(self, made: Tensors, _groups: int) -> Tensors:
        given = dict(zip(self.fresh, made, strict=True))
        args, kwargs = changed(self.call, given.get)
        with staged(None):
            out = plain_forward(self.module)(*args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out,)


Caught = AttentionCall | MixerCall


class Reached(Exception):
    """A piece has come to what mixes tokens."""

    def __init__(self, call: Caught):
        self.call = call


class Stage(threading.local):
    """What becomes of a call in this thread: `catch` takes it, or nobody (None), and the layer goes on as ever. rest: what runs is the
    layer from that call on."""

    catch: Callable[[Any], Any] | None = None
    rest = False


STAGE = Stage()


@contextmanager
def staged(catch: Callable[[Any], Any] | None, rest: bool = False) -> Iterator[None]:
    before = STAGE.catch, STAGE.rest
    STAGE.catch, STAGE.rest = catch, rest
    try:
        yield
    finally:
        STAGE.catch, STAGE.rest = before


def stop(call: Caught) -> Any:
    raise Reached(call)


def watch_attention() -> None:
    """Have transformers' attention functions ask `STAGE` first. Once for all models."""
    kind = type(modeling_utils.ALL_ATTENTION_FUNCTIONS)
    plain = getattr(kind, "get_interface", None)
    if plain is None:
        raise ModelError(
            "layers in pieces need transformers 5 or newer, whose attention is asked for by name.\nUse the strategy mst, or update transformers."
        )
    if hasattr(plain, "_mstplan"):
        return

    def get_interface(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function: Callable[..., Any] = plain(self, name, default)
        catch = STAGE.catch
        if catch is None:
            return function

        def call(module: nn.Module, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
            return catch(AttentionCall(function, module, (q, k, v), args, kwargs))

        return call

    get_interface._mstplan = True  # type: ignore[attr-defined]
    kind.get_interface = get_interface  # type: ignore[method-assign]


# ---- forwards of modules that are watched -----------------------------------------------------------------------------


def mixer_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A module that mixes tokens."""
    catch = STAGE.catch
    if catch is None:
        return plain_forward(self)(*args, **kwargs)
    return catch(MixerCall(self, (args, kwargs), self._mstplan_mixer))


def skipped_forward(self: Any, x: torch.Tensor) -> Any:
    """A norm that only what mixes tokens reads: of few tokens, where the layer runs from there on."""
    return cut_tokens(x, 1, FEW) if STAGE.rest else plain_forward(self)(x)


def emptied_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The module that calls attention: on few tokens then."""
    if not STAGE.rest:
        return plain_forward(self)(*args, **kwargs)
    few_args, few_kwargs = self._mstplan_mixer.cut((args, kwargs), FEW, {})
    return plain_forward(self)(*few_args, **few_kwargs)
