"""StarCoder (GPT-BigCode) and StarCoder2."""

from __future__ import annotations

from .base import Code, Family, defaults
from .gpt2 import GPT2

FAMILIES = {
    "gpt_bigcode": GPT2._replace(
        defaults={**GPT2.defaults, "activation_function": "gelu_pytorch_tanh", "multi_query": True},
        multi_query="multi_query",
        buffers="causality",
        uncounted=("add_cross_attention",),
        code=Code(holds_qkv=True, holds_block=True),
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
