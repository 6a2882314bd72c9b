"""Reads from a config.json what mixes tokens in each layer, and the sizes of what does so otherwise than by attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from .model import GatedDelta, LayerKind, Mamba2, Mixer, Mixing, ShortConv

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


def _unlisted(f: _Fields, layers: int, mixer: Mixer) -> list[Mixer]:
    """By the numbers of the layers with attention, where all have it without them, or by their period."""
    if f.family.attention_by == "layer_types":
        f.refuse("layer_types is missing, which says what mixes tokens in each layer")
    if f.family.attention_by == "none has":
        return [mixer] * layers
    if f.family.attention_by == "full_attention_interval":
        period = f.optional("full_attention_interval") or 4
        return ["attention" if (n + 1) % period == 0 else mixer for n in range(layers)]
    numbers = f.config.get("full_attn_idxs")
    if numbers is None:
        return ["attention"] * layers
    if not isinstance(numbers, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        f.refuse_value("full_attn_idxs", numbers, "a list of layer numbers")
    return ["attention" if n in numbers else mixer for n in range(layers)]


def mixer_of(f: _Fields, kinds: Iterable[LayerKind]) -> Mixing | None:
    """The sizes of the mixer that some of these layers have; None: all have attention."""
    mixer = next((kind.mixer for kind in kinds if kind.mixer != "attention"), None)
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
    heads, groups = f.size("mamba_n_heads"), f.size("mamba_n_groups")
    inner = f.size("mamba_expand") * f.size("hidden_size")
    given = f.find("mamba_d_head")[1]
    head_dim = inner // heads if given in (None, "auto") else f.size("mamba_d_head")
    if head_dim * heads != inner or heads % groups:
        f.refuse(f"{heads} heads of {head_dim} in {groups} groups make no mixer of {inner} numbers a token")
    chunk = f.size("mamba_chunk_size")
    if chunk not in MAMBA_CHUNKS:
        from . import unread

        known = " or ".join(map(str, MAMBA_CHUNKS))
        unread.refuse_unread(f.name, f"mamba_chunk_size is {chunk}, and the formula counts chunks of {known} tokens.")
    sizes = groups, f.size("mamba_d_state"), f.size("mamba_d_conv"), chunk
    return Mamba2(heads, head_dim, *sizes, f.flag("mamba_proj_bias"), f.flag("mamba_conv_bias"))


_READERS: Mapping[Mixer, Callable[[_Fields], Mixing]] = {
    "short conv": _short_conv,
    "gated delta": _gated_delta,
    "mamba2": _mamba2,
}
