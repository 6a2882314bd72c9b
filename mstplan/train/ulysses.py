"""Attention of sequences that several ranks share, as DeepSpeed's Ulysses runs it (ALST, arXiv 2506.13996): each rank has its part of the
tokens, and attends to all of them with its part of the heads.

`sharing_attention` puts it in place of the attention function that a model's code asks transformers for; inside, that function runs as it
is. It makes the tensors that UlyssesSPAttentionHF makes (deepspeed/runtime/sequence_parallel/ulysses_sp.py, DeepSpeed 0.19), in that
order, so that a trace of it is one of DeepSpeed's: `mstplan/step/ulysses.py` says which. Ranks next to each other share sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ModelError, RecipeError

Attend = Callable[..., tuple[torch.Tensor, Any]]


def sequence_group(ranks: int) -> dist.ProcessGroup:
    """The process group of the `ranks` ranks that share this one's sequences. Every rank has to call it. Raises RecipeError where there are not so
    many."""
    if not dist.is_initialized() or dist.get_world_size() % ranks:
        have = dist.get_world_size() if dist.is_initialized() else 1
        raise RecipeError(
            f"sequences over {ranks} GPUs need a multiple of so many ranks, and there is {have} (init_process_group, torchrun)."
        )
    groups = [dist.new_group(range(first, first + ranks)) for first in range(0, dist.get_world_size(), ranks)]
    own: dist.ProcessGroup = groups[dist.get_rank() // ranks]
    return own


@contextmanager
def sharing_attention(model: PreTrainedModel, group: dist.ProcessGroup) -> Iterator[None]:
    """Within the context, which forward and backward need, attention of models with this one's attention function is shared by the ranks of
    `group`."""
    name = model.config._attn_implementation
    plain, knows_no_windows = ALL_ATTENTION_FUNCTIONS[name], name == "sdpa"

    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: object, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        if mask is not None or (knows_no_windows and _is_longer(query, group, kwargs.get("sliding_window"))):
            raise ModelError(
                f"{type(module).__name__} needs an explicit mask, which sequences over several GPUs leave out.\nUse --attention flash."
            )
        return attend(plain, group, module, query, key, value, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = plain


def _is_longer(query: torch.Tensor, group: dist.ProcessGroup, window: int | None) -> bool:
    """Whether whole sequences are longer than a window."""
    return window is not None and query.shape[2] * group.size() > window


def attend(
    plain: Attend,
    group: dist.ProcessGroup,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Attention of this rank's tokens, query (b, H, s, e), key and value (b, G, s, e), to those of all N ranks: (b, s, H e). plain: the attention
    of (b, H / N, N s, e), causal, without a mask. Raises ModelError for a model whose attention is not given position ids, or
    whose heads the ranks do not divide."""
    if kwargs.get("position_ids") is None:
        raise ModelError(
            f"{type(module).__name__} gives its attention no position ids, which sequences over several GPUs need.\nLeave sequence_parallel out."
        )
    if query.shape[1] % group.size() or max(group.size(), key.shape[1]) % min(group.size(), key.shape[1]):
        raise ModelError(
            f"{query.shape[1]} heads of queries and {key.shape[1]} of keys cannot be shared evenly by {group.size()} GPUs.\n"
            "Set sequence_parallel to a divisor of both."
        )
    ids = [torch.empty_like(kwargs["position_ids"]) for _ in range(group.size())]
    dist.all_gather(ids, kwargs["position_ids"], group=group)
    kwargs["position_ids"] = torch.cat(ids, dim=1)
    received = [_to_heads(x, group) for x in (query, key, value)]
    own_query = _heads_first(received.pop(0))
    own_key = _heads_first(received.pop(0))
    own_value = _heads_first(received.pop(0))
    if key.shape[1] < group.size():
        module.num_key_value_groups = own_query.shape[1] // own_key.shape[1]  # type: ignore[assignment]
    mixed, weights = plain(module, own_query, own_key, own_value, None, **kwargs)
    mixed = mixed.transpose(0, 1).flatten(2)  # (S, b, H / N e)
    return _to_tokens(mixed, group).transpose(0, 1), weights


def _to_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All tokens of this rank's part of the heads: (b, heads, s, e) -> (S, b, heads / N, e). Of fewer heads than ranks each goes to several."""
    ranks, (batch, heads, tokens, size) = group.size(), x.shape
    x = x.permute(2, 0, 1, 3)
    if heads < ranks:
        x = x.repeat_interleave(ranks // heads, dim=2)
    x = x.reshape(tokens, batch, ranks, -1, size)
    x = x.permute(2, 0, 1, 3, 4).contiguous()
    return _AllToAll.apply(group, x).flatten(0, 1)  # type: ignore[no-any-return]


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(1, 2, 0, 3).contiguous()


def _to_tokens(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's tokens of all heads: (S, b, H / N e) -> (s, b, H e)."""
    x = x.unflatten(0, (group.size(), -1)).contiguous()
    received = _AllToAll.apply(group, x)
    return received.permute(1, 2, 0, 3).flatten(2)  # type: ignore[no-any-return]


class _AllToAll(torch.autograd.Function):
    """The n-th rank gets what stands n-th on each rank, and gives that of each, in order."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
        ctx.group = group
        return _exchange(group, x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, _exchange(ctx.group, gradients[0].contiguous())


def _exchange(group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received
