"""SigLIP's tower and the projector of Gemma-3 (models/siglip/modeling_siglip.py, models/gemma3/modeling_gemma3.py)."""

from __future__ import annotations

from ..selection import WeightKind
from ..tape import ForGradients, Tensor
from .base import Images, Section, Seen, sizes_of
from .encoder import add_positions, embed_patches, outside, run_layers

PROJECTOR = "model.multi_modal_projector."
MODULES = (
    *("embeddings.patch_embedding", "embeddings.position_embedding", "layer_norm1"),
    *(f"self_attn.{each}_proj" for each in ("k", "v", "q", "out")),
    *("layer_norm2", "mlp.fc1", "mlp.fc2", "post_layernorm", "mm_input_projection_weight", "mm_soft_emb_norm"),
)
"""Those with weights, in the order in which they are made."""


def see_by_siglip(images: Images, hidden: Tensor) -> Seen:
    """Patches lie as the convolution leaves them, all of a channel together, and so do hidden states of all layers."""
    patches = images.vision.encoder.patches
    w = images.writer(outside(images), patches)
    made = embed_patches(w, has_bias=True)
    embedded = add_positions(w, made, patches)
    w.hold(made)
    last = run_layers(images, patches, embedded, images.vision.encoder.layers, copies_rows=True)
    w.copies_rows = w.copies_gradients = True
    features = w.norm(last, "post_layernorm")
    w.hold(embedded)
    projected = _project(images, features)
    seen = images.into_embeddings(hidden, projected)
    main = images.w.tape
    blocks = main.op("number images", [], main.new("numbers of images", "b s", "int64"))
    return Seen(hidden, seen, (features, blocks), (projected,))


def _project(images: Images, x: Tensor) -> Tensor:
    """Means of neighbouring patches, normalised, times a matrix."""
    sizes, tokens, outer = (
        sizes_of(images.vision.encoder)._replace(norm="gemma"),
        images.vision.tokens,
        images.w.model.hidden,
    )
    w = images.writer(Section(PROJECTOR, WeightKind.PROJECTOR, sizes, {}), tokens)
    tape = w.tape
    planes = tape.new("patches by channel", x.shape, x.dtype)
    tape.op("patches by channel", [x], planes, grads=((x, None),))
    pooled = w.pointwise("pool", planes, w.new("pooled patches", "d", x.dtype), planes)
    w.hold(planes)
    normed = w.norm(pooled, "mm_soft_emb_norm")
    w.hold(planes)
    rows = w.new("normed patches in order", "d", x.dtype)
    tape.op("normed patches in order", [normed], rows, grads=((normed, None),))
    matrix = w.weight("mm_input_projection_weight", sizes.hidden, outer, kinds=(), name="")
    y = w.tape.op(
        "project",
        [rows],
        w.new("features", str(outer), x.dtype),
        for_gradients=ForGradients(((rows, matrix),)),
        grads=((rows, tape.grad(rows)),),
        weights=(matrix,),
        flops=((rows.basis, 2 * w.rows * matrix.numel),),
        product=True,
    )
    w.hold(planes, pooled, normed)
    return y
