"""Reads a model's config.json into `Model`.

One row of `families` says what a family does differently from Llama; whatever a file leaves out takes the default of
that family's configuration class in transformers. A model_type that neither has a row nor is known to transformers is
planned as a Llama-like decoder when every field of its file is known, and a note says so. Whatever else cannot be
counted is refused by name (`unread.py`); so is what is no decoder trained on next-token loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from mstplan.errors import ModelError, did_you_mean, one_line
from mstplan.spec.families import FAMILIES, LLAMA_LIKE
from mstplan.spec.families.base import Family, Routed
from mstplan.spec.mixing import layers_of_one_part, mixer_of, mixers_of_layers
from mstplan.spec.model import (
    AltUp,
    Attention,
    Block,
    Experts,
    Indexer,
    Latent,
    LayerKind,
    Mlp,
    Model,
    PerLayerInputs,
    QkNorm,
    Router,
)
from mstplan.spec.own_sizes import attention_of_layers, cuts_of_layers, shares_of_layers, width_of, widths_of_layers
from mstplan.spec.releases import parse_release, release
from mstplan.spec.towers import Tower, towers_of
from mstplan.spec.vision import vision_of

_LARGEST_SIZE = 2**31  # of any size; far beyond every model, small enough that a slip of the keyboard is caught
_MAX_LAYERS = 1000  # eight times as many as the deepest published one
_REQUIRED_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
_WAY_OUT = "Correct it there, or pass the config.json as published."

# The same fact under other names: GPT-2's, GPT-NeoX', and those of the mixtures of experts.
_ALIASES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "n_embed"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "hidden_act": ("hidden_act", "hidden_activation", "activation_function"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "experts_per_token", "moe_k", "moe_topk", "top_k_experts"),
    "n_shared_experts": ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"),
    "first_k_dense_replace": ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"),
    "decoder_sparse_step": ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step"),
    "dtype": ("dtype", "torch_dtype"),
    "intermediate_size": ("intermediate_size", "block_ff_dim"),
    "tie_word_embeddings": ("tie_word_embeddings", "tie_embedding"),
}


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ACTIVATIONS = _word_set(
    "gelu gelu_10 gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh gelu_pytorch_tanh hardswish laplace "
    "leaky_relu linear mish prelu quick_gelu relu relu2 relu6 sigmoid silu sqrtsoftplus swish tanh xielu"
)
_DTYPES = _word_set("float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2")

_REFUSED_TYPES: Mapping[str, frozenset[str]] = {
    "an encoder-only model": _word_set(
        # text
        "albert bert bert-generation big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra "
        "ernie esm eurobert flaubert fnet funnel ibert layoutlm layoutlmv2 layoutlmv3 longformer luke markuplm "
        "megatron-bert mobilebert modernbert mpnet mra neobert new nomic_bert nystromformer perceiver rembert roberta "
        "roberta-prelayernorm roc_bert roformer squeezebert tapas xlm xlm-roberta xlm-roberta-xl xmod yoso "
        # images and sound
        "align altclip audio-spectrogram-transformer beit blip chinese_clip clap clip clip_text_model "
        "clip_vision_model clipseg convnext convnextv2 deit detr dinov2 dinov3_vit efficientnet groupvit hiera hubert "
        "ijepa levit metaclip_2 mobilenet_v2 mobilevit owlvit regnet resnet sam segformer siglip siglip2 "
        "siglip_vision_model swin swinv2 unispeech videomae vilt vit vit_mae vivit wav2vec2 wav2vec2-bert wavlm xclip"
    ),
    "an encoder-decoder model": _word_set(
        "bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder florence2 fsmt led longt5 m2m_100 marian "
        "mbart moonshine mt5 mvp nllb-moe pegasus pegasus_x pix2struct plbart pop2piano prophetnet seamless_m4t "
        "seamless_m4t_v2 speech-encoder-decoder speech_to_text speecht5 switch_transformers t5 t5gemma t5gemma2 umt5 "
        "vision-encoder-decoder whisper"
    ),
}
_ENCODER_CLASSES = ("ForMaskedLM", "EncoderModel", "Encoder")
_CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "NemotronH_Omni_Reasoning_V3")
_ATTENTION_KINDS = ("full_attention", "sliding_attention", "chunked_attention")

# Files of several models whose text part stands in the fields themselves, or names no family of its own.
TEXT_TYPES = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "phi4mm": "phi3",
    "qwen2_5_omni_thinker": "qwen2_5_omni_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen2_vl": "qwen2_vl_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
}
TEXT_PARTS = ("thinker_config", "text_config", "llm_config", "language_config")
"""Fields that hold the part that speaks; a part may have parts."""
WHOLE_TYPES = {"phi4mm": "phi4_multimodal"}
"""Files of several models with code of their own, and transformers' name for the same whole."""
NO_TOWERS = "only the text part is planned: a vision or audio tower is not counted"
TEXT_ALONE = "no-towers"
_TOWER_WORDS = ("vision", "visual", "image", "img", "video", "audio", "speech", "embd_layer")


def read_config(
    config: Mapping[str, object], name: str, assume: str | None = None, transformers: str | None = None
) -> Model:
    """The model that a config.json describes; `name` names it in messages. What cannot be planned is a ModelError; of that,
    what the formula cannot count is an UnreadError. assume: "llama-like" counts the latter as a Llama all the same. transformers: the
    release whose code is planned, where that matters; None: the installed one, else the newest known."""
    if transformers is not None:
        parse_release(transformers)
    if not isinstance(config, Mapping):
        raise ModelError(f"{name}: holds {_format_value(config)}, not a JSON object with a model's fields.")
    _check_assumption(assume)
    _refuse_non_decoders(config, name)
    notes: list[str] = []
    towers, assume = (None, None) if assume == TEXT_ALONE else (towers_of(config), assume)
    vision = vision_of(config) if towers else None
    nested = (part := _find_part(config)) is not None
    if nested:
        if part == "text_config":  # as transformers writes it
            _refuse_other_classes(config, name)
        config = text_of(config)
        _refuse_non_decoders({**config, "use_bidirectional_attention": False}, name)
        if assume is None and config.get("use_bidirectional_attention") is True:  # in the prompt, as in PaliGemma
            from mstplan.spec import unread

            unread.refuse_unread(
                name, "use_bidirectional_attention is set, and the formula counts causal attention alone."
            )
    model_type = _model_type(config, name)
    if model_type not in FAMILIES and (translated := _translate(config, name, assume)) is not config:
        from mstplan.spec.published import origin_note

        notes.append(origin_note(model_type))
        config, model_type = translated, _model_type(translated, name)
    if not nested:
        model_type = TEXT_TYPES.get(model_type, model_type)
    family = FAMILIES.get(model_type)
    if towers:
        notes.append(waiting(towers))
    elif nested or (family is not None and _has_towers(config)):
        notes.append(NO_TOWERS)
    f = _Fields(config, name, family or LLAMA_LIKE, assumed=assume is not None)
    if family is None:
        notes.append(_read_as_a_llama(f, model_type))
    else:
        _refuse_foreign_experts(f)
        if not nested:  # files leave out defaults of a part, never of the whole
            f.require(_REQUIRED_FIELDS)
    model = _in_release(_model(f, model_type), f.family, transformers)
    published = _published_quantisation(f.config)
    notes = [*_quantised_notes(f), *notes, *_field_notes(f)]
    return model._replace(published=published, towers=towers or (), vision=vision, notes=tuple(notes))


def waiting(towers: tuple[Tower, ...]) -> str:
    """The note on towers that are counted, of a step on text alone."""
    counted = ", ".join(f"{tower.kind} {tower.parameters / 1e6:,.1f}M" for tower in towers)
    return f"text alone is planned: towers ({counted} parameters) wait, with weights but no gradients or optimizer states; --images counts images"


def _in_release(model: Model, family: Family, transformers: str | None) -> Model:
    if family.no_sdpa_from is None:
        return model
    planned = release(transformers)
    return model._replace(has_sdpa=planned.number < family.no_sdpa_from, release=planned)


def _check_assumption(assume: str | None) -> None:
    if assume not in (None, "llama-like", TEXT_ALONE):
        raise ModelError(f"cannot assume that a model is {_format_value(assume)}.\nKnown: llama-like, {TEXT_ALONE}.")


def _refuse_foreign_experts(f: _Fields) -> None:
    """Refuses a known family's file that tells of experts which that family has not: it is another model under its name."""
    words = ("expert", "moe", "shared_intermediate", "block_configs")
    candidates = (key for key in f.config if any(word in key.lower() for word in words))
    expert_fields = [
        key for key in candidates if key not in _ALIASES["num_experts_per_tok"]
    ]  # which says nothing alone
    if expert_fields and not f.assumed:
        from mstplan.spec import unread

        routed = f.family.experts
        fields = () if routed is None else (routed.width, *filter(None, (routed.shared_width,)), *routed.fields)
        unread.refuse_fields(f.name, unread.foreign_fields(f.config, expert_fields, fields))


def _read_as_a_llama(f: _Fields, model_type: str) -> str:
    """The note on a file without a row. Refuses one that may be something else than a Llama, unless that is assumed."""
    from mstplan.spec import unread

    what = (
        f"model_type {_format_value(model_type)} is not known to mstplan"
        if model_type
        else "the file names no model_type"
    )
    head = "" if f.holds("tie_word_embeddings") else ", with an LM head of its own"
    fields = unread.unread_fields(f.config)
    if f.assumed:
        f.require(_REQUIRED_FIELDS)
        aside = f"; not read: {unread.list_names(fields, 12)}" if fields else ""
        return f"{what}: counted as a Llama{head}, for --assume llama-like was given{aside}"
    unread.refuse_family(f.name, model_type, fields)
    _refuse_other_classes(f.config, f.name)
    if fields and (missing := f.missing(_REQUIRED_FIELDS)):
        unread.refuse_names(f.name, model_type, missing)
    unread.refuse_fields(f.name, fields)
    f.require(_REQUIRED_FIELDS)
    return f"{what}: planned as a Llama-like decoder{head}, for all its fields are a Llama's"


class _Fields:
    """Typed look-ups in one config.json. What is absent takes the family's default; what is wrong is a ModelError."""

    def __init__(self, config: Mapping[str, object], name: str, family: Family, assumed: bool = False) -> None:
        self.config = config
        self.name = name
        self.family = family
        self.assumed = assumed  # count what is not read as a Llama's
        self.defaulted: dict[str, int] = {}  # sizes that the file leaves out

    most_layers = _MAX_LAYERS

    def find(self, wanted: str) -> tuple[str, object]:
        """The name that the file uses, and the value: None if null, the family's default if absent."""
        keys = [key for key in _ALIASES.get(wanted, (wanted,)) if key in self.config]
        non_null = [key for key in keys if self.config[key] is not None]
        for key in non_null[1:]:
            one, other = self.config[non_null[0]], self.config[key]
            if isinstance(one, int) and isinstance(other, int) and one != other:
                self.refuse(
                    f"{non_null[0]} {_format_value(one)} and {key} {_format_value(other)} contradict each other"
                )
        if non_null:
            return non_null[0], self.config[non_null[0]]
        return (keys[0], None) if keys else (wanted, self.family.defaults.get(wanted))

    def require(self, wanted: tuple[str, ...]) -> None:
        if (missing := self.missing(wanted)) and self.assumed:
            raise ModelError(
                f"{self.name}: lacks {', '.join(missing)}, so that it cannot be counted as a Llama.\n"
                "Leave --assume out: max-seq, plan and trace answer by the trace where torch is installed (pip install 'mstplan[torch]')."
            )
        if missing:
            raise ModelError(
                f"{self.name}: lacks {', '.join(missing)}, without which its memory cannot be planned.\n"
                "Pass the complete config.json that lies beside the model's weights."
            )

    def missing(self, wanted: tuple[str, ...]) -> list[str]:
        nullable = {key for key, value in self.family.defaults.items() if value is None}
        return [key for key in wanted if key not in nullable and not self.holds(key)]

    def holds(self, wanted: str) -> bool:
        return any(key in self.config for key in _ALIASES.get(wanted, (wanted,)))

    def optional(self, wanted: str, low: int = 1, top: int = _LARGEST_SIZE) -> int | None:
        key, value = self.find(wanted)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= top:
            self.refuse_value(key, value, f"a whole number from {low} to {top}")
        return value

    def size(self, wanted: str, top: int = _LARGEST_SIZE) -> int:
        value = self.optional(wanted, top=top)
        if value is None:
            key, _ = self.find(wanted)
            self.refuse(f"{key} is {'null' if self.holds(wanted) else 'missing'}, must be a whole number from 1")
        if not self.holds(wanted):
            self.defaulted[wanted] = value
        return value

    def among(self, fields: Mapping[str, object], wanted: str, default: int) -> int:
        """A size among fields of a part of the file."""
        if fields.get(wanted) is None:
            return default
        return _Fields({wanted: fields[wanted]}, self.name, self.family).size(wanted)

    def count(self, wanted: str, default: int) -> int:
        value = self.optional(wanted, low=0)
        return default if value is None else value

    def flag(self, wanted: str, default: bool = False) -> bool:
        key, value = self.find(wanted)
        if value is None:
            value = self.family.defaults.get(wanted, default)
        if not isinstance(value, bool):
            self.refuse_value(key, value, "true or false")
        return value

    def switch(self, constant_or_field: bool | str) -> bool:
        return self.flag(constant_or_field) if isinstance(constant_or_field, str) else constant_or_field

    def share(self, wanted: str, default: float = 0.0) -> float:
        key, value = self.find(wanted)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:  # NaN fails, too
            self.refuse_value(key, value, "a number from 0 to 1")
        return float(value)

    def is_set(self, wanted: str) -> bool:
        """Whether a switch that is a number, or null, is on."""
        key, value = self.find(wanted)
        if value is None:
            return False
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            self.refuse_value(key, value, "a positive number, or null")
        return True

    def one_of(self, wanted: str, choices: frozenset[str], default: str) -> str:
        key, value = self.find(wanted)
        if value is None:
            return default
        if not isinstance(value, str) or value not in choices:
            suggestion = did_you_mean(value, choices) if isinstance(value, str) and len(value) < 100 else ""
            self.refuse(f"{key} is {_format_value(value)}, which mstplan does not know.{suggestion}", _WAY_OUT)
        return value

    def refuse_value(self, key: str, value: object, must_be: str) -> NoReturn:
        self.refuse(f"{key} is {_format_value(value)}, must be {must_be}")

    def refuse(self, what: str, way_out: str = _WAY_OUT) -> NoReturn:
        stop = "" if what.endswith((".", "?")) else "."
        raise ModelError(f"{self.name}: {what}{stop}\n{way_out}")


def _model(f: _Fields, model_type: str) -> Model:
    family = f.family
    if not f.assumed and (uncounted := _uncounted(f)):
        from mstplan.spec import unread

        unread.refuse_unread(f.name, f"{uncounted[0]}, and the formula does not count what that changes.")
    layer_kinds = _layer_kinds(f)
    routed = any(kind.experts for kind in layer_kinds)
    context = f.optional("max_position_embeddings")
    if family.positions == "learned" or family.buffers != "none":
        context = f.size("max_position_embeddings")
    attends = family.defaults.get("num_attention_heads") is not None or any(kind.attends for kind in layer_kinds)
    hidden, attention = f.size("hidden_size"), _attention(f) if attends else NO_ATTENTION
    return Model(
        name=f.name,
        model_type=model_type,
        hidden=hidden,
        vocab=f.size("vocab_size"),
        context=context,
        layer_kinds=layer_kinds,
        attention=attention,
        mlp=_mlp(f) if any(_has_mlp(f, kind) for kind in layer_kinds) else None,
        experts=_experts(f) if routed else None,
        per_layer=_per_layer_inputs(f),
        altup=_altup(f) if family.streams else None,
        mixer=mixer_of(f, layer_kinds),
        norm=family.norm,
        norm_bias=family.norm_bias,
        block=_block(f),
        tied=f.flag("tie_word_embeddings"),
        head_bias=f.switch(family.head_bias),
        learned_positions=(context or 0) + family.first_position if family.positions == "learned" else 0,
        causality=(context or 0) if family.buffers == "causality" else 0,
        sinusoids=(context or 0) * (attention.rotary_dim or hidden) if family.buffers == "sinusoids" else 0,
        logit_softcap=f.is_set("final_logit_softcapping"),
        alibi=family.positions == "alibi",
        embedding_norm=family.embedding_norm,
        scaled_embedding=family.scaled_embedding,
        dropout=f.share(family.dropout) if family.dropout else 0.0,
        embedding_dropout=_embedding_dropout(f),
        dtype=_dtype(f),
        has_sdpa=family.has_sdpa,
        eager_only=family.eager_only,
        own_flash=family.own_flash,
        wide_residual=_is_wide(f),
        idle_window=1 if family.idle_mask else None,
    )


def _per_layer_inputs(f: _Fields) -> PerLayerInputs | None:
    width = f.count("hidden_size_per_layer_input", default=0) if f.family.per_layer_inputs else 0
    return PerLayerInputs(width, f.size("vocab_size_per_layer_input")) if width else None


def _altup(f: _Fields) -> AltUp:
    if _per_layer_inputs(f) is None:
        from mstplan.spec import unread

        unread.refuse_unread(
            f.name, "hidden_size_per_layer_input is 0, and the formula counts layers with inputs of their own."
        )
    return AltUp(f.size("altup_num_inputs"), f.size("laurel_rank"), f.flag("altup_correct_scale"))


def _has_mlp(f: _Fields, kind: LayerKind) -> bool:
    """Whether layers of the kind have an MLP, alone or beside experts."""
    beside = f.family.experts is not None and f.family.experts.beside_mlp
    return kind.feed_forward and (not kind.experts or beside)


def _is_wide(f: _Fields) -> bool:
    return f.family.residual_in_fp32 and f.flag("residual_in_fp32", default=True)


def _embedding_dropout(f: _Fields) -> float | None:
    field, elsewhere = f.family.embedding_dropout, f.family.dropout
    if field is None or elsewhere is None:
        return None
    share = f.share(field) if field else 0.0
    return None if share == f.share(elsewhere) else share


def _block(f: _Fields) -> Block:
    if f.family.norms is not None:
        norms = f.optional(f.family.norms) or (2 if f.switch(f.family.own_heads) else 1)
        return "parallel" if norms == 2 else "one-norm"
    switch = f.family.parallel_switch
    return "pre" if switch is not None and not f.flag(switch, default=True) else f.family.block


def _dtype(f: _Fields) -> str:
    key, value = f.find("dtype")
    if isinstance(value, str):
        value = value.removeprefix("torch.")
    if value in (None, "auto"):
        return "bfloat16"
    if not isinstance(value, str) or value not in _DTYPES:
        f.refuse_value(key, value, f"one of {', '.join(sorted(_DTYPES))}")
    return value


def _activation(f: _Fields) -> str:
    if f.family.fixed_activation is not None:
        return f.family.fixed_activation
    name = f.one_of(f.family.activation, _ACTIVATIONS, default="silu")
    return "gelu_pytorch_tanh" if f.family.gelu_is_tanh and name == "gelu" else name


def _mlp(f: _Fields) -> Mlp:
    family = f.family
    return Mlp(
        width=_width(f),
        activation=_activation(f),
        gated=family.gated,
        fused=family.fused_mlp,
        bias=f.switch(family.mlp_bias),
    )


def _width(f: _Fields) -> int:
    field = f.family.mlp_width
    if field in f.family.defaults and f.family.defaults[field] is None:
        return f.optional(field) or 4 * f.size("hidden_size")
    width = width_of(f)
    return _in_blocks(f, 2 * width // 3) if f.family.adjusted_width and f.flag("block_auto_adjust_ff_dim") else width


def _in_blocks(f: _Fields, width: int) -> int:
    """A width times a number, rounded up to whole blocks (models/lfm2/modeling_lfm2.py, Lfm2MLP)."""
    key, factor = f.find("block_ffn_dim_multiplier")
    if factor is None:
        return width
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 < factor < _LARGEST_SIZE:
        f.refuse_value(key, factor, "a positive number, or null")
    block = f.size("block_multiple_of")
    return -(-int(factor * width) // block) * block


NO_ATTENTION = Attention(heads=0, kv_heads=0, head_dim=0, v_head_dim=0, rotary_dim=0)
"""Of a family without."""


def _attention(f: _Fields) -> Attention:
    family = f.family
    heads = f.size("num_attention_heads")
    if family.latent or (not family.registered and f.optional("kv_lora_rank") is not None):
        return _latent_attention(f, heads)
    own_heads = f.switch(family.own_heads)
    kv_heads = f.optional(family.kv_heads) if own_heads else None
    shares_one = not own_heads and family.multi_query is not None and f.flag(family.multi_query)
    kv_heads = 1 if shares_one else heads if kv_heads is None else kv_heads
    if heads % kv_heads:
        f.refuse(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    head_dim = _head_dim(f, heads)
    if family.square_output and heads * head_dim != f.size("hidden_size"):
        f.refuse(
            f"head_dim {head_dim} times num_attention_heads {heads} is not hidden_size, as this family's code has it"
        )
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        rotary_dim=_rotary_width(f, head_dim),
        qkv_bias=f.switch(family.qkv_bias),
        out_bias=f.switch(family.out_bias),
        fused_qkv=family.fused_qkv,
        qk_norm=_qk_norm(f),
        keys="broadcast" if shares_one and family.keys == "copied" else family.keys,
        dropout=f.share(family.attention_dropout),
        softcap=family.softcap and f.is_set("attn_logit_softcapping"),
        sinks=family.sinks,
        tempered=family.tempered is not None and f.flag(family.tempered),
        gated_output=family.gated_attention,
        values=family.values,
    )


def _qk_norm(f: _Fields) -> QkNorm:
    switch = f.family.qk_norm_switch
    return f.family.qk_norm if switch is None or f.flag(switch) else "none"


def _head_dim(f: _Fields, heads: int) -> int:
    head_dim = f.optional("head_dim") if f.family.own_heads is True else None
    if head_dim is not None:
        return head_dim
    hidden = f.size("hidden_size")
    if hidden % heads:
        f.refuse(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim")
    return hidden // heads


def _rotary_width(f: _Fields, head_dim: int) -> int:
    switch = f.family.rotary_switch
    if f.family.positions != "rotary" or (switch is not None and f.find(switch)[1] != "rope"):
        return 0
    width = f.optional(f.family.rotary_width, top=head_dim) if f.family.rotary_width is not None else None
    return int(head_dim * _rotary_share(f)) if width is None else width


def _rotary_share(f: _Fields) -> float:
    for holder in ("rope_parameters", "rope_scaling"):  # new and old home of the rotary settings
        rope = f.config.get(holder)
        if isinstance(rope, Mapping) and "partial_rotary_factor" in rope:
            return _Fields(rope, f.name, f.family).share("partial_rotary_factor", default=1.0)
    return f.share("partial_rotary_factor", default=1.0)


def _latent_attention(f: _Fields, heads: int) -> Attention:
    """DeepSeek's: keys and values are expanded to every head, so num_key_value_heads and head_dim mean nothing here."""
    latent = Latent(
        q_rank=f.size("q_lora_rank") if f.family.indexed else f.optional("q_lora_rank"),
        kv_rank=f.size("kv_lora_rank"),
        nope_dim=f.size("qk_nope_head_dim"),
        rope_dim=f.size("qk_rope_head_dim"),
        indexer=_indexer(f) if f.family.indexed else None,
    )
    return Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=latent.nope_dim + latent.rope_dim,
        v_head_dim=f.size("v_head_dim"),
        rotary_dim=latent.rope_dim,
        qkv_bias=f.switch(f.family.qkv_bias),  # on the projections to the low ranks
        out_bias=f.switch(f.family.out_bias),
        dropout=f.share(f.family.attention_dropout),
        latent=latent,
    )


def _indexer(f: _Fields) -> Indexer:
    return Indexer(f.size("index_n_heads"), f.size("index_head_dim"), f.size("index_topk"))


def _experts(f: _Fields) -> Experts:
    routed = f.family.experts
    assert routed is not None
    count, per_token = f.size("num_experts"), f.size("num_experts_per_tok")
    if per_token > count:
        f.refuse(f"{f.find('num_experts_per_tok')[0]} {per_token} is more than its {count} experts")
    own_width = f.family.registered or f.holds(routed.width)
    width = f.size(routed.width if own_width else "intermediate_size")
    sigmoid = not f.family.registered and f.find("scoring_func")[1] == "sigmoid"
    return Experts(
        number=count,
        per_token=per_token,
        width=width,
        activation=_activation(f),
        shared_width=_shared_width(f, width),
        shared_bias=f.switch(f.family.mlp_bias),
        bias=routed.bias,
        router="sigmoid-groups" if sigmoid else _router(f, routed),
        router_fp32=routed.fp32,
        normalised=f.switch(routed.normalised),
        clamped=routed.clamped,
        beside_mlp=routed.beside_mlp,
        gated=f.family.gated,
        latent=f.optional(routed.latent) if routed.latent is not None else None,
    )


def _router(f: _Fields, routed: Routed) -> Router:
    method = f.find(routed.method)[1] if routed.method is not None else None
    if method not in (None, "greedy", "group_limited_greedy"):
        f.refuse_value(str(routed.method), method, '"greedy" or "group_limited_greedy"')
    return "softmax-groups" if method == "group_limited_greedy" else routed.router


def _shared_width(f: _Fields, width: int) -> int:
    routed = f.family.experts
    field = routed.shared_width if routed is not None else None
    shared_width = f.optional(field, low=0) if field is not None else None
    return f.count("n_shared_experts", default=0) * width if shared_width is None else shared_width


def _layer_kinds(f: _Fields) -> tuple[LayerKind, ...]:
    if f.family.parted:
        return layers_of_one_part(f)
    layers, routed = f.size("num_hidden_layers", top=_MAX_LAYERS), _is_routed(f)
    first = f.count("first_k_dense_replace", default=0)
    every = f.optional("moe_layer_freq") or 1
    step = f.optional("decoder_sparse_step") or 1
    last = f.optional("moe_layer_end_index", low=-1)
    end = layers if last in (None, -1) else last + 1
    dense = _listed_layers(f, "mlp_only_layers") or frozenset()
    listed = _listed_layers(f, "moe_layers") if _has_field(f, "moe_layers") else _sparse_layers(f, layers)
    sparse = [
        routed and i in listed
        if listed is not None
        else routed and first <= i < end and i % every == 0 and (i + 1) % step == 0 and i not in dense
        for i in range(layers)
    ]
    windows = _windows(f, layers)
    masked = [f.family.always_masked] * layers
    turned, mixers = _turned_layers(f, windows), mixers_of_layers(f, layers)
    own = attention_of_layers(f, _attention(f), windows) if f.family.global_attention else [None] * layers
    shares = shares_of_layers(f, windows)
    widths = widths_of_layers(f, shares)
    fed, widening = [f.family.mlp_width != ""] * layers, [_is_wide(f) and i == 0 for i in range(layers)]
    cuts = cuts_of_layers(f, layers)
    return tuple(map(LayerKind, windows, sparse, turned, masked, mixers, own, widths, shares, fed, widening, cuts))


def _sparse_layers(f: _Fields, layers: int) -> frozenset[int] | None:
    """Numbers of the layers that mlp_layer_types gives experts, or transformers where the file has no such list; None: other fields say it."""
    routed = f.family.experts
    if routed is None or not routed.listed:
        return None
    kinds = f.config.get("mlp_layer_types")
    if kinds is None:
        return frozenset(range(routed.dense_first, layers)) if routed.dense_first else None
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in ("dense", "sparse") for kind in kinds):
        f.refuse_value("mlp_layer_types", kinds, 'a list of "dense" and "sparse", one per layer')
    return frozenset(i for i, kind in enumerate(kinds) if kind == "sparse")


def _is_routed(f: _Fields) -> bool:
    """Whether any layer has experts, where its number is one of those."""
    routed = f.family.experts
    if routed is None or (routed.switch is not None and not f.flag(routed.switch)):
        return False
    return not routed.may_be_none or f.count("num_experts", default=0) > 0


def _has_field(f: _Fields, field: str) -> bool:
    return f.family.experts is not None and field in f.family.experts.fields


def _listed_layers(f: _Fields, field: str) -> frozenset[int] | None:
    value = f.config.get(field)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        f.refuse_value(field, value, "a list of layer numbers")
    return frozenset(value)


def _windows(f: _Fields, layers: int) -> list[int | None]:
    """The sliding window of each layer, None where attention is full."""
    rule = f.family.windows
    if rule == "none":
        return [None] * layers
    switched = f.family.window_switch or (rule == "found" and f.holds("use_sliding_window"))
    enabled = f.flag("use_sliding_window") if switched else True
    window = f.optional("attention_chunk_size" if rule == "chunked" else "sliding_window") if enabled else None
    sliding = [True] * layers if rule == "every" else _sliding_layers(f, layers)
    sliding = [*sliding[:-1], False] if f.family.full_last else sliding
    return [window if slides else None for slides in sliding]


def _turned_layers(f: _Fields, windows: list[int | None]) -> list[bool]:
    """Whether rotary positions turn each layer's queries and keys."""
    rule = f.family.unturned
    if rule == "full" or (rule == "full beside windows" and f.optional("sliding_window") is not None):
        return [window is not None for window in windows]
    return _listed_turns(f, len(windows)) if rule == "listed" else [True] * len(windows)


def _listed_turns(f: _Fields, layers: int) -> list[bool]:
    turned = f.config.get("no_rope_layers")
    if turned is None or turned == []:
        period = f.optional("no_rope_layer_interval") or 4
        return [(i + 1) % period != 0 for i in range(layers)]
    if not isinstance(turned, list) or len(turned) != layers or not all(each in (0, 1) for each in turned):
        f.refuse_value("no_rope_layers", turned, "a list of 0 (without rotary positions) and 1, one per layer")
    return [bool(each) for each in turned]


def _sliding_layers(f: _Fields, layers: int) -> list[bool]:
    layer_types = f.config.get("layer_types")
    if layer_types is not None:
        kind = "chunked_attention" if f.family.windows == "chunked" else "sliding_attention"
        return [each == kind for each in _layer_types(f, layer_types, layers)]
    if f.family.windows == "chunked":
        return _listed_turns(f, layers)
    if f.family.windows == "late" or f.holds("max_window_layers"):
        first = f.count("max_window_layers", default=0)
        return [i >= first for i in range(layers)]
    if f.family.unturned == "listed":  # SmolLM3: the others
        return [not turns for turns in _listed_turns(f, layers)]
    period = f.optional("sliding_window_pattern") or f.family.period
    full = 0 if f.family.full_first else period - 1
    return [not period or i % period != full for i in range(layers)]


def _layer_types(f: _Fields, layer_types: object, layers: int) -> list[str]:
    if not isinstance(layer_types, list) or not all(isinstance(kind, str) for kind in layer_types):
        f.refuse_value("layer_types", layer_types, "a list with one kind of attention per layer")
    if len(layer_types) != layers:
        f.refuse(f"layer_types has {len(layer_types)} entries for the {layers} layers of num_hidden_layers")
    for kind in layer_types:
        if kind not in _ATTENTION_KINDS and not f.assumed:
            _refuse_layer_type(f, kind)
    return layer_types


def _refuse_layer_type(f: _Fields, kind: str) -> NoReturn:
    what = f"layer_types names {_format_value(kind)}, which is no attention that mstplan can plan"
    if f.family.registered:
        f.refuse(what, "It plans full_attention and sliding_attention.")
    from mstplan.spec import unread

    unread.refuse_unread(f.name, f"{what}.")


def _uncounted(f: _Fields) -> list[str]:
    """What is set that the formula does not count, in words."""
    found = [f"{key} is set" for key in f.family.uncounted if f.flag(key)]
    for key, wanted in f.family.only.items():
        value = f.find(key)[1]
        counted = wanted if isinstance(wanted, tuple) else (f.find(wanted)[1] if isinstance(wanted, str) else wanted,)
        if value is not None and value not in counted:
            found.append(f"{key} is {_format_value(value)}")
    return found


def _field_notes(f: _Fields) -> list[str]:
    notes = []
    if f.defaulted:
        listed = ", ".join(f"{key} {value}" for key, value in f.defaulted.items())
        notes.append(f"not in the file, transformers' default taken: {listed}")
    notes += [f"{what}: what that changes is not counted" for what in _uncounted(f)]
    if f.family.experts is not None and f.family.experts.beside_mlp and _is_routed(f):
        notes.append(
            "mst and mst-offload are left out: its experts are given more than hidden states, so that MLPs do not run in chunks; mst-layer runs "
            "all of a layer but attention in pieces (-s mst-layer)"
        )
    if f.family.experts is not None and f.count("num_nextn_predict_layers", default=0):
        notes.append("the layer that predicts further tokens (num_nextn_predict_layers) is not counted")
    return notes


def _published_quantisation(config: Mapping[str, object]) -> tuple[str, bool]:
    """What bitsandbytes published the weights in: nf4, fp4, int8, or "" for neither; and whether scales are quantised, too."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return "", False
    if settings.get("load_in_8bit"):
        return "int8", False
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    known = bool(settings.get("load_in_4bit")) and kind in ("nf4", "fp4")
    return (str(kind) if known else ""), known and bool(settings.get("bnb_4bit_use_double_quant"))


def _quantised_notes(f: _Fields) -> list[str]:
    """Note on weights that are published quantised: who has them usually trains adapters on them."""
    quantised = f.config.get("quantization_config")
    if not quantised:
        return []
    if kind := _published_quantisation(f.config)[0]:
        return [
            f"published in {kind} (bitsandbytes): planned as QLoRA, unless --quantize none, --lora 0 or --recipe says otherwise"
        ]
    method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
    how = f" ({one_line(method, 40)})" if isinstance(method, str) else ""
    what = (
        f"the published weights are quantised{how}, which is not planned: this is full fine-tuning of unquantised ones"
    )
    return [
        what if f.family.indexed else f"{what}; nearest: --lora 16 --quantize nf4"
    ]  # indexers are not counted in 4 bits


def _model_type(config: Mapping[str, object], name: str) -> str:
    value = config.get("model_type")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ModelError(f"{name}: model_type is {_format_value(value)}, must be text such as 'llama'\n{_WAY_OUT}")
    return value


def _translate(config: Mapping[str, object], name: str, assume: str | None) -> Mapping[str, object]:
    """The file in a family's fields, if it came with code of its own that `published.py` knows."""
    from mstplan.spec import published

    return published.in_known_fields(config, name) if assume is None else published.as_transformers_has_it(config)


def _find_part(config: Mapping[str, object]) -> str | None:
    return next((part for part in TEXT_PARTS if isinstance(config.get(part), Mapping)), None)


def text_of(config: Mapping[str, object]) -> Mapping[str, object]:
    """The fields of the part that speaks, of a file of several models; of any other file all."""
    for _ in TEXT_PARTS:  # no file is deeper
        part = config.get(_find_part(config) or "")
        if not isinstance(part, Mapping):
            return config
        config = _text_part(config, part)
    return config


def _text_part(whole: Mapping[str, object], text: Mapping[str, object]) -> dict[str, object]:
    """The text model's fields; what holds for the whole model stands one level up."""
    inherited_keys = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
    inherited = {key: whole[key] for key in inherited_keys if whole.get(key) is not None}
    kind = whole.get("model_type")
    if isinstance(kind, str) and kind.endswith("_thinker"):  # whose head is its own where it does not say otherwise
        inherited.setdefault("tie_word_embeddings", False)
    kind = TEXT_TYPES.get(kind, kind) if isinstance(kind, str) else kind
    return {"model_type": kind, **text, **inherited}


def describes_towers(config: Mapping[str, object]) -> bool:
    """Whether a file may be of a model with more parts than its text part."""
    return _find_part(config) is not None or _has_towers(config)


def _has_towers(config: Mapping[str, object]) -> bool:
    return any(
        isinstance(value, Mapping) and value and any(word in key for word in _TOWER_WORDS)
        for key, value in config.items()
    )


def _refuse_non_decoders(config: Mapping[str, object], name: str) -> None:
    """Refuses what is not a decoder trained on next-token loss."""
    model_type = config.get("model_type")
    lower = model_type.lower() if isinstance(model_type, str) else ""
    kind = next((kind for kind, types in _REFUSED_TYPES.items() if lower in types), None)
    if kind is None and config.get("is_encoder_decoder") is True:
        kind = "an encoder-decoder model"
    if kind is None and (
        _only_encoders(config.get("architectures")) or config.get("use_bidirectional_attention") is True
    ):
        kind = "an encoder-only model"
    if kind is not None:
        _refuse_kind(config, name, kind)


def _refuse_kind(config: Mapping[str, object], name: str, kind: str) -> NoReturn:
    raise ModelError(
        f"{name} is {kind} (model_type {_format_value(config.get('model_type'))}): mstplan plans decoders trained on next-token loss.\n"
        "Pass the config.json of a decoder, such as Llama, Qwen, Mistral, Gemma or DeepSeek."
    )


def _refuse_other_classes(config: Mapping[str, object], name: str) -> None:
    """Refuses a file without a row that names classes which are no causal language model, and none among code of its own."""
    architectures, auto_map = config.get("architectures"), config.get("auto_map")
    has_causal_code = isinstance(auto_map, Mapping) and "AutoModelForCausalLM" in auto_map
    if (
        isinstance(architectures, list)
        and bool(architectures)
        and all(isinstance(each, str) and not each.endswith(_CAUSAL_CLASSES) for each in architectures)
        and not has_causal_code
    ):
        _refuse_kind(
            config, name, f"no causal language model, going by its architectures {_format_value(architectures)}"
        )


def _only_encoders(architectures: object) -> bool:
    return (
        isinstance(architectures, list)
        and bool(architectures)
        and all(isinstance(each, str) and each.endswith(_ENCODER_CLASSES) for each in architectures)
    )


def _format_value(value: object) -> str:
    """A value as a message shows it: on one line, and short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits; lists in lists in lists
        return "far too large to show"
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 60 else text[:57] + "..."
