"""Values that a training step of S tokens has whatever its tokens are, carried beside the fake tensors that have none.

Position ids are 0 .. S - 1, masks of ones are ones, the language of a sequence is the configured one: what comes of numbers
alone, by operations that are no chance, is known, and a model's code that asks (how long is the sequence?) gets the answer
of the real step. Of token ids one thing is known: none is padding or another special token. Nothing else is: what comes of
weights or of which token stands where stays unknown, and a question for it is raised as `UnknownValues`.

Values are worked out when asked, seldom as that is; until then a tensor has a note of how it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_leaves, tree_map

MOST_NUMBERS = 1 << 24
"""In a tensor whose values are worked out: masks of 4,096 x 4,096, positions of 16 million tokens."""
MOST_STEPS = 200
"""From numbers to a value."""

_aten = torch.ops.aten
_NOTE = "_mstplan_note"
_EMPTY = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_permuted,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
}
_COMPARISONS = {_aten.eq.Scalar: False, _aten.ne.Scalar: True}
"""Of token ids with the id of a special token, and how they end."""


class UnknownValues(Exception):
    """Raised where a model's code asks for values that steps of S tokens do not have in common. operation: what asks. module: the
    path of the module that runs it."""

    def __init__(self, operation: str) -> None:
        super().__init__(operation)
        self.operation, self.module = operation, ""


class _Tokens:
    """The note of token ids, and of their views. version: see _Note."""

    def __init__(self, version: int) -> None:
        self.version = version


class _Note:
    """How the values of a tensor come about: by `func` of arguments in which notes stand for tensors. place: in the list that
    func gives. version: of the tensor when it was written; in a tensor changed since, a note is out of date. steps: from
    numbers."""

    def __init__(
        self,
        func: Callable[..., Any],
        args: Any = (),
        kwargs: Any = None,
        *,
        place: int | None = None,
        version: int = 0,
        steps: int = 0,
    ) -> None:
        self.version, self.steps = version, steps
        self._recipe: Any = (func, args, kwargs or {}, place)
        self._values: torch.Tensor | None = None

    def values(self) -> torch.Tensor:
        if self._values is None:
            func, args, kwargs, place = self._recipe
            out = func(*_real(args), **_real(kwargs))
            self._values = out if place is None else out[place]
            self._recipe = None
        return self._values


def note_tokens(tokens: torch.Tensor) -> None:
    """Let these be a step's token ids, none of them special."""
    setattr(tokens, _NOTE, _Tokens(tokens._version))


def note_values(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Let a fake tensor have these values until it is changed."""
    setattr(tensor, _NOTE, _Note(lambda: values, version=tensor._version))


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on fake tensors; where it needs values, on those. Raises UnknownValues where they are not known."""
    try:
        out = func(*args, **kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException):
        if func is _aten.index.Tensor:
            return func(args[0], [part for index in args[1] for part in _indices(index)])
        return _answer(func, args, kwargs)
    _note_result(out, func, args, kwargs)
    return out


def _answer(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operation that depends on values: a number, or tensors of its size."""
    try:
        notes = _notes_of((args, kwargs))
    except _NoNote:
        raise UnknownValues(str(func)) from None
    with unset_fake_temporarily():
        result = func(*_real(notes[0]), **_real(notes[1]))
    return tree_map(_fake, result)


def _indices(index: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """Of an index into a tensor: itself, or for a mask the places where it is true, an index for each of its axes."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    places: torch.Tensor = _answer(_aten.nonzero.default, [index], {})
    return places.unbind(1)


def _fake(result: Any) -> Any:
    """A fake tensor of the size of a result, which it notes; a number as it is."""
    if not isinstance(result, torch.Tensor):
        return result
    tensor = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype)
    setattr(tensor, _NOTE, _Note(lambda: result, version=tensor._version))
    return tensor


# ---- notes ------------------------------------------------------------------------------------------------------------


class _NoNote(Exception):
    """Raised where nothing is known of one of an operation's tensors."""


def _note_result(out: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Note of what an operation made how it came about, if that is known."""
    first = _note_of(args[0]) if args and isinstance(args[0], torch.Tensor) else ...
    if first is None or func._schema.is_mutable or _leaves_to_chance(func):
        return  # most operations: on activations and weights
    if isinstance(first, _Tokens):
        _note_result_of_tokens(out, func, args)
        return
    try:
        notes = _notes_of((args, kwargs))
    except _NoNote:
        return
    steps = 1 + max((note.steps for note in tree_leaves(notes) if isinstance(note, _Note)), default=0)
    for place, tensor in enumerate(out) if isinstance(out, list | tuple) else [(None, out)]:
        if isinstance(tensor, FakeTensor) and steps < MOST_STEPS and _can_have_values(tensor):
            setattr(tensor, _NOTE, _Note(func, *notes, place=place, version=tensor._version, steps=steps))


def _note_result_of_tokens(out: Any, func: Any, args: Sequence[Any]) -> None:
    """Note what is known of a result of token ids: of views, that they are such; of a comparison, how it ends."""
    if func in _COMPARISONS:
        setattr(out, _NOTE, _Note(torch.full, (list(out.shape), _COMPARISONS[func]), version=out._version))
    elif isinstance(out, FakeTensor) and out.untyped_storage()._cdata == args[0].untyped_storage()._cdata:
        note_tokens(out)


def _can_have_values(tensor: torch.Tensor) -> bool:
    return prod(tensor.shape) <= MOST_NUMBERS and tensor.device.type != "meta"


def _leaves_to_chance(func: Any) -> bool:
    """Does the operation make other values each time?"""
    return torch.Tag.nondeterministic_seeded in func.tags or func.overloadpacket in _EMPTY


def _note_of(tensor: torch.Tensor) -> _Note | _Tokens | None:
    """The note of a tensor; None: there is none that holds. A tensor that is not fake has its values with it."""
    if not isinstance(tensor, FakeTensor):
        return None if tensor.is_meta else _Note(lambda: tensor)
    note: _Note | _Tokens | None = getattr(tensor, _NOTE, None)
    return note if note is not None and note.version == tensor._version else None


def _notes_of(arguments: Any) -> Any:
    """Arguments with a note in the place of each tensor. Raises _NoNote where one has none."""

    def note_in_place(thing: Any) -> Any:
        note = _note_of(thing) if isinstance(thing, torch.Tensor) else thing
        if isinstance(thing, torch.Tensor) and not isinstance(note, _Note):
            raise _NoNote
        return note

    return tree_map(note_in_place, arguments)


def _real(arguments: Any) -> Any:
    """Arguments with values in the place of notes."""
    return tree_map(lambda x: x.values() if isinstance(x, _Note) else x, arguments)
