"""DeepSeek-V3.2's lightning indexer (models/deepseek_v32/modeling_deepseek_v32.py, DeepseekV32Indexer), and the mask of what it chose.

All of it runs without autograd: nothing is kept, and its weights get no gradients. Scores of every two tokens and each of its heads
are in fp32: they are the largest tensors of a layer.

Axes: h its heads, i their size, w keys that a query sees of those before it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import RecipeError
from ..spec.model import Indexer, Latent, Model
from .adapters import WORDS
from .recipe import Recipe
from .selection import WeightKind
from .tape import Tensor, Weight

if TYPE_CHECKING:
    from .layers import Writer

_WIDE = "float32"
_LINEARS = ("wq_b", "wk", "weights_proj")


def check_recipe(model: Model, recipe: Recipe) -> None:
    """Raise RecipeError for a recipe with which the formula does not count an indexer, or transformers has none."""
    latent = model.attention.latent
    if latent is None or latent.indexer is None:
        return
    adapted = recipe.lora_rank and {t.rsplit(".", 1)[-1] for t in recipe.lora_targets} & {*WORDS, *_LINEARS}
    refused = {
        f"--attention {recipe.attention}": recipe.attention in ("eager", "flash"),
        f"--precision {recipe.precision}": recipe.used_dtype != "bfloat16",
        "--autocast": recipe.runs_autocast,
        f"--quantize {recipe.quantize}": recipe.quantize != "none",
        f"--lora-targets {','.join(recipe.lora_targets)}": bool(adapted),
        "layers in pieces": recipe.layer_in_chunks,
        "--checkpoint children": recipe.checkpoint == "children",
        "--offload saved-tensors": recipe.offload == "saved-tensors",
        "--packing": recipe.packing > 1,
        "sequences or matrices over several GPUs": recipe.sharers > 1 or recipe.tensor_parallel > 1,
        f"--sharding {recipe.sharding}": recipe.sharding not in ("none", "fsdp"),  # which wait for every gradient
    }
    if option := next((option for option, asked in refused.items() if asked), None):
        raise RecipeError(
            f"layers of {model.name} choose the keys that a query sees, which the formula does not count with {option}.\n"
            "Leave that out, or ask for --rung trace."
        )


def chosen_keys(w: Writer, x: Tensor, low: Tensor, latent: Latent) -> tuple[Tensor, ...]:
    """What attention's variables hold of it: numbers of the chosen keys (t, w), the others (t, s), and the mask of both causes (t, s).
    x: hidden states (t, d); low: queries of the low rank (t, q_rank)."""
    indexer = latent.indexer
    assert indexer is not None
    return _Indexer(w, indexer, latent.rope_dim).lay_out(x, low)


class _Indexer:
    def __init__(self, w: Writer, sizes: Indexer, rotary: int):
        self.w, self.tape, self.sizes, self.rotary = w, w.tape, sizes, rotary
        w.tape.dims.update({"h": sizes.heads, "i": sizes.head_dim})

    def make(self, name: str, shape: str, *reads: Tensor, dtype: str = _WIDE, temps: tuple[Tensor, ...] = ()) -> Tensor:
        """An operation that autograd does not record."""
        y = self.w.new(name, shape, dtype)
        return self.tape.op(name, list(reads), y, temps=temps)

    def lay_out(self, x: Tensor, low: Tensor) -> tuple[Tensor, ...]:
        q, k, *held = self._queries_and_keys(x, low)
        held = [q, k, *held]
        scores = self._scores_of_heads(q, k, held)
        held.append(scores)
        summed = self._sum_of_heads(x, scores, held)
        visible = self.w.new("keys that are not before a query", "s", "bool")
        masked = self.make("scores of keys before each query", "s", summed, temps=(visible,))
        self.w.hold(*held, summed)
        numbers = self.w.new("chosen keys, int64", "w", "int64")
        self.tape.op("choose keys", [masked], numbers, temps=(self.w.new("scores of the chosen keys", "w", _WIDE),))
        self.w.hold(*held)
        chosen = self.make("chosen keys", "w", numbers, dtype="int32")
        self.w.hold(*held, masked)
        return (chosen, *self._masks(chosen))

    def _masks(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Keys that are not chosen, and with those that are not before a query."""
        ones = self.make("ones", "s", dtype="bool")
        wide = self.w.new("chosen keys, int64", "w", "int64")
        others = self.make("keys that are not chosen", "s", ones, chosen, dtype="bool", temps=(wide,))
        self.w.hold(ones)
        inverse = self.w.new("chosen keys as a mask", "s", "bool")
        return others, self.make("mask of the chosen keys", "s", others, dtype="bool", temps=(inverse,))

    # ---- scores -----------------------------------------------------------------------------------------------------

    def _queries_and_keys(self, x: Tensor, low: Tensor) -> tuple[Tensor, ...]:
        """Queries (t, h, i), keys (t, i), and what variables hold beside them."""
        tape, s = self.tape, self.sizes
        q = self._product(low, "h i", "wq_b")
        projected = self._product(x, "i", "wk")
        stats = self.w.new("mean and rstd", "2", _WIDE)
        k = self.w.new("indexer K", "i", projected.dtype)
        weights = tuple(self._weight("k_norm", s.head_dim, name=end) for end in (".weight", ".bias"))
        tape.op("indexer.k_norm", [projected], k, temps=(stats,), weights=weights)
        self.w.hold(projected)
        parts = [self._turned(each, heads, (q, k)) for each, heads in ((q, "h"), (k, "1"))]
        self.w.hold(q, k)
        whole_q = self.make("indexer Q after rotary", "h i", q, parts[0], dtype=q.dtype)
        whole_k = self.make("indexer K after rotary", "i", k, parts[1], dtype=k.dtype)
        return whole_q, whole_k, q, k, *parts

    def _turned(self, x: Tensor, heads: str, held: tuple[Tensor, ...]) -> Tensor:
        """The first numbers of a head, x cos + rotate_half(x) sin."""
        shape, half = f"{heads} {self.rotary}", f"{heads} {self.rotary // 2}"
        cosine = self.make(f"{x.name} cos", shape, x, dtype=x.dtype)
        minus = self.make(f"-{x.name} half", half, x, dtype=x.dtype)
        rotated = self.make(f"{x.name} rotated", shape, x, minus, dtype=x.dtype)
        sine = self.make(f"{x.name} sin", shape, rotated, dtype=x.dtype)
        y = self.make(f"{x.name}, turned part", shape, cosine, sine, dtype=x.dtype)
        self.w.hold(*held)
        return y

    def _scores_of_heads(self, q: Tensor, k: Tensor, held: list[Tensor]) -> Tensor:
        """relu(q k) of each head, scaled (t, h, s); of several sequences the product takes a copy of the keys for every token."""
        s = self.sizes
        wide_q, wide_k = self.make("indexer Q in fp32", "h i", q), self.make("indexer K in fp32", "i", k)
        copy = (self.w.new("indexer K for every token", "s i", _WIDE),) if self.w.numerics.several_rows else ()
        scores = self.w.new("indexer scores", "h s", _WIDE)
        flops = ((scores.basis, 2 * s.heads * s.head_dim),)
        self.tape.op("indexer scores", [wide_q, wide_k], scores, temps=copy, flops=flops)
        scaled = self.make("indexer scores, scaled", "h s", scores)
        positive = self.make("indexer scores, positive", "h s", scaled)
        self.w.hold(*held, scaled)
        return positive

    def _sum_of_heads(self, x: Tensor, scores: Tensor, held: list[Tensor]) -> Tensor:
        """Scores (t, s) of all heads, each times a number made of x."""
        own = self._product(x, "h", "weights_proj")
        wide = self.make("weights of indexer heads in fp32", "h", own)
        weights = self.make("weights of indexer heads", "h", wide)
        held.append(weights)
        summed = self.w.new("indexer scores of all heads", "s", _WIDE)
        flops = ((summed.basis, 2 * self.sizes.heads),)
        return self.tape.op("sum of indexer heads", [weights, scores], summed, flops=flops)

    def _product(self, x: Tensor, shape: str, name: str) -> Tensor:
        y = self.w.new(f"indexer {name}", shape, x.dtype)
        inner, outer = self.w.width(x), self.w.width(y)
        weight = self._weight(name, outer, inner)
        return self.tape.op(f"indexer.{name}", [x], y, weights=(weight,), flops=((y.basis, 2 * inner * outer),))

    def _weight(self, module: str, *shape: int, name: str = ".weight") -> Weight:
        kind = WeightKind.NORMS if module == "k_norm" else WeightKind.ATTENTION
        return replace(self.w.weight(f"indexer.{module}", *shape, kinds=(kind,), name=name), trained=False)
