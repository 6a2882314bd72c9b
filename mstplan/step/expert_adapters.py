"""peft's adapters on a mixture's experts and its router, which are parameters of their modules and no linear layers: whenever such a module
runs, what its adapter adds to the parameter is made, and the sum stands in for the parameter.

from source: peft tuners/lora/layer.py, ParamWrapper and _LoraFactorsProxy; utils/transformers_weight_conversion.py, _convert_peft_config_moe;
torch nn/utils/parametrize.py: ParametrizationList tries a new sum once, and `cached` holds the one that is used while the module runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..errors import RecipeError, quoted
from ..spec.families import family_of
from .adapters import ALL_LINEAR, DOWN, UP
from .selection import WeightKind
from .tape import ForGradients, Tensor, Weight

if TYPE_CHECKING:
    from ..spec.model import Experts, Model
    from .layers import Writer
    from .recipe import Recipe

GATE_AND_UP, EXPERTS_DOWN, ROUTER = "experts.gate_up_proj", "experts.down_proj", "router"
"""Parameters, as families' `weight_names` call them."""
_ROUTER_LINEAR = "gate"
_LINEARS = frozenset({_ROUTER_LINEAR, "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""All names by which peft takes experts and routers for targets."""


# ---- which are adapted ----------------------------------------------------------------------------------------------------


def list_linears(model: Model) -> tuple[str, ...]:
    """Names of linear layers that peft takes for parameters of the experts and the router, wherever in the model they are: the experts' and
    the router's of transformers 4. None: it adapts linear layers only."""
    routed = family_of(model.model_type).experts
    return (*routed.linears, _ROUTER_LINEAR) if routed is not None and routed.linears else ()


def list_parameters(model: Model, targets: Sequence[str], rank: int) -> tuple[tuple[str, int], ...]:
    """Parameters that are adapted, with their adapters' ranks: of gate and up, which are one, twice the rank. Raises RecipeError for targets that
    peft refuses, or of which the formula does not know what peft makes."""
    named = {target.rsplit(".", 1)[-1] for target in targets}
    if _is_unknown(model) and named & {ALL_LINEAR, *_LINEARS}:
        raise RecipeError(_unknown(model))
    if _breaks_router(model) and named & {ALL_LINEAR, _router_name(model)}:
        raise RecipeError(_broken(model))
    linears = list_linears(model)
    if not linears or model.experts is None:
        return ()
    gate, up, down, router = linears
    whole = ALL_LINEAR in targets
    if not whole and len(named & {gate, up}) == 1:
        raise RecipeError(_halved(model, gate, up))
    rows = ((GATE_AND_UP, gate, 2 * rank), (EXPERTS_DOWN, down, rank), (ROUTER, router, rank))
    return tuple((parameter, own_rank) for parameter, linear, own_rank in rows if whole or linear in named)


def has_adapted_experts(model: Model) -> bool:
    """Whether all-linear means the experts as well, or the formula does not know whether it does."""
    return _is_unknown(model) or (model.experts is not None and bool(list_linears(model)))


def _is_unknown(model: Model) -> bool:
    asked_of_peft = model.stand_in is not None  # by the trace
    return model.experts is not None and not asked_of_peft and not family_of(model.model_type).registered


def check_recipe(model: Model, recipe: Recipe, several_mlp_chunks: bool) -> None:
    """Check that parameters of a model's experts or router can have adapters in a step. Raises RecipeError."""
    refused = [option for option, on in (("--lora-dropout", recipe.lora_dropout), ("--dora", recipe.dora)) if on]
    if refused:
        raise RecipeError(no_variants(model.name, refused))
    adapted = f"adapters on the experts or the router of {model.name}"
    if recipe.zero_stage or recipe.flat:
        raise RecipeError(
            f"{adapted} are not planned with {recipe.sharding}.\nUse --lora-targets attention, or --sharding fsdp or ddp."
        )
    if several_mlp_chunks and not recipe.mlp_recompute:
        raise RecipeError(
            f"with {adapted} each MLP chunk would keep weights of its own, which is not planned.\n"
            "Leave --no-recompute out, or use --lora-targets attention."
        )
    every_layer = recipe.checkpoint != "none" and not str(recipe.checkpoint).startswith("every-")
    if recipe.offload == "saved-tensors" and not every_layer:
        raise RecipeError(
            f"saved tensors in CPU RAM beside {adapted} are planned only where every layer is checkpointed.\n"
            "Add --checkpoint layer, or use --lora-targets attention."
        )


def no_variants(model: str, options: Sequence[str] = ("--lora-dropout", "--dora")) -> str:
    words = " and ".join(options)
    return (
        f"peft adapts the experts and the router of {model} as parameters, and refuses {words} for those.\n"
        f"Leave {words} out, or use --lora-targets attention."
    )


def _breaks_router(model: Model) -> bool:
    routed = family_of(model.model_type).experts
    return model.experts is not None and routed is not None and routed.linear_router


def _router_name(model: Model) -> str:
    return family_of(model.model_type).weight_names[ROUTER].rpartition(".")[2]


def _broken(model: Model) -> str:
    return (
        f"peft's adapter takes the router of {model.name} for a linear layer, and its step fails.\n"
        "Use --lora-targets attention, or names of modules without the router's."
    )


def _unknown(model: Model) -> str:
    return (
        f"the formula does not know whether peft adapts the experts of {model.name} with these targets (model_type "
        f"{quoted(model.model_type)}).\nUse --lora-targets attention, or leave --assume out: the trace asks peft."
    )


def _halved(model: Model, gate: str, up: str) -> str:
    return (
        f"peft adapts {gate} and {up} together only: the experts of {model.name} have them in one parameter.\n"
        f"Name both in --lora-targets, or neither."
    )


# ---- experts --------------------------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """B (experts, out, rank) and A (experts, rank, in), in the dtype of the parameter: views of the adapter's weights, or copies. last: the one
    whose gradient is made last."""

    b: Tensor
    a: Tensor
    last: Tensor
    rank: int


def activate(w: Writer, e: Experts) -> dict[str, Factors]:
    """Factors of the experts' adapters by parameter. The wrapper of the last parameter is the outer one."""
    adapters = w.numerics.adapters
    ranks = dict(adapters.parameters) if adapters is not None else {}
    module = w.names[GATE_AND_UP].rpartition(".")[0]
    inner = f"{module}.base_layer" if EXPERTS_DOWN in ranks else module
    d, width = w.model.hidden, e.width
    rows = ((EXPERTS_DOWN, module, d, width), (GATE_AND_UP, inner, 2 * width, d))
    return {
        parameter: _factors(w, e, parameter, wrapper, (outer, inside), ranks[parameter])
        for parameter, wrapper, outer, inside in rows
        if parameter in ranks
    }


def _factors(w: Writer, e: Experts, parameter: str, module: str, shape: tuple[int, int], rank: int) -> Factors:
    """The sum is tried once, before the module runs."""
    assert w.numerics.adapters is not None
    tape, own, used = w.tape, w.numerics.adapters.dtype, w.numerics.weights
    outer, inner = shape
    share, kinds = (e.per_token, e.number), (WeightKind.MLP,)
    down = w.weight(module, rank * e.number, inner, kinds=kinds, name=DOWN, active=share, dtype=own, is_adapter=True)
    up = w.weight(module, outer, rank * e.number, kinds=kinds, name=UP, active=share, dtype=own, is_adapter=True)
    a_shape, b_shape = f"X {rank} {inner}", f"X {outer} {rank}"

    def view(weight: Weight, shape: str) -> Tensor:
        return tape.new(f"{weight.name} by expert", shape, own, tape.new(weight.name, shape, own))

    # A's gradient lies as A does; B's is copied into B's order
    a, b = view(down, a_shape), view(up, b_shape)
    if own == used:
        tape.op(a.name, [], a, weights=(down,), takes_gradient=True)
        tape.op(b.name, [], b, weights=(up,))
    else:
        tape.op(b.name, [], b, weights=(up,))
        b = w.cast(b, used, f"{b.name}, {used}")
        a = tape.new(f"{a.name}, {used}", a_shape, used)
        tape.op("cast " + down.name, [], a, weights=(down,))
    tried = tape.new(f"{parameter} + B A, tried", f"X {outer} {inner}", used)
    tape.op(f"{parameter}: try the sum", [b, a], tried, temps=(_contiguous(w, b),))
    return Factors(b, a, a if down.trained else b, rank)


def _contiguous(w: Writer, b: Tensor) -> Tensor:
    """A copy of B as cuBLAS takes it: no axis of an expert's matrix lies in order (aten native/cuda/Blas.cpp, prepare_batch_matrix_for_cublas)."""
    return w.tape.new(f"{b.name}, contiguous", b.shape, b.dtype)


def add_up(w: Writer, weight: Weight, factors: Factors) -> Tensor:
    """W + B A of every expert, in one product (torch.baddbmm), whose gradient is as large. B's gradient is made first, then A's from a copy of
    B, each unscaled at first. The copy is gone when A's is scaled: the larger of copy and gradient counts."""
    tape, (b, a, last, rank) = w.tape, factors
    _, outer, inner = weight.shape
    whole = tape.new(f"{weight.name} + B A", f"X {outer} {inner}", w.numerics.weights)
    copied, made = _contiguous(w, b), tape.new(f"gradient of {last.name}, unscaled", last.shape, last.dtype)
    beside = ((made, last),)
    if last is a and a.bytes < b.bytes:
        a = tape.view(a, f"{a.name}, to scale", a.shape)
        beside = ((copied, a),)
        tape.op(a.name, [last], a, grads=((last, tape.grad(last)),))
    return tape.op(
        whole.name,
        [b, a],
        whole,
        temps=(copied,),
        for_gradients=ForGradients(((b, a), (a, b)), beside),
        grads=((b, tape.grad(b)), (a, tape.grad(a))),
        weights=(weight,),
        takes_gradient=True,
        flops=((0, 2 * rank * weight.numel),),
    )


# ---- router ---------------------------------------------------------------------------------------------------------------


def router_delta(w: Writer, weight: Weight) -> Tensor | None:
    """B A of the router, scaled, in the dtype of its weight; None: it has no adapter. The sum is tried once, before the router runs."""
    adapters, tape = w.numerics.adapters, w.tape
    rank = dict(adapters.parameters).get(ROUTER) if adapters is not None else None
    if adapters is None or rank is None:
        return None
    outer, inner = weight.shape
    kinds, own = (WeightKind.MLP,), adapters.dtype
    down = w.weight(ROUTER, rank, inner, kinds=kinds, name=DOWN, dtype=own, is_adapter=True)
    up = w.weight(ROUTER, outer, rank, kinds=kinds, name=UP, dtype=own, is_adapter=True)
    copies = [copy for each in (up, down) for copy in w.cast_weight(each)]
    made = tape.new("router: B A", "X d", w.numerics.compute if w.numerics.autocast else own)
    tape.op(
        made.name,
        copies,
        made,
        for_gradients=ForGradients(tuple(zip(copies, (down, up), strict=False))),
        weights=(up, down),
        cast=bool(copies),
        flops=((0, 2 * rank * weight.numel),),
    )
    scaled = w.pointwise("router: scale", made, tape.new("router: B A, scaled", "X d", made.dtype))
    delta = w.cast(scaled, w.numerics.weights, f"{scaled.name}, {w.numerics.weights}")
    tape.op("router: try the sum", [delta], tape.new("router.weight + B A, tried", "X d", delta.dtype))
    return delta


def add_router(w: Writer, weight: Weight, delta: Tensor) -> Tensor:
    """W + B A of the router."""
    whole = w.tape.new("router.weight + B A", "X d", w.numerics.weights)
    return w.tape.op(whole.name, [delta], whole, grads=((delta, None),), weights=(weight,))
