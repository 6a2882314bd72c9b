"""No config is counted as something else than it is: what is not read is refused by its name, unless it decides no memory."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan import profiles
from mstplan.errors import ModelError, UnreadError
from mstplan.spec.catalog import load_model, model_names
from mstplan.spec.config import read_config
from mstplan.spec.families import FAMILIES
from mstplan.spec.unread import CONDITIONAL_FIELDS, NEUTRAL_FIELDS, READ_FIELDS, WAY_OUT, _word_set, unread_fields
from mstplan.step.parameters import parameter_count

PLAIN = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "intermediate_size": 128,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}
KNOWN = READ_FIELDS | NEUTRAL_FIELDS | frozenset().union(*CONDITIONAL_FIELDS.values())
FIRST = _word_set("moe num n expert shared dense mlp attn kv q ssm mamba conv vision audio index latent ngram layer")
LAST = _word_set(
    "experts shared_experts size width dim dims rank heads layers intermediate_size config topk k kernel state blocks"
)
NAMES = sorted({f"{a}_{b}" for a, b in itertools.product(FIRST, LAST)} - KNOWN)
THERE = st.one_of(
    st.integers(1, 9999),
    st.integers(-9, -1),
    st.floats(0.01, 9),
    st.just(True),
    st.text(min_size=1, max_size=9),
    st.lists(st.integers(), min_size=1, max_size=4),
    st.dictionaries(st.sampled_from(["depth", "size"]), st.integers(), min_size=1),
)
NOT_THERE = (None, False, 0, 0.0, "", [], {})
MODEL_TYPES = (None, "grok-9", "my_llama", "")


def of(model_type, **fields):
    return {**PLAIN, **({"model_type": model_type} if model_type is not None else {}), **fields}


def refused(config, name="FILE"):
    with pytest.raises(UnreadError) as caught:
        read_config(config, name)
    first, way_out = str(caught.value).split("\n")
    assert way_out == WAY_OUT and len(first) < 400
    return first


@settings(max_examples=400)
@given(st.sampled_from(NAMES), THERE, st.sampled_from(MODEL_TYPES))
def test_a_field_that_is_not_read_is_refused_by_its_name(name, value, model_type):
    assert (
        refused(of(model_type, **{name: value}))
        == f"FILE: {name} is a field that mstplan does not read, so its memory cannot be counted from the file."
    )


@settings(max_examples=200)
@given(st.text(max_size=300), THERE)
def test_any_name_of_a_field_is_shown_on_one_short_line(name, value):
    if name not in KNOWN and not name.endswith(("_token_id", "_token_ids", "_token_index")):
        assert "does not read" in refused(of("grok-9", **{name: value}))


@settings(max_examples=200)
@given(
    st.sampled_from(sorted(NEUTRAL_FIELDS - {"model_type", "architectures", "is_encoder_decoder", "auto_map"})), THERE
)
def test_a_field_that_decides_no_memory_changes_nothing(name, value):
    assert read_config(of("grok-9", **{name: value}), "m") == read_config(of("grok-9"), "m")


@pytest.mark.parametrize("value", NOT_THERE, ids=repr)
def test_what_is_not_there_changes_nothing(value):
    for name in NAMES:
        assert read_config(of("grok-9", **{name: value}), "m") == read_config(of("grok-9"), "m")


@pytest.mark.parametrize(
    "name", ["no_bias", "use_rms_norm", "gated_mlp", "use_swiglu", "use_rope", "mlp_gate", "without_norms", "causal"]
)
def test_off_is_not_always_absence(name):
    """A Llama has norms, gates and rotary positions, and no biases."""
    assert name in refused(of("grok-9", **{name: False}))


def test_fields_of_experts_are_read_beside_their_number_alone():
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
    assert read_config(of("grok-9", num_experts=8, **experts), "m").experts is not None
    assert "num_experts_per_tok, moe_intermediate_size, n_shared_experts" in refused(of("grok-9", **experts))
    assert read_config(of("grok-9", num_experts=0, **experts), "m").experts is None
    assert "moe_num_experts" in refused(of("grok-9", moe_num_experts=8, **experts))
    assert "num_shared_experts is a field" in refused(of("grok-9", num_experts=8, num_shared_experts=1, **experts))


def test_latent_attention_is_read_whole_or_not_at_all():
    latent = {"q_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    assert read_config(of("grok-9", kv_lora_rank=16, **latent), "m").attention.latent is not None
    assert "q_lora_rank" in refused(of("grok-9", **latent))


def test_two_names_of_one_size_that_contradict_each_other():
    with pytest.raises(ModelError, match="num_experts 8 and n_routed_experts 16 contradict each other"):
        read_config(of("grok-9", num_experts=8, n_routed_experts=16, num_experts_per_tok=2), "m")
    assert read_config(of("grok-9", num_experts=8, n_routed_experts=8, num_experts_per_tok=2), "m").experts.number == 8


def test_what_is_read_is_what_the_list_says():
    """Each of these fields changes the model, is checked, or is told in a note."""
    changed = {
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "hidden_size": 32,
        "vocab_size": 7,
        "intermediate_size": 9,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "attention_dropout": 0.5,
        "tie_word_embeddings": True,
        "final_logit_softcapping": 30.0,
        "partial_rotary_factor": 0.5,
        "sliding_window": 9,
        "rope_parameters": {"partial_rotary_factor": 0.5},
        "rope_scaling": {"partial_rotary_factor": 0.5},
        "quantization_config": {"bits": 4},
        "dtype": "float32",
        "torch_dtype": "float32",
        "num_experts": 4,
        "num_local_experts": 4,
        "n_routed_experts": 4,
    }
    window = {"sliding_window": 9}
    beside_window = {
        "use_sliding_window": False,
        "max_window_layers": 2,
        "sliding_window_pattern": 2,
        "layer_types": ["full_attention"] * 4,
    }
    for name, value in changed.items():
        experts = {"num_experts_per_tok": 2} if "experts" in name else {}
        assert read_config(of("grok-9", **{name: value}, **experts), "m") != read_config(of("grok-9"), "m"), name
    for name, value in beside_window.items():
        assert read_config(of("grok-9", **window, **{name: value}), "m") != read_config(of("grok-9", **window), "m"), (
            name
        )
    assert READ_FIELDS - {*changed, *beside_window} == {"hidden_activation", "kv_lora_rank"}


# --- other names, other families --------------------------------------------------------------------------------------------

XGLM = {
    "model_type": "xglm",
    "architectures": ["XGLMForCausalLM"],
    "hidden_size": 4096,
    "ffn_dim": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 50272,
}
OPENELM = {
    "model_type": "openelm",
    "architectures": ["OpenELMForCausalLM"],
    "model_dim": 2048,
    "num_transformer_layers": 28,
    "ffn_multipliers": [0.5] * 28,
    "num_query_heads": [12] * 28,
    "vocab_size": 32000,
}
INTERNVL = {
    "model_type": "internvl_chat",
    "architectures": ["InternVLChatModel"],
    "vision_config": {},
    "llm_config": {**PLAIN, "model_type": "qwen2"},
}


def test_a_published_file_is_never_called_incomplete():
    assert (
        refused(XGLM) == "FILE: mstplan does not read configs of this family yet (model_type 'xglm'); it has ffn_dim."
    )
    assert (
        "names of fields (model_type 'openelm') yet: it finds no hidden_size, num_hidden_layers, num_attention_heads, intermediate_size"
        in refused(OPENELM)
    )
    assert "block_configs is a field" in refused(
        {**of("nemotron-nas", block_configs=[{"ffn": {}}]), "intermediate_size": None}
    )
    with pytest.raises(ModelError, match=r"lacks vocab_size.*\nPass the complete"):
        read_config({name: value for name, value in of("grok-9").items() if name != "vocab_size"}, "FILE")


def test_the_language_model_of_a_whole_is_found_under_other_names():
    assert (
        read_config(INTERNVL, "m").attention.qkv_bias and "tower is not counted" in read_config(INTERNVL, "m").notes[0]
    )


def test_a_flat_file_of_several_models_says_what_of_towers_is_counted():
    flat = {
        **PLAIN,
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "vision_config": {"depth": 32},
    }
    model = read_config(flat, "m")
    assert "towers (vision 2,826.1M, projector 256.9M parameters) wait" in model.notes[0] and model.attention.qkv_bias
    phi = {
        **PLAIN,
        "model_type": "phi4mm",
        "audio_processor": {"name": "cascades"},
        "vision_lora": {"r": 256},
        "num_key_value_heads": 8,
    }
    assert "tower is not counted" in read_config(phi, "m").notes[0]
    assert not read_config({**PLAIN, "model_type": "qwen2"}, "m").notes


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "kimi_linear", "rwkv7", "zamba2"])
def test_hybrids_are_sent_to_the_trace(model_type):
    assert refused(of(model_type)).startswith(
        f"FILE: mstplan's formula counts no state-space, recurrent or hybrid models (model_type '{model_type}')"
    )


def test_sparse_attention_is_no_hybrid():
    kinds = ["full_attention", "indexed_attention"] * 2
    assert "layer_types names 'indexed_attention'" in refused(of("grok-9", layer_types=kinds))


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"num_experts": 8, "num_selects": 2}),
        ("llama", {"num_local_experts": 4}),
        ("mistral", {"moe": {"num_experts": 8}}),
        ("llama", {"block_configs": [{}]}),
        ("mixtral", {"num_local_experts": 4, "num_shared_experts": 2, "shared_intermediate_size": 64}),
        ("qwen3_moe", {"num_experts": 16, "shared_expert_intermediate_size": 64}),
        ("gemma2", {"expert_width": 3}),
        ("phi3", {"moe_layers": [1]}),
    ],
)
def test_experts_of_another_model_under_a_known_name(model_type, fields):
    """A family's own code has no such fields: the file is somebody's own model."""
    strange = [name for name in fields if model_type not in ("mixtral", "qwen3_moe") or "shared" in name]
    said = refused(of(model_type, **fields))
    assert all(name in said for name in strange if name != "num_selects")
    read_config(of(model_type, **{**fields, **dict.fromkeys(strange)}), "FILE")  # null: not there


# --- --assume ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.sampled_from(NAMES), THERE, st.sampled_from([*MODEL_TYPES, "mpt", "jamba", "ernie4_5_vl_moe_text"]))
def test_assumed_to_be_a_llama_it_is_counted_and_says_what_was_not_read(name, value, model_type):
    config = of(model_type, **{name: value})
    model, llama = read_config(config, "m", assume="llama-like"), read_config(of("llama"), "m")
    assert parameter_count(model) == parameter_count(llama)
    assert "--assume llama-like" in model.notes[0] and model.notes[0].endswith(f"not read: {name}")


def test_an_assumption_changes_nothing_that_is_read():
    for name in model_names():
        config = json.loads((profiles.ROOT / "models" / f"{name}.json").read_text(encoding="utf-8"))
        assert read_config(config, name, assume="llama-like") == read_config(config, name)
    assert load_model("gpt2", assume="llama-like") == load_model("gpt2")


def test_unknown_assumptions():
    with pytest.raises(ModelError, match=r"'gpt-like'\.\nKnown: llama-like, no-towers\."):
        load_model("llama3-8b", assume="gpt-like")


def test_what_is_no_decoder_stays_refused():
    for model_type in ("bert", "t5"):
        with pytest.raises(ModelError, match="trained on next-token loss"):
            read_config(of(model_type), "m", assume="llama-like")


def test_shipped_files_have_rows():
    for name in model_names():
        config = json.loads((profiles.ROOT / "models" / f"{name}.json").read_text(encoding="utf-8"))
        assert config["model_type"] in FAMILIES
    assert unread_fields(PLAIN) == []
