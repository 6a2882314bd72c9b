"""GPT-2."""

from __future__ import annotations

from .base import LAYER, Code, Family, defaults

GPT2 = Family(
    defaults(
        *(768, 12, 12, None, 50257, None),
        n_inner=None,
        max_position_embeddings=1024,
        activation_function="gelu_new",
        tie_word_embeddings=True,
        resid_pdrop=0.1,
        attn_pdrop=0.1,
        embd_pdrop=0.1,
        dtype="float32",  # its files are older than the field
    ),
    norm="layer",
    norm_bias=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    fused_qkv=True,
    gated=False,
    own_heads=False,
    mlp_width="n_inner",
    activation="activation_function",
    attention_dropout="attn_pdrop",
    dropout="resid_pdrop",
    embedding_dropout="embd_pdrop",
    positions="learned",
    uncounted=("add_cross_attention", "reorder_and_upcast_attn"),
    code=Code(holds_qkv=True, holds_block=True, softmax_as_scores=True),
    names={
        LAYER: "transformer.h.{}.",
        "embed_tokens": "transformer.wte",
        "position embeddings": "transformer.wpe",
        "final norm": "transformer.ln_f",
        "input norm": "ln_1",
        "post-attention norm": "ln_2",
        "qkv_proj": "attn.c_attn",
        "o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
)

FAMILIES = {"gpt2": GPT2}
