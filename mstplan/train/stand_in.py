"""Stands in for the description of a model that the formula does not read: sizes taken from the module itself.

No answer is counted from it. It says where a search by trace begins, and how many chunks are worthwhile.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..spec.model import Attention, Experts, LayerKind, Mlp, Model, StandIn
from .locate import ModelParts, find_mlps, find_parts

_POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx")
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "top_k")


def stand_in(model: PreTrainedModel, name: str, why: str) -> Model:
    """The description of `model` by what its modules are. why: the formula's refusal, in a line. Raises ModelError for what is no causal
    language model of transformers."""
    parts = find_parts(model)
    settings = parts.model.config.get_text_config(decoder=True)
    embedding = parts.model.get_input_embeddings()
    hidden = _number(settings, "hidden_size") or embedding.embedding_dim
    routed, mlps = _mlps(parts, hidden, _first_number(settings, _PER_TOKEN) or 2)
    experts, mlp = max(routed.values(), default=None), max(mlps.values(), default=None)
    heads = _divisor(settings, "num_attention_heads", hidden) or 1
    head_dim = _number(settings, "head_dim") or hidden // heads
    attention = Attention(
        heads, _divisor(settings, "num_key_value_heads", heads) or heads, head_dim, head_dim, head_dim
    )
    head = next(iter(parts.head.parameters()))
    return Model(
        name=name,
        model_type=str(settings.model_type),
        hidden=hidden,
        vocab=head.shape[0],
        context=_first_number(settings, _POSITIONS),
        layer_kinds=tuple(LayerKind(None, layer in routed) for layer in parts.layers),
        attention=attention,
        mlp=None
        if mlp is None and experts is not None and len(routed) == len(parts.layers)
        else mlp or Mlp(4 * hidden, "silu"),
        experts=experts,
        tied=head is embedding.weight,
        has_sdpa=bool(parts.model._supports_sdpa),
        notes=(f"answered by the trace: {why}",),
        stand_in=StandIn(sum(weight.numel() for weight in model.parameters()), why),
    )


def _mlps(parts: ModelParts, hidden: int, per_token: int) -> tuple[dict[nn.Module, Experts], dict[nn.Module, Mlp]]:
    """Of each layer that has them, the experts and the MLP, by the shapes of their weights."""
    try:
        layer_mlps = find_mlps(parts)
    except ModelError:
        layer_mlps = []
    routed: dict[nn.Module, Experts] = {}
    mlps: dict[nn.Module, Mlp] = {}
    for layer, mlp in layer_mlps:
        decoder_layer = next(
            (candidate for candidate in parts.layers if any(part is layer for part in candidate.modules())), layer
        )
        weights = [w for top in (mlp.first, mlp.down) if top is not None for w in top.parameters()]
        stacks = [w for w in weights if w.dim() == 3 and hidden in w.shape[1:]]
        widths = [w.numel() // hidden for w in weights if w.dim() == 2 and hidden in w.shape]
        if stacks:
            number = stacks[0].shape[0]
            width = min(w.numel() // (number * hidden) for w in stacks)
            routed[decoder_layer] = Experts(number, min(per_token, number), width, "silu")
        elif widths:
            mlps[decoder_layer] = Mlp(min(widths), "silu", gated=sum(widths) > 2 * min(widths))
    return routed, mlps


def _number(settings: Any, name: str) -> int | None:
    try:
        value = getattr(settings, name, None)
    except Exception:  # noqa: BLE001 - transformers refuses what differs from layer to layer
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _first_number(settings: Any, names: tuple[str, ...]) -> int | None:
    return next((number for name in names if (number := _number(settings, name)) is not None), None)


def _divisor(settings: Any, name: str, dividend: int) -> int | None:
    value = _number(settings, name)
    return value if value is not None and dividend % value == 0 else None
