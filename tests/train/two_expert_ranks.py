"""One of two processes on the CPU that share out a model's experts: `python -m tests.train.two_expert_ranks RANK FOLDER`.

Each trains on its row of a batch of two for every case below, as transformers' `DistributedConfig(fsdp_size=2, ep_size=2)` has it. Rank 0 writes to
FOLDER/differences.json, by family and case, how far loss and whole gradients are from those of one process with both rows, or the error.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing.expert_parallel import spread_experts
from mstplan.train import minisequence
from mstplan.train.adapters import add_adapters, is_adapter
from mstplan.train.step import clip_gradients, groups_of, weights_to_train

from ..ranks import compare
from ..tracing.even_router import EXPERTS, route_evenly
from ..tracing.two_experts import MODELS
from ..tracing.two_ranks import CONFIG
from ..tracing.two_sharers import seeded, whole_batch
from ..tracing.two_splitters import whole

MOST = 0.01
"""The norm to which gradients are scaled down, which is less than they have."""
FAMILIES: dict[str, dict[str, Any]] = {
    **MODELS,
    "deepseek_v3": CONFIG
    | {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "vocab_size": 1000,
        "moe_intermediate_size": 192,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
    },
}
CASES: dict[str, dict[str, Any]] = {
    "transformers alone": {},
    "tokens shared out evenly": {"even": True},
    "clipping": {"most": MOST},
    "two micro-batches": {"micro_batches": 2, "most": MOST},
    "checkpoints": {"wrap": {"mlp_chunks": 1, "loss_chunks": 1}},
    "loss in chunks": {"wrap": {"mlp_chunks": 1, "loss_chunks": 3}},
    "layer inputs on the host": {"wrap": {"mlp_chunks": 1, "loss_chunks": 3, "offload": True}},
    "MLPs in chunks": {"wrap": {"mlp_chunks": 2, "loss_chunks": 3}},
    "adapters on attention": {"adapters": True},
    "adapters on attention, checkpoints": {"adapters": True, "wrap": {"mlp_chunks": 1, "loss_chunks": 3}},
    "a row lost": {"lost": True},
}


def run(
    name: str,
    rank: int | None,
    *,
    even: bool = False,
    most: float | None = None,
    micro_batches: int = 1,
    wrap: dict[str, Any] | None = None,
    adapters: bool = False,
    lost: bool = False,
) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, whole gradients by name) of a rank's row, averaged over ranks; rank None: of both rows in one process, as transformers trains."""
    recipe = strategy("standard", gpus=2, expert_parallel=2, sharding="fsdp", precision="fp32", attention="eager")
    model: Any = seeded(FAMILIES[name], recipe)
    if rank is not None:
        spread_experts(model, recipe)
    if adapters:
        adapt(model, recipe)
    if rank is not None and wrap is not None:
        minisequence(model, **wrap)
    if even:
        route_evenly(model)
    rows = slice(None) if rank is None else slice(0, 1) if lost else slice(rank, rank + 1)
    summed = torch.zeros(())
    for n in range(micro_batches):
        if rank is not None:
            model.set_requires_gradient_sync(n + 1 == micro_batches)
        ids = whole_batch(2)[n][rows] % 1000
        loss = model(input_ids=ids, labels=ids).loss / micro_batches
        loss.backward()
        summed += loss.detach()
    if most is not None:
        clip_gradients(groups_of(weights_to_train(model)), most)
    if rank is not None:
        dist.all_reduce(summed)
        summed /= 2
        if adapters:  # which are whole on each rank: transformers' Trainer averages their gradients
            for weight in weights_to_train(model):
                dist.all_reduce(weight.grad)
                weight.grad /= 2
    return float(summed), {n: whole(w.grad) for n, w in model.named_parameters() if w.grad is not None}


def adapt(model: PreTrainedModel, recipe: Recipe) -> None:
    """Add adapters on attention, none of which is 0, to a model that may be in shards already."""
    torch.manual_seed(2)
    add_adapters(model, recipe.changed(lora_rank=4, lora_targets=("attention",)))
    for name, weight in model.named_parameters():
        if is_adapter(name):
            nn.init.normal_(weight, std=0.1)


def difference(found: tuple[float, dict[str, torch.Tensor]], wanted: tuple[float, dict[str, torch.Tensor]]) -> float:
    """The largest of loss, beside the loss, and of gradients, beside the largest of all weights'."""
    assert found[1].keys() == wanted[1].keys()
    scale = max(float(gradient.abs().max()) for gradient in wanted[1].values())
    gradients = max(float((found[1][name] - gradient).abs().max()) for name, gradient in wanted[1].items())
    return max(abs(found[0] - wanted[0]) / wanted[0], gradients / scale)


def off(name: str, rank: int) -> float:
    family, case = name.split(", ", 1)
    how = CASES[case]
    alone = run(family, None, **{key: value for key, value in how.items() if key not in ("wrap", "lost")})
    return difference(run(family, rank, **how), alone)


if __name__ == "__main__":
    compare(map(", ".join, product(FAMILIES, CASES)), off)
