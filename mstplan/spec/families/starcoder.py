"""StarCoder (GPT-BigCode) and StarCoder2."""

from __future__ import annotations

from .base import LAYER, Code, Family, defaults

FAMILIES = {
    "gpt_bigcode": Family(
        defaults(
            *(768, 12, 12, None, 50257, None),
            n_inner=None,
            max_position_embeddings=1024,
            activation_function="gelu_pytorch_tanh",
            tie_word_embeddings=True,
            resid_pdrop=0.1,
            attn_pdrop=0.1,
            embd_pdrop=0.1,
            multi_query=True,
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
        multi_query="multi_query",
        mlp_width="n_inner",
        activation="activation_function",
        attention_dropout="attn_pdrop",
        dropout="resid_pdrop",
        embedding_dropout="embd_pdrop",
        positions="learned",
        buffers="causality",
        uncounted=("add_cross_attention",),
        code=Code(holds_qkv=True, holds_block=True),
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
    ),
    "starcoder2": Family(
        defaults(
            *(3072, 30, 24, 2, 49152, 12288),
            hidden_act="gelu_pytorch_tanh",
            tie_word_embeddings=True,
            use_bias=True,
        ),
        norm="layer",
        norm_bias=True,
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        gated=False,
        windows="every",
        dropout="residual_dropout",
        embedding_dropout="embedding_dropout",
        names={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
    ),
}
