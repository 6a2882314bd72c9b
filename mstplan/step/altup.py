"""Gemma 3n's layers (models/gemma3n/modeling_gemma3n.py): several streams of hidden states (AltUp, arXiv 2301.13310), of which one goes through
attention and the MLP, a low-rank product beside attention (Laurel), and MLPs whose gates are cut off below a share of them.

Axes: n streams.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..errors import RecipeError
from ..spec.model import AltUp, Mlp, Model
from .recipe import Recipe
from .roles import Role
from .selection import WeightKind
from .tape import ForGradients, Joined, Tape, Tensor, Weight

if TYPE_CHECKING:
    from ..spec.model import LayerKind
    from .layers import Writer

_MLP = WeightKind.MLP
FeedForward = Callable[["Writer", Tensor], tuple[Tensor, ...]]
Run = Callable[["Writer", Tensor], Tensor]
InPieces = Callable[["Writer", Tensor, str, Run], Tensor]
"""Runs in pieces what a module does with a tensor: of two linear layers, mstplan/train takes Laurel for an MLP."""


def check_recipe(model: Model, recipe: Recipe) -> None:
    """Raise RecipeError for a recipe with which the formula does not count layers of several streams."""
    if model.altup is None:
        return
    refused = {
        "layers in pieces": recipe.layer_in_chunks,
        f"--checkpoint {recipe.checkpoint}": recipe.checkpoint not in ("none", "layer"),
        "--offload saved-tensors": recipe.offload == "saved-tensors",
        f"--precision {recipe.precision}": recipe.used_dtype != "bfloat16",
        "--autocast": recipe.runs_autocast,
        f"--quantize {recipe.quantize}": recipe.quantize
        != "none",  # transformers clips a quantised weight, which fails
        f"--kernels {recipe.kernels}": recipe.kernels != "torch",
        "several GPUs": recipe.gpus > 1,
    }
    if option := next((option for option, asked in refused.items() if asked), None):
        raise RecipeError(
            f"layers of {model.name} have several streams of hidden states, which the formula does not count with {option}.\n"
            "Leave that out, or ask for --rung trace."
        )


# ---- before the layers, and after them ------------------------------------------------------------------------------


def into_streams(w: Writer, x: Tensor, sizes: AltUp) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Hidden states (t, n, d) of embeddings (t, d), and what the model's variables hold of the way until the layers are through."""
    w.tape.dims["n"] = sizes.streams
    with w.tape.assign_role(Role.EMBEDDING):
        target = _magnitude(w, x, "embedding")
        streams, held = [x], [target]
        for n in range(1, sizes.streams):
            product = _product(w, x, f"altup projection {n}", "d", f"altup_projections.{n - 1}")
            scaled, new = _as_large(w, product, target, f"stream {n}")
            streams.append(scaled)
            held = [target, product, new]
            w.hold(*streams, *held)
    with w.tape.assign_role(Role.LAYER_INPUT):
        y = _stack(w, streams, "layer input")
    w.hold(*streams, *held)
    return y, (*streams, *held)


def out_of_streams(w: Writer, x: Tensor, sizes: AltUp, held: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Hidden states (t, d) of (t, n, d): the mean of all; and what variables hold until the model's forward returns. held: variables from
    before the layers."""
    tape, before = w.tape, held[: sizes.streams]
    target = _magnitude(w, _select(w, x, "first stream"), "last hidden states")
    w.hold(*held)
    streams = [_select(w, x, "first stream")]
    w.hold(*before)
    for n in range(1, sizes.streams):
        own = _select(w, x, f"stream {n}")
        product = _product(w, own, f"altup unembedding {n}", "d", f"altup_unembed_projections.{n - 1}")
        scaled, new = _as_large(w, product, target, f"last stream {n}")
        streams.append(scaled)
        w.hold(target, new, product, *streams)
    stacked = _stack(w, streams, "last streams")
    w.hold(x, target, *streams)
    y = w.new("mean of the streams", "d", stacked.dtype)
    tape.op("mean of the streams", [stacked], y, grads=((stacked, tape.grad(stacked)),))
    variables = (target, *streams)
    w.hold(*variables)
    return y, variables


def _magnitude(w: Writer, x: Tensor, name: str) -> Tensor:
    """mean(x^2) ** 0.5, a number for each token."""
    mean = _mean_square(w, x, name)
    root = w.new(f"magnitude of {name}", "1", x.dtype)
    return w.pointwise(f"{name}: root", mean, root, mean, back_temps=2)


def _mean_square(w: Writer, x: Tensor, name: str) -> Tensor:
    tape = w.tape
    square, mean = tape.new(f"{name} square", x.shape, x.dtype), w.new(f"{name} mean square", "1", x.dtype)
    tape.op(f"{name}: square", [x], square, keeps=(x,), grads=((x, tape.grad(x)),), back_temps=(square,) * 2)
    return tape.op(f"{name}: mean square", [square], mean, grads=((square, tape.grad(square)),))


def _as_large(w: Writer, x: Tensor, target: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """x * target / sqrt(max(mean(x^2), eps)), and the latter."""
    tape = w.tape
    mean = _mean_square(w, x, name)
    clamped = w.pointwise(f"{name}: clamp", mean, w.new(f"{name} mean square, clamped", "1", x.dtype), mean)
    root = w.new(f"magnitude of {name}", "1", x.dtype)
    w.pointwise(f"{name}: root", clamped, root, root)
    w.hold(mean, clamped)

    def weighed(of: Tensor, factor: Tensor, what: str, temps: int) -> Tensor:
        y = tape.new(f"{name}, {what}", of.shape, of.dtype)
        product = tape.new(f"gradient x {name}", of.shape, of.dtype)
        grads = ((of, tape.grad(of)), (factor, tape.grad(factor)))
        return tape.op(
            f"{name}: {what}", [of, factor], y, keeps=(of, factor), grads=grads, back_temps=(product,) * temps
        )

    product = weighed(x, target, "times the target", 1)
    w.hold(x, root)
    y = weighed(product, root, "as large as the first", 2)
    w.hold(x)
    return y, root


def _stack(w: Writer, streams: list[Tensor], name: str) -> Tensor:
    y = w.new(name, "n d", streams[0].dtype)
    return w.tape.op(f"stack {name}", streams, y, grads=tuple((each, None) for each in streams))


def _select(w: Writer, x: Tensor, name: str) -> Tensor:
    """A stream: a view, whose gradient lies in zeros of all."""
    return w.slice(x, name, f"{w.t} d")


def _product(w: Writer, x: Tensor, name: str, shape: str, module: str, kind: WeightKind | None = None) -> Tensor:
    return w.linear(x, w.new(name, shape, x.dtype), module, kind=kind)


# ---- a layer ----------------------------------------------------------------------------------------------------------


def altup_layer(w: Writer, x: Tensor, kind: LayerKind, feed_forward: FeedForward, in_pieces: InPieces | None) -> Tape:
    """A layer of hidden states (t, n, d). feed_forward: the MLP with the norm behind it, and what the MLP made where that is apart. in_pieces: where MLPs
    run so."""
    sizes = w.model.altup
    assert sizes is not None and w.per_layer is not None
    tape = w.tape
    tape.dims["n"] = sizes.streams
    predictions = _predict(w, x, sizes)
    w.used = {weight.name: weight for op in tape.ops for weight in op.weights}
    active = _select(w, predictions, "active stream")
    normed = w.norm(active, "input norm")
    run_laurel = partial(_laurel, sizes=sizes)
    beside = run_laurel(w, normed) if in_pieces is None else None
    start = len(tape.ops)
    mixed = w.mixed(normed, kind)
    attended = w.norm(mixed, "post-attention norm")
    gated = w.add(active, attended, w.new("active stream after attention", "d"))
    if beside is not None:
        tape.hold_since(start, beside)
    elif in_pieces is not None:  # what MLPs in pieces make is not made before it is used
        beside = in_pieces(w, normed, "Laurel in chunks", run_laurel)
    assert beside is not None
    both = w.add(gated, beside, w.new("attention and Laurel", "d"), "add Laurel")
    middle = w.pointwise("scale attention and Laurel", both, w.new("hidden states after attention", "d"))
    variables: tuple[Tensor, ...] = (predictions, normed, beside, attended, gated, middle)
    w.hold(*variables)
    with tape.assign_role(Role.MLP):
        mlp_in = w.norm(middle, "pre-MLP norm")
        w.hold(*variables)
    variables += (mlp_in,)
    mlp_out, *variables_of_mlp = feed_forward(w, mlp_in)
    variables += tuple(variables_of_mlp)
    w.hold(*variables, mlp_out)
    activated = w.add(middle, mlp_out, w.new("active stream after the MLP", "d"))
    variables += (activated, mlp_out)
    w.hold(*variables)
    corrected = _correct(w, predictions, activated, sizes, variables)
    _add_per_layer_input(w, corrected, sizes, variables)
    _join_gradients(w)
    return tape.build_tape()


def _join_gradients(w: Writer) -> None:
    """What is predicted and what is corrected go by the same weights: the later one's gradients wait for the earlier one's."""
    ops, first = w.tape.ops, dict[Weight, int]()
    for n, op in enumerate(ops):
        for weight in op.weights:
            if (earlier := first.setdefault(weight, n)) != n:
                ops[n] = replace(ops[n], defers=True)
                ops[earlier] = replace(ops[earlier], joins=Joined(weight, is_view=False))


def _laurel(w: Writer, x: Tensor, sizes: AltUp) -> Tensor:
    """x + norm(B A x) (Gemma3nTextLaurelBlock)."""
    with w.tape.assign_role(Role.MLP):
        low = _product(w, x, "Laurel, low rank", str(sizes.rank), "laurel.linear_left", WeightKind.MLP)
        high = _product(w, low, "Laurel", "d", "laurel.linear_right", WeightKind.MLP)
        normed = w.norm(high, "Laurel's norm")
        y = w.add(x, normed, w.new("Laurel and its input", "d"), "add Laurel's input")
    w.hold(x, high, normed)
    return y


def _modalities(w: Writer, x: Tensor) -> Tensor:
    """tanh of n numbers made of a token (t, n)."""
    tape = w.tape
    normed = w.norm(x, "router norm")
    scaled = w.pointwise("scale router input", normed, w.new("router input", "d"))
    w.hold(x)
    routed = _product(w, scaled, "routed", "n", "altup.modality_router", WeightKind.MLP)
    wide = w.cast(routed, "float32")
    tanh = tape.new("tanh of routed", wide.shape, "float32")
    w.pointwise("tanh", wide, tanh, tanh)
    y = w.cast(tanh, x.dtype, "modalities")
    w.hold(x, scaled, routed)
    return y


def _predict(w: Writer, x: Tensor, sizes: AltUp) -> Tensor:
    """Each stream as a sum of all, times numbers made of the first; and x (Gemma3nTextAltUp.predict)."""
    tape, n = w.tape, sizes.streams
    modalities = _modalities(w, _select(w, x, "first stream"))
    flat = _product(w, modalities, "prediction coefficients", str(n * n), "altup.prediction_coefs", WeightKind.MLP)
    made = w.new("predictions of streams", "n d")
    grads = ((x, tape.grad(x)), (flat, tape.grad(flat)))
    flops = ((made.basis, 2 * n * n * w.model.hidden),)
    tape.op(
        "predict streams", [x, flat], made, for_gradients=ForGradients(((x, flat), (flat, x))), grads=grads, flops=flops
    )
    added = tape.view(made, made.name, made.shape)
    # in place, of a view: backward copies the gradient twice (torch/csrc/autograd/functions/tensor.cpp, CopySlices)
    tape.op("add input", [made, x], added, grads=((made, tape.grad(made)), (x, tape.grad(x))))
    y = w.new("predictions", "n d")
    tape.op("predictions in order", [added], y, grads=((added, None),))
    w.hold(x, modalities, flat, added)
    return y


def _correct(w: Writer, predictions: Tensor, activated: Tensor, sizes: AltUp, held: tuple[Tensor, ...]) -> Tensor:
    """Each prediction, and what came of the first one less what was predicted, times a number (Gemma3nTextAltUp.correct)."""
    tape, n = w.tape, sizes.streams
    modalities = _modalities(w, activated)
    w.hold(*held)
    active = _select(w, predictions, "active prediction")
    innovation = w.new("innovation", "d")
    tape.op("innovation", [activated, active], innovation, grads=((activated, None), (active, tape.grad(active))))
    repeated = w.new("innovation for each stream", "n d")
    tape.op("repeat innovation", [innovation], repeated, grads=((innovation, tape.grad(innovation)),))
    w.hold(*held, modalities, innovation)
    weight = w.weight("altup.correction_coefs", n, n, kinds=(_MLP,))
    clipped = tape.new("correction coefficients, clipped", f"{n} {n}", w.numerics.weights)
    tape.op("clip correction coefficients", [], clipped)
    numbers = w.new("correction coefficients", "n")
    w.product(modalities, numbers, "altup.correction_coefs", weight)
    plus = w.new("correction coefficients + 1", "n")
    tape.op("+ 1", [numbers], plus, grads=((numbers, None),))
    corrected = w.new("corrected streams", "n d")
    product = w.new("gradient x innovation", "n d")
    tape.op(
        "weigh innovation",
        [repeated, plus],
        corrected,
        for_gradients=ForGradients(((repeated, plus), (plus, repeated)), ((product, plus),)),
        grads=((repeated, tape.grad(repeated)), (plus, tape.grad(plus))),
    )
    w.hold(*held)
    y = tape.view(corrected, corrected.name, corrected.shape)
    tape.op("add predictions", [corrected, predictions], y, grads=((corrected, None), (predictions, None)))
    w.hold(*held, modalities, repeated, plus)
    return y


def _add_per_layer_input(w: Writer, x: Tensor, sizes: AltUp, held: tuple[Tensor, ...]) -> None:
    """What Gemma 4's layers add to their output is made of the first stream here, and added to the others."""
    tape, own, start = w.tape, w.per_layer, len(w.tape.ops)
    assert own is not None
    width, rest = str(w.width(own)), f"{sizes.streams - 1} d"
    copy = w.new("first stream, copied", "d")
    view = _select(w, x, "first stream, corrected")
    scale = w.weight("altup.correct_output_scale", w.model.hidden, kinds=(_MLP,), name="")
    unused = () if sizes.scaled else (replace(scale, trained=False),)
    tape.op("copy first stream", [view], copy, grads=((view, None),), weights=unused)
    with tape.assign_role(Role.NORM):
        first = w._times_weight("scale first stream", copy, scale) if sizes.scaled else copy
        gate = w.linear(first, w.new("per-layer gate", width), "per_layer_input_gate", kind=_MLP)
        gate = w.activation(gate, _mlp(w.model).activation)
        product = w.multiply("per-layer gate * input", gate, own, w.new("per-layer product", width, gate.dtype))
        y = w.linear(product, w.new("per-layer output", "d"), "per_layer_projection", kind=_MLP)
        y = w.norm(y, "per-layer norm")
    with tape.assign_role(Role.LAYER_INPUT):
        added, written = (tape.view(x, "layer input", x.shape) for _ in range(2))
    # in place, of a view, which Python then writes once more into the whole: each is a CopySlices
    clone, zeros = w.new("gradient of the other streams", rest), w.new("zeros for the other streams", rest)
    tape.op("add per-layer output", [x, y], added, grads=((x, tape.grad(x)), (y, tape.grad(y))), back_temps=(clone,))
    tape.op("write other streams", [added], written, grads=((added, tape.grad(added)),), back_temps=(clone, zeros))
    tape.hold_since(start, *held)


def _mlp(model: Model) -> Mlp:
    assert model.mlp is not None
    return model.mlp


# ---- the MLP ------------------------------------------------------------------------------------------------------------


def mlp_of_stream(w: Writer, x: Tensor, mlp: Mlp, name: str) -> Tensor:
    """A gated MLP whose variables hold what it makes (Gemma3nTextMLP)."""
    gate = w.linear(x, w.new("MLP gate", "I"), name + ".gate_proj", kind=_MLP)
    gate = _cut_off(w, gate) if w.cuts_gates else gate
    active = w.activation(gate, mlp.activation)
    up = w.linear(x, w.new("MLP up", "I"), name + ".up_proj", kind=_MLP)
    inner = w.multiply("gate * up", active, up, w.new("MLP product", "I"))
    y = w.linear(inner, w.new("MLP output", "d"), name + ".down_proj", kind=_MLP)
    w.hold(x, gate, active, up)
    return y


def _cut_off(w: Writer, gate: Tensor) -> Tensor:
    """relu(gate - (mean + a multiple of the standard deviation)) (Gemma3nTextMLP._gaussian_topk)."""
    tape = w.tape

    def of_token(name: str) -> Tensor:
        return w.new(name, "1", gate.dtype)

    def like(name: str) -> Tensor:
        return tape.new(name, gate.shape, gate.dtype)

    mean, deviation = of_token("mean of the gate"), of_token("deviation of the gate")
    tape.op("mean of the gate", [gate], mean, grads=((gate, tape.grad(gate)),))
    centred = like("gate, centred")
    grads = ((gate, tape.grad(gate)),)
    tape.op("deviation of the gate", [gate], deviation, keeps=(gate, deviation), grads=grads, back_temps=(centred,))
    scaled = w.pointwise("scale deviation", deviation, of_token("deviation, scaled"))
    cutoff = of_token("cutoff")
    tape.op("cutoff", [mean, scaled], cutoff, grads=((mean, None), (scaled, None)))
    less = like("gate less the cutoff")
    negative = like("negative gradient")
    to_both = ((gate, None), (cutoff, tape.grad(cutoff)))
    tape.op("gate less the cutoff", [gate, cutoff], less, grads=to_both, back_temps=(negative,))
    y = like("gate beyond the cutoff")
    w.pointwise("relu", less, y, y)
    w.hold(gate, mean, deviation, cutoff)
    return y
