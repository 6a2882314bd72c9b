"""One of two processes on the CPU under DeepSpeed's ZeRO-3: `python -m tests.train.two_shards RANK FOLDER`.

Each trains on half of a batch, for every case below. Rank 0 writes to FOLDER/differences.json, by case, how far the losses of three steps are
from those of one process with the whole batch, or the error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from mstplan.train import minisequence

from ..ranks import compare
from .llama import CHUNKS, small_llama, tokens
from .two_processes import CHECKPOINTS

ZERO_3 = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Case(NamedTuple):
    wrap: Callable[[Any], Any] = lambda model: model
    after: Callable[[Any], Any] = lambda engine: engine
    model: dict[str, Any] = {}  # noqa: RUF012
    frozen: str = ""  # weights whose name has this in it
    losing: bool = False


def chunked(**settings: Any) -> Callable[[Any], nn.Module]:
    return lambda model: minisequence(model, **CHUNKS, **settings)


def cases() -> dict[str, Case]:
    several = ("two layers",)
    found = {name: Case(chunked(**settings)) for name, settings in CHECKPOINTS.items() if name not in several}
    return found | {
        "as it is": Case(),
        "tied": Case(chunked(), model={"tie_word_embeddings": True}),
        "a frozen head": Case(chunked(), frozen="lm_head"),
        "frozen MLPs": Case(chunked(layer_in_chunks=True, attention_groups=1), frozen="mlp"),
        "two layers to a checkpoint": Case(chunked(checkpoint=2)),
        "wrapped after": Case(after=chunked()),
        "a token lost": Case(chunked(), losing=True),
    }


def made(case: Case) -> tuple[Any, torch.optim.Optimizer]:
    model = small_llama(torch.float32, **case.model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(not case.frozen or case.frozen not in name)
    return model, torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.5)


def alone(case: Case, ids: torch.Tensor) -> list[float]:
    model, optimizer = made(case)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def shared(case: Case, ids: torch.Tensor) -> list[float]:
    """With half of the batch on each rank."""
    model, optimizer = made(case)
    config = {**ZERO_3, "zero_allow_untested_optimizer": True}
    engine = deepspeed.initialize(model=case.wrap(model), optimizer=optimizer, config=config)[0]
    case.after(engine)
    losses = []
    for _ in range(3):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / 2)
    return losses


def off(name: str, rank: int) -> float:
    case, ids = cases()[name], tokens(4, 13)
    found = shared(case, ids[2 * rank : 2 * rank + 2, : 12 if case.losing else 13])
    return max(abs(a - b) / abs(b) for a, b in zip(found, alone(case, ids), strict=True))


if __name__ == "__main__":
    os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    compare(cases(), off)
