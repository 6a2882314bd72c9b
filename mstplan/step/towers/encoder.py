"""Layers of CLIP's and SigLIP's towers (models/clip/modeling_clip.py, models/siglip/modeling_siglip.py)."""

from __future__ import annotations

from functools import partial

from ...spec.model import LayerKind
from ..roles import Role
from ..selection import WeightKind
from ..tape import ForGradients, Tensor, Weight
from .base import Images, Section, TowerWriter, sizes_of

TOWER = "model.vision_tower."
LAYER = {
    "input norm": "layer_norm1",
    "post-attention norm": "layer_norm2",
    **{f"{each}_proj": f"self_attn.{each}_proj" for each in "qkv"},
    "o_proj": "self_attn.out_proj",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}


def outside(images: Images) -> Section:
    """The tower but for its layers."""
    names = {"position_embedding": "embeddings.position_embedding", "patches": "embeddings.patch_embedding"}
    return Section(TOWER, WeightKind.VISION, sizes_of(images.vision.encoder), names)


def of_layer(images: Images, number: int) -> Section:
    return Section(f"{TOWER}encoder.layers.{number}.", WeightKind.VISION, sizes_of(images.vision.encoder), LAYER)


def run_layers(images: Images, tokens: int, hidden: Tensor, count: int, *, copies_rows: bool) -> Tensor:
    """The first layers of the encoder. The code of tower and encoder holds what the first is given until all are done."""
    given, start = hidden, len(images.w.tape.ops)
    for n in range(count):
        hidden = images.layer(of_layer(images, n), tokens, hidden, partial(write_layer, copies_rows=copies_rows))
    images.w.tape.hold_since(start, given)
    return hidden


def write_layer(w: TowerWriter, x: Tensor, copies_rows: bool) -> Tensor:
    """x + attention of its norm, and that + an MLP of its norm."""
    w.copies_rows, w.tape.role = copies_rows, Role.NORM
    mixed = w.attention(w.norm(x, "input norm"), LayerKind())
    middle = w.add(x, mixed, w.new("hidden states after attention", "d", w.wide))
    w.hold(mixed)
    assert w.model.mlp is not None
    made = w.mlp(w.norm(middle, "post-attention norm"), w.model.mlp)
    y = w.add(middle, made, w.hidden())
    w.hold(made)
    return y


def cast_pixels(w: TowerWriter) -> tuple[Tensor, ...]:
    """Pixels in the weights' dtype; nothing where they have it: processors make them in fp32."""
    encoder, dtype = w.images.vision.encoder, w.numerics.weights
    if dtype == "float32":
        return ()
    inputs = w.images.count * encoder.channels * encoder.side**2
    return (w.tape.op("cast pixels", [], w.tape.new("pixels", f"b {inputs}", dtype)),)


def embed_patches(w: TowerWriter, has_bias: bool) -> Tensor:
    """A convolution whose steps are as wide as its filters, of pixels in the weights' dtype. cuDNN's workspace for it is not counted."""
    encoder, tape = w.images.vision.encoder, w.tape
    pixels = w.images.pixels or cast_pixels(w)
    shape = encoder.hidden, encoder.channels, encoder.patch, encoder.patch
    filters = w.weight("patches", *shape, kinds=())
    biases: tuple[Weight, ...] = (w.weight("patches", encoder.hidden, kinds=(), name=".bias"),) if has_bias else ()
    patches = tape.new("patches", f"b {w.images.count * encoder.patches} d", w.numerics.weights)
    return tape.op(
        "convolve patches",
        pixels,
        patches,
        for_gradients=ForGradients(tuple((each, filters) for each in pixels)),
        weights=(filters, *biases),
        flops=((patches.basis, 2 * w.images.count * encoder.patches * filters.numel),),
    )


def add_positions(w: TowerWriter, patches: Tensor, rows: int) -> Tensor:
    """patches + what is learned of their places: its gradient is the sum over images."""
    places = w.positions(rows)
    grads = ((patches, None), (places, w.tape.grad(places) if w.images.several else None))
    return w.tape.op("add places of patches", [patches, places], w.hidden(), grads=grads)
