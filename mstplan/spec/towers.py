"""Towers and projectors of models that read images, by their configurations: every weight's shape, without torch.

from source: transformers 5.23, modeling_*.py of each family; `tests/spec/test_towers.py` holds the counts to its modules. A family, or
a tower in it, without a rule here is counted by transformers' own code alone, where the trace runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

TowerKind = Literal["vision", "audio", "projector"]


class TowerWeight(NamedTuple):
    """Weights of one shape. linear: the matrix of a linear layer, which can be quantised."""

    shape: tuple[int, ...]
    copies: int = 1
    linear: bool = False


class Tower(NamedTuple):
    """A part of a model that text does not go through."""

    kind: TowerKind
    weights: tuple[TowerWeight, ...]

    @property
    def parameters(self) -> int:
        return sum(_numel(weight.shape) * weight.copies for weight in self.weights)


def towers_of(config: Mapping[str, object]) -> tuple[Tower, ...] | None:
    """The towers of a whole's config.json. None: there is no rule for them, or it leaves out what the rule asks."""
    rule = RULES.get(str(config.get("model_type")))
    vision = config.get("vision_config")
    text = config.get("text_config", config)
    if rule is None or not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        return None
    try:
        towers = rule(Fields(config), Fields(vision), Fields(text))
    except (KeyError, TypeError):
        return None
    return None if towers is None else tuple(Tower(kind, tuple(weights)) for kind, weights in towers.items())


Towers = dict[TowerKind, list[TowerWeight]]


class Fields:
    """Sizes of a configuration: KeyError for one that is not there, TypeError for one that is none."""

    def __init__(self, fields: Mapping[str, Any]):
        self.fields = fields

    def size(self, name: str, default: int | None = None) -> int:
        value = self.fields[name] if default is None else self.fields.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise TypeError(name)
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.fields.get(name, default)
        if not isinstance(value, bool):
            raise TypeError(name)
        return value

    def word(self, name: str, default: str) -> str:
        value = self.fields.get(name, default)
        if not isinstance(value, str):
            raise TypeError(name)
        return value

    def count(self, name: str, default: list[int]) -> int:
        """How many numbers a list has; one number is one."""
        value = self.fields.get(name, default)
        if not isinstance(value, list | tuple | int):
            raise TypeError(name)
        return 1 if isinstance(value, int) else len(value)


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _linear(inner: int, outer: int, bias: bool, copies: int = 1) -> Iterator[TowerWeight]:
    yield TowerWeight((outer, inner), copies, linear=True)
    if bias:
        yield TowerWeight((outer,), copies)


def _layer_norms(width: int, copies: int) -> TowerWeight:
    """Weights and biases."""
    return TowerWeight((width,), 2 * copies)


# ---- encoders -------------------------------------------------------------------------------------------------------------


def _vit_layers(v: Fields, hidden: int, width: int, layers: int) -> Iterator[TowerWeight]:
    """Layers of CLIP, SigLIP and Llama-4: four projections, an MLP of two matrices, two layer norms, biases throughout."""
    yield from _linear(hidden, hidden, True, 4 * layers)
    yield from _linear(hidden, width, True, layers)
    yield from _linear(width, hidden, True, layers)
    yield _layer_norms(hidden, 2 * layers)


def _clip(v: Fields) -> Iterator[TowerWeight]:
    hidden, patch = v.size("hidden_size", 768), v.size("patch_size", 32)
    yield TowerWeight((hidden, v.size("num_channels", 3), patch, patch))
    yield TowerWeight((hidden,))  # of the class
    yield TowerWeight(((v.size("image_size", 224) // patch) ** 2 + 1, hidden))
    yield _layer_norms(hidden, 2)
    yield from _vit_layers(v, hidden, v.size("intermediate_size", 3072), v.size("num_hidden_layers", 12))


def _siglip(v: Fields) -> Iterator[TowerWeight]:
    hidden, width, patch = v.size("hidden_size", 768), v.size("intermediate_size", 3072), v.size("patch_size", 16)
    yield TowerWeight((hidden, v.size("num_channels", 3), patch, patch))
    yield TowerWeight((hidden,))
    yield TowerWeight(((v.size("image_size", 224) // patch) ** 2, hidden))
    yield _layer_norms(hidden, 1)
    yield from _vit_layers(v, hidden, width, v.size("num_hidden_layers", 12))
    if v.flag("vision_use_head", True):
        yield TowerWeight((1, 1, hidden))
        yield TowerWeight((3 * hidden, hidden))  # torch's MultiheadAttention, which is not quantised
        yield TowerWeight((hidden, hidden))
        yield TowerWeight((hidden,), 4)
        yield _layer_norms(hidden, 1)
        yield from _linear(hidden, width, True)
        yield from _linear(width, hidden, True)


def _pixtral(v: Fields) -> Iterator[TowerWeight]:
    hidden, width, patch = v.size("hidden_size", 1024), v.size("intermediate_size", 4096), v.size("patch_size", 16)
    layers = v.size("num_hidden_layers", 24)
    yield TowerWeight((hidden, v.size("num_channels", 3), patch, patch))
    yield from _linear(hidden, hidden, False, 4 * layers)
    yield from _linear(hidden, width, False, 2 * layers)
    yield from _linear(width, hidden, False, layers)
    yield TowerWeight((hidden,), 2 * layers + 1)


_ENCODERS: Mapping[str, Callable[[Fields], Iterator[TowerWeight]]] = {
    "clip_vision_model": _clip,
    "siglip_vision_model": _siglip,
    "pixtral": _pixtral,
}


def _encoder(v: Fields) -> tuple[list[TowerWeight], int]:
    """An encoder's weights, and its width. KeyError for one without a rule."""
    weights = list(_ENCODERS[str(v.fields.get("model_type"))](v))
    return weights, weights[0].shape[0]


# ---- families: whole, vision, text ----------------------------------------------------------------------------------------


def _llava(w: Fields, v: Fields, t: Fields) -> Towers:
    weights, width = _encoder(v)
    hidden, bias = t.size("hidden_size"), w.flag("multimodal_projector_bias", True)
    projector = [
        *_linear(width * w.count("vision_feature_layer", [-2]), hidden, bias),
        *_linear(hidden, hidden, bias),
    ]
    return {"vision": weights, "projector": projector}


def _llava_next(w: Fields, v: Fields, t: Fields) -> Towers:
    towers = _llava(w, v, t)
    towers["projector"].append(TowerWeight((t.size("hidden_size"),)))  # image_newline
    return towers


def _mistral3(w: Fields, v: Fields, t: Fields) -> Towers:
    weights, width = _encoder(v)
    hidden, bias = t.size("hidden_size"), w.flag("multimodal_projector_bias", False)
    projector = [
        TowerWeight((width,)),
        *_linear(width * w.size("spatial_merge_size", 2) ** 2, width, False),
        *_linear(width * w.count("vision_feature_layer", [-1]), hidden, bias),
        *_linear(hidden, hidden, bias),
    ]
    return {"vision": weights, "projector": projector}


def _gemma3(w: Fields, v: Fields, t: Fields) -> Towers:
    weights, width = _encoder(v)
    return {"vision": weights, "projector": [TowerWeight((width, t.size("hidden_size", 2304))), TowerWeight((width,))]}


def _llama4(w: Fields, v: Fields, t: Fields) -> Towers:
    hidden, width, patch = v.size("hidden_size", 768), v.size("intermediate_size", 5632), v.size("patch_size", 14)
    inner, outer = v.size("projector_input_dim", 4096), v.size("projector_output_dim", 4096)
    vision = [
        *_linear(v.size("num_channels", 3) * patch**2, hidden, False),
        TowerWeight((hidden,)),  # of the class
        TowerWeight(((v.size("image_size", 448) // patch) ** 2 + 1, hidden)),
        _layer_norms(hidden, 2),
        *_vit_layers(v, hidden, width, v.size("num_hidden_layers", 34)),
        *_linear(width, inner, False),  # after pixels are shuffled
        *_linear(outer, outer, False),
    ]
    return {
        "vision": vision,
        "projector": list(_linear(v.size("vision_output_dim", 7680), t.size("hidden_size", 5120), False)),
    }


def _patches(v: Fields, hidden: int, patch: int) -> TowerWeight:
    """The filter of Qwen-VL's, over frames, rows and columns."""
    return TowerWeight((hidden, v.size("in_channels", 3), v.size("temporal_patch_size", 2), patch, patch))


def _merger(merged: int, outer: int, norm: int, norms: int, copies: int = 1) -> list[TowerWeight]:
    """Qwen-VL's projector: a norm of `norms` vectors, and two linear layers over neighbouring patches."""
    return [
        TowerWeight((norm,), norms * copies),
        *_linear(merged, merged, True, copies),
        *_linear(merged, outer, True, copies),
    ]


def _qwen2_vl(w: Fields, v: Fields, t: Fields) -> Towers:
    hidden, layers = v.size("embed_dim", 1280), v.size("depth", 32)
    width = hidden * v.size("mlp_ratio", 4)
    vision = [
        _patches(v, hidden, v.size("patch_size", 14)),
        _layer_norms(hidden, 2 * layers),
        *_linear(hidden, 3 * hidden, True, layers),
        *_linear(hidden, hidden, True, layers),
        *_linear(hidden, width, True, layers),
        *_linear(width, hidden, True, layers),
    ]
    merged = hidden * v.size("spatial_merge_size", 2) ** 2
    return {"vision": vision, "projector": _merger(merged, v.size("hidden_size", 3584), hidden, 2)}


def _qwen2_5_vl(w: Fields, v: Fields, t: Fields) -> Towers:
    hidden, width, layers = v.size("hidden_size", 3584), v.size("intermediate_size", 3420), v.size("depth", 32)
    vision = [
        _patches(v, hidden, v.size("patch_size", 14)),
        TowerWeight((hidden,), 2 * layers),
        *_linear(hidden, 3 * hidden, True, layers),
        *_linear(hidden, hidden, True, layers),
        *_linear(hidden, width, True, 2 * layers),
        *_linear(width, hidden, True, layers),
    ]
    merged = hidden * v.size("spatial_merge_size", 2) ** 2
    return {"vision": vision, "projector": _merger(merged, v.size("out_hidden_size", 3584), hidden, 1)}


def _qwen3_vl(w: Fields, v: Fields, t: Fields) -> Towers:
    hidden, width, layers = v.size("hidden_size", 1152), v.size("intermediate_size", 4304), v.size("depth", 27)
    vision = [
        _patches(v, hidden, v.size("patch_size", 16)),
        TowerWeight((hidden,)),
        TowerWeight((v.size("num_position_embeddings", 2304), hidden)),
        _layer_norms(hidden, 2 * layers),
        *_linear(hidden, 3 * hidden, True, layers),
        *_linear(hidden, hidden, True, layers),
        *_linear(hidden, width, True, layers),
        *_linear(width, hidden, True, layers),
    ]
    merged, outer = hidden * v.size("spatial_merge_size", 2) ** 2, v.size("out_hidden_size", 3584)
    deep = v.count("deepstack_visual_indexes", [8, 16, 24])
    return {
        "vision": vision,
        "projector": _merger(merged, outer, hidden, 2) + _merger(merged, outer, merged, 2, deep),
    }


def _gemma4(w: Fields, v: Fields, t: Fields) -> Towers:
    towers: Towers = {"vision": list(_gemma4_vision(v, t.size("hidden_size", 2304)))}
    audio = w.fields.get("audio_config")
    if isinstance(audio, Mapping):
        towers["audio"] = list(_gemma4_audio(Fields(audio), t.size("hidden_size", 2304)))
    return towers


def _gemma4_vision(v: Fields, outer: int) -> Iterator[TowerWeight]:
    hidden, width, layers = (
        v.size("hidden_size", 768),
        v.size("intermediate_size", 3072),
        v.size("num_hidden_layers", 16),
    )
    heads, head_dim = v.size("num_attention_heads", 12), v.size("head_dim", 64)
    yield TowerWeight((2, v.size("position_embedding_size", 10240), hidden))
    yield from _linear(3 * v.size("patch_size", 16) ** 2, hidden, False)
    yield from _linear(hidden, heads * head_dim, False, layers)
    yield from _linear(hidden, v.size("num_key_value_heads", 12) * head_dim, False, 2 * layers)
    yield from _linear(heads * head_dim, hidden, False, layers)
    yield from _linear(hidden, width, False, 2 * layers)
    yield from _linear(width, hidden, False, layers)
    yield TowerWeight((head_dim,), 2 * layers)
    yield TowerWeight((hidden,), 4 * layers)
    yield from _linear(hidden, outer, False)


def _gemma4_audio(a: Fields, outer: int) -> Iterator[TowerWeight]:
    """A conformer: convolutions, then layers of two MLPs around attention and a convolution."""
    hidden, layers, width = (
        a.size("hidden_size", 1024),
        a.size("num_hidden_layers", 12),
        a.size("output_proj_dims", 1536),
    )
    first, second = a.fields.get("subsampling_conv_channels", (128, 32))
    channels = Fields({"first": first, "second": second})
    first, second = channels.size("first"), channels.size("second")
    yield TowerWeight((first, 1, 3, 3))
    yield TowerWeight((second, first, 3, 3))
    yield TowerWeight((first,))
    yield TowerWeight((second,))
    yield from _linear(first // 4 * second, hidden, False)
    yield from _linear(hidden, 4 * hidden, False, 2 * layers)
    yield from _linear(4 * hidden, hidden, False, 2 * layers)
    yield from _linear(hidden, hidden, False, 6 * layers)  # of attention, and after the convolution
    yield from _linear(hidden, 2 * hidden, False, layers)
    yield TowerWeight((hidden // a.size("num_attention_heads", 8),), layers)
    yield TowerWeight((hidden, 1, a.size("conv_kernel_size", 5)), layers)
    yield TowerWeight((hidden,), 9 * layers)
    yield from _linear(hidden, width, True)
    yield from _linear(width, outer, False)


RULES: Mapping[str, Callable[[Fields, Fields, Fields], Towers | None]] = {
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "llama4": _llama4,
    "llava": _llava,
    "llava_next": _llava_next,
    "mistral3": _mistral3,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl,
}
