"""Tensors that are not there yet: what a model's code does to the tokens of a tensor, recorded, to be done chunk by chunk.

A chunked module hands out a `LazyTensor` in place of its output. What follows it token by token (activations, norms, dropout,
scaling, soft-capping, casts) is recorded as the model's code applies it. What cannot be recorded either makes the tensor
(the output of an MLP) or is refused by name (what lies inside an MLP, and logits), so that nothing is ever done whole
that was promised in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from .runtime import Runtime

Run = Callable[[torch.Tensor], Any]

_UNARY = (
    "tanh",
    "sigmoid",
    "relu",
    "square",
    "sqrt",
    "exp",
    "abs",
    "neg",
    "float",
    "double",
    "half",
    "bfloat16",
    "erf",
    "clone",
)
_BINARY = ("mul", "div", "true_divide", "add", "sub", "pow", "clamp", "maximum", "minimum")
_CASTS = ("to", "type_as", "type")
_ACTIVATIONS = (F.gelu, F.silu, F.relu, F.relu6, F.elu, F.leaky_relu, F.softplus, F.mish, F.hardswish, F.hardtanh)
_METHODS = frozenset((*_UNARY, *_BINARY, *_CASTS))
_RECORDED = frozenset(
    (
        *_ACTIVATIONS,
        F.dropout,
        *(getattr(space, name) for name in _METHODS for space in (torch, torch.Tensor) if hasattr(space, name)),
    )
)
_CAST_FUNCTIONS = frozenset(getattr(torch.Tensor, name) for name in _CASTS)
_VALUE, _TOKENS = object(), object()  # in recorded arguments: what was made so far, and the tokens it is made of


class LazyTensor:
    """`run` of the tokens of `source` (..., d), a function of each token by itself: (1, n, d) to (1, n, width).

    `run` holds no tensor that spans tokens, for graphs keep it. modules: those whose weights it uses. rows: tokens to a
    chunk. runtime: cuts the chunks. random: a recorded step draws random numbers.
    """

    def __init__(
        self,
        source: torch.Tensor,
        run: Run,
        modules: tuple[nn.Module, ...],
        rows: int,
        runtime: Runtime,
        random: bool = False,
    ):
        self.source, self.run, self.modules, self.rows = source, run, modules, rows
        self.runtime, self.random = runtime, random
        self.continued = False

    def extended(self, run: Run, *modules: nn.Module, random: bool = False) -> LazyTensor:
        """Another of this kind, over the same chunks, with more modules."""
        return type(self)(self.source, run, (*self.modules, *modules), self.rows, self.runtime, self.random or random)

    def use_unrecorded(self, what: str, use: Callable[[Any], Any]) -> Any:
        """The model's code wants to `use` the tensor in a way that is not recorded, called `what`."""
        raise NotImplementedError

    def record_step(self, run: Run, *modules: nn.Module, random: bool = False) -> Any:
        """`run` applied to what this stands for, token by token. One that was continued before is no chain any more."""
        if self.continued:
            return self.use_unrecorded("them twice", run)
        self.continued, recorded = True, self.run
        return self.extended(lambda rows: run(recorded(rows)), *modules, random=random)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        lazy = next((a for a in args if isinstance(a, LazyTensor)), None)
        if lazy is None:
            nested = next(
                b
                for a in (*args, *(kwargs or {}).values())
                for b in (a if isinstance(a, (list, tuple)) else [a])
                if isinstance(b, LazyTensor)
            )
            nested.refuse(_function_name(func))
        return lazy.call_function(func, args, kwargs or {})

    def refuse(self, what: str) -> NoReturn:
        raise NotImplementedError

    def call_function(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """`func`, a torch function or Tensor method, with this tensor among its arguments."""
        others = [a for a in (*args, *kwargs.values()) if a is not self and a is not self.source]
        if (
            func in _RECORDED
            and (func in _CAST_FUNCTIONS or not any(_spans_tokens(a) for a in others))
            and not self.continued
        ):
            self.continued, recorded = True, self.run
            places = [
                _VALUE if a is self else _TOKENS if a is self.source else a for a in args
            ]  # a graph may keep what is recorded: no tensors

            def run(rows: torch.Tensor) -> Any:
                value = recorded(rows)
                return func(*[value if p is _VALUE else rows if p is _TOKENS else p for p in places], **kwargs)

            return self.extended(run, random=func is F.dropout and kwargs.get("training", True))
        return self.use_unrecorded(
            _function_name(func), lambda value: func(*[value if a is self else a for a in args], **kwargs)
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(torch.Tensor, name, None)
        if name in _METHODS:
            return lambda *args, **kwargs: self.call_function(method, (self, *args), kwargs)  # type: ignore[arg-type]
        if name == "contiguous":
            return lambda *args, **kwargs: self
        if name in ("device", "is_cuda"):
            return getattr(self.source, name)
        if callable(method):
            return lambda *args, **kwargs: self.use_unrecorded(name, lambda value: method(value, *args, **kwargs))
        return self.use_unrecorded(f"its {name}", lambda value: getattr(value, name))

    def __add__(self, other: Any) -> Any:
        return self.call_function(torch.add, (self, other), {})

    def __radd__(self, other: Any) -> Any:
        return self.call_function(torch.add, (other, self), {})

    def __mul__(self, other: Any) -> Any:
        return self.call_function(torch.mul, (self, other), {})

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self.call_function(torch.div, (self, other), {})

    def __sub__(self, other: Any) -> Any:
        return self.call_function(torch.sub, (self, other), {})

    def __pow__(self, other: Any) -> Any:
        return self.call_function(torch.pow, (self, other), {})

    def __neg__(self) -> Any:
        return self.call_function(torch.neg, (self,), {})

    def __getitem__(self, index: Any) -> Any:
        return self.use_unrecorded("part of it", lambda value: value[index])


def _spans_tokens(argument: Any) -> bool:
    """Could it differ from token to token, or be trained? Then it is not the same for every chunk."""
    if isinstance(argument, LazyTensor):
        return True
    return torch.is_tensor(argument) and (argument.numel() != 1 or argument.requires_grad)


def _function_name(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", str(func))
