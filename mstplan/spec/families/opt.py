"""OPT."""

from __future__ import annotations

from .base import LAYER, Code, Family, defaults

FAMILIES = {
    "opt": Family(
        defaults(
            *(768, 12, 12, None, 50272, None),
            ffn_dim=3072,
            max_position_embeddings=2048,
            activation_function="relu",
            tie_word_embeddings=True,
            dropout=0.1,
            enable_bias=True,
            do_layer_norm_before=True,
            layer_norm_elementwise_affine=True,
        ),
        norm="layer",
        norm_bias=True,
        qkv_bias="enable_bias",
        out_bias="enable_bias",
        mlp_bias="enable_bias",
        gated=False,
        own_heads=False,
        mlp_width="ffn_dim",
        activation="activation_function",
        dropout="dropout",
        embedding_dropout="",
        positions="learned",
        first_position=2,
        uncounted=("_remove_final_layer_norm",),
        only={
            "do_layer_norm_before": True,  # OPT-350M's are not
            "layer_norm_elementwise_affine": True,
            "word_embed_proj_dim": "hidden_size",
            "layerdrop": 0,
        },
        code=Code(counts_positions=True, scales_queries=True, frees_mlp_input=True),
        tiny={"ffn_dim": 704},
        names={
            LAYER: "model.decoder.layers.{}.",
            "embed_tokens": "model.decoder.embed_tokens",
            "position embeddings": "model.decoder.embed_positions",
            "final norm": "model.decoder.final_layer_norm",
            "input norm": "self_attn_layer_norm",
            "post-attention norm": "final_layer_norm",
            "o_proj": "self_attn.out_proj",
            "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2",
        },
    ),
}
