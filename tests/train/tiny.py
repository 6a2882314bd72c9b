"""A small model of any of transformers' causal-LM classes, in float64: its config shrunk by the names of its fields."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import torch
from transformers import Gemma4TextConfig, PreTrainedConfig, PreTrainedModel, SiglipVisionConfig
from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig

VOCABULARY, HIDDEN, WIDTH, EXPERTS = 61, 32, 44, 5

# The first pattern that matches a field's whole name gives its value. Fields that default to None or to a list are left alone.
RULES: list[tuple[str, Any]] = [
    (r".*(dropout|dropout_prob|dropout_p|layerdrop|jitter_noise)|.*_pdrop", 0.0),
    (r"(decoder_|pronunciation_|shape_)?vocab_size(_per_layer_input)?|encoder_hash_byte_group_vocab", VOCABULARY),
    (
        r"hidden_size(_global)?|backbone_hidden_size|d_model|n_embd|emb_dim|word_embed_proj_dim|embedding_size|lru_width",
        HIDDEN,
    ),
    (r"hidden_size_per_layer_input|(input|pronunciation|shape)_embed(ding)?_(size|dim)|router_hidden_size", 16),
    (
        r"(.*_)?intermediate_size|.*ffn_dim|.*ffn_hidden_size|intermediate_size_mlp|d_inner|dim_ff|dff|feed_forward_size|block_multiple_of",
        WIDTH,
    ),
    (r".*(num_key_value_heads|num_kv_heads|num_query_groups|num_key_heads)", 2),
    (r".*(num_attention_heads|attention_heads|num_heads|n_heads?|num_value_heads)", 4),
    (r"(.*_)?head_dim|d_head|dim_head|kv_channels|mamba_d_head|rotary_dim|attention_head_size|d_rel", 8),
    (r".*_rank|hc_lowrank|output_embedding_size", 8),
    (
        r"max_position_embeddings|n_positions|max_seq_len|context_length|n_ctx|max_(source|target)_positions|model_max_length",
        64,
    ),
    (
        r"sliding_window(_size)?|(attention_)?window_size|attention_chunk_size|local_attention.*|index_topk|rel_extent|zero_expert_num",
        4,
    ),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_?groups|o_groups", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_(hidden_)?layers|n_layers?|(num_)?(de|en)coder_layers|num_blocks|n_layers_per_attn_res_block", 2),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size|(mamba_)?chunk_size|block_size|index_block_size", 4),
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id|decoder_start_token_id|sep_token_id", 2),
    (r"use_cache", False),
]

_MULTI_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_NGRAMS = {"ple_layer_ids": [1], "heads_per_ngram": 2, "ngram_vocab_size_base": 50, "split_ngram_parts": 1}
_SLIDING_LATENT = {
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}

# By model type, what the names of fields do not tell.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "blt_patcher": {"vocab_size": VOCABULARY + 1},  # to tell its logits from the model's
    "cohere_compass_text": {
        "rope_parameters": {"sliding_attention": _MULTI_ROPE, "full_attention": _MULTI_ROPE},
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dbrx": {"attn_config": DbrxAttentionConfig(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0)},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": _SLIDING_LATENT,
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "git_vision_model": {"image_size": 4, "patch_size": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling_text": {"vocab_size": VOCABULARY + 3, "unpadded_vocab_size": VOCABULARY},
    "inkling2_text": {"vocab_size": VOCABULARY + 3, "unpadded_vocab_size": VOCABULARY},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": {"num_local_experts": EXPERTS + 1},  # its attention is a mixture of experts too
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {**_INDEXER, **_NGRAMS},
    "recurrent_gemma": {"intermediate_size": 2 * WIDTH, "block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [3, 4],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"num_experts": EXPERTS - 1, "num_experts_per_tok": 1},  # and one that does nothing
}
ALWAYS = ("pad_token_id", "bos_token_id", "eos_token_id")


def tiny_config(config_cls: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    """A config of the class with 2 layers, or as many as show every kind of layer that its defaults have."""
    own = {**OVERRIDES.get(config_cls.model_type, {}), **more}
    normal = config_cls(**{name: value for name, value in own.items() if isinstance(value, PreTrainedConfig)})
    declared = {field.name: field.default for field in fields(config_cls)}
    changes = {name: _small(name, default) for name, default in declared.items()}
    changes.update(_fewer_layers(normal, declared))
    if "qk_nope_head_dim" in declared:  # latent attention: as many key and value heads as query heads
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    for name in normal.sub_configs:
        if isinstance(getattr(normal, name), PreTrainedConfig):
            changes[name] = tiny_config(type(getattr(normal, name)))
    return config_cls(**{**changes, **own})


def _small(name: str, default: Any) -> Any:
    if not isinstance(default, int | float) and name not in ALWAYS:
        return default
    value = next((value for pattern, value in RULES if re.fullmatch(pattern, name)), default)
    return int(value) if isinstance(default, int) and not isinstance(default, bool) else value


def _fewer_layers(config: PreTrainedConfig, declared: dict[str, Any]) -> dict[str, Any]:
    """The fields that list something for every layer, cut to the first layer of every kind, and the number of layers."""
    values, count = config.to_dict(), getattr(config, "num_hidden_layers", None)
    lists = {n: v for n, v in values.items() if isinstance(v, list) and len(v) == count and v != list(range(count))}
    lists = {n: v for n, v in lists.items() if n in declared and not isinstance(declared[n], int)}
    if not lists:
        return {}
    kept, seen = [], set()
    for i in range(count):
        kinds = {(name, values[i]) for name, values in lists.items() if isinstance(values[i], str)}
        if not kinds <= seen:
            kept.append(i)
            seen |= kinds
    kept = sorted(kept + [i for i in range(count) if i not in kept][: max(0, 2 - len(kept))])
    number = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    found = {name: [values[i] for i in kept] for name, values in lists.items()}
    return {**found, number: len(kept)} if number in declared else found


_OWN_NONE = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 2,
}  # as it must be
OVERRIDES["gemma4_assistant"] = {"text_config": tiny_config(Gemma4TextConfig, **_OWN_NONE)}


def tiny_model(cls: type[PreTrainedModel], config_cls: type[PreTrainedConfig], **more: Any) -> PreTrainedModel:
    """A model of the class with random weights, in float64 and training mode, without dropout. Constants (norms, gates,
    biases, scales) are moved off 0 and 1 and small weights made larger, so that whatever is left out shows in the loss."""
    torch.manual_seed(0)
    config = tiny_config(config_cls, **more)
    if config.model_type == "gemma3n":  # its vision tower is timm's; a step on text does not touch it
        config.__dict__["vision_config"] = tiny_config(
            SiglipVisionConfig, vocab_size=8, vocab_offset=53, rms_norm_eps=1e-6
        )
    model = cls._from_config(config, attn_implementation="eager", experts_implementation="eager").double().train()
    with torch.no_grad():
        for weight in model.parameters():
            spread = weight.std() if weight.numel() > 1 else torch.tensor(1.0)
            if spread == 0:
                weight.add_(torch.randn_like(weight), alpha=0.1)
            elif spread < 0.1:
                weight.mul_(0.2 / spread)
    return model


def tiny_batch(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """What a step of the model takes: token ids and labels of 2 sequences of 13 tokens, some not trained on."""
    tokens = 12 if config.model_type == "reformer" else 13  # Reformer takes whole attention chunks only
    books = getattr(config, "num_codebooks", 1) if "musicgen" in config.model_type else 1
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2 * books, tokens), generator=generator)
    labels = ids.clone() if books == 1 else ids.view(2, books, tokens).transpose(1, 2).clone()
    labels[0, : tokens // 3] = -100
    batch = {"input_ids": ids, "labels": labels}
    if config.model_type == "git":
        size = config.vision_config.image_size
        batch["pixel_values"] = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    return batch
