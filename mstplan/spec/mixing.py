"""Reads from a config.json what mixes tokens in each layer, and the sizes of what does so otherwise than by attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from .model import GatedDelta, GatedNorm, LayerKind, Mamba2, Mixer, Mixing, ShortConv

if TYPE_CHECKING:
    from .config import _Fields


def mixers_of_layers(f: _Fields, layers: int) -> list[Mixer]:
    """What mixes tokens in each of so many layers. Raises ModelError for lists that do not fit."""
    mixer = f.family.mixer
    if mixer == "attention":
        return [mixer] * layers
    kinds = f.config.get("layer_types")
    if kinds is None:
        return _unlisted(f, layers, mixer)
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        f.refuse_value("layer_types", kinds, "a list with one kind of layer per layer")
    if len(kinds) != layers:
        f.refuse(f"layer_types has {len(kinds)} entries for the {layers} layers of num_hidden_layers")
    names: dict[str, Mixer] = {"full_attention": "attention", "attention": "attention"}
    names |= dict.fromkeys(_NAMES[mixer], mixer)
    if unknown := next((kind for kind in kinds if kind not in names), None):
        f.refuse(f"layer_types names {unknown!r}, which this family's code has not", f"It has {', '.join(names)}.")
    return [names[kind] for kind in kinds]


_NAMES: Mapping[Mixer, tuple[str, ...]] = {
    "short conv": ("conv",),
    "gated delta": ("linear_attention",),
    "mamba2": ("linear_attention", "mamba"),
}
"""What `layer_types` calls a mixer."""


_PARTS: Mapping[str, LayerKind] = {
    "linear_attention": LayerKind(mixer="mamba2", feed_forward=False),
    "full_attention": LayerKind(feed_forward=False),
    "mlp": LayerKind(mixer="none"),
    "moe": LayerKind(mixer="none", experts=True),
}
_LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_OLDER_PARTS = {"mamba": "linear_attention", "attention": "full_attention"}


def layers_of_one_part(f: _Fields) -> tuple[LayerKind, ...]:
    """Layers of which each is one part, by the list of them or by a letter for each (Nemotron-H). Raises ModelError."""
    parts, letters = f.config.get("layers_block_type"), f.config.get("hybrid_override_pattern")
    if parts is None and letters is None:
        parts = ["linear_attention", "moe", "full_attention", "mlp"]
    elif parts is None:
        if not isinstance(letters, str) or not letters or set(letters) - set(_LETTERS):
            f.refuse_value("hybrid_override_pattern", letters, f"a letter of {' '.join(_LETTERS)} for each layer")
        parts = [_LETTERS[letter] for letter in letters]
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
        f.refuse_value("layers_block_type", parts, "a list with one kind of layer per layer")
    if len(parts) > f.most_layers:
        f.refuse(f"layers_block_type lists {len(parts):,} layers, of which there are at most {f.most_layers:,}")
    named = [_OLDER_PARTS.get(str(part), str(part)) for part in parts]
    unknown = next((part for part in named if part not in _PARTS), None)
    if unknown is not None:
        f.refuse(
            f"layers_block_type names {unknown!r}, which this family's code has not", f"It has {', '.join(_PARTS)}."
        )
    return tuple(_PARTS[part] for part in named)


def _unlisted(f: _Fields, layers: int, mixer: Mixer) -> list[Mixer]:
    """By the numbers of the layers with attention, where all have it without them, or by their period."""
    if f.family.attention_by == "layer_types":
        f.refuse("layer_types is missing, which says what mixes tokens in each layer")
    if f.family.attention_by == "none has":
        return [mixer] * layers
    if f.family.attention_by == "full_attention_interval":
        period = f.optional("full_attention_interval") or 4
        return ["attention" if (n + 1) % period == 0 else mixer for n in range(layers)]
    numbers = f.config.get(f.family.attention_by)
    if numbers is None:
        return ["attention" if f.family.attention_by == "full_attn_idxs" else mixer] * layers
    if not isinstance(numbers, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        f.refuse_value(f.family.attention_by, numbers, "a list of layer numbers")
    return ["attention" if n in numbers else mixer for n in range(layers)]


def mixer_of(f: _Fields, kinds: Iterable[LayerKind]) -> Mixing | None:
    """The sizes of the mixer that some of these layers have beside attention or in its place; None: none has one."""
    mixer = next((kind.mixer for kind in kinds if kind.mixer in _READERS), None)
    return _READERS[mixer](f) if mixer is not None else None


def _short_conv(f: _Fields) -> ShortConv:
    return ShortConv(f.size("conv_L_cache"), f.flag("conv_bias"))


def _gated_delta(f: _Fields) -> GatedDelta:
    keys, values = f.size("linear_num_key_heads"), f.size("linear_num_value_heads")
    if values % keys:
        f.refuse(f"linear_num_value_heads {values} is not a multiple of linear_num_key_heads {keys}")
    widths = f.size("linear_key_head_dim"), f.size("linear_value_head_dim")
    return GatedDelta(keys, values, *widths, f.size("linear_conv_kernel_dim"), f.family.code.apart_products)


MAMBA_CHUNKS = 128, 256
"""Tokens of a chunk, in published models."""


def _mamba2(f: _Fields) -> Mamba2:
    field = {**_MAMBA_FIELDS, **f.family.mixer_fields}
    heads, groups = f.size(field["n_heads"]), f.size(field["n_groups"])
    given = f.find(field["d_head"])[1]
    inner = _inner_width(f, field)
    head_dim = inner // heads if inner is not None and given in (None, "auto") else f.size(field["d_head"])
    if head_dim * heads != (inner or head_dim * heads) or heads % groups:
        f.refuse(f"{heads} heads of {head_dim} in {groups} groups make no mixer of {inner} numbers a token")
    chunk = f.size(field["chunk_size"])
    if chunk not in MAMBA_CHUNKS:
        from . import unread

        known = " or ".join(map(str, MAMBA_CHUNKS))
        name = field["chunk_size"]
        unread.refuse_unread(f.name, f"{name} is {chunk}, and the formula counts chunks of {known} tokens.")
    sizes = groups, f.size(field["d_state"]), f.size(field["d_conv"]), chunk
    into, convolved, out = (f.flag(field[name]) for name in ("proj_bias", "conv_bias", "out_bias"))
    return Mamba2(heads, head_dim, *sizes, into, convolved, out, _gated_norm(f), f.family.code.scales_mixers)


_MAMBA_FIELDS: Mapping[str, str] = {
    **{
        name: f"mamba_{name}" for name in ("n_heads", "d_head", "n_groups", "d_state", "d_conv", "expand", "chunk_size")
    },
    "proj_bias": "mamba_proj_bias",
    "conv_bias": "mamba_conv_bias",
    "out_bias": "mamba_proj_bias",
}


def _inner_width(f: _Fields, field: Mapping[str, str]) -> int | None:
    """Numbers of a token within the mixer, where a field says so beside those of its heads."""
    if f.family.inner_width == "heads":
        return None
    own = f.optional(f.family.inner_width) if f.family.inner_width is not None else None
    return own or f.size(field["expand"]) * f.size("hidden_size")


def _gated_norm(f: _Fields) -> GatedNorm:
    if not f.flag("mamba_rms_norm", default=True):
        return "none"
    return "before the gate" if f.flag("mamba_norm_before_gate") else "after the gate"


_READERS: Mapping[Mixer, Callable[[_Fields], Mixing]] = {
    "short conv": _short_conv,
    "gated delta": _gated_delta,
    "mamba2": _mamba2,
    "attention and mamba2": _mamba2,
}
