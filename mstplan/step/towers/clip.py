"""CLIP's tower and the projector of LLaVA (models/clip/modeling_clip.py, models/llava/modeling_llava.py)."""

from __future__ import annotations

from functools import partial

from ..selection import WeightKind
from ..tape import Tensor
from .base import Images, Section, Seen, TowerWriter, sizes_of
from .encoder import add_positions, embed_patches, of_layer, outside, run_layers, write_layer

PROJECTOR = "model.multi_modal_projector."
MODULES = (
    *("embeddings.class_embedding", "embeddings.patch_embedding", "embeddings.position_embedding", "pre_layrnorm"),
    *(f"self_attn.{each}_proj" for each in ("k", "v", "q", "out")),
    *("layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2", "post_layernorm", "linear_1", "linear_2"),
)
"""Those with weights, in the order in which they are made."""


def see_by_clip(images: Images, hidden: Tensor) -> Seen:
    """Features are what an earlier layer than the last makes: no gradient comes to those behind it."""
    vision = images.vision
    tokens = vision.encoder.patches + 1
    w = images.writer(outside(images), tokens)
    embedded = _embed(w, tokens)
    start = len(images.w.tape.ops)
    used = run_layers(images, tokens, embedded, vision.used_layers, copies_rows=False)
    last, *inputs = _run_unused(images, tokens, used)
    images.w.tape.hold_since(start, embedded)
    projected = _project(images, used, tokens)
    joined = w.tape.new("features of all images", projected.shape, projected.dtype)
    w.tape.op("join features", [projected], joined, grads=((projected, w.tape.grad(projected)),))
    return Seen(hidden, images.into_embeddings(hidden, joined), (used, last, *inputs, projected), (joined,))


def _embed(w: TowerWriter, tokens: int) -> Tensor:
    """Patches behind a token for the class, with their places, normalised."""
    tape, patches = w.tape, embed_patches(w, has_bias=False)
    of_class = w.weight("embeddings.class_embedding", w.model.hidden, kinds=(), name="")
    joined = w.new("class and patches", "d")
    tape.op("join class and patches", [patches], joined, grads=((patches, None),), weights=(of_class,))
    embedded = add_positions(w, joined, tokens)
    w.hold(patches, joined)
    return w.norm(embedded, "pre_layrnorm")


def _run_unused(images: Images, tokens: int, used: Tensor) -> tuple[Tensor, ...]:
    """Layers whose output no feature comes from, and the norm of the class behind them: a graph is made of them, and let go with what they gave.
    Returns that, and inputs that checkpoints hold as long."""
    vision, main, start = images.vision, images.w.tape, len(images.named)
    checkpoints = images.recipe.checkpoints_layers
    last = main.op("hand on", [used], main.view(used, used.name, used.shape)) if checkpoints else used
    inputs: list[Tensor] = []
    for n in range(vision.used_layers, vision.encoder.layers):
        section = of_layer(images, n)
        if checkpoints:
            inputs.append(last)
            last = images.layer(section._replace(is_idle=True), tokens, last, partial(write_layer, copies_rows=False))
        else:
            with main.call(apart=True):
                last = write_layer(images.writer(section, tokens), last, copies_rows=False)
    w = images.writer(outside(images), 1)
    w.copies_rows = True
    w.norm(w.slice(last, "class", f"{w.t} d"), "post_layernorm")
    images.unused += images.named[start:]
    return last, *(inputs if images.trains(WeightKind.VISION) else ())


def _project(images: Images, used: Tensor, tokens: int) -> Tensor:
    """Two linear layers of features; of those of several images without the class, which do not lie together, the first one makes a copy."""
    vision, outer = images.vision, images.w.model.hidden
    sizes = sizes_of(vision.encoder)
    w = images.writer(Section(PROJECTOR, WeightKind.PROJECTOR, sizes, {}), vision.tokens)
    bias, inner = vision.projector_bias, w.new("projected features", str(outer), used.dtype)
    if vision.keeps_class or not images.several:
        given = used if vision.keeps_class else w.slice(used, "features but the class", f"{w.t} d")
        first = w.linear(given, inner, "linear_1", kind=None, bias=bias)
    else:
        rows = w.new("features in order", "d", used.dtype)
        w.tape.op("features in order", [used], rows, grads=((used, w.tape.grad(used)),))
        first = (
            _add_bias(w, w.linear(rows, inner, "linear_1", kind=None))
            if bias
            else w.linear(rows, inner, "linear_1", kind=None)
        )
    active = w.activation(first, vision.projector_activation)
    return w.linear(active, w.new("features", str(outer), active.dtype), "linear_2", kind=None, bias=bias)


def _add_bias(w: TowerWriter, x: Tensor) -> Tensor:
    """x + a bias, which is no part of the product where that makes a copy of its input (aten native/Linear.cpp)."""
    bias = w.weight("linear_1", w.width(x), kinds=(), name=".bias")
    y = w.tape.new(x.name + ", with bias", x.shape, x.dtype)
    return w.tape.op(
        "add the bias", [x], y, grads=((x, None),), weights=(bias,), workspaces=(w.sum_over_tokens(bias, x),)
    )
