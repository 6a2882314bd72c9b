"""Published files of models with code of their own: read as the family of transformers that has their layers, or refused by name.

The fields are those of the files as published; totals are those of the published weights.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from mstplan.errors import ModelError, UnreadError
from mstplan.measuring.measurement import slice_config
from mstplan.spec.catalog import load_config
from mstplan.spec.config import read_config, text_of
from mstplan.spec.families import FAMILIES
from mstplan.spec.published import TRANSLATIONS, as_transformers_has_it
from mstplan.step.parameters import parameter_count
from mstplan.train.step import read_settings


def remote(model_type, **fields):
    """What such files have in common, beside sizes."""
    code = {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"}
    return {"model_type": model_type, "auto_map": code, "use_cache": True, "tie_word_embeddings": False, **fields}


LLAMA_7B = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
}
CHATGLM3_6B = remote(
    "chatglm",
    architectures=["ChatGLMModel"],
    **dict.fromkeys(("add_qkv_bias", "apply_query_key_layer_scaling", "attention_softmax_in_fp32"), True),
    **dict.fromkeys(
        ("bias_dropout_fusion", "multi_query_attention", "original_rope", "post_layer_norm", "rmsnorm"), True
    ),
    **dict.fromkeys(("add_bias_linear", "apply_residual_connection_post_layernorm", "fp32_residual_connection"), False),
    attention_dropout=0.0,
    ffn_hidden_size=13696,
    hidden_dropout=0.0,
    hidden_size=4096,
    kv_channels=128,
    layernorm_epsilon=1e-05,
    multi_query_group_num=2,
    num_attention_heads=32,
    num_layers=28,
    padded_vocab_size=65024,
    seq_length=8192,
    torch_dtype="float16",
    pad_token_id=0,
)
GLM_4_9B = {
    **CHATGLM3_6B,
    "num_layers": 40,
    "num_hidden_layers": 40,
    "padded_vocab_size": 151552,
    "vocab_size": 151552,
    "seq_length": 131072,
    "rope_ratio": 500,
    "classifier_dropout": None,
}
QWEN_7B = remote(
    "qwen",
    architectures=["QWenLMHeadModel"],
    attn_dropout_prob=0.0,
    bf16=True,
    emb_dropout_prob=0.0,
    fp16=False,
    fp32=False,
    hidden_size=4096,
    intermediate_size=22016,
    initializer_range=0.02,
    kv_channels=128,
    layer_norm_epsilon=1e-06,
    max_position_embeddings=32768,
    no_bias=True,
    num_attention_heads=32,
    num_hidden_layers=32,
    onnx_safe=None,
    rotary_emb_base=10000,
    rotary_pct=1.0,
    scale_attn_weights=True,
    seq_length=8192,
    tokenizer_class="QWenTokenizer",
    use_dynamic_ntk=True,
    use_flash_attn="auto",
    use_logn_attn=True,
    vocab_size=151936,
)
BAICHUAN2_7B = remote(
    "baichuan", **LLAMA_7B, _from_model_config=True, model_max_length=4096, vocab_size=125696, z_loss_weight=0
)
BAICHUAN2_13B = {name: value for name, value in BAICHUAN2_7B.items() if name != "max_position_embeddings"}
EXAONE = remote(
    "exaone",
    activation_function="silu",
    attention_dropout=0.0,
    embed_dropout=0.0,
    head_dim=128,
    hidden_size=4096,
    intermediate_size=14336,
    layer_norm_epsilon=1e-05,
    max_position_embeddings=32768,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_layers=32,
    rope_scaling={
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    rope_theta=1000000,
    vocab_size=102400,
)
INTERNLM2 = remote(
    "internlm2",
    **{**LLAMA_7B, "intermediate_size": 14336, "max_position_embeddings": 32768},
    attn_implementation="flash_attention_2",
    bias=False,
    num_key_value_heads=8,
    pretraining_tp=1,
    rope_scaling={"factor": 2.0, "type": "dynamic"},
    vocab_size=92544,
)
STABLELM = remote(
    "stablelm_epoch",
    **{**LLAMA_7B, "hidden_size": 2560, "intermediate_size": 6912},
    norm_eps=1e-5,
    num_key_value_heads=32,
    rope_pct=0.25,
    use_qkv_bias=False,
    vocab_size=50304,
)
FALCON = remote(
    "RefinedWebModel",
    **dict.fromkeys(("alibi", "bias", "apply_residual_connection_post_layernorm"), False),
    attention_dropout=0.0,
    hidden_size=4544,
    multi_query=True,
    n_head=71,
    n_layer=32,
    parallel_attn=True,
    vocab_size=65024,
)
LING_MINI = remote(
    "bailing_moe",
    architectures=["BailingMoeV2ForCausalLM"],
    attention_dropout=0.0,
    embedding_dropout=0.0,
    first_k_dense_replace=1,
    head_dim=128,
    hidden_act="silu",
    hidden_size=2048,
    intermediate_size=5120,
    max_position_embeddings=32768,
    moe_intermediate_size=512,
    moe_router_enable_expert_bias=True,
    moe_shared_expert_intermediate_size=512,
    n_group=8,
    norm_topk_prob=True,
    num_attention_heads=16,
    num_experts=256,
    num_experts_per_tok=8,
    num_hidden_layers=20,
    num_key_value_heads=4,
    num_shared_experts=1,
    output_dropout=0.0,
    partial_rotary_factor=0.5,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=600000,
    routed_scaling_factor=2.5,
    router_dtype="fp32",
    score_function="sigmoid",
    topk_group=4,
    torch_dtype="bfloat16",
    use_bias=False,
    use_qk_norm=True,
    use_qkv_bias=False,
    use_rmsnorm=True,
    vocab_size=157184,
)
PUBLISHED = {
    "chatglm3-6b": (CHATGLM3_6B, 6_243_584_000),
    "glm-4-9b": (GLM_4_9B, 9_399_951_360),
    "qwen-7b": (QWEN_7B, 7_721_324_544),
    "baichuan2-7b": (BAICHUAN2_7B, 7_505_973_248),
    "exaone-3.5-7.8b": (EXAONE, 7_818_448_896),
    "internlm2-7b": (INTERNLM2, 7_737_708_544),
    "stablelm-3b-4e1t": (STABLELM, 2_795_443_200),
    "ling-mini-2.0": (LING_MINI, 16_255_638_528),  # its file has 256 numbers more a layer, which are no parameters here
    "yi-6b": (remote("Yi", **LLAMA_7B, num_key_value_heads=4, vocab_size=64000), 6_061_035_520),
}


def in_transformers(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_settings(config), attn_implementation="sdpa")
    model.tie_weights()
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones_and_those_of_transformers_own_class(name):
    config, total = PUBLISHED[name]
    model = read_config(config, name)
    assert parameter_count(model)[0] == in_transformers(config) == total
    assert model.model_type in FAMILIES and "came with code of its own" in model.notes[0]


def test_sizes_stand_where_the_family_has_them():
    glm, qwen, exaone = (read_config(config, "m") for config in (GLM_4_9B, QWEN_7B, EXAONE))
    assert (glm.context, glm.dtype, glm.attention.kv_heads, glm.attention.rotary_dim) == (131072, "float16", 2, 64)
    assert (qwen.mlp.width, qwen.dtype, qwen.attention.kv_heads, qwen.attention.qkv_bias) == (
        11008,
        "bfloat16",
        32,
        True,
    )
    assert (exaone.layers, exaone.mlp.activation, exaone.attention.kv_heads) == (32, "silu", 8)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**CHATGLM3_6B, "ffn_hidden_size": None, "inner_hidden_size": 16384}, "no ffn_hidden_size, inner_hidden_size"),
        ({**CHATGLM3_6B, "post_layer_norm": False}, "post_layer_norm False"),
        ({**CHATGLM3_6B, "add_bias_linear": True}, "add_bias_linear True"),
        ({**CHATGLM3_6B, "vision_config": {"num_hidden_layers": 63}}, "vision_config"),
        ({**GLM_4_9B, "vocab_size": 7}, "padded_vocab_size 151552"),
        ({**QWEN_7B, "no_bias": False}, "no_bias False"),
        ({**QWEN_7B, "visual": {"layers": 48}}, "visual"),
        ({**EXAONE, "embed_dropout": 0.1}, "embed_dropout 0.1"),
        ({**INTERNLM2, "moe_experts": 4}, "moe_experts"),
        (BAICHUAN2_13B, "no max_position_embeddings"),
        ({**LING_MINI, "score_function": "softmax"}, "score_function 'softmax'"),  # as the first generation's
        ({**LING_MINI, "n_group": None}, "no n_group"),
        ({**LING_MINI, "layer_group_size": 5}, "layer_group_size"),  # Ling 2.5 mixes linear attention in
    ],
)
def test_other_layers_under_the_same_name_are_refused_by_the_field(config, says):
    with pytest.raises(UnreadError) as caught:
        read_config(config, "FILE")
    first, _ = str(caught.value).split("\n")
    assert says in first and f"(model_type '{config['model_type']}')" in first and len(first) < 400
    assert as_transformers_has_it(config) == config


def test_lings_shared_expert_of_another_width_is_refused():
    with pytest.raises(UnreadError, match="moe_shared_expert_intermediate_size is a field that mstplan does not read"):
        read_config({**LING_MINI, "moe_shared_expert_intermediate_size": 1024}, "FILE")


def test_falcons_first_files_are_read_as_its_later_ones():
    published = {name: value for name, value in FALCON.items() if name != "tie_word_embeddings"}
    model = read_config(published, "FILE")
    assert model.model_type == "falcon" and parameter_count(model)[0] == in_transformers(published) == 6_921_720_704


def test_nothing_else_is_touched(tmp_path):
    for model_type in ("llama", "qwen2", "glm", "falcon", "grok-9", None, ["qwen"]):
        config = {**LLAMA_7B, "model_type": model_type}
        assert as_transformers_has_it(config) is config
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load_config(tmp_path) == config
    assert not TRANSLATIONS.keys() & FAMILIES.keys()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CHATGLM3_6B))
    assert load_config(path) == as_transformers_has_it(CHATGLM3_6B)
    assert slice_config(load_config(path), 3, "m")["num_hidden_layers"] == 3


def said_of(config):
    try:
        return str(read_config(config, "m").name)
    except ModelError as e:
        return str(e)


@pytest.mark.parametrize("value", [None, True, -1, 0, "x", [1], {}, 1.5], ids=repr)
@pytest.mark.parametrize("name", PUBLISHED)
def test_any_value_gives_a_model_or_two_lines(name, value):
    config, _ = PUBLISHED[name]
    assert all(len(said_of({**config, field: value}).splitlines()) <= 2 for field in config)


# --- parts of a whole -------------------------------------------------------------------------------------------------------

QWEN_TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
INTERNVL = remote(
    "internvl_chat",
    architectures=["InternVLChatModel"],
    vision_config={"model_type": "intern_vit_6b"},
    llm_config=INTERNLM2,
)


@pytest.mark.parametrize("text_type", [{"model_type": "qwen2_5_omni_text"}, {}], ids=["said", "left out"])
def test_the_part_that_thinks_of_a_model_that_speaks(text_type):
    thinker = {
        "model_type": "qwen2_5_omni_thinker",
        "audio_config": {"d_model": 1280},
        "text_config": {**QWEN_TEXT, **text_type},
    }
    whole = {"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniModel"], "thinker_config": thinker}
    model = read_config({**whole, "talker_config": {"hidden_size": 896}, "token2wav_config": {}}, "m")
    assert model.model_type == "qwen2_5_omni_text" and not model.tied and "tower is not counted" in model.notes[0]
    assert parameter_count(model)[0] == 7_615_616_512  # Qwen2.5-7B's


def test_the_text_part_of_qwen3_vl():
    text = {**QWEN_TEXT, "head_dim": 128, "model_type": "qwen3_vl_text"}
    model = read_config({"model_type": "qwen3_vl", "vision_config": {"depth": 27}, "text_config": text}, "m")
    assert model.attention.qk_norm == "head" and not model.attention.qkv_bias


def test_a_part_may_have_come_with_code_of_its_own():
    model = read_config(INTERNVL, "m")
    assert parameter_count(model)[0] == in_transformers(INTERNVL) == 7_737_708_544
    assert any("internlm2" in note for note in model.notes) and any("tower" in note for note in model.notes)
    assert text_of(INTERNVL)["vocab_size"] == 92544 and text_of(INTERNLM2) is INTERNLM2


def test_a_flat_file_of_a_text_part_that_transformers_has_under_another_name():
    """Phi-4-multimodal's own code; its adapters and towers are left out."""
    phi = remote(
        "phi4mm",
        architectures=["Phi4MMForCausalLM"],
        **{**LLAMA_7B, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24},
        audio_processor={"name": "cascades"},
        embd_layer={"embedding_cls": "image_audio"},
        num_key_value_heads=8,
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        rope_scaling={"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        vocab_size=200064,
    )
    phi["tie_word_embeddings"] = True
    text, towers = 3_836_021_760, 907_982_272  # Phi-4-mini's
    assert parameter_count(read_config(phi, "m"))[0] == text and in_transformers(phi) == text + towers


def test_attention_that_is_not_causal_everywhere_is_left_to_the_trace():
    text = {**LLAMA_7B, "model_type": "gemma", "vocab_size": 257216}
    whole = {"model_type": "paligemma", "vision_config": {"num_hidden_layers": 27}, "text_config": text}
    assert read_config(whole, "m").model_type == "gemma"
    text["use_bidirectional_attention"] = True
    with pytest.raises(UnreadError, match=r"^FILE: use_bidirectional_attention is set, "):
        read_config(whole, "FILE")
    with pytest.raises(ModelError, match="encoder-only"):
        read_config(text, "FILE")
