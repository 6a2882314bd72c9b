"""Expert parallelism on fake tensors: transformers' own code (`transformers/distributed/expert_parallel.py` and `fsdp.py`, transformers 5.23), on PyTorch's
fake process group, whose router shares tokens out evenly (`mstplan/step/expert_parallel.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from ..errors import ModelError, VersionError
from ..step.expert_parallel import refuse_ranks, rows_of_a_token
from ..step.recipe import Recipe
from ..train.adapters import is_adapter
from .patches import (
    COLLECTIVE_WAIT,
    COUNTS_SENT,
    DISPATCH,
    FULLY_SHARD,
    HOST_POLICY,
    META_OF_RESULT,
    WAIT_OF_TRANSFORMERS,
    patched,
)
from .tensor_parallel import unseen
from .values import note_values

_AXES = ("pp", "dp_replicate", "fsdp", "tp"), ("pp", "dp_replicate", "efsdp", "ep")
"""Of transformers' two meshes of the same ranks: of all other weights, and of experts."""


def _plans(model: PreTrainedModel, recipe: Recipe) -> tuple[Any, dict[str, str], dict[str, str]]:
    """(transformers' DistributedConfig, its plan for experts, its plan of FSDP2's groups), of a model as it is. Raises ModelError where it has none;
    VersionError where transformers' plans are others."""
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        config = DistributedConfig(
            fsdp_size=recipe.gpus,
            ep_size=recipe.expert_parallel,
            fsdp_mixed_precision=recipe.gathers_in_bf16,
            fsdp_cpu_offload=recipe.weights_on_host,
        )
        _, experts, groups = model._resolve_parallel_plans(config)  # type: ignore[attr-defined]
    except (ImportError, AttributeError, TypeError):
        raise VersionError("transformers' ep_plan is read as 5.23 has it.\nInstall transformers 5.23.") from None
    except ValueError:
        raise ModelError(
            f"transformers has no ep_plan for {type(model).__name__}.\nLeave --expert-parallel out."
        ) from None
    if not any(experts.get(name) == "grouped_gemm" for name, _ in model.named_parameters()):
        raise ModelError(
            f"transformers shares out no experts of {type(model).__name__} that have adapters.\nUse --lora-targets attention."
        )
    return config, experts, groups


def shapes_apart(model: PreTrainedModel, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Shapes on rank 0 of what is not in shards over all ranks, by name: experts, its part of them, or what FSDP2 leaves it of that; adapters, which are
    whole. Raises ModelError as above, and for numbers of experts that the ranks do not divide."""
    ranks = recipe.expert_parallel
    if ranks == 1:
        return {}
    _, plan, _ = _plans(model, recipe)
    shapes = {}
    for name, weight in model.named_parameters():
        if plan.get(name) == "grouped_gemm":
            refuse_ranks(type(model).__name__, weight.shape[0], ranks, recipe.gpus)
            shapes[name] = (-(-weight.shape[0] // recipe.gpus), *weight.shape[1:])
        elif is_adapter(name):
            shapes[name] = tuple(weight.shape)
    return shapes


def spread_experts(model: PreTrainedModel, recipe: Recipe) -> None:
    """Share out a model's experts, and all weights in shards, over ranks, in place, as `from_pretrained(distributed_config=...)` does; adapters, which
    come afterwards there, stay whole."""
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism
    from transformers.distributed.utils import TransformersDeviceMesh

    config, experts, groups = _plans(model, recipe)
    with unset_fake_temporarily() if detect_fake_mode() else nullcontext():  # its ranks are numbers that are read
        sizes = (1, 1, recipe.gpus, 1), (1, 1, config.efsdp_size, config.ep_size)
        meshes = TransformersDeviceMesh(
            *(init_device_mesh("cpu", size, mesh_dim_names=axes) for size, axes in zip(sizes, _AXES, strict=True))
        )
        expert_mesh, alone = meshes.get_mesh("ep"), meshes.get_mesh("tp")
    model.config.distributed_config = config
    apply_expert_parallelism(model, expert_mesh, alone, experts)
    adapters = {weight for name, weight in model.named_parameters() if is_adapter(name)}
    with patched(
        {
            HOST_POLICY: lambda plain: partial(plain, pin_memory=False),
            FULLY_SHARD: lambda plain: partial(plain, ignored_params=adapters),
        }
    ):
        apply_fully_sharded_data_parallelism(model, meshes, groups, experts)


@contextmanager
def routed_evenly(recipe: Recipe) -> Iterator[None]:
    """Within the context a rank sends as many rows to each expert, and is sent as many from each rank for each of its own, `expert_imbalance` times as
    many as it sends; and a collective's result is what is waited for. Raises VersionError where torch or transformers is another."""
    tokens = per_token = 0

    def dispatch(plain: Callable[..., Any]) -> Callable[..., Any]:
        def dispatch_tokens(ranks: Any, x: torch.Tensor, chosen: torch.Tensor, scores: torch.Tensor) -> Any:
            nonlocal tokens, per_token
            tokens, per_token = chosen.shape
            return plain(ranks, x, chosen, scores)

        return dispatch_tokens

    def count(received: torch.Tensor, sent: torch.Tensor, group: Any = None) -> None:
        note_values(sent, _evenly(tokens * per_token, sent.shape))
        note_values(received, _evenly(tokens * rows_of_a_token(per_token, recipe.expert_imbalance), received.shape))

    with patched(
        {
            DISPATCH: dispatch,
            COUNTS_SENT: lambda _: count,
            COLLECTIVE_WAIT: lambda _: lambda made: made,
            WAIT_OF_TRANSFORMERS: lambda _: lambda made: made,
            META_OF_RESULT: unseen,
        }
    ):
        yield


def _evenly(rows: int, shape: torch.Size) -> torch.Tensor:
    """Numbers of rows (ranks, experts) that add up to so many."""
    parts = shape.numel()
    with unset_fake_temporarily():
        return torch.tensor([rows // parts + (n < rows % parts) for n in range(parts)]).view(shape)
