"""Random models, recipes and cards: small enough to replay in milliseconds, odd enough to reach every branch."""

from hypothesis import strategies as st

from mstplan.spec.hardware import Card, gpus
from mstplan.spec.model import Attention, Experts, Latent, LayerKind, Mlp, Model
from mstplan.step.recipe import Recipe
from mstplan.step.steps import Chunks
from mstplan.units import GIB

ACTIVATIONS = st.sampled_from(["silu", "gelu_pytorch_tanh", "gelu_new", "relu"])
POWERS = st.integers(0, 10).map(lambda n: 1 << n)


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 3))
    size = draw(st.sampled_from([32, 64, 80, 128]))
    if draw(st.integers(0, 5)) == 0:
        latent = Latent(draw(st.sampled_from([None, 96])), 64, size, 32)
        return Attention(heads, heads, size + 32, size, 0, latent=latent)
    return Attention(
        heads,
        kv_heads,
        size,
        size,
        rotary_dim=draw(st.sampled_from([0, size // 2, size])),
        qkv_bias=draw(st.booleans()),
        fused_qkv=draw(st.booleans()),
        qk_norm=draw(st.sampled_from(["none", "head"])),
        softcap=draw(st.booleans()),
    )


@st.composite
def experts(draw: st.DrawFn) -> Experts:
    count = draw(st.sampled_from([4, 8]))
    return Experts(
        count,
        per_token=draw(st.integers(1, count // 2)),
        width=draw(st.sampled_from([128, 512])),
        activation="silu",
        shared_width=draw(st.sampled_from([0, 256])),
        bias=draw(st.booleans()),
        router=draw(st.sampled_from(["softmax", "topk-softmax", "sigmoid-groups"])),
        router_fp32=draw(st.booleans()),
        clamped=draw(st.booleans()),
    )


@st.composite
def models(draw: st.DrawFn, window: bool = True) -> Model:
    """Models of up to six layers, in patterns of attention with and without a window, dense and with experts."""
    routed = draw(st.none() | experts())
    windows = st.sampled_from([None, 256, 4096] if window else [None])
    routes = st.just(routed is not None and draw(st.booleans()))
    widths = st.sampled_from([None, None, 192])
    kind = st.builds(
        LayerKind,
        windows,
        routes,
        causal_mask=st.just(False),
        mixer=st.just("attention"),
        attention=st.none(),
        mlp_width=widths,
        keys=st.just(""),
        feed_forward=st.just(True),
        widens=st.just(False),
        cuts_gates=st.just(False),
    )
    pattern = draw(st.lists(kind, min_size=1, max_size=2))
    kinds = tuple(pattern * draw(st.integers(1, 3)))
    gated = draw(st.booleans())
    return Model(
        name="random",
        model_type="llama",
        hidden=draw(st.sampled_from([128, 320, 1024])),
        vocab=draw(st.sampled_from([512, 32000, 128256])),
        context=None,
        layer_kinds=kinds,
        attention=draw(attentions()),
        mlp=Mlp(draw(st.sampled_from([64, 512, 3072])), draw(ACTIVATIONS), gated, gated and draw(st.booleans())),
        experts=routed if any(k.experts for k in kinds) else None,
        norm=draw(st.sampled_from(["rms", "rms-fp32-weight", "gemma", "layer"])),
        block=draw(st.sampled_from(["pre", "sandwich", "post", "parallel"])),
        tied=draw(st.booleans()),
        learned_positions=draw(st.sampled_from([0, 2048])),
        logit_softcap=draw(st.booleans()),
        scaled_embedding=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.1])),
    )


@st.composite
def recipes(draw: st.DrawFn, **fixed: object) -> Recipe:
    """Recipes that contradict nothing, with the chunk counts left open where they may be."""
    checkpoint = draw(st.sampled_from(["none", "layer", "sqrt", 2]))
    in_backward = draw(st.booleans())
    chunked_loss, recompute = draw(st.booleans()), draw(st.booleans())
    mlp_chunks = "auto" if recompute else draw(st.sampled_from([1, 1, 4, "auto"]))
    precision = fixed.get("precision") or draw(st.sampled_from(["bf16", "mixed", "fp32"]))
    choices = {
        "precision": precision,
        "optimizer": draw(st.sampled_from(["adamw", "adamw-8bit", "adafactor", "sgd"])),
        "adamw_kernel": draw(st.sampled_from(["foreach", "fused", "for-loop"])),
        "optimizer_in_backward": in_backward,
        "optimizer_on_host": not in_backward and draw(st.booleans()),
        "accumulation": 1 if in_backward else draw(st.sampled_from([1, 4])),
        "batch": draw(st.integers(1, 3)),
        "checkpoint": checkpoint,
        "pad_to": draw(st.sampled_from([1, 1, 1, 3, 4, 8, 64])),
        "mlp_chunks": mlp_chunks,
        "mlp_recompute": recompute,
        "layer_in_chunks": fixed.get("mlp_recompute", recompute) and draw(st.booleans()),
        "loss_chunks": "auto" if chunked_loss else 1,
        "loss": "chunked"
        if chunked_loss
        else draw(st.sampled_from(["transformers", "transformers<4.49", "transformers<4.45"])),
        "offload": "layer-inputs" if checkpoint != "none" and draw(st.booleans()) else "none",
        "attention": draw(st.sampled_from(["sdpa", "eager"] if precision == "fp32" else ["sdpa", "flash", "eager"])),
    }
    return Recipe(**{**choices, **fixed})


@st.composite
def cards(draw: st.DrawFn) -> Card:
    """Any shipped card's rates with any amount of memory that holds its context."""
    gpu = draw(st.sampled_from(gpus()))
    return Card(gpu, draw(st.integers(GIB, 200 * GIB)))


@st.composite
def chunk_counts(draw: st.DrawFn, recipe: Recipe) -> Chunks:
    mlp = draw(POWERS | st.integers(1, 300)) if recipe.mlp_chunks == "auto" else recipe.mlp_chunks
    loss = draw(POWERS | st.integers(1, 300)) if recipe.loss_chunks == "auto" else recipe.loss_chunks
    return Chunks(mlp, loss)
