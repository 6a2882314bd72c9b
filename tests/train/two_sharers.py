"""One of two processes on the CPU that share sequences: `python -m tests.train.two_sharers RANK FOLDER`.

Each runs its part of every sequence of a batch, for every case below. Rank 0 writes to FOLDER/differences.json, by case, how far loss and
gradients, averaged over the ranks, are from those of one process with whole sequences, or the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mstplan import Recipe, strategy
from mstplan.train import minisequence

from ..ranks import compare
from .llama import CHUNKS, Step, difference, small_llama, tokens
from .two_processes import CHECKPOINTS, shard

FLASH = "flash_attention_2"
Batch = dict[str, torch.Tensor]


class Case(NamedTuple):
    """A model of the whole, how it is wrapped for parts, and a batch of whole sequences."""

    wrap: Callable[[Any], nn.Module]
    batch: Batch
    model: dict[str, Any] = {}  # noqa: RUF012  of configuration
    flash: bool = False
    losing: bool = False  # a token of the second part


def attend_to_samples(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: Any, position_ids: Any, **_: Any
) -> Any:
    """What flash-attention does with samples in a row, which it tells apart by position ids that begin anew."""
    sample = (position_ids == 0).cumsum(1)
    same = sample[:, None, :, None] == sample[:, None, None, :]
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    k, v = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=same & causal)
    return out.transpose(1, 2).contiguous(), None


def shared(asked: Any = 2, **settings: Any) -> Callable[[Any], nn.Module]:
    """Wrap for the ranks that are asked for, or that a function gives."""

    def wrap(model: Any) -> nn.Module:
        ranks = asked() if callable(asked) else asked
        return minisequence(model, sequence_parallel=ranks, **{**CHUNKS, **settings})

    return wrap


def whole_batch(length: int = 24) -> Batch:
    ids = tokens(2, length)
    return {"input_ids": ids, "labels": ids}


def half_labelled() -> Batch:
    """Labels that count are in the first part, but for one."""
    batch = whole_batch()
    labels = batch["labels"].clone()
    labels[:, 13:] = -100
    return {**batch, "labels": labels}


def padded_on_the_right(left: bool = False) -> Batch:
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, : 5 if left else None] = 0 if left else 1
    mask[1, 20:] = 0 if not left else 1
    batch = whole_batch()
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


def packed() -> Batch:
    """Samples of 9, 10 and 5 tokens in a row, of which none begins where a part does."""
    batch = whole_batch()
    positions = torch.cat([torch.arange(n) for n in (9, 10, 5)]).repeat(2, 1)
    return {**batch, "position_ids": positions, "labels": batch["labels"].masked_fill(positions == 0, -100)}


def cases() -> dict[str, Case]:
    found = {f"alone, {name}": Case(shared(**settings), whole_batch()) for name, settings in CHECKPOINTS.items()}
    chosen = ("layer", "offload", "layers in chunks")
    for name in chosen:
        of = CHECKPOINTS[name]
        found[f"DDP, {name}"] = Case(lambda m, of=of: DistributedDataParallel(shared(**of)(m)), whole_batch())
        found[f"FSDP, {name}"] = Case(lambda m, of=of: shared(**of)(shard(m)), whole_batch())
    layers = CHECKPOINTS["layers in chunks"]
    return found | {
        "selective": Case(shared(checkpoint="selective"), whole_batch()),
        "by a group": Case(shared(lambda: dist.group.WORLD), whole_batch()),
        "by a mesh": Case(shared(lambda: init_device_mesh("cpu", (2,))), whole_batch()),
        "by a recipe": Case(
            lambda m: minisequence(m, plan=strategy("mst", gpus=2, sequence_parallel=2, **CHUNKS)), whole_batch()
        ),
        "one head of keys": Case(shared(), whole_batch(), {"num_key_value_heads": 1}),
        "one head a rank": Case(shared(), whole_batch(), {"num_attention_heads": 2, "num_key_value_heads": 1}),
        "groups of heads": Case(
            shared(layer_in_chunks=True, attention_groups=2), whole_batch(), {"num_key_value_heads": 4}
        ),
        "labels in one part": Case(shared(), half_labelled()),
        "a length that is odd": Case(shared(), whole_batch(23)),
        "padding on the right": Case(shared(), padded_on_the_right()),
        "packed, flash": Case(shared(), packed(), flash=True),
        "packed, flash, layers in chunks": Case(shared(**layers), packed(), flash=True),
        # refused, by all ranks
        "packed, sdpa": Case(shared(), packed()),
        "padding on the left": Case(shared(), padded_on_the_right(left=True)),
        "groups that cannot be shared": Case(
            shared(layer_in_chunks=True, attention_groups=2), whole_batch(), {"num_attention_heads": 2}
        ),
        "three heads": Case(
            shared(), whole_batch(), {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
        ),
        "eager": Case(shared(), whole_batch(), {"attn_implementation": "eager"}),
        "auto": Case(lambda m: minisequence(m, plan="auto", sequence_parallel=2), whole_batch()),
        "another recipe": Case(lambda m: minisequence(m, plan=Recipe(), sequence_parallel=2), whole_batch()),
        "a mesh of two": Case(shared(lambda: init_device_mesh("cpu", (1, 2))), whole_batch()),
        "a token lost": Case(shared(), whole_batch(), losing=True),
    }


def trained(model: nn.Module, batch: Batch) -> Step:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}


def of_parts(model: nn.Module, batch: Batch, losing: bool, reduced: bool) -> Step:
    """Loss and gradients of a step on this rank's part, averaged over ranks. reduced: are gradients so already?"""
    part = minisequence.part(model, batch)
    if losing:
        part["shift_labels"][:, 3] = -100
    loss, gradients = trained(model, part)
    mean = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(mean)
    found = {}
    for name, gradient in gradients.items():
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        if not reduced:
            dist.all_reduce(whole)
            whole /= 2
        found[name.removeprefix("module.")] = whole
    return mean.item() / 2, found


def off(name: str, rank: int) -> float:
    case = cases()[name]
    models = [small_llama(**case.model) for _ in range(2)]
    for model in models if case.flash else ():
        model.config._attn_implementation = FLASH  # whose package need not be installed
    wrapped = case.wrap(models[1])
    wanted = trained(models[0], case.batch)
    reduced = name.startswith(("DDP", "FSDP"))
    losing = case.losing and rank == 1
    worst = max(difference(of_parts(wrapped, case.batch, losing, reduced), wanted) for _ in range(2))
    minisequence.undo(wrapped)
    plain = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    again = difference(trained(plain, case.batch), wanted) if not reduced else 0.0
    return max(worst, again)


if __name__ == "__main__":
    ALL_ATTENTION_FUNCTIONS[FLASH] = attend_to_samples
    compare(cases(), off)
