"""What mstplan asks of an attention kernel: which attention it serves, what it keeps, its workspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from ...spec.model import Attention, LayerKind
    from ..layers import Writer
    from ..tape import Tensor


class AttentionCall(NamedTuple):
    """Facts that scaled_dot_product_attention looks at when it chooses its kernel (aten sdp_utils.cpp)."""

    dtype: str
    head_dim: int  # of queries and keys
    v_head_dim: int
    grouped: bool  # several query heads share a key; with a mask transformers repeats keys and values first
    masked: bool  # an explicit mask beside causality

    @classmethod
    def from_attention(cls, a: Attention, dtype: str, masked: bool) -> AttentionCall:
        return cls(dtype, a.head_dim, a.v_head_dim, a.kv_heads != a.heads and not masked, masked)


class Kernel:
    """An attention kernel. A new one is a file with a subclass, and a line in this folder's `__init__.py`; what stands in for
    it in the trace is a file of its own."""

    name: ClassVar[str]
    """What recipes and --attention call it."""
    by_name: ClassVar[bool] = True
    """Whether a recipe can ask for it; else only `sdpa` chooses it."""
    by_sdpa: ClassVar[bool] = True
    """Whether scaled_dot_product_attention chooses it where it serves."""
    makes_causal_mask: ClassVar[bool] = False
    """Whether transformers makes a mask (b, s, s) for it, in the hidden states' dtype."""
    sixteen_bit_only: ClassVar[bool] = False

    def serves(self, asked: AttentionCall) -> bool:
        raise NotImplementedError

    def lay_out(self, w: Writer, q: Tensor, k: Tensor, v: Tensor, kind: LayerKind, masked: bool) -> Tensor:
        """Write it on the tape of `w`: q (t, H, e), k and v (t, G, e) -> (t, H, e)."""
        raise NotImplementedError


def flops(a: Attention, window: int | None = None) -> tuple[tuple[int, int], ...]:
    """Two products of 2 operations; causality masks half of the scores, a window what is further away."""
    per_pair = a.heads * (a.head_dim + a.v_head_dim)
    full = ((4, per_pair),)
    return full if window is None else (*full, (1, 2 * window * per_pair))


def repeated(w: Writer, x: Tensor) -> Tensor:
    """Keys or values for every query head: a copy, of a single head a view."""
    a = w.model.attention
    if a.kv_heads == a.heads:
        return x
    name, shape = x.name + " for every query head", f"{w.t} H e"
    y = w.tape.view(x, name, shape) if a.kv_heads == 1 else w.tape.new(name, shape, x.dtype)
    return w.tape.op("repeat " + x.name, [x], y, grads=((x, w.tape.grad(x)),))
