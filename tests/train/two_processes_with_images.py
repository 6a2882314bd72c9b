"""One of two processes on the CPU, whose sequences have images: `python -m tests.train.two_processes_with_images RANK FOLDER`.

Each runs half of the batch under FSDP2, layers of the tower sharded as those of text are, for every case below. Rank 0 writes to
FOLDER/differences.json, by case, how far loss and gathered gradients are from those of one process with the whole batch, or the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mstplan.step.recipe import Recipe
from mstplan.tracing.fsdp import mesh_of, shard_model
from mstplan.train import minisequence
from mstplan.train.images import image_batch
from mstplan.train.step import build_model, read_settings

from ..ranks import compare
from ..tracing.two_ranks_with_images import CONFIGS, IMAGE
from .llama import CHUNKS, Step, difference, exact_loss
from .two_processes import CHECKPOINTS

RECIPE = Recipe(images=1, batch=4, precision="fp32")
SHARDED = Recipe(images=1, batch=2, precision="fp32", gpus=2, sharding="fsdp")
TOKENS = 26

Inputs = dict[str, torch.Tensor]


def small_model(family: str, frozen: str = "") -> Any:
    """The same random weights every time. frozen: weights whose name has this in it."""
    torch.manual_seed(0)
    config = CONFIGS[family] | {"text_config": CONFIGS[family]["text_config"] | {"num_hidden_layers": 2}}
    model: Any = build_model(read_settings(config, whole=True), RECIPE, "sdpa", "cpu").double()
    model.loss_function = exact_loss
    for name, weight in model.named_parameters():
        weight.requires_grad_(not frozen or frozen not in name)
    return model


def batch(family: str) -> Inputs:
    """Four sequences, of random tokens behind an image of random pixels."""
    generator = torch.Generator().manual_seed(1)
    ids, numbers, pixels = image_batch(read_settings(CONFIGS[family], whole=True), RECIPE, TOKENS)
    text = torch.randint(3, IMAGE, ids.shape, generator=generator)
    ids = torch.where(ids == IMAGE, ids, text)
    labels = torch.where(ids == IMAGE, -100, ids)
    return {
        "input_ids": ids,
        "labels": labels,
        **numbers,
        "pixel_values": torch.rand(pixels, generator=generator, dtype=torch.float64),
    }


def step(model: nn.Module, inputs: Inputs) -> Step:
    """Loss and gradients by name, whole; not those of biases of keys, which are rounding alone: attention does not depend on them."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    weights = {name: weight for name, weight in model.named_parameters() if not name.endswith("k_proj.bias")}
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    return loss.item(), {
        name: gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()
        for name, gradient in gradients.items()
    }


def shard(model: Any) -> nn.Module:
    shard_model(model, SHARDED, mesh_of("cpu", SHARDED))  # type: ignore[arg-type]
    return model


def cases() -> dict[str, tuple[str, str, Callable[[Any], nn.Module]]]:
    """Family, what is frozen, and how a model is wrapped."""
    found: dict[str, tuple[str, str, Callable[[Any], nn.Module]]] = {}

    def wrapped(settings: dict[str, Any]) -> Callable[[Any], nn.Module]:
        return lambda model: shard(minisequence(model, **CHUNKS, **settings))

    for family in CONFIGS:
        found[f"{family}, as it is"] = family, "", shard
        for name in ("none", "layer", "offload", "layers in chunks"):
            found[f"{family}, {name}"] = family, "", wrapped(CHECKPOINTS[name])
        found[f"{family}, frozen tower"] = family, "vision_tower", wrapped(CHECKPOINTS["layer"])
        found[f"{family}, wrapped after"] = family, "", lambda model: minisequence(shard(model), **CHUNKS)
    found["llava, pixels of another"] = "llava", "", shard
    return found


def off(name: str, rank: int) -> float:
    family, frozen, wrap = cases()[name]
    inputs = batch(family)
    wanted = step(small_model(family, frozen), inputs)
    mine = {key: values[2 * rank : 2 * rank + 2] for key, values in inputs.items()}
    if name.endswith("pixels of another"):
        mine["pixel_values"] = mine["pixel_values"].flip(0)
    loss, gradients = step(wrap(small_model(family, frozen)), mine)
    mean = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(mean)
    return difference((mean.item() / 2, gradients), wanted)


if __name__ == "__main__":
    compare(cases(), off)
