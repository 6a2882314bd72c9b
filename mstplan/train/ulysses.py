"""Attention of sequences that several ranks share, as DeepSpeed's Ulysses runs it (ALST, arXiv 2506.13996): each rank has its part of the
tokens, and attends to all of them with its part of the heads.

`share_attention` marks a model's modules, and puts it in place of the attention function that their code asks transformers for; inside,
that function runs as it is, as it does for modules without a mark. It makes the tensors that UlyssesSPAttentionHF makes
(deepspeed/runtime/sequence_parallel/ulysses_sp.py, DeepSpeed 0.19), in that order, so that a trace of it is one of DeepSpeed's:
`mstplan/step/ulysses.py` says which. Ranks next to each other share sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ModelError, RecipeError, quoted

Attend = Callable[..., tuple[torch.Tensor, Any]]

IGNORED = -100
"""The label of a token that no loss counts."""
_PARTS = "minisequence.part(model, batch) makes this rank's part of a batch."


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


def group_of(asked: Any) -> dist.ProcessGroup:
    """The process group that `minisequence(sequence_parallel=...)` means: a group, a mesh of one dimension, or a number of ranks, of which
    every rank has to say the same. Raises RecipeError for anything else."""
    if isinstance(asked, dist.ProcessGroup):
        return asked
    if isinstance(asked, DeviceMesh):
        if asked.ndim != 1:
            raise RecipeError(
                f"sequence_parallel is a mesh of {asked.ndim} dimensions.\nGive the one over which sequences are shared, such as mesh['sp']."
            )
        group: dist.ProcessGroup = asked.get_group()
        return group
    if isinstance(asked, int) and not isinstance(asked, bool) and asked > 0:
        return sequence_group(asked)
    raise RecipeError(
        f"sequence_parallel must be a process group, a device mesh, or a number of ranks, not {quoted(str(asked))}."
    )


class Sharing:
    """What modules know whose attention the ranks of a group share. Copies of a model share with the same ranks."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.layers: set[Any] = set()  # whose attention was shared, in this forward pass
        self.evaluates = False  # is a part of a batch being evaluated?

    def __deepcopy__(self, _memo: Any) -> Sharing:
        return self

    def takes(self, module: Any) -> bool:
        """Whether a module's attention is shared now. Generation runs on each rank by itself."""
        return bool(module.training) or self.evaluates

    def groups_of_heads(self, wanted: int, heads: int, kv_heads: int) -> int:
        """The most groups, at most as many as are wanted, whose heads the ranks can share each."""
        divisors = (n for n in range(wanted, 1, -1) if heads % n == 0 and kv_heads % n == 0)
        return next((n for n in divisors if can_share(heads // n, kv_heads // n, self.group.size())), 1)

    @contextmanager
    def run(self, model: PreTrainedModel, layers: int, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Within the context a model of so many layers runs on a part of a batch; given are further arguments. arguments: those of the call. Raises
        ModelError for those of whole sequences, and for a model that mixes tokens elsewhere than in attention."""
        labels = arguments.get("shift_labels")
        if not model.training and labels is None:
            yield {}
            return
        if arguments.get("position_ids") is None or (arguments.get("labels") is not None and labels is None):
            raise ModelError(
                f"{type(model).__name__} shares sequences over GPUs, and is given no position_ids or no shift_labels.\n{_PARTS}"
            )
        self._refuse_samples_without_flash(model, arguments["position_ids"])
        self.layers.clear()
        self.evaluates = True
        try:
            yield self._divisor(model, arguments)
        finally:
            self.evaluates = False
        if len(self.layers) != layers:
            raise ModelError(
                f"{type(model).__name__} mixes tokens elsewhere than in attention that transformers' interface knows, which GPUs cannot share."
                "\nLeave sequence_parallel out."
            )

    def _divisor(self, model: PreTrainedModel, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """By which the model divides its loss: so that losses and gradients, averaged over ranks, are those of whole sequences, however the
        labels that count are spread over the parts."""
        if arguments.get("labels") is None or arguments.get("num_items_in_batch") is not None:
            return {}
        names = inspect.signature(model.forward).parameters.values()
        if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in names):
            raise ModelError(f"{type(model).__name__} takes no shift_labels, which sequences over several GPUs need.")
        count = (arguments["shift_labels"] != IGNORED).sum()
        dist.all_reduce(count, group=self.group)
        return {"num_items_in_batch": count / self.group.size()}

    def _refuse_samples_without_flash(self, model: PreTrainedModel, positions: torch.Tensor) -> None:
        """Several samples in a row are told apart by flash-attention's kernels alone. All ranks refuse, or none."""
        if "flash" in model.config._attn_implementation:
            return
        tokens = positions.shape[-1]
        first = self.group.rank() * tokens
        consecutive = torch.arange(first, first + tokens, device=positions.device)
        others = (positions != consecutive).sum()
        dist.all_reduce(others, group=self.group)
        if others.item():
            raise ModelError(
                f"several samples in a row, over several GPUs, need flash attention, and {type(model).__name__} runs "
                f"{model.config._attn_implementation}.\nLoad it with attn_implementation='flash_attention_2', or leave packing out."
            )

    def part(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's part of a batch: of ids, labels and position ids (b, S), if there are such, (b, s) each; labels are shifted as well. S is padded
        to a multiple of the ranks. Raises ModelError for padding on the left, and for what is no (b, S)."""
        whole = dict(batch)
        ids, mask = whole["input_ids"], whole.pop("attention_mask", None)
        if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise ModelError(
                "batches for sequences over several GPUs are padded on the right.\nSet padding_side='right'."
            )
        if strange := [name for name, value in whole.items() if value.shape != ids.shape]:
            raise ModelError(f"{strange[0]} is no tensor (b, S) as input_ids is, and cannot be shared over GPUs.")
        if "position_ids" not in whole:
            whole["position_ids"] = torch.arange(ids.shape[1], device=ids.device).repeat(ids.shape[0], 1)
        if "labels" in whole and "shift_labels" not in whole:
            whole["shift_labels"] = F.pad(whole["labels"][:, 1:], (0, 1), value=IGNORED)
        ranks, rank = self.group.size(), self.group.rank()
        return {name: _padded(name, value, ranks).chunk(ranks, 1)[rank].contiguous() for name, value in whole.items()}


def _padded(name: str, value: torch.Tensor, multiple: int) -> torch.Tensor:
    """Values (b, S) of a batch, S padded to a multiple: labels with such as no loss counts, positions with those that follow."""
    more = -value.shape[1] % multiple
    if name == "position_ids":
        return torch.cat([value, value[:, -1:] + torch.arange(1, more + 1, device=value.device)], 1)
    return F.pad(value, (0, more), value=IGNORED if "labels" in name else 0)


def share_attention(model: PreTrainedModel, group: dist.ProcessGroup) -> Sharing:
    """Let the ranks of `group` share a model's attention, in place, until `share_no_more`. Raises ModelError where its attention is not asked
    for by name, and where convolutions mix tokens, too."""
    name = model.config._attn_implementation
    if ALL_ATTENTION_FUNCTIONS.get(name) is None:
        raise ModelError(
            f"{type(model).__name__} runs {name} attention, which GPUs cannot share.\nLoad it with attn_implementation='sdpa'."
        )
    if any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules()):
        raise ModelError(
            f"{type(model).__name__} has convolutions over tokens, which GPUs cannot share.\nLeave sequence_parallel out."
        )
    _watch(name)
    sharing = Sharing(group)
    for module in model.modules():
        module._mstplan_sharing = sharing  # type: ignore[assignment]
    return sharing


def share_no_more(model: nn.Module) -> None:
    """The model as it was before `share_attention`."""
    for module in model.modules():
        module.__dict__.pop("_mstplan_sharing", None)


def _watch(name: str) -> None:
    """Have the attention function of this name ask its module first whether ranks share it. Once for all models."""
    plain, knows_no_windows = ALL_ATTENTION_FUNCTIONS[name], name == "sdpa"
    if hasattr(plain, "_mstplan"):
        return

    @wraps(plain)
    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        sharing: Sharing | None = getattr(module, "_mstplan_sharing", None)
        if sharing is None or not sharing.takes(module):
            return plain(module, query, key, value, attention_mask, *args, **kwargs)  # type: ignore[no-any-return]
        if attention_mask is not None or (
            knows_no_windows and _is_longer(query, sharing.group, kwargs.get("sliding_window"))
        ):
            raise ModelError(
                f"{type(module).__name__} needs an explicit mask, which sequences over several GPUs leave out.\nUse --attention flash."
            )
        sharing.layers.add(getattr(module, "layer_idx", None))
        return attend(plain, sharing.group, module, query, key, value, **kwargs)

    attention._mstplan = True  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS[name] = attention


def _is_longer(query: torch.Tensor, group: dist.ProcessGroup, window: int | None) -> bool:
    """Whether whole sequences are longer than a window."""
    return window is not None and query.shape[2] * group.size() > window


def can_share(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether so many ranks can share heads of queries and of keys evenly."""
    return heads % ranks == 0 and max(ranks, kv_heads) % min(ranks, kv_heads) == 0


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
    if not can_share(query.shape[1], key.shape[1], group.size()):
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
    with _repeating_keys(module, own_query.shape[1] // own_key.shape[1]):
        mixed, weights = plain(module, own_query, own_key, own_value, None, **kwargs)
    mixed = mixed.transpose(0, 1).flatten(2)  # (S, b, H / N e)
    return _to_tokens(mixed, group).transpose(0, 1), weights


@contextmanager
def _repeating_keys(module: Any, times: int) -> Iterator[None]:
    """Within the context a module repeats each head of keys so many times, where it repeats any."""
    before = getattr(module, "num_key_value_groups", None)
    if before is None or before == times:
        yield
        return
    module.num_key_value_groups = times
    try:
        yield
    finally:
        module.num_key_value_groups = before


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
