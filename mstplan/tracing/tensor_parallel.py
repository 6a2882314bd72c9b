"""Tensor parallelism on fake tensors: transformers' own plan, on PyTorch's fake process group (`mstplan/step/tensor_parallel.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from ..errors import ModelError, VersionError
from ..step.recipe import Recipe
from ..step.tensor_parallel import keeps_whole
from .fsdp import SPLIT, part_of_mesh
from .patches import COLLECTIVE_WAIT, LAST_AXIS, META_OF_RESULT, patched

SPLIT_AXES = {"colwise": 0, "colwise_gather_output": 0, "embedding_rowwise": 0, "rowwise": 1}
"""The axis of a weight that transformers' styles split."""
WHOLE = frozenset({"replicated_with_grad_allreduce"})
"""Styles of weights that every rank has whole, such as norms of heads, whose gradients are summed up in place."""


def plan_of(model: PreTrainedModel, ranks: int) -> dict[str, str]:
    """transformers' plan for a model: a style for every module and weight that is split, by its name. Raises ModelError where it has none, or
    one with other styles; VersionError where transformers' plans are others."""
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        plan: dict[str, str] = model._resolve_parallel_plans(DistributedConfig(tp_size=ranks))[0]  # type: ignore[attr-defined]
    except (ImportError, AttributeError):
        raise VersionError("transformers' tp_plan is read as 5.23 has it.\nInstall transformers 5.23.") from None
    except ValueError:
        raise ModelError(
            f"transformers has no tp_plan for {type(model).__name__}.\nLeave --tensor-parallel out."
        ) from None
    named = {name for name, _ in model.named_parameters()}
    other = next((style for name, style in plan.items() if name in named and style not in {*SPLIT_AXES, *WHOLE}), None)
    if other is not None:
        raise ModelError(
            f"transformers' tp_plan for {type(model).__name__} has the style {other}, which is not traced.\nLeave --tensor-parallel out."
        )
    return plan


def shapes_on_a_rank(model: PreTrainedModel, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that are split, by name. Raises ModelError as above, and for sizes that the ranks do not divide."""
    ranks = recipe.tensor_parallel
    if ranks == 1:
        return {}
    plan, shapes = plan_of(model, ranks), {}
    for name, weight in model.named_parameters():
        if plan.get(name) in SPLIT_AXES:
            axis, shape = SPLIT_AXES[plan[name]], list(weight.shape)
            if shape[axis] % ranks:
                raise ModelError(
                    f"{name} {tuple(shape)} cannot be split evenly over {ranks} GPUs.\nUse a divisor of {shape[axis]:,}."
                )
            shape[axis] //= ranks
            shapes[name] = tuple(shape)
    return shapes


def split_over_ranks(model: PreTrainedModel, recipe: Recipe, mesh: DeviceMesh) -> None:
    """Split a model's matrices over the ranks of `mesh` that do so, in place: before they are sharded."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    splitting, plan = part_of_mesh(mesh, SPLIT), plan_of(model, recipe.tensor_parallel)
    if recipe.sequence_parallel_norms:
        parallelize_module(model, splitting, _styles(model, plan, recipe.loss_parallel))  # type: ignore[arg-type]
    else:
        apply_tensor_parallelism(model, splitting, plan)


def _styles(model: PreTrainedModel, plan: dict[str, str], loss_parallel: bool) -> dict[str, ParallelStyle]:
    """torch's styles of a model's modules where norms share out tokens, as torchtitan plans them: what transformers' plan splits is split, and hidden
    states between are in pieces of the sequence. loss_parallel: logits stay in parts of the vocabulary."""
    styles: dict[str, ParallelStyle] = {}
    tokens, whole, logits = Shard(1), Replicate(), Shard(-1) if loss_parallel else Replicate()
    for name, module in model.named_modules():
        style, owner = plan.get(f"{name}.weight"), name.rpartition(".")[0]
        if style == "colwise_gather_output":
            styles[name] = ColwiseParallel(
                input_layouts=tokens, output_layouts=logits, use_local_output=not loss_parallel
            )
        elif style == "embedding_rowwise":
            styles[name] = RowwiseParallel(input_layouts=whole, output_layouts=tokens)
        elif style == "rowwise":
            styles[name] = RowwiseParallel(output_layouts=tokens)
        elif style == "colwise":
            styles[name] = ColwiseParallel()
            styles[owner] = (
                PrepareModuleInput(
                    input_kwarg_layouts={"hidden_states": tokens}, desired_input_kwarg_layouts={"hidden_states": whole}
                )
                if owner.endswith("attn")
                else PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(whole,))
            )
        elif style in WHOLE:  # of each head
            styles[name] = SequenceParallel(sequence_dim=2, use_local_output=True)
        elif getattr(module, "weight", None) is not None:
            styles[name] = SequenceParallel()
    return styles


def has_whole_gradient(model: PreTrainedModel, weight: torch.nn.Parameter | None, recipe: Recipe) -> bool:
    """Whether a weight is the embedding, of which the optimizer is given a whole gradient beside a rank's rows."""
    return keeps_whole(recipe) and weight is model.get_input_embeddings().weight


def whole_gradient(weight: torch.Tensor) -> torch.Tensor:
    """A gradient that is whole on every rank, of a weight that is split."""
    assert isinstance(weight, DTensor)
    local = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return DTensor.from_local(local, weight.device_mesh, [Replicate()], run_check=False)


@contextmanager
def splits_without_ranks() -> Iterator[None]:
    """Within the context DTensors make what they make among all ranks: what torch works shapes out with is none of it, and a collective's result
    is what is waited for. Raises VersionError where torch or transformers is another."""
    with patched(
        {
            META_OF_RESULT: unseen,
            LAST_AXIS: lambda _: staticmethod(_by_last_axis),
            COLLECTIVE_WAIT: lambda _: lambda made: made,
        }
    ):
        yield


def unseen(plain: Callable[..., Any]) -> Callable[..., Any]:
    """What torch works shapes of DTensors out with, as the recorder does not see it."""

    def propagate(*args: Any) -> Any:
        with _disable_current_modes():
            return plain(*args)

    return propagate


def _by_last_axis(local: torch.Tensor, mesh: Any, size: int) -> DTensor:
    """A rank's part of a tensor that is split along its last axis, with strides worked out without one."""
    shape, strides = (*local.shape[:-1], size), [1]
    for length in shape[:0:-1]:
        strides.insert(0, strides[0] * length)
    return DTensor.from_local(local, mesh, [Shard(-1)], run_check=False, shape=torch.Size(shape), stride=tuple(strides))
