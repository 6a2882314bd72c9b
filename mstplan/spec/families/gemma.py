"""Gemma, Gemma 2 and the text parts of Gemma 3, 3n and 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Code, Family, Routed, defaults

GEMMA: Mapping[str, Any] = {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
}
PER_LAYER: Mapping[str, str] = {
    "embed_tokens_per_layer": "model.embed_tokens_per_layer",
    "per_layer_model_projection": "model.per_layer_model_projection",
    "per-layer inputs' norm": "model.per_layer_projection_norm",
    "per-layer norm": "post_per_layer_input_norm",
}
"""Names of what inputs of each layer go through."""
GEMMA2 = Family(
    defaults(
        *(2304, 26, 8, 4, 256000, 9216),
        sliding_window=4096,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
        **GEMMA,
    ),
    norm="gemma",
    block="sandwich",
    windows="listed",
    period=2,
    activation="hidden_activation",
    softcap=True,
    scaled_embedding=True,
    no_sdpa_from=(5, 21),
)

GEMMA3N = Family(
    defaults(
        *(2048, 35, 8, 2, 262400, 16384),
        sliding_window=512,
        max_position_embeddings=32768,
        hidden_size_per_layer_input=256,
        vocab_size_per_layer_input=262144,
        final_logit_softcapping=30.0,
        num_kv_shared_layers=15,
        altup_num_inputs=4,
        altup_correct_scale=True,
        laurel_rank=64,
        **GEMMA,
    ),
    norm="rms-fp32",
    block="sandwich",
    windows="listed",
    period=5,
    activation="hidden_activation",
    scaled_embedding=True,
    qk_norm="head",
    values="normed",
    per_layer_inputs=True,
    shared_keys=True,
    streams=True,
    only={"altup_active_idx": 0, "altup_num_inputs": 4},
    code=Code(local_rotary=True),
    names={
        **PER_LAYER,
        **{
            f"altup_{part}.{n}": f"model.altup_{part}.{n}"
            for part in ("projections", "unembed_projections")
            for n in range(3)
        },
        "Laurel's norm": "laurel.post_laurel_norm",
        "router norm": "altup.router_norm",
    },
    tiny={"head_dim": 32, "num_kv_shared_layers": 0},
)
FAMILIES = {
    "gemma3n_text": GEMMA3N,
    "gemma": Family(
        defaults(3072, 28, 16, 16, 256000, 24576, **GEMMA),
        norm="gemma",
        scaled_embedding=True,
        gelu_is_tanh=True,
    ),
    "gemma2": GEMMA2,
    "vaultgemma": GEMMA2._replace(block="pre", names={"post-attention norm": "pre_feedforward_layernorm"}),
    "gemma3_text": GEMMA2._replace(
        # The published multimodal files leave out the context, too.
        defaults=defaults(
            *(2304, 26, 8, 4, 262208, 9216), sliding_window=4096, max_position_embeddings=131072, **GEMMA
        ),
        period=6,
        qk_norm="head",
        softcap=False,  # the field exists, the attention does not use it
        no_sdpa_from=None,
        code=Code(local_rotary=True),
    ),
    "gemma4_text": Family(
        defaults(
            *(2304, 30, 8, 4, 262144, 9216),
            sliding_window=512,
            max_position_embeddings=131072,
            global_head_dim=512,
            hidden_size_per_layer_input=256,
            vocab_size_per_layer_input=262144,
            **GEMMA,
        ),
        norm="rms-fp32",
        block="sandwich",
        windows="listed",
        period=6,
        full_last=True,
        activation="hidden_activation",
        scaled_embedding=True,
        qk_norm="head",
        values="normed",
        global_attention=True,
        per_layer_inputs=True,
        shared_keys=True,
        wide_borrowers="use_double_wide_mlp",
        only={"use_bidirectional_attention": ("vision",)},  # of images alone
        experts=Routed(
            may_be_none=True,
            switch="enable_moe_block",
            beside_mlp=True,
            fields=("enable_moe_block",),
        ),
        code=Code(local_rotary=True, scales_output=True, scaled_router=True, fp32_expert_scores=True),
        names={
            **PER_LAYER,
            "MLP norm": "post_feedforward_layernorm_1",
            "experts norm": "pre_feedforward_layernorm_2",
            "post-experts norm": "post_feedforward_layernorm_2",
            "router": "router.proj",
            "experts.gate_up_proj": "experts.gate_up_proj",
            "experts.down_proj": "experts.down_proj",
        },
        tiny={"head_dim": 32, "global_head_dim": 64},
    ),
}
