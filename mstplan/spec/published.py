"""Published files of models that came with code of their own, in the fields of the family of transformers that has their layers.

transformers has no class for them, so neither the formula nor the trace would know their files; the layers themselves are those of a
family that it has, to which people convert their weights. A translation names every field that decides memory: what it does not name
is refused (`unread.py`), as is a value that means other layers. Loaded for files of these model types alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from ..errors import UnreadError, quoted
from . import unread

Fields = Mapping[str, object]


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


class Translation(NamedTuple):
    """A model type's fields in those of a family. Names that both share need no mention."""

    family: str  # its model_type
    names: Mapping[str, str] = MappingProxyType({})  # the file's name of a field: the family's
    shared: frozenset[str] = frozenset()  # fields beside a Llama's that file and family have under one name
    fixed: Fields = MappingProxyType(
        {}
    )  # fields that must have this value where the file has them, or the layers are others
    needed: frozenset[str] = frozenset()  # fields without which it is another model of that type
    neutral: frozenset[str] = frozenset()  # fields that decide no memory, beside those that decide none anywhere
    adds: Fields = MappingProxyType({})  # the family's fields that the file leaves out
    fit: Callable[[dict[str, object]], None] | None = None  # the rest, in place


_DTYPE_FLAGS = _word_set("bf16 fp16 fp32")


def _fit_chatglm(fields: dict[str, object]) -> None:
    if not fields.pop("multi_query_attention", False):
        fields["num_key_value_heads"] = fields.get("num_attention_heads")


def _fit_qwen(fields: dict[str, object]) -> None:
    width = fields.get("intermediate_size")  # of both halves of a gated MLP together
    if isinstance(width, int) and not isinstance(width, bool) and width % 2 == 0:
        fields["intermediate_size"] = width // 2
    fields["num_key_value_heads"] = fields.get("num_attention_heads")
    kinds = {
        "bfloat16": fields.pop("bf16", None),
        "float16": fields.pop("fp16", None),
        "float32": fields.pop("fp32", None),
    }
    if (kind := next((kind for kind, is_set in kinds.items() if is_set is True), None)) is not None:
        fields.setdefault("torch_dtype", kind)


def _fit_refined_web(fields: dict[str, object]) -> None:
    if "num_kv_heads" in fields:  # the 40B's
        fields["new_decoder_architecture"] = True


def _fit_ling(fields: dict[str, object]) -> None:
    width, number = fields.get("moe_intermediate_size"), fields.get("n_shared_experts")
    if isinstance(width, int) and isinstance(number, int) and fields.get(_LING_SHARED) == width * number:
        del fields[_LING_SHARED]  # any other width is refused by name


_LING_SHARED = "moe_shared_expert_intermediate_size"
_LING = Translation(  # Ling 2.0 and Ring 2.0; the first generation's router is another
    "glm4_moe",
    {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts", "use_qkv_bias": "attention_bias"},
    _word_set(
        f"first_k_dense_replace moe_intermediate_size n_group norm_topk_prob num_experts_per_tok num_nextn_predict_layers routed_scaling_factor "
        f"topk_group use_qk_norm {_LING_SHARED}"
    ),
    {
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "use_bias": False,
        "use_rmsnorm": True,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
        "norm_head": False,
        "router_dtype": "fp32",
        "use_sliding_window": False,
    },
    needed=_word_set("first_k_dense_replace head_dim n_group num_experts score_function use_qk_norm"),
    neutral=_word_set("mtp_loss_scaling_factor norm_softmax max_window_layers sliding_window"),
    fit=_fit_ling,
)
_INTERNLM = Translation(
    "llama", {"bias": "attention_bias"}, neutral=_word_set("rotary use_dynamic_ntk"), adds={"attention_bias": True}
)
_REFINED_WEB = Translation(
    "falcon",
    {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads"},
    _word_set("multi_query multi_query_attention parallel_attn alibi bias hidden_dropout"),
    neutral=_word_set("apply_residual_connection_post_layernorm layer_norm_epsilon"),
    fit=_fit_refined_web,
)
TRANSLATIONS: Mapping[str, Translation] = {
    # ChatGLM2, ChatGLM3, GLM-4-9B, CodeGeeX
    "chatglm": Translation(
        "glm",
        {
            "num_layers": "num_hidden_layers",
            "ffn_hidden_size": "intermediate_size",
            "padded_vocab_size": "vocab_size",
            "kv_channels": "head_dim",
            "multi_query_group_num": "num_key_value_heads",
            "add_qkv_bias": "attention_bias",
            "seq_length": "max_position_embeddings",
        },
        _word_set("multi_query_attention"),
        {
            "rmsnorm": True,
            "post_layer_norm": True,
            "add_bias_linear": False,
            "apply_residual_connection_post_layernorm": False,
            "fp32_residual_connection": False,
            "hidden_dropout": 0.0,
            "pre_seq_len": None,
        },
        needed=frozenset({"ffn_hidden_size", "num_layers", "padded_vocab_size"}),
        neutral=_word_set(
            "apply_query_key_layer_scaling attention_softmax_in_fp32 bias_dropout_fusion layernorm_epsilon original_rope rope_ratio "
            "prefix_projection quantization_bit"
        ),
        adds={"partial_rotary_factor": 0.5, "tie_word_embeddings": False, "hidden_act": "silu"},
        fit=_fit_chatglm,
    ),
    # Qwen, before Qwen1.5 became qwen2
    "qwen": Translation(
        "qwen2",
        {"kv_channels": "head_dim"},
        fixed={"no_bias": True, "attn_dropout_prob": 0.0, "emb_dropout_prob": 0.0, "rotary_pct": 1.0},
        needed=frozenset({"intermediate_size"}),
        neutral=_DTYPE_FLAGS
        | _word_set(
            "layer_norm_epsilon onnx_safe rotary_emb_base scale_attn_weights use_dynamic_ntk use_logn_attn use_cache_quantization "
            "use_cache_kernel softmax_in_fp32"
        ),
        adds={"use_sliding_window": False, "tie_word_embeddings": False, "hidden_act": "silu"},
        fit=_fit_qwen,
    ),
    # the 7B; the 13B has ALiBi instead of rotary positions, and no max_position_embeddings
    "baichuan": Translation(
        "llama", needed=frozenset({"max_position_embeddings"}), neutral=_word_set("_from_model_config")
    ),
    "exaone": Translation(
        "llama",
        {"num_layers": "num_hidden_layers", "activation_function": "hidden_act"},
        fixed={"embed_dropout": 0.0},
        neutral=_word_set("layer_norm_epsilon"),
    ),
    "internlm": _INTERNLM,
    "internlm2": _INTERNLM._replace(adds={}),
    "Yi": Translation("llama"),
    "stablelm_epoch": Translation(
        "stablelm",
        {"rope_pct": "partial_rotary_factor"},
        _word_set("use_qkv_bias"),
        neutral=_word_set("norm_eps rotary_scaling_factor"),
    ),
    "kimi_k2": Translation(
        "deepseek_v3",
        shared=_word_set(
            "first_k_dense_replace kv_lora_rank moe_intermediate_size moe_layer_freq n_group n_routed_experts n_shared_experts norm_topk_prob "
            "num_experts_per_tok num_nextn_predict_layers q_lora_rank qk_nope_head_dim qk_rope_head_dim routed_scaling_factor topk_group v_head_dim"
        ),
        fixed={"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        needed=frozenset({"kv_lora_rank", "n_routed_experts"}),
        neutral=_word_set("aux_loss_alpha ep_size seq_aux"),
    ),
    "bailing_moe": _LING,
    "bailing_moe_v2": _LING,
    "RefinedWebModel": _REFINED_WEB,
    "RefinedWeb": _REFINED_WEB,
}


def in_known_fields(config: Fields, name: str) -> Fields:
    """The file in the fields of a family of transformers, where it is of a model that came with code of its own; else as it is.

    `name` names it in messages. Raises UnreadError for what the translation does not know.
    """
    model_type = config.get("model_type")
    translation = TRANSLATIONS.get(model_type) if isinstance(model_type, str) else None
    if translation is None:
        return config
    assert isinstance(model_type, str)
    _check(config, name, model_type, translation)
    translated: dict[str, object] = {**translation.adds, "model_type": translation.family}
    for field, value in config.items():
        if field not in ("model_type", "attn_implementation", *translation.fixed, *translation.neutral - _DTYPE_FLAGS):
            translated[translation.names.get(field, field)] = value
    if translation.fit is not None:
        translation.fit(translated)
    return translated


def _check(config: Fields, name: str, model_type: str, translation: Translation) -> None:
    missing = sorted(field for field in translation.needed if config.get(field) is None)
    known = {*translation.names, *translation.fixed, *translation.neutral, *translation.shared}
    strange = [field for field in unread.unread_fields(config) if field not in known]
    others = [field for field, value in translation.fixed.items() if field in config and config[field] != value]
    others += [
        field
        for field, shared in translation.names.items()
        if None not in (config.get(field), config.get(shared)) and config[field] != config[shared]
    ]
    if missing or strange or others:
        which = [*(f"no {field}" for field in missing), *strange, *(f"{field} {config[field]!r}" for field in others)]
        unread.refuse_unread(
            name,
            f"mstplan reads files of this family (model_type {quoted(model_type)}) where their layers are those of "
            f"transformers' {translation.family}; this one has {unread.list_names(which)}.",
        )


def as_transformers_has_it(config: Fields) -> Fields:
    """`in_known_fields` for who runs transformers' code: what the translation does not know stays as it is."""
    try:
        return in_known_fields(config, "")
    except UnreadError:
        return config


def origin_note(model_type: str) -> str:
    """What to know of a file that was translated."""
    return (
        f"model_type {quoted(model_type)} came with code of its own: planned as transformers' {TRANSLATIONS[model_type].family}, "
        "which has the same weights"
    )
