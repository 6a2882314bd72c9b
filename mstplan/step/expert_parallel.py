"""Expert parallelism as transformers trains it (DistributedConfig(fsdp_size=..., ep_size=N); transformers/distributed/expert_parallel.py, AllToAllEP,
transformers 5.23): what a rank holds.

Each of N ranks has its own sequences and 1 / N of every layer's experts, whole, or in shards where several have the same. All other weights are
FSDP2's, over all ranks (`fsdp.py`). For a layer's experts

- a rank copies each token for every expert that it visits, sorted by expert, and sends each row to its expert's rank (all-to-all);
- it runs its experts on the rows that it is sent, as if each were a token that visits one: rows of a router that shares tokens out evenly are as
  many as it sends, of another `expert_imbalance` times as many, rounded up to whole rows for a token;
- a mask of rows of other ranks' experts, of which there are none, is put on what experts are given, and what each product makes is copied with it;
- what they make is sent back, put in order, weighed and summed up where the tokens are.

What is received, and what is sent, goes when the layer's experts are done; autograd keeps of it but the copy sorted by expert.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING

from ..errors import RecipeError
from .expert_adapters import EXPERTS_DOWN, GATE_AND_UP, list_parameters
from .tape import ForGradients

if TYPE_CHECKING:
    from ..spec.model import Experts, Model
    from .layers import Writer
    from .recipe import Recipe
    from .tape import Tensor

FAMILIES = (
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
)
"""Whose experts are held to the trace."""


def rows_of_a_token(per_token: int, imbalance: float) -> int:
    """Rows that a rank receives for each token of its own, whole ones."""
    return ceil(per_token * Fraction(str(imbalance)))


def most_rows(per_token: int, experts: int, ranks: int) -> int:
    """The same where all tokens of all ranks visit as many experts of one rank as they can."""
    return ranks * min(per_token, experts // ranks)


def refuse_ranks(name: str, experts: int, ranks: int, gpus: int) -> None:
    """Check that ranks divide a model's experts. Raises RecipeError with the numbers of ranks that do, and divide all GPUs."""
    if experts % ranks:
        *others, last = [f"{n:,}" for n in range(2, experts + 1) if experts % n == gpus % n == 0] or ["another --gpus"]
        raise RecipeError(
            f"--expert-parallel {ranks:,}: {name} has {experts:,} experts, which {ranks:,} GPUs cannot share out evenly.\n"
            f"Use {', '.join(others)}{' or ' if others else ''}{last}."
        )


def check(model: Model, recipe: Recipe) -> None:
    """Check that a recipe's ranks can share out a model's experts. Raises RecipeError with what would do."""
    ranks, e = recipe.expert_parallel, model.experts
    if ranks == 1:
        return
    start = f"--expert-parallel {ranks:,}: {model.name}"
    if e is None:
        raise RecipeError(f"{start} has no experts.\nLeave --expert-parallel out.")
    refuse_ranks(model.name, e.number, ranks, recipe.gpus)
    if model.model_type not in FAMILIES:
        raise RecipeError(
            f"{start} is of a family ({model.model_type}) whose experts are not shared out here.\nPlanned are {', '.join(FAMILIES)}."
        )
    if model.tied:
        raise RecipeError(
            f"{start} ties its embedding to its head, for which transformers' groups of weights are not planned.\nLeave --expert-parallel out."
        )
    if recipe.lora_rank and list_parameters(model, recipe.lora_targets, recipe.lora_rank):
        raise RecipeError(
            f"{start} has adapters on experts or router: peft makes them for all experts, and each GPU has a part of these.\nUse --lora-targets attention."
        )
    if rows_of_a_token(e.per_token, recipe.expert_imbalance) > (most := most_rows(e.per_token, e.number, ranks)):
        raise RecipeError(
            f"--expert-imbalance {recipe.expert_imbalance:g}: of {ranks:,} GPUs, whose tokens visit {e.per_token:,} of {e.number:,} experts each, one "
            f"receives at most {most / e.per_token:g} times as many rows as it sends.\nUse {most / e.per_token:g} or less."
        )


def routed(w: Writer, x: Tensor, e: Experts, scores: Tensor, chosen: Tensor, outside: tuple[Tensor, ...]) -> Tensor:
    """What the experts of all ranks make of x, chosen before; outside: variables of the code around."""
    tape = w.tape
    tape.dims["R"] = rows_of_a_token(e.per_token, w.numerics.imbalance)
    given = w.cast(scores, x.dtype, "scores given to experts") if w.numerics.policy else scores
    with tape.call(apart=True):
        order, sent, received, ids, ones = _dispatched(w, x, chosen)
        w.hold(*outside, order, sent)
        around = (*outside, order, received, ids, ones)
        made = _of_own_experts(w, received, ids, ones, e, around)
        w.hold(*around)
        y = _combined(w, made, given, order, x.dtype)
        w.hold(*around, made)
    w.hold(*outside)
    return y


def _dispatched(w: Writer, x: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
    """(order of rows by expert, rows that are sent, rows that come, their experts, a one for each)."""
    tape, axis = w.tape, x.shape.split()[-1]
    order, tokens = w.new("expert order", "A", "int64"), w.new("tokens by expert", "A", "int64")
    tape.op("sort by expert", [chosen], order, temps=(w.new("sorted experts", "A", "int64"),))
    tape.op("tokens by expert", [order], tokens)
    sent = w.new("rows to send", f"A {axis}", x.dtype)
    tape.op("gather tokens", [x, tokens], sent, keeps=(tokens,), grads=((x, tape.grad(x)),))
    count = w.new("a count for each row", "A", "int64")
    tape.op("count rows", [chosen], count)
    received = w.new("rows received", f"R {axis}", x.dtype)
    tape.op("all-to-all of rows", [sent], received, grads=((sent, tape.grad(sent)),))
    ids, places = w.new("experts of rows", "R", "int64"), w.new("places of rows", "R", "int64")
    w.hold(sent, order)
    tape.op("experts of rows", [received], ids, temps=(places,))
    w.hold(sent, order)
    ones = w.new("a score of 1 for each row", "R", x.dtype)
    tape.op("scores of rows", [ids], ones)
    return order, sent, received, ids, ones


def _of_own_experts(w: Writer, x: Tensor, ids: Tensor, ones: Tensor, e: Experts, around: tuple[Tensor, ...]) -> Tensor:
    """A rank's own experts on the rows that it has been sent, one expert for each (integrations/moe.py, grouped_mm_experts_forward)."""
    tape, axis = w.tape, x.shape.split()[-1]

    def integers(name: str, dtype: str = "int64") -> Tensor:
        return w.new(name, "R", dtype)

    by_expert, order, rows = integers("sorted experts of rows"), integers("order of rows"), integers("rows by expert")
    tape.op("sort rows by expert", [ids], order, by_expert)
    tape.op("rows by expert", [order], rows)
    picked = w.new("expert inputs", f"R {axis}", x.dtype)
    tape.op("gather rows", [x, rows], picked, keeps=(rows,), grads=((x, tape.grad(x)),))
    weights = w.new("scores of rows by expert", "R", ones.dtype)
    tape.op("sort scores", [ones, order], weights)
    counted = integers("experts to count", "int32")
    tape.op("count by expert", [by_expert], counted)
    mask = integers("mask of rows of other ranks", "bool")
    tape.op("mask of rows", [by_expert], mask)
    masked = tape.view(picked, "expert inputs, masked", picked.shape)
    tape.op("mask rows", [picked, mask], masked, keeps=(mask,), grads=((picked, tape.grad(picked)),))
    inside = (*around, by_expert, order, picked, weights, counted, mask)

    w.visits = "R"
    d, width, dtype = tape.dims[axis], (2 if e.gated else 1) * e.width, w.numerics.weights
    name = "expert gate and up" if e.gated else "expert up"
    up, bias, _ = w._grouped(masked, w.new(name, f"R {width}", dtype), GATE_AND_UP, e, (width, d), by_expert, {})
    w.hold(*inside)
    up = _masked(w, up, mask)
    inner = w._clamped_gate(up) if e.clamped else w._expert_gate(up, e)
    w.hold(*inside, up, *bias)
    down, bias, _ = w._grouped(
        inner, w.new("expert outputs", f"R {axis}", dtype), EXPERTS_DOWN, e, (d, e.width), by_expert, {}
    )
    w.visits = "A"
    w.hold(*inside)
    down = _masked(w, down, mask)
    weighted = w.new("weighted expert outputs", f"R {axis}", down.dtype)
    tape.op("weigh experts", [down, weights], weighted, keeps=(weights,), grads=((down, tape.grad(down)),))
    places = integers("rows in the order they came")
    tape.op("invert the order", [order], places, temps=(integers("numbers of rows"),))
    restored = w.new("expert outputs in the order they came", f"R {axis}", down.dtype)
    tape.op("restore order", [weighted, places], restored, keeps=(places,), grads=((weighted, tape.grad(weighted)),))
    y = w.new("expert outputs to send back", f"R {axis}", down.dtype)
    tape.op("sum of one", [restored], y, grads=((restored, None),))
    w.hold(*inside, *bias, down, places, restored)
    return y


def _masked(w: Writer, x: Tensor, mask: Tensor) -> Tensor:
    """A copy with zeros in rows of other ranks."""
    y = w.tape.new(x.name + ", masked", x.shape, x.dtype)
    return w.tape.op("mask " + x.name, [x, mask], y, keeps=(mask,), grads=((x, w.tape.grad(x)),))


def _combined(w: Writer, made: Tensor, scores: Tensor, order: Tensor, dtype: str) -> Tensor:
    """What came back, in order, weighed and summed up for each token."""
    tape, axis = w.tape, made.shape.split()[-1]
    back = w.new("rows that came back", f"A {axis}", made.dtype)
    tape.op("all-to-all back", [made], back, grads=((made, tape.grad(made)),))
    in_order = w.new("expert outputs in token order", f"A {axis}", made.dtype)
    tape.op("restore order", [back, order], in_order, keeps=(order,), grads=((back, tape.grad(back)),))
    wide = "float32" if "float32" in (scores.dtype, made.dtype) else made.dtype
    weighted = w.new("weighted outputs", f"A {axis}", wide)
    product = w.new("gradient x outputs", f"A {axis}", wide)
    uncast = ((w.new("gradient before its cast", f"A {axis}", made.dtype), in_order),) if wide != made.dtype else ()
    tape.op(
        "weigh outputs",
        [in_order, scores],
        weighted,
        for_gradients=ForGradients(
            ((in_order, scores), (scores, in_order)), (*uncast, (product, scores)), late_temps=uncast
        ),
        grads=((in_order, tape.grad(in_order)), (scores, tape.grad(scores))),
    )
    w.hold(back)
    y = w.new("sum of expert outputs", axis, wide)
    tape.op("sum over experts", [weighted], y, grads=((weighted, None),))
    w.hold(back, in_order)
    return w.cast(y, dtype, "MLP output")
