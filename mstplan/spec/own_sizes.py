"""Reads from a config.json what layers have of their own where the model's other layers have something else: heads of attention, keys and
values that later layers share, widths of MLPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .model import Attention, Lends

if TYPE_CHECKING:
    from .config import _Fields


def attention_of_layers(f: _Fields, attention: Attention, windows: Sequence[int | None]) -> list[Attention | None]:
    """Each layer's own attention; None: the model's. Raises ModelError for heads that do not fit, UnreadError for what is not counted."""
    if not f.family.global_attention:
        return [None] * len(windows)
    full = attention._replace(values="keys") if f.flag("attention_k_eq_v") else attention
    heads = _heads_by_layer(f, attention, windows)
    own = [_with_heads(f, attention if window is not None else full, *heads[n]) for n, window in enumerate(windows)]
    return [None if each == attention else each for each in own]


def shares_of_layers(f: _Fields, windows: Sequence[int | None]) -> list[Lends]:
    """Which layers take keys and values of earlier ones, and which lend them: the last with a window, and the last without, that has its
    own (models/gemma4/configuration_gemma4.py, kv_sharing_modes). Raises UnreadError where a kind of layers only lends or
    only borrows."""
    borrowers = f.count("num_kv_shared_layers", default=0) if f.family.shared_keys else 0
    if not borrowers:
        return [""] * len(windows)
    own = len(windows) - borrowers
    slides = [window is not None for window in windows]
    lenders = {kind: max((n for n in range(max(own, 0)) if slides[n] is kind), default=None) for kind in set(slides)}
    if None in lenders.values() or set(slides[own:]) != set(slides):
        from . import unread

        unread.refuse_unread(
            f.name,
            f"num_kv_shared_layers is {borrowers}, and the formula counts that where each kind of layers has some with keys and values of their "
            "own, and some that take those.",
        )
    return ["borrows" if n >= own else "lends" if n in lenders.values() else "" for n in range(len(windows))]


def widths_of_layers(f: _Fields, shares: Sequence[Lends]) -> list[int | None]:
    """Each layer's own width of its MLP; None: the model's."""
    listed = f.config.get(f.family.mlp_width)
    if f.family.streams and isinstance(listed, list):
        if len(listed) != len(shares):
            f.refuse(
                f"{f.family.mlp_width} lists {len(listed)} widths for the {len(shares)} layers of num_hidden_layers"
            )
        widths = [f.among({"width": each}, "width", 1) for each in listed]
        return [None if each == widths[0] else each for each in widths]
    switch = f.family.wide_borrowers
    if switch is None or not f.flag(switch):
        return [None] * len(shares)
    return [2 * f.size(f.family.mlp_width) if share == "borrows" else None for share in shares]


def width_of(f: _Fields) -> int:
    """Width of the MLPs: of several that are listed the first's."""
    listed = f.config.get(f.family.mlp_width)
    if f.family.streams and isinstance(listed, list):
        if not listed:
            f.refuse_value(f.family.mlp_width, listed, "a whole number, or one for each layer")
        return f.among({"width": listed[0]}, "width", 1)
    return f.size(f.family.mlp_width)


_CUT_LAYERS = 10
"""Layers whose gates are cut off where a file does not say it, of more than so many (models/gemma3n/configuration_gemma3n.py)."""


def cuts_of_layers(f: _Fields, layers: int) -> list[bool]:
    """In which layers gates of the MLP are cut off below a share of them."""
    if not f.family.streams:
        return [False] * layers
    shares = f.config.get("activation_sparsity_pattern")
    if shares is None:
        return [layers > _CUT_LAYERS and n < _CUT_LAYERS for n in range(layers)]
    if (
        not isinstance(shares, list)
        or len(shares) != layers
        or not all(isinstance(each, (int, float)) and 0 <= each < 1 for each in shares)
    ):
        f.refuse_value("activation_sparsity_pattern", shares, "a list of shares below 1, one per layer")
    return [each > 0 for each in shares]


def _with_heads(f: _Fields, attention: Attention, head_dim: int, kv_heads: int) -> Attention:
    if attention.heads % kv_heads:
        f.refuse(f"num_attention_heads {attention.heads} is not a multiple of {kv_heads} heads of keys and values")
    turned = head_dim if attention.rotary_dim else 0
    return attention._replace(head_dim=head_dim, v_head_dim=head_dim, rotary_dim=turned, kv_heads=kv_heads)


def _heads_by_layer(f: _Fields, attention: Attention, windows: Sequence[int | None]) -> list[tuple[int, int]]:
    """Head size and heads of keys of each layer: by per_layer_config, as transformers writes it, else by fields for all layers without a
    window (models/gemma4/configuration_gemma4.py)."""
    usual = attention.head_dim, attention.kv_heads
    if "per_layer_config" in f.config:
        listed = _overrides(f, len(windows))
        return [
            (f.among(listed[n], "head_dim", usual[0]), f.among(listed[n], "num_key_value_heads", usual[1]))
            if n in listed
            else usual
            for n in range(len(windows))
        ]
    kv_heads = f.optional("num_global_key_value_heads") if f.flag("attention_k_eq_v") else None
    full = f.size("global_head_dim"), kv_heads or attention.kv_heads
    return [full if window is None else usual for window in windows]


def _overrides(f: _Fields, layers: int) -> dict[int, Mapping[str, object]]:
    """What per_layer_config says, by the numbers of layers."""
    from . import unread

    value = f.config["per_layer_config"]
    rows = value.items() if isinstance(value, Mapping) else ()
    if not isinstance(value, Mapping) or not all(
        str(n).isdecimal() and int(n) < layers and isinstance(row, Mapping) for n, row in rows
    ):
        f.refuse_value("per_layer_config", value, "fields of layers by their numbers")
    counted = {"head_dim", "num_key_value_heads"}
    other = sorted({str(key) for _, row in rows for key in row} - counted)
    if other:
        unread.refuse_unread(
            f.name, f"per_layer_config sets {', '.join(other)}, and the formula does not count what that changes."
        )
    return {int(n): row for n, row in rows}
