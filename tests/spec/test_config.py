"""config.json -> Model, against transformers' own reading of the same files."""

import json
import math
import sys
from dataclasses import fields

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma4TextConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mstplan import profiles
from mstplan.errors import ModelError, UnreadError
from mstplan.spec.catalog import model_names
from mstplan.spec.config import _ACTIVATIONS, _ALIASES, _REFUSED_TYPES, read_config
from mstplan.spec.families import FAMILIES, LLAMA_LIKE
from mstplan.spec.model import GatedDelta, Latent, LayerKind, Model, ShortConv
from mstplan.step.parameters import parameter_count
from tests.train.tiny import tiny_config

NAMES = model_names()
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "intermediate_size": 128,
}


def shipped(name):
    return json.loads((profiles.ROOT / "models" / f"{name}.json").read_text(encoding="utf-8"))


def of_layers(config):
    """The config of layers with a window, where kinds of layers have one each (Gemma 4)."""
    return config.per_layer_config["sliding_attention"] if config.model_type == "gemma4_text" else config


def theirs(config):
    return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))


def their_windows(config):
    """The window of each layer, as the modelling code of transformers takes it."""
    family, layers = config.model_type, config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if family in ("mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2"):
        return [window] * layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    if family == "llama4_text":
        return [config.attention_chunk_size if kind == "chunked_attention" else None for kind in kinds]
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    return [window if kind == "sliding_attention" else None for kind in kinds]


def their_kv_heads(config):
    """Heads of keys, as the modelling code of transformers takes them."""
    if config.model_type == "falcon":
        return config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1
    return getattr(of_layers(config), "num_key_value_heads", None) or config.num_attention_heads


NEEDED = {
    "hunyuan_v1_moe": {"num_experts": 16},
    "dots1": {"n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 16, "head_dim": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
}
"""Fields without which transformers makes no such model, or none that runs."""


def small(model_type, **changes):
    square = {"head_dim": 8} if FAMILIES.get(model_type, LLAMA_LIKE).square_output else {}
    return {
        **LLAMA,
        "model_type": model_type,
        "num_key_value_heads": 8,
        **square,
        **NEEDED.get(model_type, {}),
        **changes,
    }


def refusal(config, name="some-model"):
    with pytest.raises(ModelError) as caught:
        read_config(config, name)
    message = str(caught.value)
    assert name in message
    assert len(message.splitlines()) <= 2 and "Traceback" not in message
    return message


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_shipped_model_is_what_transformers_reads(name):
    config, model = theirs(shipped(name)), read_config(shipped(name), name)
    assert model.name == name and model.model_type == config.model_type
    assert model.hidden == config.hidden_size
    assert model.layers == config.num_hidden_layers
    assert model.vocab == config.vocab_size
    assert model.context == getattr(config, "max_position_embeddings", None)
    assert model.tied is config.tie_word_embeddings
    if model.attends:
        assert model.attention.heads == config.num_attention_heads
        assert model.attention.kv_heads == their_kv_heads(config)
    assert [kind.window for kind in model.layer_kinds] == their_windows(config)
    if model.attention.latent is None:
        if model.attends:
            derived = config.hidden_size // config.num_attention_heads
            assert model.attention.head_dim == (getattr(of_layers(config), "head_dim", None) or derived)
    else:
        assert model.attention.head_dim == config.qk_head_dim
        assert model.attention.v_head_dim == config.v_head_dim
    rope = getattr(config, "rope_parameters", None) or {}
    if FAMILIES[model.model_type].positions == "rotary" and model.attention.latent is None and model.attends:
        turned = getattr(config, "position_embedding_type", "rope") == "rope"
        share = rope.get("partial_rotary_factor", 1.0) if turned else 0
        width = FAMILIES[model.model_type].rotary_width
        turns = int(model.attention.head_dim * share) if width is None else getattr(config, width)
        assert model.attention.rotary_dim == turns
    if model.mlp is not None and not FAMILIES[model.model_type].adjusted_width:
        width = getattr(config, FAMILIES[model.model_type].mlp_width, None) or 4 * config.hidden_size
        assert model.mlp.width == (width[0] if isinstance(width, list) else width)
    if model.experts is not None:
        assert model.experts.per_token == config.num_experts_per_tok
        numbers = [getattr(config, name, None) for name in _ALIASES["num_experts"]]
        assert model.experts.number in numbers


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_defaults_are_those_of_transformers(model_type):
    config = CONFIG_MAPPING[model_type]()
    rope = getattr(config, "rope_parameters", None) or {}
    for key, value in FAMILIES[model_type].defaults.items():
        if key == "dtype" or (key == "intermediate_size" and value is None):
            continue
        if key.endswith("head_dim") and "global_head_dim" in FAMILIES[model_type].defaults:  # of kinds of layers
            kind = "full_attention" if key == "global_head_dim" else "sliding_attention"
            assert config.per_layer_config[kind].head_dim == value
            continue
        if key in ("hidden_act", "hidden_activation") and not hasattr(config, key):
            continue
        if value is None and (FAMILIES[model_type].parted or model_type == "mamba2"):
            continue  # told by a list of layers; there is no attention and no MLP
        if key == FAMILIES[model_type].mlp_width and value is None:
            assert getattr(config, key, None) in (None, 4 * config.hidden_size)
        elif key == "num_key_value_heads" and value is None:
            assert FAMILIES[model_type].multi_query or getattr(config, key, None) in (None, config.num_attention_heads)
        elif key == "sliding_window" and getattr(config, "use_sliding_window", True) is False:
            assert type(config)(use_sliding_window=True).sliding_window == value
        elif key == "partial_rotary_factor":
            assert rope[key] == value
        elif isinstance(getattr(config, key, None), list):  # one for each layer
            assert set(getattr(config, key)) == {value}
        else:
            assert value in [getattr(config, name) for name in _ALIASES.get(key, (key,)) if hasattr(config, name)], key


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_absent_fields_are_filled_as_transformers_fills_them(model_type):
    given = small(model_type)
    if 32 % (FAMILIES[model_type].defaults["num_key_value_heads"] or 32) == 0:
        del given["num_key_value_heads"]
    given.update(num_attention_heads=32, hidden_size=256, num_hidden_layers=9, num_experts_per_tok=2)
    if "layer_types" in given:
        given["layer_types"] = given["layer_types"][:1] * 9
    if "num_heads" in given:
        given["num_heads"] *= 4
    config, model = CONFIG_MAPPING[model_type].from_dict(dict(given)), read_config(given, model_type)
    assert model.tied is getattr(config, "tie_word_embeddings", False)  # of a text part the whole says it
    assert [kind.window for kind in model.layer_kinds] == their_windows(config)
    if model.attention.latent is None and model_type != "mamba2":
        assert model.attention.kv_heads == their_kv_heads(config)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_has_sdpa_is_what_transformers_says(model_type):
    model_class = class_of(CONFIG_MAPPING[model_type]())
    assert read_config(small(model_type, num_experts_per_tok=2), model_type).has_sdpa is model_class._supports_sdpa


def parameters(model):
    """How many weights a model has, by what was read from its file: every size and switch counts."""
    hidden, norm = model.hidden, model.hidden * (2 if model.norm_bias else 1)
    norms = norm * {"sandwich": 4, "one-norm": 1}.get(model.block, 2)
    layers = sum(
        norms // (1 if kind.feed_forward and kind.mixer != "none" else 2)
        + mixing_weights(model.of_kind(kind), kind)
        + (mlp_weights(model.of_kind(kind), kind.experts) if kind.feed_forward else 0)
        for kind in model.layer_kinds
    )
    if model.per_layer is not None:
        width, every = model.per_layer.width, model.per_layer.width * model.layers
        layers += model.layers * (2 * width + 1) * hidden + every * (model.per_layer.vocab + hidden) + width
    if (
        model.altup is not None
    ):  # projections in and out; of a layer Laurel, the router, its norm, coefficients and scale
        n, rank, _ = model.altup
        layers += 2 * (n - 1) * hidden * hidden
        layers += model.layers * ((2 * rank + 1 + n + 1 + 1) * hidden + n**3 + n * n)
    head = model.vocab * (hidden * (not model.tied) + model.head_bias)
    return layers + norm * (1 + model.embedding_norm) + head + hidden * (model.vocab + model.learned_positions)


def mixing_weights(model, kind):
    sizes, hidden = model.mixer, model.hidden
    if kind.mixer in ("attention", "none"):
        return attention_weights(model, kind) if kind.attends else 0
    if isinstance(sizes, ShortConv):
        return 4 * hidden * hidden + sizes.kernel * hidden + 5 * hidden * sizes.bias
    if isinstance(sizes, GatedDelta):
        keys, values = sizes.key_heads * sizes.key_dim, sizes.value_heads * sizes.value_dim
        own = 2 * sizes.value_heads + sizes.value_dim + (2 * keys + values) * sizes.kernel  # in one product or apart
        return hidden * (2 * keys + 3 * values + 2 * sizes.value_heads) + own
    inner = sizes.heads * sizes.head_dim
    channels = inner + 2 * sizes.groups * sizes.state
    into = inner + channels + sizes.heads
    own = 3 * sizes.heads + inner * (sizes.norm != "none") + channels * (sizes.kernel + sizes.conv_bias)
    beside = attention_weights(model, kind) if kind.attends else 0
    return hidden * (into + inner) + into * sizes.bias + hidden * sizes.out_bias + own + beside


def attention_weights(model, kind):
    a, hidden = model.attention, model.hidden
    out = a.heads * a.v_head_dim * hidden + hidden * a.out_bias
    if a.latent is not None:
        low = a.latent.kv_rank + a.latent.rope_dim
        keys = hidden * low + low * a.qkv_bias + a.latent.kv_rank
        expanded = a.latent.kv_rank * a.heads * (a.latent.nope_dim + a.v_head_dim)
        rank, width = a.latent.q_rank, a.heads * a.head_dim
        queries = hidden * width if rank is None else rank * (hidden + a.qkv_bias + 1 + width)
        return queries + keys + expanded + out + indexer_weights(a.latent, hidden)
    made = 0 if kind.keys == "borrows" else 1 if a.values == "keys" else 2  # of keys and values
    width = (a.heads * (1 + a.gated_output) + made * a.kv_heads) * a.head_dim
    normed = {
        "none": 0,
        "unweighted": 0,
        "head": (1 + bool(made)) * a.head_dim,
        "full": (a.heads + a.kv_heads) * a.head_dim,
    }[a.qk_norm]
    return hidden * width + width * a.qkv_bias + normed + a.heads * a.sinks + out


def indexer_weights(latent, hidden):
    if latent.indexer is None:
        return 0
    heads, width, _ = latent.indexer
    return latent.q_rank * heads * width + hidden * (width + heads) + 2 * width


def mlp_weights(model, routed):
    hidden = model.hidden
    if routed:
        e = model.experts
        biases = e.number * (2 * e.width + hidden + 1) * e.bias
        code = FAMILIES[model.model_type].code
        beside = hidden * code.shared_gate + e.number * code.corrected
        matrices, inside = 2 + e.gated, e.latent or hidden
        latent = 2 * hidden * e.latent + (hidden + e.latent) * e.shared_bias if e.latent else 0
        shared = matrices * hidden * e.shared_width + (e.shared_width * (matrices - 1) + hidden) * (
            e.shared_bias and e.shared_width > 0
        )
        if e.beside_mlp:  # the MLP, three norms more, the router's weight on its input and numbers of experts
            beside += 3 * hidden * model.mlp.width + 4 * hidden + e.number
        return matrices * inside * e.number * e.width + shared + hidden * e.number + biases + beside + latent
    into = 2 if model.mlp.gated else 1
    own = 2 if model.mlp.activation == "xielu" else 0  # weights of the activation
    return own + (into + 1) * hidden * model.mlp.width + (into * model.mlp.width + hidden) * model.mlp.bias


INDEX = json.loads((profiles.ROOT / "models" / "index.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_gives_the_published_parameters(name):
    assert parameters(read_config(shipped(name), name)) == INDEX[name]["parameters"]


def class_of(config):
    """transformers' class of what a row reads; of a text part the whole's."""
    whole = config.model_type.removesuffix("_text")
    if whole in WHOLES:
        return WHOLES[whole][1]
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


WHOLES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen2_5_omni": (Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
}


def parameters_in_transformers(config):
    """Of the class that a row reads, on the meta device; of a model of several parts those of its text part."""
    whole = config.model_type.removesuffix("_text")
    with torch.device("meta"):
        if whole in WHOLES:
            settings, cls = WHOLES[whole]
            built = cls(
                settings(
                    text_config=config.to_dict(), tie_word_embeddings=config.to_dict().get("tie_word_embeddings", False)
                )
            )
            for holder in (built, built.model):
                holder.visual = holder.audio_tower = None
        else:
            built = class_of(config)(config)
    built.tie_weights()
    return sum(weight.numel() for weight in built.parameters())


NEED_HEAD_DIM = ("helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")
"""Their modules cannot be built, or run, without."""
SWITCHED = {
    "attention_bias": True,
    "mlp_bias": True,
    "use_bias": False,
    "use_qkv_bias": True,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("changes", ({}, SWITCHED), ids=("plain", "switched"))
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_what_is_read_gives_the_parameters_of_transformers(model_type, changes):
    kv_heads = 8 if FAMILIES[model_type].latent or not FAMILIES[model_type].own_heads else 2
    counted = {name: value for name, value in changes.items() if name not in FAMILIES[model_type].uncounted}
    config = small(model_type, num_key_value_heads=kv_heads, num_experts_per_tok=2, pad_token_id=0, **counted)
    if model_type in NEED_HEAD_DIM:
        config["head_dim"] = 8
    read_by_transformers = CONFIG_MAPPING[model_type].from_dict(dict(config))
    assert parameters(read_config(config, "m")) == parameters_in_transformers(read_by_transformers)


def changed(value):
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 0] if value < 9 else [2 * value]
    return [0.5] if isinstance(value, float) else [2, True, 0.5] if value is None else []


CHUNKS = {
    **{family: {"mamba_chunk_size": 256} for family in ("granitemoehybrid", "bamba", "falcon_h1")},
    **{family: {"chunk_size": 128} for family in ("mamba2", "nemotron_h")},
    "deepseek_v32": {"index_topk": 2048},
    "gemma3n_text": {"altup_num_inputs": 4},
}
"""Of more tokens, keys or streams than in a tiny config, where the formula counts such alone."""


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_no_field_of_a_family_is_passed_over(model_type):
    """Each field of its configuration class, set to something else: as many parameters as in transformers, or refused."""
    config_class = CONFIG_MAPPING[model_type]
    common = {field.name for field in fields(PreTrainedConfig)}
    tiny = json.loads(tiny_config(config_class).to_json_string(use_diff=False)) | CHUNKS.get(model_type, {})
    tiny.pop("time_step_limit", None)  # of infinity, which transformers writes but does not read from a plain file
    own = [
        field.name
        for field in fields(config_class)
        if field.name not in common and not field.name.endswith("_token_id")
    ]
    compared = 0
    for key in (*own, *config_class.attribute_map):
        for value in changed(tiny.get(key)):
            config = {**tiny, key: value}
            try:
                there = parameters_in_transformers(config_class.from_dict(dict(config)))
            except Exception:  # noqa: BLE001 - transformers refuses it
                continue
            try:
                model = read_config(config, "m")
            except ModelError:
                continue
            assert parameter_count(model)[0] == there, (key, value)
            compared += 1
    assert compared > 3


def test_activations_are_those_of_transformers():
    assert set(ACT2FN) == _ACTIVATIONS


def test_no_refused_family_has_a_row():
    assert not set(FAMILIES) & set().union(*_REFUSED_TYPES.values())


@pytest.mark.parametrize(
    ("name", "facts"),
    {
        "gpt2": {"learned_positions": 1024, "dropout": 0.1, "norm": "layer", "norm_bias": True, "dtype": "float32"},
        "pythia-1.4b": {"block": "parallel", "norm": "layer", "norm_bias": True},
        "gemma2-2b": {"block": "sandwich", "norm": "gemma", "scaled_embedding": True, "logit_softcap": True},
        "gemma3-1b": {"block": "sandwich", "norm": "gemma", "scaled_embedding": True, "logit_softcap": False},
        "olmo2-7b": {"block": "post", "norm": "rms-fp32-weight", "dtype": "float32"},
        "gpt-oss-20b": {"block": "pre", "norm": "rms-fp32-weight", "mlp": None, "has_sdpa": False},
        "llama2-7b": {"block": "pre", "norm": "rms", "norm_bias": False, "experts": None, "learned_positions": 0},
    }.items(),
)
def test_traits_of_a_family(name, facts):
    model = read_config(shipped(name), name)
    assert {key: getattr(model, key) for key in facts} == facts


@pytest.mark.parametrize(
    ("name", "facts"),
    {
        "gpt2": {"qkv_bias": True, "out_bias": True, "fused_qkv": True, "dropout": 0.1, "rotary_dim": 0},
        "pythia-1.4b": {"qkv_bias": True, "out_bias": True, "fused_qkv": True, "rotary_dim": 32},
        "qwen2-7b": {"qkv_bias": True, "out_bias": False, "qk_norm": "none"},
        "qwen3-8b": {"qkv_bias": False, "out_bias": False, "qk_norm": "head"},
        "olmo2-7b": {"qk_norm": "full"},
        "gemma2-2b": {"softcap": True, "qk_norm": "none"},
        "gemma3-1b": {"softcap": False, "qk_norm": "head"},
        "gpt-oss-20b": {"sinks": True, "qkv_bias": True, "out_bias": True},
        "phi3-mini-4k": {"fused_qkv": True, "qkv_bias": False},
        "deepseek-v3": {"latent": Latent(1536, 512, 128, 64), "head_dim": 192, "v_head_dim": 128, "rotary_dim": 64},
        "deepseek-v2-lite": {"latent": Latent(None, 512, 128, 64), "kv_heads": 16},
    }.items(),
)
def test_attention_of_a_family(name, facts):
    attention = read_config(shipped(name), name).attention
    assert {key: getattr(attention, key) for key in facts} == facts


@pytest.mark.parametrize(
    ("name", "facts"),
    {
        "mixtral-8x7b": {"number": 8, "per_token": 2, "width": 14336, "router": "softmax", "shared_width": 0},
        "qwen3-30b-a3b": {"number": 128, "per_token": 8, "width": 768, "router": "softmax", "router_fp32": False},
        "gpt-oss-20b": {"number": 32, "width": 2880, "router": "topk-softmax", "bias": True, "clamped": True},
        "deepseek-v2-lite": {"number": 64, "shared_width": 2816, "router": "softmax", "router_fp32": True},
        "deepseek-v3": {"number": 256, "shared_width": 2048, "router": "sigmoid-groups", "router_fp32": True},
    }.items(),
)
def test_experts_of_a_family(name, facts):
    experts = read_config(shipped(name), name).experts
    assert {key: getattr(experts, key) for key in facts} == facts


def test_dense_layers_come_first_in_deepseek():
    kinds = read_config(shipped("deepseek-v3"), "v3").layer_kinds
    assert [kind.experts for kind in kinds] == [False] * 3 + [True] * 58


def test_qwen3_moe_dense_layers():
    config = {**shipped("qwen3-30b-a3b"), "num_hidden_layers": 6, "mlp_only_layers": [3], "decoder_sparse_step": 2}
    model = read_config(config, "m")
    assert [kind.experts for kind in model.layer_kinds] == [False, True, False, False, False, True]
    assert model.mlp is not None and model.mlp.width == 6144
    dense = read_config({**config, "num_experts": 0}, "m")
    assert dense.experts is None and not any(kind.experts for kind in dense.layer_kinds)


def test_qwen2_window_needs_its_switch_and_starts_late():
    config = {**shipped("qwen2-7b"), "sliding_window": 4096, "num_hidden_layers": 4, "max_window_layers": 3}
    assert set(read_config(config, "m").layer_kinds) == {LayerKind()}
    switched = {**config, "use_sliding_window": True}
    assert [kind.window for kind in read_config(switched, "m").layer_kinds] == [None, None, None, 4096]
    assert [kind.window for kind in read_config(switched, "m").layer_kinds] == their_windows(theirs(switched))


def test_gpt_neox_without_parallel_residual():
    assert read_config({**shipped("pythia-1.4b"), "use_parallel_residual": False}, "m").block == "pre"


def test_first_gemma_says_gelu_and_means_its_tanh_approximation():
    assert read_config(small("gemma", hidden_act="gelu"), "m").mlp.activation == "gelu_pytorch_tanh"


def test_phi3_partial_rotary_in_old_and_new_place():
    config = small("phi3", num_key_value_heads=8)
    assert read_config({**config, "partial_rotary_factor": 0.5}, "m").attention.rotary_dim == 4
    assert read_config({**config, "rope_parameters": {"partial_rotary_factor": 0.25}}, "m").attention.rotary_dim == 2


def test_head_dim_null_and_absent():
    assert read_config({**LLAMA, "head_dim": None}, "m").attention.head_dim == 8
    assert read_config(LLAMA, "m").attention.head_dim == 8
    assert read_config({**LLAMA, "head_dim": 16}, "m").attention.head_dim == 16
    assert read_config({**LLAMA, "num_key_value_heads": None}, "m").attention.kv_heads == 8


def test_gemma3_multimodal_is_planned_as_its_text():
    # As published: what equals the class default is left out of text_config.
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {**text, "sliding_window": 1024},
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    model, alone = read_config(whole, "it"), read_config(shipped("gemma3-4b"), "it")
    assert "text alone" in model.notes[0] and "towers" in model.notes[0]
    assert "vocab_size 262208" in model.notes[1]
    for fact in ("hidden", "vocab", "context", "layer_kinds", "attention", "mlp", "norm", "block", "tied", "dtype"):
        assert getattr(model, fact) == getattr(alone, fact), fact
    untyped = {**whole, "text_config": {k: v for k, v in text.items() if k != "model_type"}}
    assert read_config(untyped, "it").model_type == "gemma3_text"


def test_text_config_of_another_multimodal_model():
    model = read_config({"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}, "llava")
    assert (model.hidden, model.layers, model.vocab) == (4096, 32, 32064)


def test_unknown_decoder_is_planned_like_llama_and_says_so():
    model = read_config(small("grok-9"), "m")
    assert model.notes[0].startswith("model_type 'grok-9' is not known to mstplan: planned as a Llama-like decoder")
    like = read_config(small("llama"), "m")
    assert (model.attention, model.mlp, model.norm, model.block) == (like.attention, like.mlp, like.norm, like.block)


def test_unknown_decoder_with_experts():
    config = small("new_moe", num_local_experts=16, num_experts_per_tok=2, moe_intermediate_size=32)
    model = read_config({**config, "n_shared_experts": 1, "first_k_dense_replace": 1}, "m")
    assert (model.experts.number, model.experts.width, model.experts.shared_width) == (16, 32, 32)
    assert [kind.experts for kind in model.layer_kinds] == [False, True, True, True]


def test_unknown_decoder_with_windows():
    kinds = ["sliding_attention", "full_attention"] * 2
    listed = read_config(small("novel", sliding_window=9, layer_types=kinds), "m")
    assert [kind.window for kind in listed.layer_kinds] == [9, None, 9, None]
    off = read_config(small("novel", sliding_window=9, use_sliding_window=False), "m")
    assert {kind.window for kind in off.layer_kinds} == {None}


def test_missing_model_type_is_noted():
    config = {k: v for k, v in LLAMA.items() if k != "model_type"}
    assert "names no model_type" in read_config(config, "m").notes[0]


def test_quantised_weights_are_noted():
    assert any("quantised (mxfp4)" in note for note in read_config(shipped("gpt-oss-20b"), "m").notes)
    assert any("quantised (fp8)" in note for note in read_config(shipped("deepseek-v3"), "m").notes)


@pytest.mark.parametrize(
    "method",
    [
        "bitsandbytes",
        "gptq",
        "awq",
        "mxfp4",
        "fp8",
        "compressed-tensors",
        "hqq",
        "x" * 1000,
        "a\nb\x1b[31m",
        3,
        None,
        ["awq"],
    ],
)
@pytest.mark.parametrize(
    "whole",
    [
        LLAMA,
        small("grok-9"),
        shipped("deepseek-v3"),
        {"model_type": "gemma3", "text_config": small("gemma3_text")},
        {key: value for key, value in LLAMA.items() if key != "model_type"},
    ],
    ids=["llama", "unknown", "deepseek", "nested", "untyped"],
)
def test_who_has_quantised_weights_is_told_first_how_they_are_planned(whole, method):
    model = read_config({**whole, "quantization_config": {"quant_method": method}}, "m")
    assert model.notes[0].startswith("the published weights are quantised")
    assert model.notes[0].endswith("nearest: --lora 16 --quantize nf4")
    assert model.notes[0].isprintable() and len(model.notes[0]) < 250
    plain = read_config({key: value for key, value in whole.items() if key != "quantization_config"}, "m")
    assert model._replace(notes=()) == plain._replace(notes=()) and model.notes[1:] == plain.notes


def test_dtype_under_either_name():
    assert read_config({**LLAMA, "dtype": "float16"}, "m").dtype == "float16"
    assert read_config({**LLAMA, "torch_dtype": "torch.float32"}, "m").dtype == "float32"
    assert read_config({**LLAMA, "torch_dtype": None}, "m").dtype == "bfloat16"


NOTED = ("gpt-oss", "deepseek-v3", "deepseek-r1", "glm-4.")  # published quantised, or with a layer that is not counted


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(NOTED)])
def test_shipped_files_need_no_notes(name):
    assert read_config(shipped(name), name).notes == ()


def test_layers_with_experts_by_mlp_layer_types():
    def sparse(model_type, **fields):
        return [
            kind.experts for kind in read_config(small(model_type, num_experts_per_tok=2, **fields), "m").layer_kinds
        ]

    kinds = ["sparse", "dense", "sparse", "dense"]
    for model_type in ("glm4_moe_lite", "exaone_moe", "mellum"):
        assert sparse(model_type, num_hidden_layers=4, mlp_layer_types=kinds) == [True, False, True, False]
    assert sparse("glm4_moe_lite", num_hidden_layers=3) == [False, True, True]
    assert sparse("exaone_moe", num_hidden_layers=3, first_k_dense_replace=2) == [False, False, True]
    assert sparse("mellum", num_hidden_layers=2) == [True, True]
    for wrong in (kinds[:3], [*kinds[:3], "soft"], "sparse"):
        message = refusal(small("mellum", num_hidden_layers=4, num_experts_per_tok=2, mlp_layer_types=wrong))
        assert 'must be a list of "dense" and "sparse", one per layer' in message


@pytest.mark.parametrize("changes", [{"first_k_dense_replace": 3}, {"head_dim": 128}], ids=str)
def test_what_transformers_reads_otherwise_is_left_to_the_trace(changes):
    with pytest.raises(UnreadError, match=f"{next(iter(changes))} is "):
        read_config(small("glm4_moe_lite", num_experts_per_tok=2, **changes), "m")


# --- what is refused --------------------------------------------------------------------------------------------------

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
BAD = ["4096", True, 4096.0, math.nan, math.inf, 0, -1, 2**31 + 1, 10**5000, [], {}, "a\nb", "\ud800"]


@pytest.mark.parametrize("value", BAD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("key", (*SIZES, "intermediate_size", "head_dim", "max_position_embeddings"))
def test_bad_size_is_named(key, value):
    message = refusal({**LLAMA, key: value}, "models/x.json")
    assert message.startswith(f"models/x.json: {key} is ") and "must be a whole number from 1 to" in message


@pytest.mark.parametrize("key", ("hidden_size", "num_hidden_layers", "vocab_size"))
def test_null_size(key):
    assert f"{key} is null" in refusal({**LLAMA, key: None})


def test_too_many_layers():
    assert "num_hidden_layers is 1001, must be a whole number from 1 to 1000" in refusal(
        {**LLAMA, "num_hidden_layers": 1001}
    )


@pytest.mark.parametrize("model_type", ("llama", "gpt2", "grok-9", "gemma3_text"))
def test_missing_fields_are_named_together(model_type):
    message = refusal({"model_type": model_type, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 9})
    assert "lacks num_hidden_layers, vocab_size," in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 16}, "not a multiple of num_key_value_heads 16"),
        ({"hidden_size": 63}, "hidden_size 63 is not a multiple of num_attention_heads 8"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, must be true or false"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes', must be true or false"),
        ({"mlp_bias": []}, "mlp_bias is [], must be true or false"),
        ({"attention_dropout": 1.5}, "attention_dropout is 1.5, must be a number from 0 to 1"),
        ({"attention_dropout": math.nan}, "attention_dropout is nan, must be a number from 0 to 1"),
        ({"hidden_act": "sillu"}, "hidden_act is 'sillu', which mstplan does not know. Did you mean silu"),
        ({"hidden_act": 3}, "hidden_act is 3"),
        ({"torch_dtype": "int4"}, "torch_dtype is 'int4', must be one of"),
        ({"model_type": 5}, "model_type is 5"),
        ({"final_logit_softcapping": "30"}, "final_logit_softcapping is '30', must be a positive number, or null"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor is 2"),
    ],
)
def test_contradictions_and_wrong_types(changes, said):
    assert said in refusal({**LLAMA, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than its 8 experts"),
        ("mixtral-8x7b", {"num_local_experts": -8}, "num_local_experts is -8"),
        ("qwen3-30b-a3b", {"mlp_only_layers": "0"}, "mlp_only_layers is '0', must be a list of layer numbers"),
        ("deepseek-v3", {"kv_lora_rank": None}, "kv_lora_rank is null"),
        ("deepseek-v2-lite", {"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        ("gpt-oss-20b", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for the 24 layers"),
        ("gpt-oss-20b", {"layer_types": 7}, "layer_types is 7"),
        ("gpt-oss-20b", {"layer_types": ["mamba"] * 24}, "layer_types names 'mamba'"),
        ("mistral-7b-v0.1", {"sliding_window": 0}, "sliding_window is 0"),
        ("gpt2", {"n_head": 7}, "hidden_size 768 is not a multiple of num_attention_heads 7"),
        ("gpt2", {"n_embd": "768"}, "n_embd is '768'"),
        ("gpt2", {"n_positions": None}, "n_positions is null"),
    ],
)
def test_family_fields_are_checked(name, changes, said):
    assert said in refusal({**shipped(name), **changes})


def test_deepseek_v2_without_experts_per_token():
    config = shipped("deepseek-v2-lite")
    del config["num_experts_per_tok"]
    assert "num_experts_per_tok is missing" in refusal(config)


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [
        *((t, "an encoder-only model") for t in ("bert", "roberta", "deberta-v2", "electra", "vit", "clip")),
        *((t, "an encoder-decoder model") for t in ("t5", "bart", "whisper", "mt5")),
    ],
)
def test_what_is_no_decoder_is_refused_by_name(model_type, kind):
    message = refusal(small(model_type), "it")
    assert message.startswith(
        f"it is {kind} (model_type '{model_type}'): mstplan plans decoders trained on next-token loss."
    )


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["NewForMaskedLM"]}, "encoder-only"),
        ({"architectures": ["DPRQuestionEncoder"]}, "encoder-only"),
        ({"use_bidirectional_attention": True}, "encoder-only"),
    ],
)
def test_what_says_that_it_is_no_decoder_is_refused(changes, kind):
    assert kind in refusal(small("novel", **changes))


@pytest.mark.parametrize("model_type", ("BERT", "Bert", "T5"))
def test_capitals_are_no_way_around(model_type):
    assert "trained on next-token loss" in refusal(small(model_type))


@pytest.mark.parametrize("architectures", (["NovelModel"], ["NovelForSequenceClassification", "NovelModel"]))
def test_unknown_model_without_a_causal_lm_is_refused(architectures):
    assert "no causal language model" in refusal(small("novel", architectures=architectures))


@pytest.mark.parametrize(
    "architectures",
    (["NovelForCausalLM"], ["NovelLMHeadModel"], ["NovelForConditionalGeneration", "X"], [], None, 3, [3]),
)
def test_unknown_model_that_may_be_a_causal_lm_is_planned(architectures):
    assert read_config(small("novel", architectures=architectures), "m").layers == 4


@pytest.mark.parametrize("architectures", (["LlamaForCausalLM", "LlamaForMaskedLM"], [], None, 3, ["LlamaModel"]))
def test_other_architectures_are_not_refused(architectures):
    assert read_config({**LLAMA, "architectures": architectures}, "m").layers == 4


def test_not_an_object():
    assert "not a JSON object" in refusal([LLAMA])


# --- anything -----------------------------------------------------------------------------------------------------

CONFIGS = [
    *(shipped(name) for name in ("llama3-8b", "gpt2", "deepseek-v3", "qwen3-30b-a3b", "gemma3-1b", "gpt-oss-20b"))
]
CONFIGS += [shipped("pythia-1.4b"), shipped("phi3-mini-4k"), small("novel", num_experts=4, num_experts_per_tok=2)]
CONFIGS.append({"model_type": "gemma3", "text_config": shipped("gemma3-4b"), "vision_config": {}})
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.integers(-2, 70)
ANY_JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)
OPTIONAL = ["head_dim", "layer_types", "mlp_only_layers", "rope_parameters", "rope_scaling", "quantization_config"]
OPTIONAL += ["text_config", "is_encoder_decoder", "use_sliding_window", "sliding_window", "moe_layer_freq", "dtype"]


@settings(max_examples=400)
@given(data=st.data(), value=ANY_JSON)
def test_any_value_gives_a_model_or_a_model_error(data, value):
    config = data.draw(st.sampled_from(CONFIGS))
    key = data.draw(st.sampled_from(sorted(set(config) | set(OPTIONAL))))
    inside = data.draw(st.booleans()) and isinstance(config.get("text_config"), dict)
    changed = {**config, "text_config": {**config["text_config"], key: value}} if inside else {**config, key: value}
    answer_or_error(changed)


@given(config=st.dictionaries(st.sampled_from(sorted(set().union(*CONFIGS))), ANY_JSON))
@example(config={})
def test_any_object_gives_a_model_or_a_model_error(config):
    answer_or_error(config)


def answer_or_error(config):
    try:
        model = read_config(config, "any.json")
    except ModelError as error:
        assert "any.json" in str(error) and len(str(error).splitlines()) <= 2  # noqa: PT017
    else:
        assert isinstance(model, Model) and model.layers >= 1
        assert all(len(note.splitlines()) == 1 for note in model.notes)


def test_a_deeply_nested_value():
    value = []
    for _ in range(sys.getrecursionlimit() * 2):
        value = [value]
    refusal({**LLAMA, "hidden_size": value})


# --- layers without rotary positions ---------------------------------------------------------------------------------


def turned(model_type, **fields):
    return [kind.rotary for kind in read_config(small(model_type, **fields), "m").layer_kinds]


def test_layers_without_rotary_positions():
    assert turned("smollm3") == [True, True, True, False]
    assert turned("smollm3", no_rope_layers=[1, 0, 1, 1]) == [True, False, True, True]
    assert turned("smollm3", no_rope_layer_interval=2) == [True, False] * 2
    assert turned("cohere2") == turned("exaone4") == [True, True, True, False]
    assert turned("cohere2", sliding_window=None) == [False] * 4
    assert turned("exaone4", sliding_window=None) == [True] * 4
    assert turned("llama") == [True] * 4


@pytest.mark.parametrize("listed", [[1, 0], [1, 2, 1, 1], "1111", 4])
def test_a_list_of_turned_layers_that_is_none(listed):
    assert "no_rope_layers" in refusal(small("smollm3", no_rope_layers=listed))


def test_heads_as_wide_as_hidden_states_where_code_needs_it():
    assert "head_dim 16" in refusal(small("helium", head_dim=16))


def test_dropout_after_the_embedding_is_its_own():
    dropouts = [
        read_config(small("phi", resid_pdrop=0.1, embd_pdrop=share), "m").embedding_dropout for share in (0.0, 0.1, 0.2)
    ]
    assert dropouts == [0.0, None, 0.2]  # None: as elsewhere


GEMMA4 = {
    **small("gemma4_text"),
    "num_hidden_layers": 6,
    "head_dim": 64,
    "global_head_dim": 128,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 1000,
    "sliding_window": 512,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}


def test_layers_without_a_window_have_heads_of_their_own():
    model = read_config({**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}, "m")
    window, full = model.layer_kinds[:2]
    assert (model.attention.head_dim, model.attention.values) == (64, "normed")
    assert window.attention is None
    assert full.attention is not None
    assert (full.attention.head_dim, full.attention.kv_heads, full.attention.values) == (128, 1, "keys")
    assert model.of_kind(full).attention == full.attention


def test_own_heads_as_transformers_writes_them():
    listed = {f"{n}": {"head_dim": 128} for n in (1, 3, 5)}
    plain = {key: value for key, value in GEMMA4.items() if key != "global_head_dim"}
    assert read_config({**plain, "per_layer_config": listed}, "m") == read_config(GEMMA4, "m")


def test_the_last_layer_has_full_attention_whatever_is_listed():
    kinds = read_config({**GEMMA4, "layer_types": ["sliding_attention"] * 6}, "m").layer_kinds
    assert [kind.window for kind in kinds] == [512] * 5 + [None]


def test_last_layers_borrow_keys_of_the_last_layers_before():
    model = read_config({**GEMMA4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}, "m")
    assert [kind.keys for kind in model.layer_kinds] == ["", "", "lends", "lends", "borrows", "borrows"]
    width = model.mlp.width
    assert [model.of_kind(kind).mlp.width for kind in model.layer_kinds] == [width] * 4 + [2 * width] * 2


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_kv_shared_layers": 6}, "num_kv_shared_layers is 6"),
        ({"num_kv_shared_layers": 5}, "num_kv_shared_layers is 5"),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers is 1"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"per_layer_config": {"1": {"hidden_size": 8}}}, "per_layer_config sets hidden_size"),
        ({"per_layer_config": {"9": {"head_dim": 8}}}, "per_layer_config is"),
        ({"per_layer_config": {"1": {"head_dim": 0}}}, "head_dim is 0"),
    ],
)
def test_what_gemma4_cannot_be_is_refused(changes, why):
    with pytest.raises(ModelError, match=why):
        read_config({**GEMMA4, **changes}, "m")


GEMMA4_SIZES = {  # hidden, width, layers, heads, heads of keys, window, each how many-th layer has full attention, more
    "e2b": ((1536, 6144, 35, 8, 1, 512, 5), {"num_kv_shared_layers": 20, "use_double_wide_mlp": True}),
    "e4b": ((2560, 10240, 42, 8, 2, 512, 6), {"num_kv_shared_layers": 18}),
    "26b-a4b": (
        (2816, 2112, 30, 16, 8, 1024, 6),
        {
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 2,
            "enable_moe_block": True,
            "num_experts": 128,
            "top_k_experts": 8,
            "moe_intermediate_size": 704,
        },
    ),
    "31b": (
        (5376, 21504, 60, 32, 16, 1024, 6),
        {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 4},
    ),
}
GEMMA4_PARAMETERS = {
    "e2b": (4_628_569_344, 4_628_569_344),
    "e4b": (7_463_013_376, 7_463_013_376),
    "26b-a4b": (25_233_141_760, 3_822_530_560),  # the model card says 25.2B, of which 3.8B active
    "31b": (30_697_345_280, 30_697_345_280),  # 30.7B
}


@pytest.mark.parametrize("size", GEMMA4_SIZES)
def test_published_sizes_of_gemma4(size):
    (hidden, width, layers, heads, kv_heads, window, period), more = GEMMA4_SIZES[size]
    fields = {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if (n + 1) % period else "full_attention" for n in range(layers)],
        **more,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Gemma4TextConfig(**fields))
    counted = parameter_count(read_config({"model_type": "gemma4_text", "vocab_size": 262144, **fields}, size))
    assert counted == GEMMA4_PARAMETERS[size]
    assert counted[0] == sum(weight.numel() for weight in model.parameters())
