"""The forward pass of transformers' decoders, operation by operation, on a `Tape`.

Each function follows the code of transformers 5 (models/*/modeling_*.py) and says, for every operation, what PyTorch's
autograd keeps of it (tools/autograd/derivatives.yaml). Weights are declared where they are used, so that the parameter
counts, the intermediates and the arithmetic all come from this one description.

Axes: b batch, s tokens (c, k: of one MLP or loss chunk), d hidden, H heads, G key/value heads, e head size, I MLP width,
V vocabulary, X experts, A experts that a token visits, F their width, r tokens rounded up to 128. `t` stands for the tokens at hand: "b s" or "b c".
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ..spec.families import family_of
from ..spec.model import Attention, Experts, LayerKind, Mlp, Model
from ..spec.platform import AMPERE, Platform
from .instants import Stage
from .kernels import chosen, runs_sdpa
from .kernels.base import AttentionCall
from .roles import Purpose, Role
from .selection import WeightKind
from .tape import BASIS, ForGradients, Op, Part, Tape, TapeWriter, Tensor, Weight, WeightWorkspace, axes_of, sums_of
from .workspaces import SumOverTokens

HIDDEN = "layer input"


class Numerics(NamedTuple):
    """Numerics of a step: weights' dtype, whether bf16 autocast casts them, attention kernel."""

    weights: str = "bfloat16"
    autocast: bool = False
    attention: str = "sdpa"  # a recipe's, see `kernels.attentions()`
    masked: bool = False  # sliding-window layers get an explicit mask (sdpa beyond the window)
    padded: bool = False  # its rows are padded
    platform: Platform = AMPERE  # by which sdpa chooses its kernel

    @property
    def compute(self) -> str:
        return "bfloat16" if self.autocast else self.weights


class Writer:
    """Writes a model's operations onto a tape."""

    def __init__(
        self,
        model: Model,
        numerics: Numerics,
        tokens: str = "b s",
        stage: Stage | None = None,
        frozen: frozenset[str] = frozenset(),
    ):
        a = model.attention
        self.model, self.numerics, self.t = model, numerics, tokens
        family = family_of(model.model_type)
        self.code, self.names, self.frozen = family.code, family.weight_names, frozen
        dims = {"d": model.hidden, "V": model.vocab, "H": a.heads, "G": a.kv_heads, "e": a.head_dim}
        self.tape = TapeWriter({**dims, "He": a.heads * a.head_dim, "Ge": a.kv_heads * a.head_dim}, stage)
        self.wide = numerics.weights  # dtype of the residual stream

    def new(self, name: str, shape: str, dtype: str | None = None) -> Tensor:
        return self.tape.new(name, f"{self.t} {shape}".rstrip(), dtype or self.numerics.compute)

    def source(self, name: str = HIDDEN, dtype: str | None = None, role: Purpose | None = Role.LAYER_INPUT) -> Tensor:
        with self.tape.assign_role(role):
            self.tape.source = self.new(name, "d", dtype or self.wide)
        return self.tape.source

    def hidden(self) -> Tensor:
        """Hidden states as they go from layer to layer."""
        with self.tape.assign_role(Role.LAYER_INPUT):
            return self.new(HIDDEN, "d", self.wide)

    def hold(self, *tensors: Tensor) -> None:
        """Variables of the code at hand that live at least until the latest operation is done."""
        self.tape.hold(*tensors)

    # ---- elementary operations ------------------------------------------------------------------------------------

    def cast(self, x: Tensor, dtype: str, name: str = "") -> Tensor:
        if x.dtype == dtype:
            return x
        with self.tape.assign_role(self.tape.role if name else x.role):  # a mere copy is for what the original is for
            y = self.tape.new(name or f"{x.name}, {dtype}", x.shape, dtype)
        return self.tape.op("cast " + x.name, [x], y, grads=((x, self.tape.grad(x)),))

    def autocast(self, x: Tensor) -> Tensor:
        """The copy in bf16 that autocast makes for each operation that wants it."""
        return self.cast(x, "bfloat16") if self.numerics.autocast else x

    def weight(
        self,
        module: str,
        *shape: int,
        kinds: tuple[WeightKind, ...],
        name: str = ".weight",
        active: tuple[int, int] = (1, 1),
    ) -> Weight:
        """The weight of a part of the step, as its family has it; name: what its own name ends in."""
        whole = self.names.get(module, module) + name
        return Weight(whole, shape, active, frozenset(kinds), whole not in self.frozen)

    def cast_weight(self, weight: Weight) -> tuple[Tensor, ...]:
        """A weight as an operation keeps it: autocast's bf16 copy, or nothing beyond the parameter itself."""
        if not self.numerics.autocast or len(weight.shape) < 2:
            return ()
        shape = " ".join(map(str, weight.shape))
        name = f"{weight.name}, bf16 copy"  # autocast keeps copies of what is trained (aten autocast_mode.cpp, cached_cast)
        copy = self.tape.new(name, shape, "bfloat16", cached=weight.trained)
        self.tape.op("cast " + weight.name, [], copy)
        return (copy,)

    def linear(
        self,
        x: Tensor,
        y: Tensor,
        name: str,
        *,
        kind: WeightKind,
        bias: bool = False,
        weight: Weight | None = None,
        copy: Tensor | None = None,
        defers: bool = False,
    ) -> Tensor:
        """y = x W^T (+ bias). Keeps x and W (aten::mm, aten::addmm). copy: of W, made for this in another dtype."""
        x = self.autocast(x)
        inner, outer = self._width(x), self._width(y)
        w = weight or self.weight(name, outer, inner, kinds=(kind,))
        weights = (w, self.weight(name, outer, kinds=(kind,), name=".bias")) if bias else (w,)
        copies = (copy,) if copy is not None else self.cast_weight(w)
        return self.tape.op(
            name,
            [x, *copies],
            y,
            for_gradients=ForGradients(((x, w), *((copy, x) for copy in copies))),
            grads=((x, self.tape.grad(x)),),
            weights=weights,
            workspaces=tuple(self.sum_over_tokens(each, y) for each in weights[1:]),
            flops=((y.basis, 2 * inner * outer),),
            cast=bool(copies) and copy is None,
            defers=defers,
            product=not copies,
            adds_bias=bias,
        )

    def sum_over_tokens(self, weight: Weight, x: Tensor) -> WeightWorkspace:
        """The workspace while gradients of x's shape are added up to the weight's."""
        return WeightWorkspace(weight, SumOverTokens(weight.numel, self._width(x) // weight.numel), BASIS[x.basis])

    def _last(self, x: Tensor) -> int:
        axis = x.shape.rsplit(" ", 1)[1]
        return int(axis) if axis.isdigit() else self.tape.dims[axis]

    def _width(self, x: Tensor) -> int:
        width = 1
        for axis in axes_of(x.shape)[1]:
            width *= int(axis) if axis.isdigit() else self.tape.dims[axis]
        return width

    def pointwise(self, name: str, x: Tensor, y: Tensor, *keeps: Tensor, temps: int = 0, back_temps: int = 0) -> Tensor:
        """An operation of one input that keeps `keeps` and makes `temps` more tensors of the output's size on the way."""
        return self.tape.op(
            name,
            [x],
            y,
            keeps=keeps,
            grads=((x, self.tape.grad(x)),),
            temps=(self.tape.new("temporary", y.shape, y.dtype),) * temps,
            back_temps=(self.tape.new("temporary", y.shape, y.dtype),) * back_temps,
        )

    def softmax(self, name: str, x: Tensor, y: Tensor, *temps: Tensor) -> Tensor:
        """Keeps its output; CUDA's backward first makes the product of gradient and output (aten native/cuda/SoftMax.cu,
        softmax_backward_cuda_out)."""
        product = self.tape.new("gradient x output", y.shape, y.dtype)
        grads = ((x, self.tape.grad(x)),)
        return self.tape.op(name, [x], y, keeps=(y,), temps=temps, grads=grads, back_temps=(product,))

    def multiply(self, name: str, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """y = x * z, both with gradients: keeps both."""
        grads = ((x, self.tape.grad(x)), (z, self.tape.grad(z)))
        return self.tape.op(name, [x, z], y, for_gradients=ForGradients(((x, z), (z, x))), grads=grads)

    def add(self, x: Tensor, z: Tensor, y: Tensor, name: str = "residual add") -> Tensor:
        """y = x + z: keeps nothing, hands the gradient on to both (casting it where dtypes differ)."""
        grads = tuple((u, None if u.dtype == y.dtype else self.tape.grad(u)) for u in (x, z))
        return self.tape.op(name, [x, z], y, grads=grads)

    def slice(self, x: Tensor, name: str, shape: str) -> Tensor:
        """A view of part of x, whose backward writes into zeros of x's full size (slice_backward)."""
        part = self.tape.view(x, name, shape)
        return self.tape.op("slice " + name, [x], part, grads=((x, self.tape.grad(x)),))

    def dropout(self, x: Tensor, p: float, name: str = "", operation: str = "") -> Tensor:
        """CUDA's fused dropout keeps a mask of one byte per element (native_dropout)."""
        if p == 0:
            return x
        y = self.tape.new(name or x.name + " after dropout", x.shape, x.dtype)
        mask = self.tape.new(f"dropout mask of {x.name}", x.shape, "bool")
        return self.tape.op(
            operation or "dropout of " + x.name, [x], y, mask, keeps=(mask,), grads=((x, self.tape.grad(x)),)
        )

    # ---- normalisation --------------------------------------------------------------------------------------------

    def norm(self, x: Tensor, name: str) -> Tensor:
        """The model's norm; the caller's variable holds x until it returns."""
        if self.model.norm == "layer":
            y = self._layer_norm(x, name)
        elif self.model.norm == "gemma":
            y = self._gemma_norm(x, name)
        else:
            y = self._rms_norm(x, name, late_cast=self.model.norm == "rms-fp32-weight")
        self.hold(x)
        return y

    def _layer_norm(self, x: Tensor, name: str) -> Tensor:
        """nn.LayerNorm: one kernel, keeps its input (autocast runs it in fp32)."""
        rows = x.shape.rsplit(" ", 1)[0]
        stats = self.tape.new(f"{name} mean and rstd", rows + " 2", "float32")
        y = self.tape.new(name, x.shape, "float32" if self.numerics.autocast else x.dtype)
        width = self._width(x)
        ends = (".weight", ".bias") if self.model.norm_bias else (".weight",)
        weights = [self.weight(name, width, kinds=(WeightKind.NORMS,), name=end) for end in ends]
        return self.tape.op(
            name, [x], y, stats, keeps=(x, stats), grads=((x, self.tape.grad(x)),), weights=tuple(weights)
        )

    def _root_mean_square(self, x32: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """x * rsqrt(mean(x^2) + eps) in fp32, as its Python code runs: keeps x32 and one number a row. With it the mean."""
        tape, rows = self.tape, x32.shape.rsplit(" ", 1)[0]
        square = tape.new(f"{name} square", x32.shape, "float32")
        mean, scale = (tape.new(f"{name} {what}", rows, "float32") for what in ("mean square", "1/rms"))
        tape.op(
            f"{name}: square", [x32], square, keeps=(x32,), grads=((x32, tape.grad(x32)),), back_temps=(square,) * 2
        )
        tape.op(f"{name}: mean square", [square], mean, grads=((square, tape.grad(square)),))
        tape.op(f"{name}: 1/rms", [mean], scale, keeps=(scale,), grads=((mean, tape.grad(mean)),))
        normed = tape.new(f"{name}, normed", x32.shape, "float32")
        tape.op(
            f"{name}: scale",
            [x32, scale],
            normed,
            keeps=(x32, scale),
            grads=((x32, tape.grad(x32)), (scale, tape.grad(scale))),
            back_temps=(square,),
        )
        return normed, mean

    def _rms_norm(self, x: Tensor, name: str, late_cast: bool) -> Tensor:
        """LlamaRMSNorm: weight * normed.to(dtype); with late_cast (weight * normed).to(dtype)."""
        normed, mean = self._root_mean_square(self.cast(x, "float32", f"{name} input in fp32"), name)
        variables = (normed, mean)
        if not late_cast:
            normed = self.cast(normed, x.dtype, f"{name}, normed, {x.dtype}")
        y = self.cast(self._weighted(normed, name), x.dtype, name)
        self.hold(*variables)
        return y

    def _weighted(self, normed: Tensor, name: str, *factors: Tensor) -> Tensor:
        """The product with the weight, or with what was made of it."""
        w = self.weight(name, self._last(normed), kinds=(WeightKind.NORMS,))
        y = self.tape.new(name, normed.shape, normed.dtype)
        product = self.tape.new("gradient x normed", normed.shape, normed.dtype)
        grads = ((normed, self.tape.grad(normed)),)
        return self.tape.op(
            f"{name}: weight",
            [normed, *factors],
            y,
            for_gradients=ForGradients(((normed, w), *((factor, normed) for factor in factors)), ((product, w),)),
            grads=grads,
            weights=(w,),
            workspaces=(self.sum_over_tokens(w, normed),),
        )

    def _gemma_norm(self, x: Tensor, name: str) -> Tensor:
        """Gemma: the product with (1 + weight) runs in fp32, then back to x's dtype."""
        normed, _ = self._root_mean_square(self.cast(x, "float32", f"{name} input in fp32"), name)
        plus = self.tape.new(f"{name}, 1 + weight", str(self._last(normed)), "float32")
        self.tape.op(f"{name}: 1 + weight", [], plus)
        return self.cast(self._weighted(normed, name, plus), x.dtype, name)

    # ---- attention ------------------------------------------------------------------------------------------------

    def attention(self, x: Tensor, kind: LayerKind) -> Tensor:
        with self.tape.assign_role(Role.ATTENTION):
            return self._attention(x, kind)

    def _attention(self, x: Tensor, kind: LayerKind) -> Tensor:
        a = self.model.attention
        q, k, v, *others = self._latent_qkv(x, a) if a.latent else self._qkv(x, a)
        mixed = self._attend(self.autocast(q), self.autocast(k), self.autocast(v), a, kind)
        y = self.linear(mixed, self.new("attention output", "d"), "o_proj", kind=WeightKind.ATTENTION, bias=a.out_bias)
        self.hold(x, q, k, v, *others)
        y = self.dropout(y, self.model.dropout)
        if self.code.holds_qkv:  # elsewhere dropout follows when attention has returned
            self.hold(x, q, k, v)
        return y

    def _qkv(self, x: Tensor, a: Attention) -> tuple[Tensor, ...]:
        """q, k, v, and what else the code's variables hold until attention is done."""
        t = self.t
        fused: tuple[Tensor, ...] = ()
        if a.fused_qkv:
            width = (a.heads + 2 * a.kv_heads) * a.head_dim
            whole = self.linear(
                x, self.new("Q, K and V", str(width)), "qkv_proj", kind=WeightKind.ATTENTION, bias=a.qkv_bias
            )
            fused = (whole,)
            q, k, v = self._split(whole, ("Q", f"{t} H e"), ("K", f"{t} G e"), ("V", f"{t} G e"))
        else:
            by_head = a.qk_norm != "full"  # else the norm is over all heads together
            q = self.linear(
                x, self.new("Q", "H e" if by_head else "He"), "q_proj", kind=WeightKind.ATTENTION, bias=a.qkv_bias
            )
            if a.qk_norm != "none":
                q = self.norm(q, "q_norm")
            k = self.linear(
                x, self.new("K", "G e" if by_head else "Ge"), "k_proj", kind=WeightKind.ATTENTION, bias=a.qkv_bias
            )
            if a.qk_norm != "none":
                k = self.norm(k, "k_norm")
            v = self.linear(x, self.new("V", "G e"), "v_proj", kind=WeightKind.ATTENTION, bias=a.qkv_bias)
        if a.rotary_dim:
            before = (q, k)
            tables = self._interleaved(a.rotary_dim) if self.code.interleaved_tables else ()
            q = self._rotary(q, "H", a.rotary_dim, a.head_dim, *tables)
            k = self._rotary(k, "G", a.rotary_dim, a.head_dim, *tables)
            self.hold(*before)  # until both are turned
            if self.code.rotary_in_fp32:
                turned = (q, k)
                q = self.cast(q, self.numerics.compute)
                self.hold(*before, *turned)
                k = self.cast(k, self.numerics.compute)
                self.hold(*before, *turned)
        return q, k, v, *fused

    def _split(self, fused: Tensor, *parts: tuple[str, str]) -> tuple[Tensor, ...]:
        """Views of one tensor; their gradients are joined into one (Phi-3 slices instead: zeros each, added)."""
        views = tuple(self.tape.view(fused, name, shape) for name, shape in parts)
        if self.code.slices_qkv and len(parts) == 3:
            for view in views:
                self.tape.op("slice " + view.name, [fused], view, grads=((fused, self.tape.grad(fused)),))
        else:
            self.tape.op("split " + fused.name, [fused], *views, grads=((fused, self.tape.grad(fused)),))
        return views

    def _interleaved(self, rotary: int) -> tuple[Tensor, Tensor]:
        """cos and sin with every number twice (models/glm/modeling_glm.py, apply_rotary_pos_emb)."""
        dtype = rotary_dtype(self.model, self.wide)
        cosine, sine = (self.tape.new(f"{name}, interleaved", f"s {rotary}", dtype) for name in ("cos", "sin"))
        self.tape.op("interleave", [], cosine, sine)
        return cosine, sine

    def _rotary(self, x: Tensor, heads: str, rotary: int, width: int, *tables: Tensor) -> Tensor:
        """x * cos + rotate_half(x) * sin. Nothing is kept but cos and sin: `tables`, or those that all layers share. heads: their
        axis."""
        if self.code.rotary == "complex":
            return self._rotary_complex(x)
        if self.code.rotary == "halves":
            return self._rotary_by_halves(x, heads, rotary)
        e = "e" if rotary == width and not self.model.attention.latent else str(rotary)
        shape = f"{self.t} {heads} {e}"
        turned = x if rotary == width else self.slice(x, x.name + ", rotary part", shape)
        wide = rotary_dtype(self.model, self.wide)
        cosine = self.tape.new(f"{x.name} cos", shape, wide)
        cos, sin = (tables[:1], tables[1:]) if tables else ((), ())
        grads = ((turned, self.tape.grad(turned)),)
        self.tape.op(f"{x.name} * cos", [turned, *cos], cosine, keeps=cos, grads=grads)
        half = f"{self.t} {heads} {rotary // 2}"
        first, second = (
            self.slice(turned, x.name + " first half", half),
            self.slice(turned, x.name + " second half", half),
        )
        minus = self.tape.new(f"-{x.name} half", half, x.dtype)
        self.tape.op("negate", [second], minus, grads=((second, self.tape.grad(second)),))
        rotated = self.tape.new(f"{x.name} rotated", shape, x.dtype)
        self.tape.op("rotate half", [minus, first], rotated, grads=((minus, None), (first, None)))
        sine = self.tape.new(f"{x.name} sin", shape, wide)
        grads = ((rotated, self.tape.grad(rotated)),)
        self.tape.op(f"{x.name} * sin", [rotated, *sin], sine, keeps=sin, grads=grads, holds=(turned,))
        y = self.tape.new(f"{x.name} after rotary", shape, wide)
        self.tape.op("rotary add", [cosine, sine], y, grads=((cosine, None), (sine, None)), holds=(x, *tables))
        if rotary == width and not self.code.joins_rotary:
            return y
        rest = (self.slice(x, x.name + ", rest", f"{self.t} {heads} {width - rotary}"),) if rotary < width else ()
        whole = self.tape.new(f"{x.name} after rotary", f"b {heads} s e", wide)
        return self.tape.op("join rotary and rest", [y, *rest], whole, grads=tuple((part, None) for part in (y, *rest)))

    def _rotary_by_halves(self, x: Tensor, heads: str, rotary: int) -> Tensor:
        """(x1 cos - x2 sin, x2 cos + x1 sin), x1 and x2 being halves of x: DeepSeek-V3, gpt-oss."""
        tape, half = self.tape, f"{self.t} {heads} {rotary // 2}"
        x1, x2 = self._split(x, (x.name + " first half", half), (x.name + " second half", half))

        def product(part: Tensor, what: str) -> Tensor:
            y = tape.new(f"{part.name} {what}", half, x.dtype)
            return tape.op(f"{part.name} * {what}", [part], y, grads=((part, tape.grad(part)),))

        turned = []
        for name, one, other in (("first", x1, x2), ("second", x2, x1)):
            cosine, sine = product(one, "cos"), product(other, "sin")
            y = tape.new(f"{x.name} {name} half turned", half, x.dtype)
            minus = None if name == "second" else tape.grad(sine)
            turned.append(tape.op("rotary add", [cosine, sine], y, grads=((cosine, None), (sine, minus))))
        whole = tape.new(f"{x.name} after rotary", f"b {heads} s {x.shape.split()[-1]}", x.dtype)
        tape.op("join halves", turned, whole, grads=tuple((y, None) for y in turned), holds=(x,))
        return whole

    def _rotary_complex(self, x: Tensor) -> Tensor:
        """Pairs of numbers as complex ones in fp32, times a rotation: DeepSeek-V2."""
        tape = self.tape
        pairs = self.cast(x, "float32", f"{x.name} as complex numbers")
        turned = tape.new(f"{x.name} turned", x.shape, "float32")
        tape.op("rotate", [pairs], turned, grads=((pairs, tape.grad(pairs)),))
        y = self.cast(turned, x.dtype, f"{x.name} after rotary")
        self.hold(pairs)
        return y

    def _latent_qkv(self, x: Tensor, a: Attention) -> tuple[Tensor, ...]:
        """DeepSeek's multi-head latent attention (modeling_deepseek_v3.py): q, k, v, and what else its variables hold."""
        latent = a.latent
        assert latent is not None
        t, dims = self.t, self.tape.dims
        dims.update({"kv_rank": latent.kv_rank, "nope": latent.nope_dim, "rope": latent.rope_dim, "ev": a.v_head_dim})
        q_in = x
        if latent.q_rank is not None:
            dims["q_rank"] = latent.q_rank
            low = self.linear(x, self.new("Q latent", "q_rank"), "q_a_proj", kind=WeightKind.ATTENTION, bias=a.qkv_bias)
            q_in = self._rms_norm(low, "q_a_layernorm", late_cast=False)
        q = self.linear(
            q_in, self.new("Q", "H e"), "q_b_proj" if latent.q_rank is not None else "q_proj", kind=WeightKind.ATTENTION
        )
        q_rest, q_turned = self._split(q, ("Q without position", f"{t} H nope"), ("Q rotary part", f"{t} H rope"))
        both = self.linear(
            x,
            self.new("K and V latent", str(latent.kv_rank + latent.rope_dim)),
            "kv_a_proj",
            kind=WeightKind.ATTENTION,
            bias=a.qkv_bias,
        )
        low, k_turned = self._split(both, ("KV latent", f"{t} kv_rank"), ("K rotary part", f"{t} 1 rope"))
        low = self._rms_norm(low, "kv_a_layernorm", late_cast=False)
        q_turned = self._rotary(q_turned, "H", latent.rope_dim, latent.rope_dim)
        k_turned = self._rotary(k_turned, "1", latent.rope_dim, latent.rope_dim)
        q_whole = self.tape.new("Q after rotary", "b H s e", q_turned.dtype)
        self.tape.op("join Q", [q_rest, q_turned], q_whole, grads=((q_rest, None), (q_turned, None)))
        kv = self.linear(
            low, self.new("K and V", f"H {latent.nope_dim + a.v_head_dim}"), "kv_b_proj", kind=WeightKind.ATTENTION
        )
        k_rest, v = self._split(kv, ("K without position", f"{t} H nope"), ("V", f"{t} H ev"))
        k_whole = self.tape.new("K after rotary", "b H s e", q_turned.dtype)
        parts = ((k_rest, self.tape.grad(k_rest)), (k_turned, self.tape.grad(k_turned)))
        self.tape.op("join K", [k_rest, k_turned], k_whole, grads=parts)
        return q_whole, k_whole, v, q, both, low, q_turned, k_turned

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, a: Attention, kind: LayerKind) -> Tensor:
        how = self.numerics.attention
        masked = runs_sdpa(how) and kind.window is not None and self.numerics.masked
        kernel = chosen(how, AttentionCall.from_attention(a, self.numerics.compute, masked, self.numerics.platform))
        start = len(self.tape.ops)
        mixed = kernel.lay_out(self, q, k, v, kind, masked)
        self.tape.name_kernel(kernel.name, start)
        return mixed

    # ---- MLP and experts ------------------------------------------------------------------------------------------

    def mlp(self, x: Tensor, mlp: Mlp, name: str = "mlp") -> Tensor:
        with self.tape.assign_role(Role.MLP):
            return self._mlp(x, mlp, name)

    def _mlp(self, x: Tensor, mlp: Mlp, name: str) -> Tensor:
        self.tape.dims["I"] = mlp.width
        width = "I"
        if not mlp.gated:
            inner = self.linear(x, self.new("MLP up", width), name + ".up_proj", kind=WeightKind.MLP, bias=mlp.bias)
            inner = self.activation(inner, mlp.activation)
        elif mlp.fused:
            both = self.linear(
                x,
                self.new("MLP gate and up", str(2 * mlp.width)),
                name + ".gate_up_proj",
                kind=WeightKind.MLP,
                bias=mlp.bias,
            )
            gate, up = self._split(both, ("MLP gate", f"{self.t} {width}"), ("MLP up", f"{self.t} {width}"))
            active = self.activation(gate, mlp.activation)
            inner = self.multiply("gate * up", up, active, self.new("MLP product", width))
        else:
            gate = self.linear(x, self.new("MLP gate", width), name + ".gate_proj", kind=WeightKind.MLP, bias=mlp.bias)
            active = self.activation(gate, mlp.activation)
            up = self.linear(x, self.new("MLP up", width), name + ".up_proj", kind=WeightKind.MLP, bias=mlp.bias)
            inner = self.multiply("gate * up", active, up, self.new("MLP product", width))
        y = self.linear(inner, self.new("MLP output", "d"), name + ".down_proj", kind=WeightKind.MLP, bias=mlp.bias)
        self.hold(x)
        return self.dropout(y, self.model.dropout)

    def activation(self, x: Tensor, name: str) -> Tensor:
        y = self.tape.new(f"MLP {name}", x.shape, x.dtype)
        if name == "gelu_new":  # eight operations in Python (transformers activations.py)
            return self._gelu_new(x, y)
        keeps = (y,) if name in ("relu", "tanh", "sigmoid") else (x,)
        return self.pointwise(name, x, y, *keeps)

    def _gelu_new(self, x: Tensor, y: Tensor) -> Tensor:
        """0.5 * x * (1 + tanh(c * (x + 0.044715 * x^3))): keeps x, the tanh, the half and the factor."""
        tape = self.tape

        def like(name: str) -> Tensor:
            return tape.new(name, x.shape, x.dtype)

        half = self.pointwise("0.5 * x", x, like("MLP half"))
        cube = self.pointwise("x^3", x, like("MLP cube"), x, back_temps=2)
        cube = self.pointwise("0.044715 * x^3", cube, like("MLP scaled cube"))
        inner = like("MLP x + cube")
        tape.op("x + cube", [x, cube], inner, grads=((x, None), (cube, None)))
        inner = self.pointwise("scale", inner, like("MLP tanh input"))
        tanh = like("MLP tanh")
        self.pointwise("tanh", inner, tanh, tanh)
        factor = like("MLP 1 + tanh")
        tape.op("1 + tanh", [tanh], factor, grads=((tanh, None),))
        self.multiply("gelu", half, factor, y)
        self.hold(x)
        return y

    def experts(self, x: Tensor, e: Experts) -> Tensor:
        with self.tape.assign_role(Role.MLP):
            return self._experts(x, e)

    def _experts(self, x: Tensor, e: Experts) -> Tensor:
        """A mixture of experts through grouped products (transformers integrations/moe.py, grouped_mm_experts_forward).

        Every token is copied for each of its experts; rows are sorted by expert.
        """
        tape, rows = self.tape, e.per_token
        tape.dims.update({"X": e.number, "A": rows, "F": e.width})

        def integers(name: str, dtype: str = "int64") -> Tensor:
            return self.new(name, "A", dtype)

        scores, chosen, *others = self._router(x, e)
        outside = (x, scores, chosen, *others)
        order, ids, tokens = integers("expert order"), integers("sorted experts"), integers("tokens by expert")
        tape.op("sort by expert", [chosen], order, ids)
        tape.op("tokens by expert", [order], tokens)
        picked = self.new("expert inputs", "A d", x.dtype)
        tape.op("gather tokens", [x, tokens], picked, keeps=(tokens,), grads=((x, tape.grad(x)),))
        weights = self.new("expert scores by expert", "A", scores.dtype)
        tape.op("sort scores", [scores, order], weights, keeps=(order,), grads=((scores, tape.grad(scores)),))
        counted = integers("experts to count", "int32")
        tape.op("count by expert", [ids], counted)
        inside = (*outside, ids, order, picked, weights, counted)
        dtype = self.numerics.weights  # grouped products know no autocast: they cast their input to the weights' dtype
        d, width = self.model.hidden, 2 * e.width
        up, bias = self._grouped(
            picked, self.new("expert gate and up", f"A {width}", dtype), "experts.gate_up_proj", e, (width, d), ids
        )
        inner = self._clamped_gate(up) if e.clamped else self._expert_gate(up, e)
        self.hold(up, *bias)
        down, bias = self._grouped(
            inner, self.new("expert outputs", "A d", dtype), "experts.down_proj", e, (d, e.width), ids
        )
        wide = "float32" if "float32" in (scores.dtype, down.dtype) else down.dtype  # up to the sum over experts
        weighted = self.new("weighted expert outputs", "A d", wide)
        product = self.new("gradient x outputs", "A d", wide)
        uncast = (self.new("gradient before its cast", "A d", down.dtype),) if wide != down.dtype else ()
        tape.op(
            "weigh experts",
            [down, weights],
            weighted,
            for_gradients=ForGradients(((down, weights), (weights, down)), ((product, weights),)),
            grads=((down, tape.grad(down)), (weights, tape.grad(weights))),
            back_temps=uncast,
            late_temps=uncast,
        )
        places = integers("rows in token order")
        tape.op("invert the order", [order], places, temps=(integers("numbers of rows"),))
        restored = self.new("expert outputs in token order", "A d", wide)
        tape.op(
            "restore order", [weighted, places], restored, keeps=(places,), grads=((weighted, tape.grad(weighted)),)
        )
        y = self.new("sum of expert outputs", "d", wide)
        tape.op("sum over experts", [restored], y, grads=((restored, tape.grad(restored)),))
        y = self.cast(y, x.dtype, "MLP output")
        self.hold(*inside, *bias, down, places, restored)
        if not e.shared_width:
            return y
        shared = self.mlp(x, Mlp(e.shared_width, e.activation), "shared_experts")
        y = self.add(y, shared, self.new("MLP output", "d", y.dtype), "add shared experts")
        self.hold(*outside)
        return y

    def _router(self, x: Tensor, e: Experts) -> tuple[Tensor, ...]:
        """Scores of the chosen experts (t A), their numbers (t A, int64), and the logits, which a variable holds."""
        tape = self.tape
        dtype, copy = self.numerics.compute, None
        weight, x_in = self.weight("router", e.number, self.model.hidden, kinds=(WeightKind.MLP,)), x
        if e.router_fp32:
            dtype, x_in = "float32", self.cast(x, "float32", "router input in fp32")
            if self.numerics.weights != "float32":
                copy = tape.new("router.weight in fp32", "X d", "float32")
                tape.op("cast router.weight", [], copy)
        logits = self.linear(
            x_in,
            self.new("router logits", "X", dtype),
            "router",
            kind=WeightKind.MLP,
            weight=weight,
            bias=e.bias,
            copy=copy,
        )
        scores = self.new("expert scores", "A", "float32" if e.router_fp32 or self.code.fp32_expert_scores else None)
        chosen = self.new("chosen experts", "A", "int64")
        if e.router == "topk-softmax":
            top = self.new("top logits", "A")
            tape.op("top experts", [logits], top, chosen, keeps=(chosen,), grads=((logits, tape.grad(logits)),))
            self.softmax("softmax of experts", top, scores)
            self.hold(x, top)
            return scores, chosen, logits
        probs, top = self.new("router probabilities", "X", "float32"), self.new("top probabilities", "A", "float32")
        cast = () if logits.dtype == "float32" else (self.new("router logits in fp32", "X", "float32"),)
        if e.router == "sigmoid-groups":
            grads = ((logits, tape.grad(logits)),)
            tape.op("router probabilities", [logits], probs, keeps=(probs,), temps=cast, grads=grads)
        else:
            self.softmax("router probabilities", logits, probs, *cast)
        grouping: tuple[Tensor, ...] = ()
        if (
            e.router == "sigmoid-groups"
        ):  # scores with the correction, before and after masking; the mask of groups, twice as bool
            grouping = (self.new("scores to choose by", "X", "float32"),) * 3 + (
                self.new("mask of groups", "X", "bool"),
            ) * 2
        tape.op(
            "top experts", [probs], top, chosen, keeps=(chosen,), temps=grouping, grads=((probs, tape.grad(probs)),)
        )
        scaled = (
            e.router_fp32 and e.router == "softmax"
        )  # DeepSeek-V2 multiplies by a number, the others divide by the sum
        sums = () if scaled else (self.new("sum of top probabilities", "", "float32"),)
        tape.op(
            "normalise experts",
            [top],
            scores,
            *sums,
            keeps=() if scaled else (top, *sums),
            grads=((top, tape.grad(top)),),
            holds=(x, logits, probs),
        )
        return scores, chosen, logits

    def _grouped(
        self, x: Tensor, y: Tensor, name: str, e: Experts, shape: tuple[int, int], ids: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(product, rows of biases that the code holds on to). Biases are gathered by row first and added in place."""
        x = self.cast(x, self.numerics.weights)
        share = (e.per_token, e.number)
        w = self.weight(name, e.number, *shape, kinds=(WeightKind.MLP,), name="", active=share)
        rows: tuple[Tensor, ...] = ()
        if e.bias:
            rows = (self.tape.new(name + "_bias by row", y.shape, y.dtype),)
            bias = self.weight(name, e.number, shape[0], kinds=(WeightKind.MLP,), name="_bias", active=share)
            self.tape.op(name + "_bias", [ids], *rows, keeps=(ids,), weights=(bias,))
        self.tape.op(
            name,
            [x],
            y,
            for_gradients=ForGradients(((x, w),)),
            grads=((x, self.tape.grad(x)), *((row, None) for row in rows)),
            weights=(w,),
            holds=rows,
            flops=((y.basis, 2 * e.per_token * shape[0] * shape[1]),),
        )
        return y, rows

    def _expert_gate(self, up: Tensor, e: Experts) -> Tensor:
        gate, linear = self._split(up, ("expert gate", f"{self.t} A F"), ("expert up", f"{self.t} A F"))
        active = self.activation(gate, e.activation)
        return self.multiply("expert gate * up", active, linear, self.new("expert product", "A F", active.dtype))

    def _clamped_gate(self, up: Tensor) -> Tensor:
        """gpt-oss: (clamp(up) + 1) * clamp(gate) * sigmoid(alpha * clamp(gate)), gate and up interleaved."""

        def like(name: str) -> Tensor:
            return self.new(name, "A F", up.dtype)

        gate, linear = self.slice(up, "expert gate", f"{self.t} A F"), self.slice(up, "expert up", f"{self.t} A F")
        gate = self.pointwise("clamp gate", gate, like("clamped gate"), gate)
        linear = self.pointwise("clamp up", linear, like("clamped up"), linear)
        scaled = self.pointwise("alpha * gate", gate, like("scaled gate"))
        sigmoid = like("sigmoid of gate")
        self.pointwise("sigmoid", scaled, sigmoid, sigmoid)
        glu = self.multiply("gate * sigmoid", gate, sigmoid, like("gated"))
        plus = like("up + 1")
        self.tape.op("up + 1", [linear], plus, grads=((linear, None),))
        product = self.multiply("(up + 1) * gated", plus, glu, like("expert product"))
        self.hold(gate, linear, glu)
        return product


def rotary_dtype(model: Model, residual: str) -> str:
    """The dtype of cos and sin: the residual stream's, or fp32."""
    return "float32" if family_of(model.model_type).code.rotary_in_fp32 else residual


class MlpChunks(NamedTuple):
    """Way the MLP runs: in one go, or in several pieces, each recomputed by itself in backward or not."""

    several: bool = False
    recompute: bool = False


@lru_cache(maxsize=256)
def layer(
    model: Model, kind: LayerKind, numerics: Numerics, chunks: MlpChunks, frozen: frozenset[str] = frozenset()
) -> Tape:
    """One decoder layer, from hidden states (b, s, d) to hidden states (b, s, d); frozen: names of its weights that are not trained."""
    w = Writer(model, numerics, frozen=frozen)
    w.tape.role = Role.NORM
    x = w.source()
    block = model.block
    attention_in = x if block == "post" else w.norm(x, "input norm")
    attended = w.attention(attention_in, kind)
    if block in ("sandwich", "post"):
        attended = w.norm(attended, "post-attention norm")
    if block == "parallel":
        mlp_out = _feed_forward(w, w.norm(x, "post-attention norm"), kind, chunks)
        both = w.add(mlp_out, attended, w.new("MLP and attention", "d"), "add MLP and attention")
        w.add(both, x, w.hidden())
        w.hold(attended, mlp_out)
        return w.tape.build_tape()
    middle = w.add(x, attended, w.new("hidden states after attention", "d", w.wide))
    with w.tape.assign_role(Role.MLP if block == "sandwich" else Role.NORM):
        name = "post-attention norm" if block == "pre" else "pre-MLP norm"
        mlp_in = middle if block == "post" else w.norm(middle, name)
    mlp_out = _feed_forward(w, mlp_in, kind, chunks)
    if block == "post" and chunks.recompute:
        return w.tape.build_tape()  # the residual is the MLP's input, so the chunks add it
    if block in ("sandwich", "post") and not chunks.recompute:
        with w.tape.assign_role(Role.MLP):
            mlp_out = w.norm(mlp_out, "post-MLP norm")
    w.add(middle, mlp_out, w.hidden())
    if w.code.holds_block:
        w.hold(attended, mlp_in)
    return w.tape.build_tape()


def _feed_forward(w: Writer, x: Tensor, kind: LayerKind, chunks: MlpChunks) -> Tensor:
    """The MLP or the experts; in chunks that are recomputed, with the norm and the residual that follow token by token, as
    mstplan/train runs it."""
    model = w.model
    if not (chunks.several or chunks.recompute):
        return w.experts(x, _experts(model)) if kind.experts else w.mlp(x, _mlp(model))
    inner = Writer(model, w.numerics, "b c", frozen=w.frozen)
    source = inner.source(x.name, x.dtype, x.role)
    y = inner.experts(source, _experts(model)) if kind.experts else inner.mlp(source, _mlp(model))
    if chunks.recompute and model.block in ("sandwich", "post"):
        with inner.tape.assign_role(Role.MLP):
            y = inner.norm(y, "post-MLP norm")
    if chunks.recompute and model.block == "post":
        y = inner.add(source, y, inner.hidden())
    inner_tape = inner.tape.build_tape()
    sums = sums_of(inner_tape) if chunks.several else ()
    part = Part(inner_tape, recompute=chunks.recompute, chunked=True, sums=sums)
    with w.tape.assign_role(y.role):
        out = w.tape.new(y.name, "b s d", y.dtype)
    return w.tape.add(Op("MLP in chunks", (x,), (out,), part=part))


def _mlp(model: Model) -> Mlp:
    assert model.mlp is not None
    return model.mlp


def _experts(model: Model) -> Experts:
    assert model.experts is not None
    return model.experts
