"""GPT-J and CodeGen: transformers has eager attention alone for them, in fp32."""

from __future__ import annotations

from .base import LAYER, Code, Family, defaults

_NAMES = {
    LAYER: "transformer.h.{}.",
    "embed_tokens": "transformer.wte",
    "final norm": "transformer.ln_f",
    "input norm": "ln_1",
    "q_proj": "attn.q_proj",
    "k_proj": "attn.k_proj",
    "v_proj": "attn.v_proj",
    "qkv_proj": "attn.qkv_proj",
    "o_proj": "attn.out_proj",
    "mlp.up_proj": "mlp.fc_in",
    "mlp.down_proj": "mlp.fc_out",
}

GPTJ = Family(
    defaults(
        *(4096, 28, 16, None, 50400, None),
        n_inner=None,
        max_position_embeddings=2048,
        activation_function="gelu_new",
        rotary_dim=64,
        dtype="float32",  # its files are older than the field
    ),
    norm="layer",
    norm_bias=True,
    block="one-norm",
    qkv_bias=False,
    out_bias=False,
    mlp_bias=True,
    head_bias=True,
    gated=False,
    own_heads=False,
    mlp_width="n_inner",
    activation="activation_function",
    attention_dropout="attn_pdrop",
    dropout="resid_pdrop",
    embedding_dropout="embd_pdrop",
    rotary_width="rotary_dim",
    buffers="sinusoids",
    has_sdpa=False,
    eager_only=True,
    own_flash=True,
    code=Code(
        rotary="every two",
        fp32_scores=True,
        attends_itself=True,
        returns_weights=True,
        adds_branches_first=True,
        holds_qkv=True,
    ),
    names=_NAMES,
)

FAMILIES = {
    "gptj": GPTJ,
    "codegen": GPTJ._replace(
        fused_qkv=True,
        own_flash=False,
        code=GPTJ.code._replace(copies_heads=True, indexes_sinusoids=True),
    ),
}
