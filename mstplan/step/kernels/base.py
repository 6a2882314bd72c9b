"""What mstplan asks of an attention kernel: which attention it serves, what it keeps, its workspace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ...spec.platform import AMPERE, Platform
from ..tape import ForGradients

if TYPE_CHECKING:
    from ...spec.model import Attention, LayerKind
    from ..layers import Writer
    from ..tape import Tensor


RingTemps = Callable[["Writer", "Tensor", str, bool], tuple["Tensor", ...]]


class AttentionCall(NamedTuple):
    """Facts that scaled_dot_product_attention looks at when it chooses its kernel (aten transformers/cuda/sdp_utils.cpp)."""

    dtype: str
    head_dim: int  # of queries and keys
    v_head_dim: int
    grouped: bool  # several query heads share a key; with a mask transformers repeats keys and values first
    masked: bool  # an explicit mask beside causality
    dropout: float = 0.0
    platform: Platform = AMPERE
    broadcast: bool = (
        False  # query heads that share a key are not said to (enable_gqa), which the math kernel alone takes
    )

    @property
    def words(self) -> str:
        heads = "grouped heads" if self.grouped else "heads"
        mask = " under an explicit mask" if self.masked else ""
        sizes = f"{self.head_dim}" if self.v_head_dim == self.head_dim else f"{self.head_dim} and {self.v_head_dim}"
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{heads} of size {sizes} in {self.dtype}{mask}{dropout}"

    @classmethod
    def from_attention(cls, a: Attention, dtype: str, masked: bool, platform: Platform) -> AttentionCall:
        grouped = (
            a.keys == "shared" and a.kv_heads != a.heads and not masked and a.v_head_dim == a.head_dim <= 256
        )  # else transformers repeats
        broadcast = a.keys == "broadcast" and a.kv_heads != a.heads
        return cls(dtype, a.head_dim, a.v_head_dim, grouped, masked, a.dropout, platform, broadcast)


class Kernel:
    """An attention kernel. A new one is a file with a subclass, and a line in this folder's `__init__.py`; what stands in for
    it in the trace is a file of its own."""

    name: ClassVar[str]
    """What recipes and --attention call it."""
    label: ClassVar[str]
    """What people read for it."""
    by_name: ClassVar[bool] = True
    """Whether a recipe can ask for it; else only `sdpa` chooses it."""
    by_sdpa: ClassVar[bool] = True
    """Whether scaled_dot_product_attention chooses it where it serves."""
    within_sdpa: ClassVar[bool] = False
    """Whether a recipe that asks for it runs scaled_dot_product_attention, with masks and all, and lets it have this kernel only."""
    makes_causal_mask: ClassVar[bool] = False
    """Whether transformers makes a mask (b, s, s) for it, in the hidden states' dtype."""
    sixteen_bit_only: ClassVar[bool] = False
    gradients_by_head: ClassVar[bool] = False
    """Whether the gradients of q and k lie heads first, though q and k do not."""
    one_operation: ClassVar[bool] = True
    """Whether torch's dispatcher sees it as one operation, whose results a selective checkpoint keeps."""
    in_rings: ClassVar[bool] = False
    """Whether `ring.py` can lay it out: torch's ring attention knows it, and it says what its backward takes for a block."""
    pads_masks: ClassVar[bool] = False
    """Whether it takes a copy of a mask whose rows are padded (cuda.BIAS_ROWS)."""

    def is_asked(self, platform: Platform) -> bool:
        """Whether scaled_dot_product_attention asks it there, where it has its choice."""
        return self.by_sdpa

    def serves(self, asked: AttentionCall) -> bool:
        raise NotImplementedError

    def lay_out(self, w: Writer, q: Tensor, k: Tensor, v: Tensor, kind: LayerKind, masked: bool) -> Tensor:
        """Write it on the tape of `w`: q (t, H, e), k and v (t, G, e) -> (t, H, e)."""
        raise NotImplementedError

    def ring_temps(self, w: Writer, mixed: Tensor, halved: str, by_head: bool) -> tuple[Tensor, ...]:
        """Temporaries of its backward for a block of a ring. mixed: a tensor like its output; halved: "queries" or "keys", of which the
        block is half, or ""; by_head: its merged output lies heads first."""
        raise NotImplementedError


def output(w: Writer, q: Tensor) -> Tensor:
    """What a kernel makes that lays its output out as q is."""
    a = w.model.attention
    e = "e" if a.v_head_dim == a.head_dim else "ev"
    return w.tape.new("attention mixed", f"b H s {e}" if heads_first(q) else f"{w.t} H {e}", q.dtype)


def heads_first(q: Tensor) -> bool:
    """Whether the rows of a head lie together, as torch.cat leaves them: (b, H, s, e); projections give (b, s, H, e)."""
    return q.shape.split()[1] == "H"


def tokens_first(w: Writer, mixed: Tensor) -> Tensor:
    """Attention's output as the output projection takes it: a copy where it lies heads first (transformers
    integrations/sdpa_attention.py)."""
    if not heads_first(mixed):
        return mixed
    joined = w.tape.new("attention mixed, tokens first", f"{w.t} H {mixed.shape.split()[-1]}", mixed.dtype)
    return w.tape.op("join heads", [mixed], joined, grads=((mixed, None),))


def mask_as_bias(w: Writer, dtype: str) -> Tensor:
    """A boolean mask as a bias in the queries' dtype (aten transformers/attention.cpp, convert_boolean_attn_mask)."""
    bias = w.tape.new("attention bias", "b s s", dtype)
    return w.tape.op("mask to bias", [], bias)


def repeated(w: Writer, x: Tensor, by_kernel: bool = False) -> Tensor:
    """Keys or values for every query head: a copy, of a single head a view, unless the kernel repeats it (aten's repeat_interleave)."""
    a = w.model.attention
    if a.kv_heads == a.heads or a.keys == "copied":
        return x
    name, shape = x.name + " for every query head", "b H s e"
    y = (
        w.tape.view(x, name, shape)
        if a.kv_heads == w.numerics.ranks and not by_kernel
        else w.tape.new(name, shape, x.dtype)
    )
    return w.tape.op("repeat " + x.name, [x], y, grads=((x, w.tape.grad(x)),))


def copied_by_head(w: Writer, x: Tensor) -> Tensor:
    """Queries, keys or values of all heads as the product takes them: of several sequences a copy."""
    if not w.numerics.several_rows:
        return x
    copy = w.tape.new(f"{x.name}, heads first", "b H s e", x.dtype)
    return w.tape.op(f"{x.name}, heads first", [x], copy, grads=((x, None),))


def for_every_head(w: Writer, x: Tensor) -> Tensor:
    """The single head of keys or values as the product takes it: a view, of several sequences a copy for every query head."""
    if not w.numerics.several_rows:
        return repeated(w, x)
    copy = w.tape.new(f"{x.name} for every query head", "b H s e", x.dtype)
    return w.tape.op("repeat " + x.name, [x], copy, grads=((x, w.tape.grad(x)),))


def scores_of(w: Writer, name: str, dtype: str) -> Tensor:
    return w.tape.new(name, "b H s s", dtype)


def mix(w: Writer, weights: Tensor, v: Tensor, holds: tuple[Tensor, ...], dtype: str = "") -> Tensor:
    """The product of the attention matrix and the values, by head, while variables hold `holds`; and its copy, tokens first. dtype: that
    it and the matrix are cast to."""
    tape, a = w.tape, w.model.attention
    e = "e" if a.v_head_dim == a.head_dim else "ev"
    mixed = tape.new("attention mixed, by head", f"b H s {e}", v.dtype)
    tape.op(
        "mix values",
        [weights, v],
        mixed,
        for_gradients=ForGradients(((weights, v), (v, weights))),
        grads=((weights, tape.grad(weights)), (v, tape.grad(v))),
        flops=((4, a.heads * a.v_head_dim * 2),),
        holds=holds,
    )
    if dtype and dtype != mixed.dtype:
        narrow = tape.new(mixed.name, mixed.shape, dtype)
        copy = tape.new("attention matrix, copied", weights.shape, dtype)
        grads = ((mixed, tape.grad(mixed)),)
        mixed = tape.op("cast attention mixed", [mixed], narrow, temps=(copy,), grads=grads, holds=(weights, *holds))
    return tokens_first(w, mixed)
