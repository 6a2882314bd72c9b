"""The forward pass of transformers' decoders, operation by operation, on a `Tape`.

Each function follows the code of transformers 5 (models/*/modeling_*.py) and says, for every operation, what PyTorch's
autograd keeps of it (tools/autograd/derivatives.yaml). Weights are declared where they are used, so that the parameter
counts, the intermediates and the arithmetic all come from this one description.

Axes: b batch, s tokens (c, k: of one MLP or loss chunk), d hidden, H heads, G key/value heads, e head size, I MLP width,
V vocabulary, X experts, A experts that a token visits, F their width, R rows that a card
receives for each token, r tokens rounded up to 128. `t` stands for the tokens at hand: "b s" or "b c".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

from ..errors import RecipeError
from ..spec.families import family_of
from ..spec.model import Attention, Experts, LayerKind, Mlp, Model
from ..spec.platform import AMPERE, Platform
from . import expert_parallel, quantised, ring, tensor_parallel, ulysses
from .adapters import Adapters, add_adapter, is_read_outside
from .altup import altup_layer, mlp_of_stream
from .expert_adapters import EXPERTS_DOWN, GATE_AND_UP, Factors, activate, add_router, add_up, router_delta
from .indexer import chosen_keys
from .instants import Stage
from .kernels import chosen, runs_sdpa
from .kernels.base import AttentionCall, Kernel, heads_first
from .liger import kernels_for
from .mixers import mix
from .ring import Ring
from .roles import Purpose, Role
from .selection import WeightKind
from .tape import (
    BASIS,
    ForGradients,
    Op,
    Part,
    Tape,
    TapeWriter,
    Tensor,
    Weight,
    WeightWorkspace,
    axes_of,
    sums_of,
    tensor_of,
)
from .workspaces import MULTIPROCESSORS, SumOverTokens
from .zero3 import LEAVES

HIDDEN = "layer input"
PER_LAYER = "per-layer input"


class Numerics(NamedTuple):
    """Numerics of a step: weights' dtype, whether bf16 autocast casts them, attention kernel."""

    weights: str = "bfloat16"
    autocast: bool = False
    attention: str = "sdpa"  # a recipe's, see `kernels.attentions()`
    masked: bool = (
        False  # sliding-window layers get an explicit mask (sdpa beyond the window), with several samples all layers
    )
    samples: int = 1  # in a row, told apart
    masks_all: bool = False  # with several samples or images all layers, not those of a window alone
    padded: bool = False  # its rows are padded
    several_rows: bool = False  # sequences, of which copies are made: of pieces, of heads for products
    platform: Platform = AMPERE  # by which sdpa chooses its kernel
    adapters: Adapters | None = None
    quantised: str = ""  # nf4, fp4 or int8: the weights of linear layers
    double_quantised: bool = False
    packed_in: str = "uint8"  # of 4 bits
    checkpointed: bool = False  # its layers
    kernels: str = "torch"  # of norms, rotary embedding and MLP
    ranks: int = 1  # cards that share a sequence, and in attention the heads
    ring: Ring | None = None  # of cards that share a sequence
    splits: int = 1  # cards that every matrix is split over
    norm_sharers: int = 1  # of these, cards that norm a part of the tokens each
    loss_parallel: bool = False  # each of which has its part of the logits
    spread: int = 1  # cards that share out experts
    imbalance: float = 1.0  # of what they send each other
    policy: bool = False  # FSDP2's MixedPrecisionPolicy: what its modules are given is cast to bf16
    in_deepspeeds_linear: bool = False  # which stands in for torch's (ZeRO-3)

    @property
    def compute(self) -> str:
        """Dtype of products."""
        return "bfloat16" if self.autocast else self.weights

    @property
    def made(self) -> str:
        """Dtype that linear layers hand on: quantised ones cast back to their input's."""
        return self.weights if self.quantised else self.compute

    def masks(self, kind: LayerKind) -> bool:
        """Whether a layer's attention is given an explicit mask beside causality."""
        return runs_sdpa(self.attention) and self.masked and (self.samples > 1 or self.masks_all or kind.asks_mask)


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
        self.experts_first = family.experts is not None and family.experts.experts_first
        dims = {"d": model.hidden, "V": model.vocab, "H": a.heads, "G": a.kv_heads, "e": a.head_dim, "ev": a.v_head_dim}
        self.tape = TapeWriter({**dims, "He": a.heads * a.head_dim, "Ge": a.kv_heads * a.head_dim}, stage)
        self.wide = "float32" if model.wide_residual else numerics.weights  # dtype of the residual stream
        self.beside: tuple[Tensor, ...] = ()  # returned by attention with its output: the layer's variable holds it
        self.gate: Tensor | None = None  # of attention's output
        self.visits = "A"  # axis of what experts are given for each token: a row for each expert that it visits, or what other cards send as well
        self.lent: tuple[Tensor, ...] = ()  # keys and values that the layer lends, or borrows
        self.per_layer: Tensor | None = None  # the layer's own part of what is embedded for each
        self.used: dict[str, Weight] = {}  # in another part of the same layer
        self.inside: tuple[
            Tensor, ...
        ] = ()  # variables of attention's code, or the MLP's, where that adds the residual
        self.turned_parts: tuple[Tensor, ...] = ()  # of queries and keys, as rotary embedding made them
        self.tables: tuple[Tensor, ...] = ()  # cos and sin, where they are a piece's own
        self.cuts_gates = False  # of the MLP
        self.in_chunks = False  # does the layer around attention run over pieces?
        self.liger = kernels_for(model.model_type) if numerics.kernels == "liger" else None
        # tokens that there are for one of what shapes count by their basis: of images, whose number is known
        self.rows = 1
        # axes of tokens of hidden states between layers, and of norms
        self.between = "b q" if numerics.norm_sharers > 1 and tokens == "b s" else tokens
        # axes of position ids, which packed rows have each of its own; pieces of several rows are counted as if they had
        own_places = numerics.samples > 1 or numerics.ranks > 1 or numerics.ring is not None
        self.places = "s" if not own_places and tokens == "b s" else tokens

    def new(self, name: str, shape: str, dtype: str | None = None) -> Tensor:
        return self.tape.new(name, f"{self.t} {shape}".rstrip(), dtype or self.numerics.made)

    def source(
        self,
        name: str = HIDDEN,
        dtype: str | None = None,
        role: Purpose | None = Role.LAYER_INPUT,
        shape: str = "d",
    ) -> Tensor:
        with self.tape.assign_role(role):
            self.tape.sources.append(self.tape.new(name, f"{self.between} {shape}", dtype or self.wide))
        return self.tape.sources[-1]

    def source_per_layer(self, is_view: bool = True) -> tuple[Tensor, ...]:
        """The layer's own part of what is embedded for each layer, where the model does that: a view of all, or a piece of it."""
        sizes = self.model.per_layer
        if sizes is None:
            return ()
        with self.tape.assign_role(Role.LAYER_INPUT):
            whole = self.new(PER_LAYER, f"{self.model.layers} {sizes.width}", self.wide)
            shape = f"{self.t} {sizes.width}"
            self.per_layer = self.tape.new(PER_LAYER, shape, self.wide, whole if is_view else None)
        self.tape.sources.append(self.per_layer)
        return (self.per_layer,)

    def source_keys(self) -> None:
        """Keys and values of an earlier layer."""
        with self.tape.assign_role(Role.ATTENTION):
            self.lent = tuple(self.new(f"{name} of an earlier layer", "G e", self.wide) for name in ("K", "V"))
        self.tape.sources += self.lent

    def by_head(self, heads: str, width: str) -> str:
        """The shape of what lies heads first."""
        rows, tokens = self.t.split()
        return f"{rows} {heads} {tokens} {width}"

    def hidden(self, dtype: str = "") -> Tensor:
        """Hidden states as they go from layer to layer. dtype: that of the embedding, where it is another."""
        with self.tape.assign_role(Role.LAYER_INPUT):
            return self.tape.new(HIDDEN, f"{self.between} d", dtype or self.wide)

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
        dtype: str = "",
        is_adapter: bool = False,
    ) -> Weight:
        """The weight of a part of the step, as its family has it; name: what its own name ends in; dtype: its own, where it has one."""
        whole = self.names.get(module, module) + name
        place = _place(whole, kinds, self.experts_first)
        trained = whole not in self.frozen
        return self.used.get(whole) or Weight(
            whole, shape, active, frozenset(kinds), trained, dtype=dtype, is_adapter=is_adapter, place=place
        )

    def cast_weight(self, weight: Weight) -> tuple[Tensor, ...]:
        """A weight as an operation keeps it: autocast's bf16 copy, or nothing beyond the parameter itself."""
        if not self.numerics.autocast or len(weight.shape) < 2 or (weight.dtype or self.numerics.weights) == "bfloat16":
            return ()
        shape = " ".join(map(str, weight.shape))
        name = f"{weight.name}, bf16 copy"  # autocast keeps copies of what is trained (aten autocast_mode.cpp, cached_cast)
        copy = self.tape.new(name, shape, "bfloat16", cached=weight.trained and not self.multiplies_view(weight))
        self.tape.op("cast " + weight.name, [], copy)
        return (copy,)

    def multiplies_view(self, weight: Weight) -> bool:
        """Whether a layer's product takes a view of the weight (models/falcon/modeling_falcon.py, FalconLinear)."""
        in_layer = bool({WeightKind.ATTENTION, WeightKind.MLP} & weight.kinds)
        return self.code.multiplies_views and in_layer and not weight.is_adapter

    def linear(
        self,
        x: Tensor,
        y: Tensor,
        name: str,
        *,
        kind: WeightKind | None,
        bias: bool = False,
        weight: Weight | None = None,
        copy: Tensor | None = None,
        defers: bool = False,
    ) -> Tensor:
        """y = x W^T (+ bias), and what an adapter adds to it. kind: None for one that no word means. copy: of W, made for this in another dtype."""
        start = len(self.tape.ops)
        with self.tape.call() as external:
            made = self._linear(x, y, name, kind, bias, weight, copy, defers)
            external += [w for op in self.tape.ops[start:] for w in op.weights if is_read_outside(w)]
        return made

    def _linear(
        self,
        x: Tensor,
        y: Tensor,
        name: str,
        kind: WeightKind | None,
        bias: bool,
        weight: Weight | None,
        copy: Tensor | None,
        defers: bool,
    ) -> Tensor:
        numerics, module = self.numerics, self.names.get(name, name)
        if numerics.splits > 1 and name in tensor_parallel.COLUMNS:
            x = tensor_parallel.enter(self, x)
        is_quantised = bool(numerics.quantised) and weight is None
        adapters = numerics.adapters if weight is None else None
        targeted = adapters is not None and adapters.targets_module(module, kind)
        if is_quantised and y.dtype != x.dtype:
            y = self.tape.new(y.name, y.shape, x.dtype)
        base = self.tape.new(y.name, y.shape, y.dtype) if targeted else y
        kinds = (kind,) if kind is not None else ()
        w = weight or self.weight(name, self.width(y), self.width(x), kinds=kinds)
        biases = (self.weight(name, self.width(y), kinds=kinds, name=".bias"),) if bias else ()
        with self.tape.call() if targeted else nullcontext():  # of the layer in it
            if is_quantised:
                quantised.product(self, x, base, name, w, biases)
            else:
                self.product(x, base, name, w, *biases, copy=copy, defers=defers)
        if numerics.splits > 1 and name in tensor_parallel.ROWS:
            return tensor_parallel.summed(self, y, self.tape.new(y.name, f"{self.between} d", y.dtype), x)
        return add_adapter(self, x, base, y, name, kind, is_quantised) if targeted else y

    def product(
        self,
        x: Tensor,
        y: Tensor,
        name: str,
        w: Weight,
        *biases: Weight,
        copy: Tensor | None = None,
        defers: bool = False,
    ) -> Tensor:
        """y = x W^T (+ bias). Keeps x and W (aten::mm, aten::addmm), x for the gradient of W; DeepSpeed's own linear in any case (zero/linear.py). copy: of W,
        made for this in another dtype."""
        x = self.autocast(x)
        inner, outer = self.width(x), self.width(y)
        weights = (w, *biases)
        copies = (copy,) if copy is not None else self.cast_weight(w)
        keeps_input = ((x, x),) if self.numerics.in_deepspeeds_linear else ()
        return self.tape.op(
            name,
            [x, *copies],
            y,
            for_gradients=ForGradients(((x, w), *((copy, x) for copy in copies), *keeps_input)),
            grads=((x, self.tape.grad(x)),),
            weights=weights,
            workspaces=tuple(self.sum_over_tokens(each, y) for each in weights[1:]),
            flops=((y.basis, 2 * self.rows * inner * outer),),
            cast=bool(copies) and copy is None,
            defers=defers,
            product=not (
                self.numerics.in_deepspeeds_linear or copies or self.numerics.autocast or self.multiplies_view(w)
            ),
            adds_bias=bool(biases),
        )

    def sum_over_tokens(self, weight: Weight, x: Tensor) -> WeightWorkspace:
        """The workspace while gradients of x's shape are added up to the weight's."""
        rows = self.rows * self.width(x) // weight.numel
        return WeightWorkspace(weight, SumOverTokens(weight.numel, rows), BASIS[x.basis])

    def _last(self, x: Tensor) -> int:
        axis = x.shape.rsplit(" ", 1)[1]
        return int(axis) if axis.isdigit() else self.tape.dims[axis]

    def width(self, x: Tensor) -> int:
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
        shared_out = self.numerics.norm_sharers > 1
        with self.tape.call(), self.tape.distributed() if shared_out else nullcontext():
            y = self._norm(tensor_parallel.as_part(self, x) if shared_out else x, name)
        self.hold(x)
        return y

    def _norm(self, x: Tensor, name: str) -> Tensor:
        if self.liger is not None and name in self.liger.norms:
            return self._liger_norm(x, name, in_place=name not in self.liger.copying)
        if self.model.norm in ("layer", "layer-1p"):
            return self._layer_norm(x, name)
        if self.model.norm == "gemma":
            return self._gemma_norm(x, name)
        if self.model.norm == "rms-fp32":
            return self._gemma_norm(x, name, "weight in fp32")
        if self.model.norm == "rms-wide-weight":
            return self._wide_weight_norm(x, name)
        if self.model.norm == "centred":
            return self._centred_norm(x, name)
        return self._rms_norm(x, name, late_cast=self.model.norm == "rms-fp32-weight")

    def _layer_norm(self, x: Tensor, name: str) -> Tensor:
        """nn.LayerNorm: one kernel, keeps its input (autocast runs it in fp32)."""
        width = self.width(x)
        plus: tuple[Tensor, ...] = ()
        if self.model.norm == "layer-1p":  # Nemotron's: 1 + weight is made first, and autocast leaves 16 bits
            x, plus = self.autocast(x), (self.tape.new(f"{name}, 1 + weight", str(width), self.numerics.compute),)
            self.tape.op(f"{name}: 1 + weight", [], *plus)
        rows = x.shape.rsplit(" ", 1)[0]
        stats = self.tape.new(f"{name} mean and rstd", rows + " 2", "float32")
        y = self.tape.new(name, x.shape, "float32" if self.numerics.autocast and not plus else x.dtype)
        ends = (".weight", ".bias") if self.model.norm_bias else (".weight",)
        weights = [self.weight(name, width, kinds=(WeightKind.NORMS,), name=end) for end in ends]
        return self.tape.op(
            name, [x, *plus], y, stats, keeps=(x, stats, *plus), grads=((x, self.tape.grad(x)),), weights=tuple(weights)
        )

    def _liger_norm(self, x: Tensor, name: str, in_place: bool) -> Tensor:
        """LigerRMSNorm: one kernel, keeps its input and 1/rms. Its backward adds up the weight's gradient in fp32, a part on each
        multiprocessor (liger_kernel/ops/rms_norm.py)."""
        tape, width = self.tape, self._last(x)
        weight = self.weight(name, width, kinds=(WeightKind.NORMS,))
        scale = tape.new(f"{name} 1/rms", x.shape.rsplit(" ", 1)[0], "float32")
        parts = tape.new(f"parts of the gradient of {weight.name}", f"{MULTIPROCESSORS + 1} {width}", "float32")
        return tape.op(
            name,
            [x],
            tape.new(name, x.shape, x.dtype),
            scale,
            keeps=(x, scale),
            for_gradients=ForGradients(back_temps=((parts, weight),)),
            grads=((x, None if in_place else tape.grad(x)),),
            weights=(weight,),
        )

    def _root_mean_square(self, x32: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """x * rsqrt(mean(x^2) + eps) in fp32, as its Python code runs: keeps x32 and one number a row, a power of the mean in place of rsqrt
        that as well. With it the mean."""
        tape, rows = self.tape, x32.shape.rsplit(" ", 1)[0]
        square = tape.new(f"{name} square", x32.shape, "float32")
        mean, scale = (tape.new(f"{name} {what}", rows, "float32") for what in ("mean square", "1/rms"))
        tape.op(
            f"{name}: square", [x32], square, keeps=(x32,), grads=((x32, tape.grad(x32)),), back_temps=(square,) * 2
        )
        tape.op(f"{name}: mean square", [square], mean, grads=((square, tape.grad(square)),))
        if self.model.norm == "rms-fp32":  # mean ** -0.5, whose variable holds the mean
            mean_and_eps = tape.new(f"{name} mean square + eps", rows, "float32")
            tape.op(f"{name}: + eps", [mean], mean_and_eps, grads=((mean, None),))
            mean = mean_and_eps
            self.pointwise(f"{name}: 1/rms", mean, scale, mean, back_temps=2)
        else:
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
        if self.model.norm == "rms-fp32":
            self.hold(mean)
        return normed, mean

    def _latent_norm(self, x: Tensor, name: str) -> Tensor:
        with self.tape.call():
            return self._rms_norm(x, name, late_cast=False)

    def _rms_norm(self, x: Tensor, name: str, late_cast: bool) -> Tensor:
        """LlamaRMSNorm: weight * normed.to(dtype); with late_cast (weight * normed).to(dtype)."""
        normed, mean = self._root_mean_square(self.cast(x, "float32", f"{name} input in fp32"), name)
        variables = (normed, mean)
        if not late_cast:
            normed = self.cast(normed, x.dtype, f"{name}, normed, {x.dtype}")
        y = self.cast(self._weighted(normed, name), x.dtype, name)
        if not self.code.frees_normed:
            self.hold(*variables)
        return y

    def _wide_weight_norm(self, x: Tensor, name: str) -> Tensor:
        """NemotronHRMSNorm: (weight.to(fp32) * normed).to(dtype)."""
        normed, mean = self._root_mean_square(self.cast(x, "float32", f"{name} input in fp32"), name)
        weight = self.tape.new(f"{name}.weight in fp32", str(self._last(normed)), "float32")
        self.tape.op(f"{name}: cast weight", [], weight)
        y = self.cast(self._weighted(normed, name, weight), x.dtype, name)
        self.hold(normed, mean)
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

    def _gemma_norm(self, x: Tensor, name: str, factor: str = "1 + weight") -> Tensor:
        """Gemma: the product with (1 + weight) runs in fp32, then back to x's dtype. factor: what is made of the weight for it."""
        normed, _ = self._root_mean_square(self.cast(x, "float32", f"{name} input in fp32"), name)
        made = self.tape.new(f"{name}, {factor}", str(self._last(normed)), "float32")
        self.tape.op(f"{name}: {factor}", [], made)
        return self.cast(self._weighted(normed, name, made), x.dtype, name)

    def _centred_norm(self, x: Tensor, name: str) -> Tensor:
        """CohereLayerNorm: mean and variance in Python, in fp32; the difference from the mean is made twice."""
        tape, x32 = self.tape, self.cast(x, "float32", f"{name} input in fp32")
        rows = x32.shape.rsplit(" ", 1)[0]
        mean, variance, scale = (tape.new(f"{name} {what}", rows, "float32") for what in ("mean", "variance", "1/std"))
        square = tape.new(f"{name} square", x32.shape, "float32")

        def centred() -> Tensor:
            y = tape.new(f"{name}, less the mean", x32.shape, "float32")
            grads = ((x32, None), (mean, tape.grad(mean)))
            return tape.op(f"{name}: less the mean", [x32, mean], y, grads=grads, back_temps=(square,))

        tape.op(f"{name}: mean", [x32], mean, grads=((x32, tape.grad(x32)),))
        first = centred()
        tape.op(
            f"{name}: square",
            [first],
            square,
            keeps=(first,),
            grads=((first, tape.grad(first)),),
            back_temps=(square,) * 2,
        )
        tape.op(f"{name}: variance", [square], variance, grads=((square, tape.grad(square)),))
        second = centred()
        tape.op(f"{name}: 1/std", [variance], scale, keeps=(scale,), grads=((variance, tape.grad(variance)),))
        normed = tape.new(f"{name}, normed", x32.shape, "float32")
        grads = ((second, tape.grad(second)), (scale, tape.grad(scale)))
        tape.op(f"{name}: scale", [second, scale], normed, keeps=(second, scale), grads=grads, back_temps=(square,))
        self.hold(x32)
        weight = tape.new(f"{name}.weight in fp32", str(self._last(normed)), "float32")
        tape.op(f"{name}: cast weight", [], weight)
        product = self._weighted(normed, name, weight)
        self.hold(mean, variance, normed)
        return self.cast(product, x.dtype, name)

    # ---- attention ------------------------------------------------------------------------------------------------

    def mixed(self, x: Tensor, kind: LayerKind) -> Tensor:
        """What a layer makes of all its tokens together: attention, or another mixer."""
        if kind.mixer == "attention and mamba2":
            return self.both_mixed(x, kind)
        return self.attention(x, kind) if kind.mixer == "attention" else mix(self, x)

    def both_mixed(self, x: Tensor, kind: LayerKind) -> Tensor:
        """The sum of what attention and Mamba-2 make of the same, each times a number (models/falcon_h1/modeling_falcon_h1.py)."""
        own = self.mixed(x, kind._replace(mixer="mamba2"))
        with self.tape.assign_role(Role.ATTENTION):
            own = self.scaled(own)
            given = self.scaled(x)
            attended = self.mixed(given, kind._replace(mixer="attention"))
            self.hold(given)
            attended = self.scaled(attended)
            y = self.add(own, attended, self.new("Mamba-2 and attention", "d", own.dtype), "add branches")
        self.hold(x)
        self.beside += (own, attended)
        return y

    def scaled(self, x: Tensor) -> Tensor:
        """x times a number."""
        return self.pointwise("scale " + x.name, x, self.tape.new(x.name + ", scaled", x.shape, x.dtype))

    def attention(self, x: Tensor, kind: LayerKind) -> Tensor:
        # gpt-oss' layers, whose weights tell them, give it x by name, which hooks on modules do not see
        by_name = self.model.attention.sinks
        given = tensor_parallel.all_tokens(self, x)
        with self.tape.call(passes_on=not by_name):
            q, k, v, *others = self.attention_inputs(given, kind)
            y = self.attention_output(self.attend(q, k, v, kind), given, q, k, v, *others)
        if given is not x:  # the layer's variable
            self.hold(x)
        return y

    def attention_inputs(self, x: Tensor, kind: LayerKind) -> tuple[Tensor, ...]:
        """q, k, v, and what else the code's variables hold until attention is done."""
        a = self.model.attention
        with self.tape.assign_role(Role.ATTENTION):
            if a.values != "projected":
                return self._qkv_in_turn(x, a, kind)
            return self._latent_qkv(x, a) if a.latent else self._qkv(x, a, kind)

    def attention_output(self, mixed: Tensor, *variables: Tensor) -> Tensor:
        """What attention made -> (t, d); variables: that its code holds meanwhile."""
        bias = self.model.attention.out_bias
        with self.tape.assign_role(Role.ATTENTION):
            if self.gate is not None:
                sigmoid = self.new("sigmoid of the gate", "H e", self.gate.dtype)
                self.pointwise("sigmoid", self.gate, sigmoid, sigmoid)
                mixed = self.multiply(
                    "attention * gate", mixed, sigmoid, self.new("attention, gated", "H e", mixed.dtype)
                )
                self.hold(*variables)
            y = self.linear(mixed, self.new("attention output", "d"), "o_proj", kind=WeightKind.ATTENTION, bias=bias)
            if self.code.adds_within:
                self.inside += (mixed, *variables, *self.beside)
            self.hold(*variables, *self.inside)
            y = self.dropout(y, 0.0 if self.code.drops_mlp_only else self.model.dropout)
        if self.code.holds_qkv:  # elsewhere dropout follows when attention has returned
            self.hold(*variables[:4])
        return y

    def _qkv(self, x: Tensor, a: Attention, kind: LayerKind) -> tuple[Tensor, ...]:
        t = self.t
        fused: tuple[Tensor, ...] = ()
        if a.fused_qkv:
            width = (a.heads + 2 * a.kv_heads) * a.head_dim
            whole = self.linear(
                x, self.new("Q, K and V", str(width)), "qkv_proj", kind=WeightKind.ATTENTION, bias=a.qkv_bias
            )
            fused = (whole,)
            if a.keys != "shared":
                q, k, v = self._taken_out(whole, a)
            else:
                q, k, v = self._split(whole, ("Q", f"{t} H e"), ("K", f"{t} G e"), ("V", f"{t} G e"))
                if self.code.copies_heads:
                    q, k, v = (self._copied_heads(each) for each in (q, k, v))
        else:
            by_head = a.qk_norm != "full"  # else the norm is over all heads together
            if a.gated_output:
                q, fused = self._gated_queries(x, a)
            else:
                q = self.linear(
                    x, self.new("Q", "H e" if by_head else "He"), "q_proj", kind=WeightKind.ATTENTION, bias=a.qkv_bias
                )
            if self.code.scales_queries:
                q = self.pointwise("scale queries", q, self.new("Q, scaled", "H e", q.dtype))
            early = a.qk_norm in ("head", "full") and not (self.code.qk_norm_last or self.code.late_qk_norm)
            if early:
                q = self.norm(q, "q_norm")
            k = self.linear(
                x, self.new("K", "G e" if by_head else "Ge"), "k_proj", kind=WeightKind.ATTENTION, bias=a.qkv_bias
            )
            if self.code.scales_mixers:
                k = self.scaled(k)
            if early:
                k = self.norm(k, "k_norm")
            v = self.linear(x, self.new("V", "G e"), "v_proj", kind=WeightKind.ATTENTION, bias=a.qkv_bias)
            if self.code.qk_norm_last and a.qk_norm != "none":
                q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
        if a.rotary_dim and kind.rotary:
            q, k, fused = self._turned(q, k, a, kind, fused)
        if a.qk_norm == "unweighted" and kind.rotary:
            q, k = self._unweighted_norm(q), self._unweighted_norm(k)
        elif a.qk_norm != "none" and self.code.late_qk_norm:
            q, k = self.norm(q, "q_norm"), self.norm(k, "k_norm")
        if a.tempered and not kind.rotary:
            q = self._tempered(q)
        return q, k, v, *fused

    def _qkv_in_turn(self, x: Tensor, a: Attention, kind: LayerKind) -> tuple[Tensor, ...]:
        """Queries are normalised and turned before there are keys; values, which may be keys as they were made, are normalised last.
        A layer that borrows both makes queries alone (models/gemma4/modeling_gemma4.py)."""

        def made(name: str, heads: str) -> Tensor:
            y = self.new(name, f"{heads} e")
            return self.linear(x, y, f"{name.lower()}_proj", kind=WeightKind.ATTENTION, bias=a.qkv_bias)

        def turned(y: Tensor, norm: str, heads: str) -> Tensor:
            normed = self.norm(y, norm)
            y = self._rotary(normed, heads, a.rotary_dim, a.head_dim)
            self.hold(normed)
            return y

        q = turned(made("Q", "H"), "q_norm", "H")
        if kind.keys == "borrows":
            return q, *self.lent
        k = made("K", "G")
        v = k if a.values == "keys" else made("V", "G")
        k = turned(k, "k_norm", "G")
        v = self._unweighted_norm(v)
        self.lent = (k, v)
        return q, k, v

    def _turned(
        self, q: Tensor, k: Tensor, a: Attention, kind: LayerKind, held: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Queries and keys with their positions, and what the code's variables hold beside them."""
        if self.liger is not None and self.liger.rotary:
            kernel, asked = self._kernel(a, kind)
            repeats = (
                1 < a.kv_heads < a.heads and not asked.grouped
            )  # what is summed up over query heads lies heads first
            q = self._liger_rotary(q, "H", bool(held), kernel.gradients_by_head)
            k = self._liger_rotary(k, "G", bool(held), kernel.gradients_by_head or repeats)
        else:
            if self.code.rotary == "complex":
                return *self._both_turned(q, k), held
            if self.code.rotary == "every two":
                return self._turned_every_two(q, k, a, held)
            before: tuple[Tensor, ...] = (q, k)
            if self.code.widens_before_rotary:
                q, k = self.cast(q, "float32"), self.cast(k, "float32")
                before += (q, k)
            tables = self._interleaved(a.rotary_dim) if self.code.interleaved_tables else self.tables
            q = self._rotary(q, "H", a.rotary_dim, a.head_dim, *tables)
            k = self._rotary(k, "H" if a.keys == "copied" else "G", a.rotary_dim, a.head_dim, *tables)
            self.hold(*before)  # until both are turned
            if self.code.rotary_in_fp32 or self.code.widens_before_rotary:
                turned = (q, k)
                q = self.cast(q, self.numerics.compute)
                self.hold(*before, *turned)
                k = self.cast(k, self.numerics.compute)
                self.hold(*before, *turned)
            if self.code.holds_parts:
                held += (*before, *self.turned_parts)
        return q, k, held

    def _turned_every_two(
        self, q: Tensor, k: Tensor, a: Attention, held: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """x cos + rotate_every_two(x) sin of part of queries and keys, with rows of the layer's table (models/gptj/modeling_gptj.py)."""
        tape, model = self.tape, self.model
        rows = tape.new("sinusoids, fp32", f"{self.places} {a.rotary_dim}", "float32")
        beside: tuple[Tensor, ...] = ()
        if self.code.indexes_sinusoids:
            sinusoids = tape.op("index sinusoids", [], rows)
        else:
            table = tape.new("sinusoids of all positions", str(model.sinusoids), "float32")
            places = tape.new("positions, repeated", f"{self.places} {a.rotary_dim}", "int64")
            beside = (table, places)
            tape.op("look up sinusoids", [], rows, *beside)
            sinusoids = self.cast(rows, k.dtype, "sinusoids")
            self.hold(*beside, rows)
        variables = (*beside, sinusoids, q, k)
        parts = []
        for x, heads in ((k, "G"), (q, "H")):
            shape = f"{self.t} {heads} {a.rotary_dim}"
            turned = self.slice(x, x.name + ", rotary part", shape)
            parts.append(self._every_two(turned, f"{self.t} {heads} {a.rotary_dim // 2}", sinusoids))
        whole = []
        for x, heads, part in ((k, "G", parts[0]), (q, "H", parts[1])):
            rest = self.slice(x, x.name + ", rest", f"{self.t} {heads} {a.head_dim - a.rotary_dim}")
            y = self.new(f"{x.name} after rotary", f"{heads} e", part.dtype)
            to_rest = None if rest.dtype == y.dtype else tape.grad(rest)
            whole.append(tape.op("join rotary and rest", [part, rest], y, grads=((part, None), (rest, to_rest))))
        self.hold(*variables, *parts)
        return whole[1], whole[0], (*held, *variables, *parts)

    def _every_two(self, x: Tensor, half: str, sinusoids: Tensor) -> Tensor:
        tape = self.tape
        sine, cosine = (
            tape.new(f"{name} twice", f"{self.places} {self._last(x)}", sinusoids.dtype) for name in ("sin", "cos")
        )
        tape.op("interleave sin", [sinusoids], sine)
        tape.op("interleave cos", [sinusoids], cosine)
        wide = sinusoids.dtype
        widened = () if wide == x.dtype else (tape.new("gradient, widened", x.shape, wide),)

        def product(of: Tensor, table: Tensor, name: str) -> Tensor:
            made = tape.new(f"{x.name} * {name}", x.shape, wide)
            grads = ((of, tape.grad(of)),)
            return tape.op(made.name, [of, table], made, keeps=(table,), grads=grads, back_temps=widened)

        y = product(x, cosine, "cos")
        first, second = self.slice(x, x.name + " even", half), self.slice(x, x.name + " odd", half)
        minus = tape.new(f"-{x.name} odd", half, x.dtype)
        tape.op("negate", [second], minus, grads=((second, tape.grad(second)),))
        rotated = tape.new(f"{x.name} rotated", x.shape, x.dtype)
        tape.op("stack", [minus, first], rotated, grads=((minus, None), (first, None)))
        z = product(rotated, sine, "sin")
        turned = tape.new(f"{x.name}, turned", x.shape, wide)
        tape.op("rotary add", [y, z], turned, grads=((y, None), (z, None)))
        self.hold(x, sine, cosine)
        return turned

    def _gated_queries(self, x: Tensor, a: Attention) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Queries, and what variables hold that comes with them: the gate as it lies in order (models/qwen3_next/modeling_qwen3_next.py)."""
        width = str(2 * a.heads * a.head_dim)
        both = self.linear(x, self.new("Q and gate", width), "q_proj", kind=WeightKind.ATTENTION, bias=a.qkv_bias)
        q, part = self._split(both, ("Q", f"{self.t} H e"), ("gate", f"{self.t} H e"))
        self.gate = self.tape.new("gate, in order", f"{self.t} H e", part.dtype)
        self.tape.op("gate, in order", [part], self.gate, grads=((part, None),))
        return q, (self.gate,)

    def _unweighted_norm(self, x: Tensor) -> Tensor:
        """Llama 4's L2 norm of a head."""
        normed, _ = self._root_mean_square(self.cast(x, "float32", f"{x.name} in fp32"), f"{x.name} norm")
        y = self.cast(normed, x.dtype, f"{x.name}, normed")
        self.hold(x)
        return y

    def _tempered(self, q: Tensor) -> Tensor:
        """Queries times factors of their positions, in fp32 (models/llama4/modeling_llama4.py)."""
        tape = self.tape
        factors = tape.new("factors of positions", self.places, "float32")
        tape.op("factors of positions", [], factors)
        wide = tape.new("Q * factors", q.shape, "float32")
        tape.op("Q * factors", [q, factors], wide, keeps=(factors,), grads=((q, tape.grad(q)),))
        y = self.cast(wide, q.dtype, "Q, tempered")
        self.hold(q, factors)
        return y

    def _split(self, fused: Tensor, *parts: tuple[str, str]) -> tuple[Tensor, ...]:
        """Views of one tensor; their gradients are joined into one (Phi-3 slices instead: zeros each, added)."""
        views = tuple(self.tape.view(fused, name, shape) for name, shape in parts)
        if self.code.slices_qkv and len(parts) == 3:
            for view in views:
                self.tape.op("slice " + view.name, [fused], view, grads=((fused, self.tape.grad(fused)),))
        else:
            grads = ((fused, self.tape.grad(fused)),)
            self.tape.op("split " + fused.name, [fused], *views, grads=grads, joins_gradients=True)
        return views

    def _taken_out(self, whole: Tensor, a: Attention) -> tuple[Tensor, ...]:
        """Queries, keys and values of a fused product by index, which copies keys and values; with own heads of keys all three are copied
        once more, for every query head (models/falcon/modeling_falcon.py, _split_heads)."""
        tape, t = self.tape, self.t
        q = self.slice(whole, "Q", f"{t} H e")
        if a.kv_heads == a.heads:
            return q, self.slice(whole, "K", f"{t} H e"), self.slice(whole, "V", f"{t} H e")

        def indexed(name: str) -> Tensor:
            copy = self.new(name, "G e", whole.dtype)
            return tape.op("index " + name, [whole], copy, grads=((whole, tape.grad(whole)),))

        k, v = indexed("K"), indexed("V")
        if a.keys == "broadcast":
            return q, k, v
        copies = self._copied_heads(q), self._copied_heads(k, spread=True), self._copied_heads(v, spread=True)
        self.hold(k, v)
        return copies

    def _copied_heads(self, x: Tensor, spread: bool = False) -> Tensor:
        """A copy, which autograd hands a gradient back through as it is; spread: to every query head, over which it is summed."""
        shape = "H e" if spread else " ".join(x.shape.split()[2:])
        copy = self.new(f"{x.name}, copied", shape, x.dtype)
        return self.tape.op(f"copy {x.name}", [x], copy, grads=((x, self.tape.grad(x) if spread else None),))

    def _interleaved(self, rotary: int) -> tuple[Tensor, Tensor]:
        """cos and sin with every number twice (models/glm/modeling_glm.py, apply_rotary_pos_emb)."""
        dtype = rotary_dtype(self.model, self.wide)
        cosine, sine = (
            self.tape.new(f"{name}, interleaved", f"{self.places} {rotary}", dtype) for name in ("cos", "sin")
        )
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
        widened = self.code.widened_rotary
        wide = x.dtype if x.dtype == "float32" else rotary_dtype(self.model, self.wide)
        cosine = self.tape.new(f"{x.name} cos", shape, wide)
        cos, sin = (tables[:1], tables[1:]) if tables else ((), ())
        factor = self.cast(turned, wide) if widened else turned
        grads = ((factor, self.tape.grad(factor)),)
        self.tape.op(f"{x.name} * cos", [factor, *cos], cosine, keeps=cos, grads=grads)
        half = f"{self.t} {heads} {rotary // 2}"
        first, second = (
            self.slice(turned, x.name + " first half", half),
            self.slice(turned, x.name + " second half", half),
        )
        minus = self.tape.new(f"-{x.name} half", half, x.dtype)
        self.tape.op("negate", [second], minus, grads=((second, self.tape.grad(second)),))
        rotated = self.tape.new(f"{x.name} rotated", shape, x.dtype)
        self.tape.op("rotate half", [minus, first], rotated, grads=((minus, None), (first, None)))
        rotated = self.cast(rotated, wide) if widened else rotated
        sine = self.tape.new(f"{x.name} sin", shape, wide)
        grads = ((rotated, self.tape.grad(rotated)),)
        self.tape.op(f"{x.name} * sin", [rotated, *sin], sine, keeps=sin, grads=grads, holds=(turned,))
        y = self.tape.new(f"{x.name} after rotary", shape, wide)
        self.tape.op("rotary add", [cosine, sine], y, grads=((cosine, None), (sine, None)), holds=(x, *tables))
        if rotary == width and not self.code.joins_rotary:
            return y
        self.turned_parts += (y,)
        rest = (self.slice(x, x.name + ", rest", f"{self.t} {heads} {width - rotary}"),) if rotary < width else ()
        whole = self.tape.new(f"{x.name} after rotary", self.by_head(heads, "e"), wide)
        return self.tape.op("join rotary and rest", [y, *rest], whole, grads=tuple((part, None) for part in (y, *rest)))

    def _liger_rotary(self, x: Tensor, heads: str, is_slice: bool, by_head: bool) -> Tensor:
        """Liger's, in place: of a slice it turns a copy; and of a gradient that lies heads first (liger_kernel/ops/rope.py)."""
        name, shape = f"{x.name} after rotary", f"{self.t} {heads} e"
        y = self.tape.new(name, shape, x.dtype) if is_slice else self.tape.view(x, name, shape)
        gradient = self.tape.grad(x) if by_head else None
        return self.tape.op("rotate " + x.name, [x], y, grads=((x, gradient),))

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
        whole = tape.new(f"{x.name} after rotary", self.by_head(heads, x.shape.split()[-1]), x.dtype)
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

    def _both_turned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as complex numbers in fp32, times a rotation; both are cast back last (models/llama4/modeling_llama4.py)."""
        tape, both = self.tape, (q, k)
        pairs = [self.cast(x, "float32", f"{x.name} as complex numbers") for x in both]
        turned = []
        for x in pairs:
            y = tape.new(f"{x.name}, turned", x.shape, "float32")
            turned.append(tape.op("rotate " + x.name, [x], y, grads=((x, tape.grad(x)),)))
        q, k = (self.cast(y, x.dtype, f"{x.name} after rotary") for x, y in zip(both, turned, strict=True))
        self.hold(*both, *pairs, *turned)
        return q, k

    def _latent_qkv(self, x: Tensor, a: Attention) -> tuple[Tensor, ...]:
        """DeepSeek's multi-head latent attention (modeling_deepseek_v3.py): q, k, v, and what else its variables hold."""
        latent = a.latent
        assert latent is not None
        t, dims = self.t, self.tape.dims
        dims.update({"kv_rank": latent.kv_rank, "nope": latent.nope_dim, "rope": latent.rope_dim})
        q_in = x
        if latent.q_rank is not None:
            dims["q_rank"] = latent.q_rank
            low = self.linear(x, self.new("Q latent", "q_rank"), "q_a_proj", kind=WeightKind.ATTENTION, bias=a.qkv_bias)
            q_in = self._latent_norm(low, "q_a_layernorm")
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
        low = self._latent_norm(low, "kv_a_layernorm")
        q_turned = self._rotary(q_turned, "H", latent.rope_dim, latent.rope_dim)
        k_turned = self._rotary(k_turned, "1", latent.rope_dim, latent.rope_dim)
        q_whole = self.tape.new("Q after rotary", self.by_head("H", "e"), q_turned.dtype)
        self.tape.op("join Q", [q_rest, q_turned], q_whole, grads=((q_rest, None), (q_turned, None)))
        kv = self.linear(
            low, self.new("K and V", f"H {latent.nope_dim + a.v_head_dim}"), "kv_b_proj", kind=WeightKind.ATTENTION
        )
        k_rest, v = self._split(kv, ("K without position", f"{t} H nope"), ("V", f"{t} H ev"))
        k_whole = self.tape.new("K after rotary", self.by_head("H", "e"), q_turned.dtype)
        parts = ((k_rest, self.tape.grad(k_rest)), (k_turned, self.tape.grad(k_turned)))
        self.tape.op("join K", [k_rest, k_turned], k_whole, grads=parts)
        chosen = (q_in, *chosen_keys(self, x, q_in, latent)) if latent.indexer is not None else ()
        return q_whole, k_whole, v, q, both, low, q_turned, k_turned, *chosen

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kind: LayerKind) -> Tensor:
        """q (t, H, e), k and v (t, G, e) -> (t, H, e)."""
        if self.numerics.ranks > 1:
            return ulysses.attend(self, q, k, v, kind)
        if self.numerics.ring is not None:
            return ring.attend(self, q, k, v, kind)
        return self.attend_here(q, k, v, kind)

    def attend_here(self, q: Tensor, k: Tensor, v: Tensor, kind: LayerKind) -> Tensor:
        """The same of heads and tokens that are on this card."""
        with self.tape.assign_role(Role.ATTENTION):
            q, k, v = map(self.autocast, (q, k, v))
            kernel, asked = self._kernel(self.model.attention, kind)
            start = len(self.tape.ops)
            mixed = kernel.lay_out(self, q, k, v, kind, asked.masked)
        self.tape.name_kernel(kernel.name, start, kernel.one_operation)
        return mixed

    @property
    def rounded_rows(self) -> str:
        """Axes of tokens, those of each row rounded up as `r` says."""
        return "b r"

    def attention_flops(self, window: int | None = None, is_masked: bool = False) -> tuple[tuple[int, int], ...]:
        """Two products of 2 operations; causality masks half of the scores, which a mask that is a tensor does not spare; a window what
        is further away."""
        a = self.model.attention
        per_pair = a.heads * (a.head_dim + a.v_head_dim)
        if is_masked:
            return ((4, 2 * per_pair),)
        full = ((4, per_pair),)
        return full if window is None else (*full, (1, 2 * window * per_pair))

    @property
    def heads_here(self) -> int:
        """Heads that this card attends with: of a sequence that it shares, its part of them."""
        return self.model.attention.heads // self.numerics.ranks

    def _kernel(self, a: Attention, kind: LayerKind) -> tuple[Kernel, AttentionCall]:
        """The attention kernel of a kind of layers, and what it is chosen by."""
        how = self.numerics.attention
        masked = self.numerics.masks(kind)
        asked = AttentionCall.from_attention(a, self.numerics.compute, masked, self.numerics.platform)
        return chosen(how, asked), asked

    # ---- MLP and experts ------------------------------------------------------------------------------------------

    def mlp(self, x: Tensor, mlp: Mlp, name: str = "mlp") -> Tensor:
        with self.tape.assign_role(Role.MLP), self.tape.call():
            given = tensor_parallel.all_tokens(self, x)
            y = self._mlp(given, mlp, name)
        if given is not x:  # the layer's variable
            self.hold(x)
        return y

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
            if self.liger is not None:
                return self._mlp_output(x, self._liger_gate(gate, up, are_slices=True), mlp, name)
            active = self.activation(gate, mlp.activation)
            inner = self.multiply("gate * up", up, active, self.new("MLP product", width))
        elif self.code.scales_mixers:
            return self._scaled_mlp(x, mlp, name)
        elif self.model.altup is not None:
            return mlp_of_stream(self, x, mlp, name)
        else:
            gate = self.linear(x, self.new("MLP gate", width), name + ".gate_proj", kind=WeightKind.MLP, bias=mlp.bias)
            active = self.activation(gate, mlp.activation) if self.liger is None else gate
            up = self.linear(x, self.new("MLP up", width), name + ".up_proj", kind=WeightKind.MLP, bias=mlp.bias)
            if self.liger is not None:
                return self._mlp_output(x, self._liger_gate(gate, up), mlp, name)
            inner = self.multiply("gate * up", active, up, self.new("MLP product", width))
        return self._mlp_output(x, inner, mlp, name)

    def _scaled_mlp(self, x: Tensor, mlp: Mlp, name: str) -> Tensor:
        """Of gate and output times a number each, with up made first (models/falcon_h1/modeling_falcon_h1.py, FalconH1MLP)."""
        kind, bias = WeightKind.MLP, mlp.bias
        up = self.linear(x, self.new("MLP up", "I"), name + ".up_proj", kind=kind, bias=bias)
        gate = self.linear(x, self.new("MLP gate", "I"), name + ".gate_proj", kind=kind, bias=bias)
        active = self.activation(self.scaled(gate), mlp.activation)
        inner = self.multiply("up * gate", up, active, self.new("MLP product", "I"))
        y = self.scaled(self._mlp_output(x, inner, mlp, name))
        self.hold(x, inner)
        return y

    def _mlp_output(self, x: Tensor, inner: Tensor, mlp: Mlp, name: str) -> Tensor:
        y = self.linear(inner, self.new("MLP output", "d"), name + ".down_proj", kind=WeightKind.MLP, bias=mlp.bias)
        if not self.code.frees_mlp_input:
            self.hold(x)
        if self.code.adds_within:
            self.inside = (x, inner)
        return self.dropout(y, self.model.dropout)

    def _liger_gate(self, gate: Tensor, up: Tensor, are_slices: bool = False) -> Tensor:
        """LigerSiLUMul or LigerGELUMul: keeps gate and up, of slices copies, and its backward writes the gradients over them
        (liger_kernel/ops/swiglu.py, geglu.py)."""
        tape = self.tape
        copies = tuple(tape.new(f"{x.name}, contiguous", x.shape, x.dtype) for x in (gate, up) if are_slices)
        kept = copies or (gate, up)
        return tape.op(
            "gate * up",
            [gate, up],
            tape.new("MLP product", gate.shape, gate.dtype),
            *copies,
            keeps=kept,
            grads=((gate, tape.grad(gate)), (up, tape.grad(up))),
            reuses=((gate, kept[0]), (up, kept[1])),
        )

    def activation(self, x: Tensor, name: str) -> Tensor:
        with self.tape.call():
            return self._activation(x, name)

    def _activation(self, x: Tensor, name: str) -> Tensor:
        y = self.tape.new(f"MLP {name}", x.shape, x.dtype)
        if name == "gelu_new":  # eight operations in Python (transformers activations.py)
            return self._gelu_new(x, y)
        if (
            name == "bloom_gelu"
        ):  # in Python, whose backward makes it again (models/bloom/modeling_bloom.py, GeLUFunction)
            temporaries = (self.tape.new("temporary", x.shape, x.dtype),)
            grads = ((x, self.tape.grad(x)),)
            y = self.tape.op(name, [x], y, keeps=(x,), grads=grads, temps=temporaries * 3, back_temps=temporaries * 4)
            self.hold(x)
            return y
        if name == "xielu":
            return self._xielu(x, y)
        if name == "quick_gelu":  # x sigmoid(1.702 x), in Python
            scaled, sigmoid = (self.tape.new(f"MLP {part}", x.shape, x.dtype) for part in ("input, scaled", "sigmoid"))
            self.pointwise("sigmoid", self.pointwise("scale", x, scaled), sigmoid, sigmoid)
            return self.multiply("x * sigmoid", x, sigmoid, y)
        if name == "relu2":
            relu = self.tape.new("MLP relu", x.shape, x.dtype)
            y = self.pointwise("square", self.pointwise("relu", x, relu, relu), y, relu, back_temps=2)
            self.hold(x, relu)
            return y
        keeps = (y,) if name in ("relu", "tanh", "sigmoid") else (x,)
        return self.pointwise(name, x, y, *keeps)

    def _xielu(self, x: Tensor, y: Tensor) -> Tensor:
        """where(x > 0, p x x + b x, (expm1(min(x, eps)) - x) n + b x) in Python, p and n of a weight each (transformers activations.py)."""
        tape = self.tape
        p, n = (
            self.weight(f"mlp.act_fn.{name}", 1, kinds=(WeightKind.MLP,), name="") for name in ("alpha_p", "alpha_n")
        )

        def like(name: str, dtype: str = x.dtype) -> Tensor:
            return tape.new(f"MLP {name}", x.shape, dtype)

        def weighted(name: str, z: Tensor, weight: Weight) -> Tensor:
            product = ForGradients(((z, weight),), ((like("gradient x input"), weight),))
            grads = ((z, tape.grad(z)),)
            return tape.op(name, [z], like(name), for_gradients=product, grads=grads, weights=(weight,))

        def added(name: str, z: Tensor) -> Tensor:
            other = self.pointwise("b x", x, like("b x"))
            return tape.op(name, [z, other], like(name), grads=((z, None), (other, None)))

        positive = like("x > 0", "bool")
        tape.op("x > 0", [x], positive)
        square = self.multiply("p x x", weighted("p x", x, p), x, like("p x x"))
        above = added("p x x + b x", square)
        low = like("min(x, eps)")
        masks = (like("where"), like("halved"), like("mask", "bool"))
        tape.op("min(x, eps)", [x], low, keeps=(x,), grads=((x, tape.grad(x)),), back_temps=masks)
        exponential = like("expm1")
        self.pointwise("expm1", low, exponential, exponential, back_temps=1)
        less = like("expm1 - x")
        tape.op("expm1 - x", [exponential, x], less, grads=((exponential, None), (x, tape.grad(x))))
        below = added("(expm1 - x) n + b x", weighted("(expm1 - x) n", less, n))
        grads = ((above, tape.grad(above)), (below, tape.grad(below)))
        tape.op("where", [positive, above, below], y, keeps=(positive,), grads=grads)
        self.hold(x)
        return y

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
        is_leaf = self.numerics.in_deepspeeds_linear and self.model.model_type in LEAVES
        with self.tape.assign_role(Role.MLP), self.tape.call(is_leaf=is_leaf):
            return self._experts(x, e)

    def _experts(self, x: Tensor, e: Experts) -> Tensor:
        """A mixture of experts, and beside it the expert that every token visits, which runs first or last."""
        self.tape.dims.update({"X": e.number, "A": e.per_token, "F": e.width})
        if e.router == "sigmoid-all":
            return self._all_experts(x, e)
        first = self.code.shared_first and e.shared_width > 0
        shared: tuple[Tensor, ...] = (self._shared_expert(x, e),) if first else ()
        with self.tape.call():
            scores, chosen, *others = self._router(x, e)
        self.hold(*shared)
        outside = (x, scores, chosen, *others, *shared)
        given = self._to_latent(x, e)
        if self.numerics.spread > 1:
            y = expert_parallel.routed(self, given, e, scores, chosen, outside)
        else:
            with self.tape.call():
                y = self._routed(given, e, scores, chosen, (*outside, given))
        if e.latent is not None:
            y = self.linear(
                y, self.new("expert outputs, widened", "d"), "from latent", kind=WeightKind.MLP, bias=e.shared_bias
            )
        self.beside += (y,) if self.code.shared_apart else ()
        if not e.shared_width:
            return y
        one = shared[0] if first else self._shared_expert(x, e)
        if self.code.shared_gate:
            one = self._gated(x, one)
        y = self.add(y, one, self.new("MLP output", "d", y.dtype), "add shared experts")
        self.hold(*outside)
        return y

    def router(self, x: Tensor, e: Experts) -> tuple[Tensor, ...]:
        """Scores of the chosen experts (t A), their numbers, and probabilities of all, which the layer's variables hold: of a router of
        its own, which sees the experts' input before its norm."""
        self.tape.dims.update({"X": e.number, "A": e.per_token, "F": e.width})
        with self.tape.assign_role(Role.MLP):
            return self._scaled_router(x, e)

    def routed(self, x: Tensor, e: Experts, scores: Tensor, chosen: Tensor, *others: Tensor) -> Tensor:
        """What experts make of x, chosen before."""
        with self.tape.assign_role(Role.MLP):
            return self._routed(x, e, scores, chosen, (x, scores, chosen, *others))

    def _scaled_router(self, x: Tensor, e: Experts) -> tuple[Tensor, ...]:
        """The input's norm times a weight; the chosen probabilities, divided by their sum, times a number for each expert
        (models/gemma4/modeling_gemma4.py, Gemma4TextRouter)."""
        tape, kind = self.tape, (WeightKind.MLP,)
        normed = self._unweighted_norm(x)
        scale = self.weight("router.scale", self._last(x), kinds=kind, name="")
        weighed = self._times_weight("router input", normed, scale)
        x_in = self.pointwise("scale router input", weighed, self.new("router input, scaled", "d", weighed.dtype))
        logits = self.linear(x_in, self.new("router logits", "X"), "router", kind=WeightKind.MLP)
        probs = self._router_probabilities(logits, e)
        chosen, top = self.new("chosen experts", "A", "int64"), self.new("top probabilities", "A", probs.dtype)
        tape.op("top experts", [probs], top, chosen, keeps=(chosen,), grads=((probs, tape.grad(probs)),))
        scores = self._expert_scores(top, e)
        numbers = self.weight("router.per_expert_scale", e.number, kinds=kind, name="")
        factors = self.new("numbers of the chosen experts", "A", self.numerics.weights)
        tape.op("numbers of experts", [chosen], factors, keeps=(chosen,), weights=(numbers,))
        own = self.new("expert scores, scaled", "A", scores.dtype)
        self.multiply("scale scores", scores, factors, own)
        self.hold(x, x_in, logits, probs)
        return own, chosen, probs

    def _times_weight(self, name: str, x: Tensor, weight: Weight) -> Tensor:
        y = self.tape.new(name, x.shape, x.dtype)
        product = self.tape.new("gradient x input", x.shape, x.dtype)
        return self.tape.op(
            name,
            [x],
            y,
            for_gradients=ForGradients(((x, weight),), ((product, weight),)),
            grads=((x, self.tape.grad(x)),),
            weights=(weight,),
            workspaces=(self.sum_over_tokens(weight, x),),
        )

    def _to_latent(self, x: Tensor, e: Experts) -> Tensor:
        """What experts are given of x (models/nemotron_h/modeling_nemotron_h.py, NemotronHMoE)."""
        if e.latent is None:
            return x
        narrowed = self.new("expert inputs, narrowed", str(e.latent))
        return self.linear(x, narrowed, "to latent", kind=WeightKind.MLP, bias=e.shared_bias)

    def _all_experts(self, x: Tensor, e: Experts) -> Tensor:
        """Every expert on every token, times its score (models/llama4/modeling_llama4.py), and the shared expert's output."""
        tape, d = self.tape, self.model.hidden
        scores, logits = self._scores_of_all(x, e)
        copies = self.new("a copy for each expert", "X d", x.dtype)
        tape.op("repeat", [x], copies, grads=((x, tape.grad(x)),))
        column = self.new("scores by expert", "X", scores.dtype)
        tape.op("scores by expert", [scores], column, grads=((scores, tape.grad(scores)),))
        given = self.new("expert inputs", "X d", x.dtype)
        product = self.new("gradient x copies", "X d", x.dtype)
        tape.op(
            "weigh tokens",
            [copies, column],
            given,
            for_gradients=ForGradients(((copies, column), (column, copies)), ((product, column),)),
            grads=((copies, tape.grad(copies)), (column, tape.grad(column))),
        )
        up = self._of_all(given, "X", 2 * e.width, GATE_AND_UP, (d, 2 * e.width), e)
        gate, linear = self._split(up, ("expert gate", f"{self.t} X F"), ("expert up", f"{self.t} X F"))
        active = self.activation(gate, e.activation)
        inner = self.multiply("up * expert gate", linear, active, self.new("expert product", "X F", active.dtype))
        out = self._of_all(inner, "X", d, EXPERTS_DOWN, (e.width, d), e)
        self.hold(given, up)
        shared = self._shared_expert(x, e)
        total = self.new("sum of expert outputs", "d", out.dtype)
        tape.op("sum over experts", [out], total, grads=((out, tape.grad(out)),))
        y = tape.view(shared, "MLP output", f"{self.t} d")
        tape.op("add experts", [shared, total], y, grads=((shared, None), (total, None)))
        self.hold(x, scores, logits, given, out)
        return y

    def _of_all(self, x: Tensor, experts: str, width: int, name: str, shape: tuple[int, int], e: Experts) -> Tensor:
        """A product of each expert's own (torch.bmm)."""
        share = (e.per_token, e.number)
        w = self.weight(name, e.number, *shape, kinds=(WeightKind.MLP,), name="", active=share)
        y = self.new(name + " of all", f"{experts} {width}", x.dtype)
        return self.tape.op(
            name,
            [x],
            y,
            for_gradients=ForGradients(((x, w),)),
            grads=((x, self.tape.grad(x)),),
            weights=(w,),
            flops=((y.basis, 2 * e.number * shape[0] * shape[1]),),
        )

    def _scores_of_all(self, x: Tensor, e: Experts) -> tuple[Tensor, Tensor]:
        """Sigmoids of the chosen experts' logits, 0 for the others (t X), and the logits."""
        tape = self.tape
        logits = self._router_logits(x, e)
        top, chosen = self._top_logits(logits)
        spread = self.new("chosen logits among all", "X", logits.dtype)
        tape.op("spread", [top, chosen], spread, keeps=(chosen,), grads=((top, tape.grad(top)),))
        wide = self.cast(spread, "float32", "chosen logits in fp32")
        sigmoid = self.new("scores in fp32", "X", "float32")
        scores = self.cast(self.pointwise("sigmoid", wide, sigmoid, sigmoid), logits.dtype, "expert scores")
        self.hold(x, logits, top, chosen, spread)
        return scores, logits

    def _shared_expert(self, x: Tensor, e: Experts) -> Tensor:
        fused = self.code.fused_shared
        mlp = Mlp(e.shared_width, e.activation, gated=e.gated, fused=fused, bias=e.shared_bias)
        return self.mlp(x, mlp, "shared_experts")

    def _gated(self, x: Tensor, shared: Tensor) -> Tensor:
        """The sigmoid of a product of one column, times what the shared expert made (models/qwen2_moe/modeling_qwen2_moe.py)."""
        logit = self.linear(x, self.new("shared gate", "1"), "shared gate", kind=WeightKind.MLP)
        gate = self._activation(logit, "sigmoid")
        return self.multiply("gate * shared", gate, shared, self.new("shared expert, gated", "d", shared.dtype))

    def _routed(self, x: Tensor, e: Experts, scores: Tensor, chosen: Tensor, outside: tuple[Tensor, ...]) -> Tensor:
        """A mixture of experts through grouped products (transformers integrations/moe.py, grouped_mm_experts_forward).

        Every token is copied for each of its experts; rows are sorted by expert.
        """
        tape = self.tape

        def integers(name: str, dtype: str = "int64") -> Tensor:
            return self.new(name, "A", dtype)

        factors = activate(self, e)
        order, ids, tokens = integers("expert order"), integers("sorted experts"), integers("tokens by expert")
        tape.op("sort by expert", [chosen], order, ids)
        tape.op("tokens by expert", [order], tokens)
        d, width = self.width(x), (2 if e.gated else 1) * e.width
        axis = x.shape.split()[-1]
        picked = self.new("expert inputs", f"A {axis}", x.dtype)
        tape.op("gather tokens", [x, tokens], picked, keeps=(tokens,), grads=((x, tape.grad(x)),))
        weights = self.new("expert scores by expert", "A", scores.dtype)
        tape.op("sort scores", [scores, order], weights, keeps=(order,), grads=((scores, tape.grad(scores)),))
        counted = integers("experts to count", "int32")
        tape.op("count by expert", [ids], counted)
        inside = (
            *outside,
            *(t for each in factors.values() for t in (each.b, each.a)),
            ids,
            order,
            picked,
            weights,
            counted,
        )
        dtype = self.numerics.weights  # grouped products know no autocast: they cast their input to the weights' dtype
        name = "expert gate and up" if e.gated else "expert up"
        up, bias, held = self._grouped(
            picked, self.new(name, f"A {width}", dtype), GATE_AND_UP, e, (width, d), ids, factors
        )
        inner = self._clamped_gate(up) if e.clamped else self._expert_gate(up, e)
        self.hold(up, *bias)
        down, bias, also_held = self._grouped(
            inner, self.new("expert outputs", f"A {axis}", dtype), EXPERTS_DOWN, e, (d, e.width), ids, factors
        )
        wide = "float32" if "float32" in (scores.dtype, down.dtype) else down.dtype  # up to the sum over experts
        weighted = self.new("weighted expert outputs", f"A {axis}", wide)
        product = self.new("gradient x outputs", f"A {axis}", wide)
        uncast = ((self.new("gradient before its cast", f"A {axis}", down.dtype), down),) if wide != down.dtype else ()
        tape.op(
            "weigh experts",
            [down, weights],
            weighted,
            for_gradients=ForGradients(
                ((down, weights), (weights, down)), (*uncast, (product, weights)), late_temps=uncast
            ),
            grads=((down, tape.grad(down)), (weights, tape.grad(weights))),
        )
        places = integers("rows in token order")
        tape.op("invert the order", [order], places, temps=(integers("numbers of rows"),))
        restored = self.new("expert outputs in token order", f"A {axis}", wide)
        tape.op(
            "restore order", [weighted, places], restored, keeps=(places,), grads=((weighted, tape.grad(weighted)),)
        )
        y = self.new("sum of expert outputs", axis, wide)
        tape.op("sum over experts", [restored], y, grads=((restored, tape.grad(restored)),))
        y = self.cast(y, x.dtype, "MLP output")
        self.hold(*inside, *bias, *held, *also_held, down, places, restored)
        return y

    def _router(self, x: Tensor, e: Experts) -> tuple[Tensor, ...]:
        """Scores of the chosen experts (t A), their numbers (t A, int64), and the logits, which a variable holds."""
        logits = self._router_logits(x, e)
        if e.router == "topk-softmax":
            return self._softmax_of_top(x, logits)
        probs = self._router_probabilities(logits, e)
        if e.router == "softmax-groups":
            probs = self._of_best_groups(probs)
        chosen = self.new("chosen experts", "A", "int64")
        top = self.new("top probabilities", "A", probs.dtype)
        grads = ((probs, self.tape.grad(probs)),)
        self.tape.op(
            "top experts",
            [probs],
            top,
            chosen,
            keeps=(chosen,),
            temps=self._grouping(e),
            grads=grads,
            weights=self._correction(e),
        )
        scores = self._expert_scores(top, e)
        self.hold(x, logits, probs)
        return scores, chosen, logits

    def _router_logits(self, x: Tensor, e: Experts) -> Tensor:
        tape = self.tape
        dtype, copy = self.numerics.compute, None
        own = "float32" if self.code.fp32_router else ""
        weight, x_in = self.weight("router", e.number, self.model.hidden, kinds=(WeightKind.MLP,), dtype=own), x
        delta = router_delta(self, weight)
        if e.router_fp32:
            dtype, x_in = "float32", self.cast(x, "float32", "router input in fp32")
            if (own or self.numerics.weights) != "float32" and delta is None:
                copy = tape.new("router.weight in fp32", "X d", "float32")
                tape.op("cast router.weight", [], copy)
        logits = self.new("router logits", "X", dtype)
        if delta is None:
            self._linear(x_in, logits, "router", WeightKind.MLP, e.bias, weight, copy, defers=False)
        else:
            self._adapted_logits(x_in, logits, add_router(self, weight, delta), delta)
        return self.cast(logits, "float32", "router logits in fp32") if self.code.fp32_router_logits else logits

    def _softmax_of_top(self, x: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        """Scores from the logits of the chosen experts alone."""
        top, chosen = self._top_logits(logits)
        scores = self.softmax("softmax of experts", top, self.new("expert scores", "A", logits.dtype))
        if self.code.fp32_router_logits:
            scores = self.cast(scores, x.dtype, "expert scores in their input's dtype")
        self.hold(x, top)
        return scores, chosen, logits

    def _top_logits(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the chosen experts (t A), and their numbers (t A, int64)."""
        top, chosen = self.new("top logits", "A", logits.dtype), self.new("chosen experts", "A", "int64")
        grads = ((logits, self.tape.grad(logits)),)
        self.tape.op("top experts", [logits], top, chosen, keeps=(chosen,), grads=grads)
        return top, chosen

    def _router_probabilities(self, logits: Tensor, e: Experts) -> Tensor:
        """Softmax or sigmoid of all logits, in fp32."""
        plain = self.code.plain_router or logits.dtype == "float32"
        probs = self.new("router probabilities", "X", logits.dtype if plain else "float32")
        cast = () if plain else (self.new("router logits in fp32", "X", "float32"),)
        if e.router in ("softmax", "softmax-groups"):
            return self.softmax("router probabilities", logits, probs, *cast)
        grads = ((logits, self.tape.grad(logits)),)
        return self.tape.op("router probabilities", [logits], probs, keeps=(probs,), temps=cast, grads=grads)

    def _of_best_groups(self, probs: Tensor) -> Tensor:
        """Probabilities with zeros for the experts of other groups (models/deepseek_v2/modeling_deepseek_v2.py, DeepseekV2TopkRouter)."""
        mask, others = self.new("mask of groups", "X", "float32"), self.new("experts of other groups", "X", "bool")
        y = self.new("probabilities of the best groups", "X", probs.dtype)
        grads = ((probs, self.tape.grad(probs)),)
        self.tape.op("mask groups", [probs], y, others, keeps=(others,), temps=(mask,), grads=grads)
        return y

    def _grouping(self, e: Experts) -> tuple[Tensor, ...]:
        """What is made to choose by: scores with the correction, and with groups of experts those after masking and the mask, twice as bool."""
        scores, mask = self.new("scores to choose by", "X", "float32"), self.new("mask of groups", "X", "bool")
        if e.router == "sigmoid-groups":
            return (scores,) * 3 + (mask,) * 2
        return (scores,) if e.router == "sigmoid" or self.code.corrected else ()

    def _correction(self, e: Experts) -> tuple[Weight, ...]:
        """A correction that is a parameter, which no gradient reaches (models/ernie4_5_moe/modeling_ernie4_5_moe.py)."""
        if not self.code.corrected:
            return ()
        weight = self.weight("correction", 1, e.number, kinds=(WeightKind.MLP,), name="", dtype="float32")
        return (replace(weight, trained=False),)

    def _expert_scores(self, top: Tensor, e: Experts) -> Tensor:
        """Probabilities of the chosen experts, divided by their sum, else multiplied by a number or as they are; cast to their input's dtype."""
        fp32 = (e.router_fp32 and not self.code.corrected) or self.code.fp32_expert_scores
        scores = self.new("expert scores", "A", "float32" if fp32 else None)
        if not e.normalised and not e.router_fp32:
            return self.cast(top, scores.dtype, scores.name)
        total = self.new("sum of top probabilities", "", top.dtype)
        clamped = (self.new("sum of top probabilities, clamped", "", "float32"),) if self.code.corrected else ()
        sums = (total, *clamped) if e.normalised else ()
        kept = (top, *sums) if e.normalised else ()
        grads = ((top, self.tape.grad(top)),)
        return self.tape.op("normalise experts", [top], scores, *sums, keeps=kept, grads=grads)

    def _adapted_logits(self, x: Tensor, logits: Tensor, matrix: Tensor, delta: Tensor) -> None:
        """x W^T of a W that was made for this."""
        x, used = self.autocast(x), self.autocast(self.cast(matrix, x.dtype))
        self.tape.op(
            "router",
            [x, used],
            logits,
            for_gradients=ForGradients(((x, used), (used, x))),
            grads=((x, self.tape.grad(x)), (used, self.tape.grad(used))),
            flops=((logits.basis, 2 * self.width(x) * self.width(logits)),),
        )
        self.hold(matrix, delta)

    def _grouped(
        self,
        x: Tensor,
        y: Tensor,
        name: str,
        e: Experts,
        shape: tuple[int, int],
        ids: Tensor,
        factors: Mapping[str, Factors],
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(product, rows of biases that the code holds on to, the sum of weights and adapter). Biases are gathered by row first and
        added in place."""
        w = self._expert_weight(name, e, *shape)
        adapted = (add_up(self, w, factors[name]),) if name in factors else ()
        x = self.cast(x, self.numerics.weights)
        rows: tuple[Tensor, ...] = ()
        if e.bias:
            rows = (self.tape.new(name + "_bias by row", y.shape, y.dtype),)
            bias = self._expert_weight(name, e, shape[0], suffix="_bias")
            self.tape.op(name + "_bias", [ids], *rows, keeps=(ids,), weights=(bias,))
        self.tape.op(
            name,
            [x, *adapted],
            y,
            for_gradients=ForGradients((*((x, each) for each in adapted or (w,)), *((each, x) for each in adapted))),
            grads=(*((each, self.tape.grad(each)) for each in (x, *adapted)), *((row, None) for row in rows)),
            weights=() if adapted else (w,),
            transposes=not (adapted or e.clamped),  # gpt-oss has them transposed (integrations/moe.py, is_transposed)
            holds=rows,
            flops=((y.basis, 2 * self.tape.dims[self.visits] * shape[0] * shape[1]),),
        )
        return y, rows, adapted

    def _expert_weight(self, name: str, e: Experts, *shape: int, suffix: str = "") -> Weight:
        """A weight of all experts, or of those that are this card's."""
        cards, share = self.numerics.spread, (e.per_token, e.number)
        w = self.weight(name, e.number // cards, *shape, kinds=(WeightKind.MLP,), name=suffix, active=share)
        return w if cards == 1 else replace(w, spread_over=cards)

    def _expert_gate(self, up: Tensor, e: Experts) -> Tensor:
        if not e.gated:
            return self.activation(up, e.activation)
        shape = f"{self.t} {self.visits} F"
        gate, linear = self._split(up, ("expert gate", shape), ("expert up", shape))
        active = self.activation(gate, e.activation)
        product = self.new("expert product", f"{self.visits} F", active.dtype)
        return self.multiply("expert gate * up", active, linear, product)

    def _clamped_gate(self, up: Tensor) -> Tensor:
        """gpt-oss: (clamp(up) + 1) * clamp(gate) * sigmoid(alpha * clamp(gate)), gate and up interleaved."""

        def like(name: str) -> Tensor:
            return self.new(name, f"{self.visits} F", up.dtype)

        shape = f"{self.t} {self.visits} F"
        gate, linear = self.slice(up, "expert gate", shape), self.slice(up, "expert up", shape)
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


def _place(name: str, kinds: tuple[WeightKind, ...], experts_first: bool) -> int:
    """Where a weight lies among those of its layer: attention and MLP are made before their norms, projections before norms of queries and keys, experts
    before the expert that is shared, and before their router or after it."""
    if WeightKind.NORMS in kinds:
        return 9 if name.count(".") == 1 else 1
    if WeightKind.MLP not in kinds:
        return 0
    if ".shared_" in name:
        return 8
    if ".experts." not in name:
        return 7 if experts_first else 2
    return 3 + 2 * (".down_proj" in name) + name.endswith("_bias")


class _CheckpointingWriter(Writer):
    """Writes a layer whose norms, attention and MLP are checkpointed, each by itself."""

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self._checkpointed(x, name, lambda w, x: w.norm(x, name))

    def mixed(self, x: Tensor, kind: LayerKind) -> Tensor:
        if kind.mixer == "attention and mamba2":
            return self.both_mixed(x, kind)
        return self._checkpointed(x, kind.mixer, lambda w, x: w.mixed(x, kind))

    def mlp(self, x: Tensor, mlp: Mlp, name: str = "mlp") -> Tensor:
        return self._checkpointed(x, name, lambda w, x: w.mlp(x, mlp, name))

    def experts(self, x: Tensor, e: Experts) -> Tensor:
        return self._checkpointed(x, "experts", lambda w, x: w.experts(x, e))

    def _checkpointed(self, x: Tensor, name: str, write: Callable[[Writer, Tensor], Tensor]) -> Tensor:
        inner = Writer(self.model, self.numerics, frozen=self.frozen)
        inner.tape.role = self.tape.role
        made = write(inner, inner.source(x.name, x.dtype, x.role))
        with self.tape.assign_role(made.role):
            y = self.tape.new(made.name, made.shape, made.dtype)
        self.tape.add(Op(name, (x,), (y,), part=Part(inner.tape.build_tape(), recompute=True), stage=self.tape.stage))
        return y


def rotary_dtype(model: Model, residual: str) -> str:
    """The dtype of cos and sin: the residual stream's, or fp32."""
    return "float32" if family_of(model.model_type).code.rotary_in_fp32 else residual


class MlpChunks(NamedTuple):
    """Way the MLP runs: in one go, or in several pieces, each recomputed by itself in backward or not.

    layer: so does all of a layer but attention itself, which runs over `groups` of heads, one after the other. on_host: what goes into
    attention, and what comes out, waits in CPU RAM. children: what a layer calls is checkpointed, each by itself.
    """

    several: bool = False
    recompute: bool = False
    layer: bool = False
    groups: int = 1
    on_host: bool = False
    children: bool = False


@lru_cache(maxsize=256)
def layer(
    model: Model, kind: LayerKind, numerics: Numerics, chunks: MlpChunks, frozen: frozenset[str] = frozenset()
) -> Tape:
    """One decoder layer, from hidden states (b, s, d) to hidden states (b, s, d); frozen: names of its weights that are not trained."""
    model = model.of_kind(kind)
    if chunks.layer and (kind.mixer == "none" or not (kind.feed_forward or kind.attends)):
        chunks = chunks._replace(layer=False)  # of one part, which is all in pieces, or all runs whole
    if chunks.layer:
        whole = family_of(model.model_type).code.attends_itself or kind.mixer != "attention"
        in_chunks = _around_mixer if whole else _layer_in_chunks
        return in_chunks(model, kind, numerics, chunks, frozen)
    writer = _CheckpointingWriter if chunks.children else Writer
    w = writer(model, numerics, frozen=frozen)
    w.tape.role = Role.NORM
    w.cuts_gates = kind.cuts_gates
    if model.altup is not None:
        w.tape.dims["n"] = model.altup.streams
    x = w.source(dtype=numerics.weights if kind.widens else None, shape="d" if model.altup is None else "n d")
    w.source_per_layer()
    if kind.keys == "borrows":
        w.source_keys()
    if kind.mixer == "none" or not kind.feed_forward:
        return _one_part(w, x, kind, chunks)
    if model.altup is not None:
        in_pieces = partial(_in_pieces, chunks=chunks) if chunks.several or chunks.recompute else None
        tape = altup_layer(w, x, kind, partial(_fed_and_normed, kind=kind, chunks=chunks), in_pieces)
        return replace(tape, outputs=(tape.output, *w.lent)) if kind.keys == "lends" else tape
    normed, mlp_in = _attention_input(w, x), None
    if w.model.block == "parallel" and w.code.norms_first:
        mlp_in = w.norm(x, "post-attention norm")
    mixed = w.mixed(normed, kind)
    if mlp_in is not None:
        w.hold(normed, mlp_in)
    tape = _after_attention(w, x, mixed, normed, kind, chunks, mlp_in)
    if kind.keys == "lends":
        return replace(tape, outputs=(tape.output, *w.lent))
    return replace(tape, returned=w.beside) if w.code.returns_weights else tape


def _fed_and_normed(w: Writer, x: Tensor, kind: LayerKind, chunks: MlpChunks) -> tuple[Tensor, ...]:
    """What the norm behind the MLP makes, and what it is given, unless both run in pieces."""
    y = _feed_forward(w, x, kind, chunks)
    if chunks.recompute:
        return (y,)
    with w.tape.assign_role(Role.MLP):
        return w.norm(y, "post-MLP norm"), y


def _one_part(w: Writer, x: Tensor, kind: LayerKind, chunks: MlpChunks) -> Tape:
    """A layer of a norm and what mixes tokens alone, or an MLP or experts alone, with the residual, which may be in fp32."""
    normed = w.norm(w.cast(x, w.numerics.weights, "layer input, narrowed"), "input norm")
    residual = w.cast(x, w.wide, "layer input in fp32")
    made = _feed_forward(w, normed, kind, chunks) if kind.feed_forward else w.mixed(normed, kind)
    w.hold(*w.beside)
    w.add(residual, made, w.hidden())
    w.hold(residual, made)
    return w.tape.build_tape()


def _attention_input(w: Writer, x: Tensor) -> Tensor:
    if w.model.block == "post":
        return x
    return w.norm(x, "attention norm" if w.model.block == "parallel" and w.code.norms_first else "input norm")


def _after_attention(
    w: Writer,
    x: Tensor,
    attended: Tensor,
    normed: Tensor,
    kind: LayerKind,
    chunks: MlpChunks,
    mlp_in: Tensor | None = None,
) -> Tape:
    """The rest of a layer, of its input, what attention gave (t, d), and what attention was given. mlp_in: what the MLP is given,
    where that was made before."""
    block = w.model.block
    if block in ("sandwich", "post"):
        attended = w.norm(attended, "post-attention norm")
    if block == "one-norm":
        return _beside_attention(w, x, attended, normed, kind, chunks)
    if block == "parallel":
        mlp_out = _feed_forward(w, mlp_in or w.norm(x, "post-attention norm"), kind, chunks)
        both = w.add(mlp_out, attended, _sum_of_branches(w, mlp_out), "add MLP and attention")
        w.add(both, x, w.hidden())
        w.hold(attended, mlp_out, *w.beside, *((normed, mlp_in) if mlp_in is not None else ()))
        return w.tape.build_tape()
    if not kind.feed_forward:
        w.add(x, attended, w.hidden())
        w.hold(attended)
        return w.tape.build_tape()
    middle = w.add(x, _scaled(w, attended), w.tape.new("hidden states after attention", f"{w.between} d", w.wide))
    w.hold(attended, *w.inside)
    w.inside = ()
    return _after_residual(w, middle, attended, normed, kind, chunks)


def _after_residual(
    w: Writer, middle: Tensor, attended: Tensor, normed: Tensor, kind: LayerKind, chunks: MlpChunks
) -> Tape:
    """The rest of a layer whose MLP follows attention, of hidden states between the two."""
    block = w.model.block
    with w.tape.assign_role(Role.MLP if block == "sandwich" else Role.NORM):
        name = "post-attention norm" if block == "pre" else "pre-MLP norm"
        mlp_in = middle if block == "post" else w.norm(middle, name)
    both = kind.experts and _experts(w.model).beside_mlp
    mlp_out = _mlp_and_experts(w, mlp_in, middle, chunks) if both else _feed_forward(w, mlp_in, kind, chunks)
    w.hold(*w.beside)
    if block == "post" and chunks.recompute:
        return w.tape.build_tape()  # the residual is the MLP's input, so the chunks add it
    if block in ("sandwich", "post") and not chunks.recompute:
        with w.tape.assign_role(Role.MLP):
            mlp_out = w.norm(mlp_out, "post-MLP norm")
    apart = kind.experts and w.code.shared_apart
    added = mlp_out if chunks.recompute and not apart else _scaled(w, mlp_out)
    last = w.per_layer is None
    y = w.add(middle, added, w.hidden() if last else w.new("hidden states after the MLP", "d", w.wide))
    w.hold(mlp_out, *w.beside, *w.inside)
    if w.code.holds_block:
        w.hold(attended, mlp_in)
    if w.code.holds_attended:
        w.hold(attended)
    if w.code.holds_normed:
        w.hold(attended, normed)
    if w.per_layer is not None:
        y = _add_per_layer_input(w, y, w.per_layer)
    if w.code.scales_output:
        _scale_output(w, y)
    return w.tape.build_tape()


def _add_per_layer_input(w: Writer, x: Tensor, own: Tensor) -> Tensor:
    """x plus the norm of a product of (a gate made of x, times the layer's own input) (models/gemma4/modeling_gemma4.py)."""
    start, width = len(w.tape.ops), str(w.width(own))
    with w.tape.assign_role(Role.NORM):
        gate = w.linear(x, w.new("per-layer gate", width), "per_layer_input_gate", kind=WeightKind.MLP)
        gate = w.activation(gate, _mlp(w.model).activation)
        product = w.multiply("per-layer gate * input", gate, own, w.new("per-layer product", width, gate.dtype))
        y = w.linear(product, w.new("per-layer output", "d"), "per_layer_projection", kind=WeightKind.MLP)
        y = w.norm(y, "per-layer norm")
    y = w.add(x, y, w.hidden(), "add per-layer output")
    w.tape.hold_since(start, *w.beside)
    return y


def _scale_output(w: Writer, y: Tensor) -> None:
    """Multiply a layer's output in place by a number of its own; backward makes another gradient. The number is a buffer: it takes no room
    here, but is saved, so that a checkpoint runs all of the layer again before backward enters it."""
    with w.tape.assign_role(y.role):
        scaled = w.tape.view(y, y.name, y.shape)
    number = without_bytes(w.tape.new("number of the layer", "1", y.dtype))
    w.tape.op("scale the output", [y], scaled, keeps=(number,), grads=((y, w.tape.grad(y)),))


def _beside_attention(
    w: Writer, x: Tensor, attended: Tensor, normed: Tensor, kind: LayerKind, chunks: MlpChunks
) -> Tape:
    """The MLP of attention's input, and both added to the layer's."""
    mlp_out = _feed_forward(w, normed, kind, chunks)
    first, last = (mlp_out, x) if w.code.adds_branches_first else (x, mlp_out)
    both = w.add(attended, first, _sum_of_branches(w, mlp_out), "add")
    w.add(both, last, w.hidden())
    w.hold(attended, normed, mlp_out, *w.beside)
    return w.tape.build_tape()


def _sum_of_branches(w: Writer, mlp_out: Tensor) -> Tensor:
    name = "MLP and attention"
    return w.tape.view(mlp_out, name, mlp_out.shape) if w.code.adds_in_place else w.new(name, "d", mlp_out.dtype)


def _scaled(w: Writer, x: Tensor) -> Tensor:
    """What a branch gives times the model's number, if it has one."""
    return w.pointwise("scale " + x.name, x, w.new(x.name + ", scaled", "d", x.dtype)) if w.code.scales_branches else x


def _feed_forward(w: Writer, x: Tensor, kind: LayerKind, chunks: MlpChunks) -> Tensor:
    """The MLP or the experts; in chunks that are recomputed, with the norm and the residual that follow token by token, as
    mstplan/train runs it."""
    model = w.model
    if not (chunks.several or chunks.recompute):
        return w.experts(x, _experts(model)) if kind.experts else w.mlp(x, _mlp(model))
    if kind.experts and w.code.shared_apart:
        return _two_in_chunks(w, x, _experts(model), chunks)
    inner = Writer(model, w.numerics, "b c", frozen=w.frozen)
    inner.cuts_gates = w.cuts_gates
    source = inner.source(x.name, x.dtype, x.role)
    y = inner.experts(source, _experts(model)) if kind.experts else inner.mlp(source, _mlp(model))
    if chunks.recompute and model.block in ("sandwich", "post"):
        with inner.tape.assign_role(Role.MLP):
            y = inner.norm(y, "post-MLP norm")
    if chunks.recompute:
        y = _scaled(inner, y)
    if chunks.recompute and model.block == "post":
        y = inner.add(source, y, inner.hidden())
    piece = inner.tape.build_tape()
    with w.tape.call(weights=tuple(weight for op in piece.ops for weight in op.weights)):
        return _in_chunks(w, piece, (x,), "MLP in chunks", chunks)[0]


def _mlp_and_experts(w: Writer, mlp_in: Tensor, middle: Tensor, chunks: MlpChunks) -> Tensor:
    """The MLP and experts of the same hidden states, each with norms of its own, added (models/gemma4/modeling_gemma4.py)."""
    model = w.model
    if chunks.several or chunks.recompute:
        raise RecipeError(
            f"{model.name} gives its experts more than hidden states, so that MLPs do not run in chunks.\n"
            "Set mlp_chunks=1, or take mst-layer (-s mst-layer)."
        )
    mlp_out = w.mlp(mlp_in, _mlp(model))
    with w.tape.assign_role(Role.MLP):
        dense = w.norm(mlp_out, "MLP norm")
        routing = w.router(middle, _experts(model))
        w.hold(mlp_out)
        experts_in = w.norm(middle, "experts norm")
        w.hold(mlp_out)
    routed = w.routed(experts_in, _experts(model), *routing)
    with w.tape.assign_role(Role.MLP):
        w.hold(mlp_out)
        routed = w.norm(routed, "post-experts norm")
        w.hold(mlp_out)
        y = w.add(dense, routed, w.new("MLP output", "d", dense.dtype), "add MLP and experts")
    w.hold(mlp_out)
    w.beside += (dense, routed, *routing)
    return y


def _two_in_chunks(w: Writer, x: Tensor, e: Experts, chunks: MlpChunks) -> Tensor:
    """Routed experts and the shared one, in chunks each for itself, and their sum."""

    def in_chunks(name: str, run: Callable[[Writer, Tensor], Tensor]) -> Tensor:
        return _in_pieces(w, x, name, run, chunks)

    routed = in_chunks("experts in chunks", lambda inner, piece: inner.experts(piece, e._replace(shared_width=0)))
    shared = in_chunks("shared expert in chunks", lambda inner, piece: inner._shared_expert(piece, e))
    w.beside += (routed,)
    with w.tape.assign_role(Role.MLP):
        return w.add(routed, shared, w.new("MLP output", "d", routed.dtype), "add shared experts")


def _in_pieces(w: Writer, x: Tensor, name: str, run: Callable[[Writer, Tensor], Tensor], chunks: MlpChunks) -> Tensor:
    """What is made of x, in pieces as MLPs run."""
    inner = Writer(w.model, w.numerics, "b c", frozen=w.frozen)
    run(inner, inner.source(x.name, x.dtype, x.role))
    return _in_chunks(w, inner.tape.build_tape(), (x,), name, chunks)[0]


# ---- layers in pieces -------------------------------------------------------------------------------------------------


def _layer_in_chunks(
    model: Model, kind: LayerKind, numerics: Numerics, chunks: MlpChunks, frozen: frozenset[str]
) -> Tape:
    """One decoder layer as mstplan/train/layers.py runs it: attention over all tokens, a group of heads at a time; what is before and after
    it over pieces. Axes H and G of what is whole are those of a group."""
    groups = chunks.groups
    w = Writer(_of_heads(model, groups), numerics, frozen=frozen)
    w.in_chunks = True
    x, own = w.source(), w.source_per_layer()
    before = _before_attention(model, kind, numerics, frozen, groups)
    made = _in_chunks(w, before, (x, *own), "before attention", chunks, makes_on_host=chunks.on_host)
    attend = partial(_attend_from_host, w) if chunks.on_host else w.attend
    attended = [attend(q, k, v, kind) for q, k, v in (made[n::groups] for n in range(groups))]
    w.hold(*made)
    after = Writer(model, numerics, "b c", frozen=frozen)
    after.tape.role = Role.NORM
    after.beside = _cut_positions(after)
    piece = after.source()
    after.source_per_layer(is_view=False)
    after.used = {weight.name: weight for op in before.ops for weight in op.weights}
    gated = model.attention.gated_output
    # the MLP's input is attention's, and made again; so are gates, and with them all that comes before attention
    normed = _attention_input(after, piece) if model.block == "one-norm" or gated else piece
    again = (normed, *after.attention_inputs(normed, kind)) if gated else ()
    output = after.attention_output(_joined_groups(after, attended), *again)
    tape = _after_attention(after, piece, output, normed, kind, MlpChunks())
    _in_chunks(w, tape, (x, *own, *attended), "after attention", chunks)
    return w.tape.build_tape()


def _around_mixer(model: Model, kind: LayerKind, numerics: Numerics, chunks: MlpChunks, frozen: frozenset[str]) -> Tape:
    """The same of a layer whose tokens mix otherwise than by attention, or by attention that does not go by transformers' interface: all of the
    module that does so runs over all tokens at once."""
    w = Writer(model, numerics, frozen=frozen)
    w.in_chunks = True
    x = w.source()
    before = Writer(model, numerics, "b c", frozen=frozen)
    before.tape.role = Role.NORM
    source = before.source()
    made: tuple[Tensor, ...] = (_attention_input(before, source),)
    if w.code.adds_within:  # it is given the residual, too
        made += (before.tape.op("residual", [source], without_bytes(source), grads=((source, None),)),)
    before.tape.outputs = made
    mixer = "attention" if kind.mixer == "attention" else "the mixer"
    given = _in_chunks(w, before.tape.build_tape(), (x,), f"before {mixer}", chunks)
    mixed = w.mixed(given[0], kind)
    if w.code.adds_within:
        mixed = w.add(given[1], mixed, w.new("hidden states after attention", "d", w.wide))
        w.hold(*w.inside, *given)
    after = Writer(model, numerics, "b c", frozen=frozen)
    after.tape.role = Role.NORM
    piece, output = after.source(), after.source(mixed.name, mixed.dtype, mixed.role)
    after.used = {weight.name: weight for op in w.tape.ops if op.part for o in op.part.tape.ops for weight in o.weights}
    if w.code.adds_within:
        tape = _after_residual(after, output, output, output, kind, MlpChunks())
    else:
        normed = _attention_input(after, piece) if model.block == "one-norm" else piece
        tape = _after_attention(after, piece, output, normed, kind, MlpChunks())
    _in_chunks(w, tape, (x, mixed), f"after {mixer}", chunks)
    return w.tape.build_tape()


def _attend_from_host(w: Writer, q: Tensor, k: Tensor, v: Tensor, kind: LayerKind) -> Tensor:
    """Attention of what is on the host, with its result there, as mstplan/train/host_attention.py runs it: what its kernel keeps of the size of
    queries comes back for its backward. Raises RecipeError for attention in several operations, or with weights of its own."""
    kernel, _ = w._kernel(w.model.attention, kind)
    if not kernel.one_operation:
        raise RecipeError(
            f"attention by {kernel.name} keeps a matrix of scores, which attention_on_host does not see to.\nLeave it out (--attention-on-host)."
        )
    if w.model.attention.sinks:
        raise RecipeError(
            f"{w.model.name} has weights within attention itself, whose gradients are not made from CPU RAM.\nLeave attention_on_host out "
            "(--attention-on-host)."
        )
    here = tuple(_come_to_device(w, tensor) for tensor in (q, k, v))
    start, copied = len(w.tape.ops), {tensor.storage for tensor in here}
    mixed = w.attend(here[0], here[1], here[2], kind)
    sent: list[Tensor] = []
    saved: set[Tensor] = set()
    for n, op in enumerate(w.tape.ops[start:], start):
        away = tuple(tensor for tensor in op.keeps if _is_of_heads(tensor))
        if away:
            saved.update(tensor.storage for tensor in away)
            sent += [tensor for tensor in away if tensor.storage not in {*copied, mixed.storage}]
            stay = tuple(tensor for tensor in op.keeps if tensor not in away)
            back = tuple(w.tape.new(f"{t.name}, back from CPU RAM", t.shape, t.dtype) for t in away)
            w.tape.ops[n] = replace(op, keeps=stay, fetched=back, fetched_alone=True)
    there = on_host(mixed)
    w.tape.op(
        "attention's result to CPU RAM",
        [mixed],
        there,
        grads=((mixed, w.tape.grad(mixed)),),
        on_host=(mixed, *sent),
        leaves_host=tuple(tensor for tensor in here if tensor.storage not in saved),
    )
    w.hold(*here)
    return there


def _come_to_device(w: Writer, tensor: Tensor) -> Tensor:
    with w.tape.assign_role(Role.ATTENTION):
        here = w.tape.new(tensor.name, tensor.shape, tensor.dtype)
    return w.tape.op(f"{tensor.name} from CPU RAM", [tensor], here, grads=((tensor, on_host(here)),))


def _is_of_heads(tensor: Tensor) -> bool:
    """Whether it has numbers for every token and head, as queries have."""
    axes = tensor.shape.split()
    return len(axes) == 4 and axes[-1] != "s"


def on_host(tensor: Tensor) -> Tensor:
    """A tensor of the same shape in CPU RAM: no bytes on the device."""
    return without_bytes(tensor)


def without_bytes(tensor: Tensor) -> Tensor:
    """One of the same shape that takes nothing on the device."""
    return Tensor(tensor.name, tensor.shape, tensor.dtype, tensor.basis, 0, role=tensor.role)


def _of_heads(model: Model, groups: int) -> Model:
    """The model with the heads of one of so many groups. Raises RecipeError where they make no groups of the same size."""
    a = model.attention
    if a.kv_heads % groups:
        raise RecipeError(
            f"{model.name} has {a.kv_heads} heads of keys, which make no {groups} groups.\nSet attention_groups (--attention-groups) to a divisor."
        )
    return model._replace(attention=a._replace(heads=a.heads // groups, kv_heads=a.kv_heads // groups))


def _before_attention(model: Model, kind: LayerKind, numerics: Numerics, frozen: frozenset[str], groups: int) -> Tape:
    """From a piece of hidden states to its queries, keys and values, each by groups."""
    w = Writer(model, numerics, "b c", frozen=frozen)
    w.tape.role = Role.NORM
    positions = _cut_positions(w)
    source = w.source()
    w.source_per_layer(is_view=False)  # which the runtime hands to both parts
    x = _attention_input(w, source)
    with w.tape.assign_role(Role.ATTENTION):
        q, k, v, *others = w.attention_inputs(x, kind)
        w.hold(x, q, k, v, *others, *positions)
        by_groups: tuple[Tensor, ...] = ()
        for tensor in (q, k, v):
            views = tuple(w.tape.view(tensor, tensor.name, tensor.shape) for _ in range(groups))
            w.tape.op("groups of " + tensor.name, [tensor], *views, grads=((tensor, w.tape.grad(tensor)),))
            by_groups += views
    w.tape.outputs = by_groups
    return w.tape.build_tape()


def _cut_positions(w: Writer) -> tuple[Tensor, ...]:
    """Copies of a piece of positions, cos and sin, where each sequence of several has its own; else there are views alone."""
    if not (w.code.turns_by_row and w.numerics.several_rows):
        return ()
    with w.tape.assign_role(Role.POSITIONS):
        ids = w.tape.new("positions, a piece", w.t, "int64")
        shape = f"{w.t} {w.model.attention.rotary_dim}"
        w.tables = tuple(w.tape.new(f"{name} of positions, a piece", shape, w.wide) for name in ("cos", "sin"))
        w.tape.op("cut positions", [], ids, *w.tables)
    return (ids, *w.tables)


def _joined_groups(w: Writer, attended: list[Tensor]) -> Tensor:
    """What attention made of a piece of each group, side by side."""
    first, a = attended[0], w.model.attention
    width = first.shape.split()[-1]
    pieces = [
        w.source(t.name, t.dtype, t.role, f"{a.heads // len(attended)} {width}" if len(attended) > 1 else f"H {width}")
        for t in attended
    ]
    if len(pieces) == 1:
        return pieces[0]
    with w.tape.assign_role(Role.ATTENTION):
        joined = w.new(first.name, f"H {width}", first.dtype)
    return w.tape.op("join groups", pieces, joined, grads=tuple((piece, None) for piece in pieces))


def norm_in_chunks(w: Writer, x: Tensor, name: str) -> Tensor:
    """A norm of hidden states between the last layer and the head, with layers in pieces."""
    inner = Writer(w.model, w.numerics, "b c", frozen=w.frozen)
    with inner.tape.assign_role(w.tape.role):
        inner.norm(inner.source(x.name, x.dtype, x.role), name)
    return _in_chunks(w, inner.tape.build_tape(), (x,), name, MlpChunks(several=True, recompute=True, layer=True))[0]


def _in_chunks(
    w: Writer,
    piece: Tape,
    inputs: tuple[Tensor, ...],
    name: str,
    chunks: MlpChunks,
    makes_on_host: bool = False,
) -> tuple[Tensor, ...]:
    """What a tape of one piece gives for all of them, laid out as a piece is; makes_on_host: in CPU RAM."""
    copies = tuple(
        tensor_of(piece.dims, f"{source.name}, a piece", source.shape, source.dtype, role=source.role)
        for source, whole in zip(piece.sources, inputs, strict=True)
        if chunks.layer
        and (w.numerics.several_rows or whole.storage is not whole or heads_first(whole) or not whole.bytes)
    )
    gradient_copies = tuple(
        tensor_of(piece.dims, f"{output.name}'s gradient, a piece", output.shape, output.dtype, role=output.role)
        for output in piece.outputs
        if makes_on_host or (chunks.layer and w.numerics.several_rows and not heads_first(output))
    )
    sums = sums_of(piece) if chunks.several else ()
    part = Part(
        piece, recompute=chunks.recompute, chunked=True, sums=sums, copies=copies, gradient_copies=gradient_copies
    )
    made = tuple(_whole(w, tensor) for tensor in piece.outputs)
    there = made if makes_on_host else ()
    made = tuple(map(on_host, made)) if makes_on_host else made
    w.tape.add(Op(name, inputs, made, part=part, stage=w.tape.stage, on_host=there))
    return made


def _whole(w: Writer, piece: Tensor) -> Tensor:
    axes = piece.shape.replace(" c", " s").split()
    if axes[2] == "s" and w.tape.dims[axes[1]] == 1:  # of one head, tokens come first as well
        axes[1:3] = "s", axes[1]
    with w.tape.assign_role(piece.role):
        return w.tape.new(piece.name, " ".join(axes), piece.dtype)


def _mlp(model: Model) -> Mlp:
    assert model.mlp is not None
    return model.mlp


def _experts(model: Model) -> Experts:
    assert model.experts is not None
    return model.experts
