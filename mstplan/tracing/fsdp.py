"""FSDP2 (ZeRO-3): `fully_shard` of every decoder layer and of the model, as most train with it; and what one rank of it allocates.

`first_of_ranks` makes this process the first of any number of ranks, on PyTorch's fake process group: torch's own FSDP2 code runs, and
allocates as it does on every card, but nothing is sent. `record_fsdp` lets a recorder see what FSDP2 does to the storages of gathered
weights, which it empties and fills in place.

The order of allocations is the order in which FSDP2's code runs on the host. That is so on a card as well: the caching
allocator hands out and takes back when the host asks, however far behind the streams are. So what is prefetched is in this
order, too: in backward a layer's all-gather is issued before the backward of the layer after it; in forward the host merely runs
ahead, and an all-gather's buffer is held until the next layer's is there
(torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, "Overlapping all-gather copy-in and all-gather").

Rank 0 is traced, whose shards are the largest: a dimension that `gpus` does not divide is padded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, partialmethod
from itertools import cycle, pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp._runtime_utils import _reshard, _should_free_in_backward
from torch.distributed.fsdp.fully_sharded_data_parallel import _get_grad_norm

from ..errors import RecipeError
from ..step.recipe import Recipe
from ..train import locate
from ..train.flat_shards import wrapped_apart
from .patches import (
    CHUNKS_OF_RANKS,
    EMPTY,
    EMPTY_FLAT,
    FILL,
    FILL_ALONE,
    FILL_FLAT,
    FLAT_GRADIENT,
    GATHER_BUFFER,
    GATHER_INPUTS,
    GATHERED_OUTPUTS,
    INPUTS_OF_GATHER,
    JOINED_MESHES,
    RESHARD_REST,
    SCATTER_BUFFERS,
    SHARDED_GRADIENT,
    MakeReplacement,
    Target,
    patched,
)
from .recorder import Recorder
from .recording import Category

GATHERED = "FSDP: gathered weights"
BUFFER = "FSDP: all-gather buffer"
COPY_IN = "FSDP: shards in bf16"
SCATTER = "FSDP: reduce-scatter input"
SHARDS = "FSDP: gradient shards"
SPLIT = "tp"
"""The dimension of a mesh along which matrices are split, as accelerate and transformers call it."""


@contextmanager
def first_of_ranks(recipe: Recipe, rank: int = 0) -> Iterator[DeviceMesh | None]:
    """Within the context this process is the first of the recipe's `gpus` ranks, or another, the others of which are not there. Gives the mesh of those that
    share weights or split them."""
    if not recipe.sharded and recipe.sharers == recipe.tensor_parallel == 1:
        yield None
        return
    if dist.is_initialized():
        raise RecipeError(
            "a trace of several GPUs needs a process without a process group.\nTrace before init_process_group."
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=recipe.gpus)
    try:
        with patched(
            {
                CHUNKS_OF_RANKS: lambda _plain: partial(_first_chunks, rank + 1),
                JOINED_MESHES: lambda plain: staticmethod(unset_fake_temporarily()(plain)),
            }
        ):
            yield mesh_of("cpu", recipe) if recipe.sharded or recipe.tensor_parallel > 1 else None
    finally:
        dist.destroy_process_group()


def _first_chunks(count: int, tensor: torch.Tensor, ranks: int, dim: int) -> list[torch.Tensor]:
    """The shares of the first `count` ranks, without those of the others: of 65,536 they take minutes."""
    rows = tensor.size(dim)
    starts = [min(rows, n * -(-rows // ranks)) for n in range(count + 1)]
    return [tensor.narrow(dim, start, end - start) for start, end in pairwise(starts)]


def mesh_of(device: str, recipe: Recipe) -> DeviceMesh:
    """Ranks by what they do: those that split a matrix are neighbours, then come those that share weights, then replicas of these."""
    ranks = {"shard": recipe.shards, SPLIT: recipe.tensor_parallel}
    ranks = {"replicate": recipe.gpus // prod(ranks.values()), **ranks}
    several = {name: number for name, number in ranks.items() if number > 1}
    return init_device_mesh(device, tuple(several.values()), mesh_dim_names=tuple(several))


def part_of_mesh(mesh: DeviceMesh, *names: str) -> DeviceMesh:
    """The dimensions of a mesh of these names, of those that it has."""
    with unset_fake_temporarily():  # numbers of ranks are read
        return mesh[tuple(name for name in mesh.mesh_dim_names or () if name in names)]


def shard_model(model: nn.Module, recipe: Recipe, mesh: DeviceMesh) -> None:
    """Shard every decoder layer, with images every layer of a tower as well, then the rest, over the ranks of `mesh` that share weights; in place.
    FSDP1 wraps a model where its step is built (mstplan/train/flat_shards.py)."""
    if recipe.flat:
        return
    sharing = part_of_mesh(mesh, "replicate", "shard")
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=getattr(torch, recipe.reduced_dtype))
        if recipe.gathers_in_bf16
        else MixedPrecisionPolicy()
    )
    offload = CPUOffloadPolicy(pin_memory=False) if recipe.weights_on_host else OffloadPolicy()
    whole = {weight for weight in model.parameters() if not is_sharded(weight)}
    parts = locate.find_parts(model)
    towers = locate.layers_of_towers(parts) if recipe.images else []
    for module in (*towers, *parts.layers, model):
        fully_shard(module, mesh=sharing, mp_policy=policy, offload_policy=offload, ignored_params=whole)


def is_sharded(weight: torch.Tensor) -> bool:
    """Whether FSDP2 splits a weight: not bitsandbytes' 4-bit weights in bytes, which accelerate leaves out (fsdp2_prepare_model)."""
    return weight.is_floating_point()


def shard_shape(shape: tuple[int, ...], gpus: int) -> tuple[int, ...]:
    """Of rank 0's shard of a weight, padded (FSDPParam._init_sharded_param): dimension 0 is split."""
    return (-(-shape[0] // gpus), *shape[1:])


def shape_on_rank(weight: torch.Tensor, recipe: Recipe, split: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Of what rank 0 has of a weight. split: the shape of its part of a matrix that ranks split."""
    shape = split or tuple(weight.shape)
    return shard_shape(shape, recipe.shards) if is_sharded(weight) else shape


FlatShape = tuple[str, tuple[int, ...], torch.dtype, bool]


def flat_shapes(model: nn.Module, recipe: Recipe) -> Iterator[FlatShape]:
    """(name, shape on rank 0, dtype, whether it is trained) of FSDP1's flat parameters: the rest's first, then those of layers, each before its adapters'."""
    for name, weights in _flat_weights(model, recipe):
        end = _places(weights, recipe)[-1][1]
        yield name, (-(-end // recipe.shards),), weights[0].dtype, weights[0].requires_grad


def flat_pieces(model: nn.Module, recipe: Recipe) -> Iterator[FlatShape]:
    """The same of what lies in them of each weight, which the optimizer steps where it has views of weights."""
    for name, weights in _flat_weights(model, recipe):
        places = _places(weights, recipe)
        share = -(-places[-1][1] // recipe.shards)
        for n, (weight, (start, end)) in enumerate(zip(weights, places, strict=True)):
            if start < share:
                yield f"{name}, weight {n}", (min(end, share) - start,), weight.dtype, weight.requires_grad


def _places(weights: list[nn.Parameter], recipe: Recipe) -> list[tuple[int, int]]:
    """(start, end) of each weight in a flat parameter. Of views of weights each begins at a multiple of 16 bytes (_get_aligned_numel)."""
    used = torch.bfloat16 if recipe.gathers_in_bf16 else weights[0].dtype
    step = 16 // used.itemsize if recipe.use_orig_params else 1
    places: list[tuple[int, int]] = []
    for weight in weights:
        start = -(-places[-1][1] // step) * step if places else 0
        places.append((start, start + weight.numel()))
    return places


def _flat_weights(model: nn.Module, recipe: Recipe) -> Iterator[tuple[str, list[nn.Parameter]]]:
    inside: set[nn.Parameter] = set()
    flats: list[tuple[str, list[nn.Parameter]]] = []
    for n, modules in enumerate(wrapped_apart(model, recipe).values()):  # type: ignore[arg-type]
        own: list[list[nn.Parameter]] = []
        for module in modules:
            own.append([weight for weight in module.parameters() if weight not in inside])
            inside.update(own[-1])
        flats.append((f"flat layer {n}", own.pop()))
        flats += [(f"flat matrix {i} of adapters in layer {n}", weights) for i, weights in enumerate(own)]
    rest = [weight for weight in model.parameters() if weight not in inside]
    yield from (("flat rest", rest), *flats)


def clip_flat(weights: list[nn.Parameter], norm: float) -> None:
    """What FSDP1's clip_grad_norm_ does on one rank, over its flat weights, but for the all-reduce of a number."""
    zero = torch.zeros((), device=weights[0].device)
    total = _get_grad_norm(weights, 2.0, zero, zero.device) ** 2.0
    scale = torch.clamp(norm / (total**0.5 + 1e-6), max=1.0)
    for weight in weights:
        assert weight.grad is not None
        weight.grad.mul_(scale.to(weight.grad.device, weight.grad.dtype))


def _record_flat(recorder: Recorder) -> dict[Target, MakeReplacement]:
    """What FSDP1 does to storages, and what it makes."""

    def fill(plain: Callable[..., None]) -> Callable[..., None]:
        def fill_flat(tensor: torch.Tensor, size: torch.Size) -> None:
            _fill_storage(partial(plain, size=size), recorder, tensor)

        return fill_flat

    def named(purpose: str, category: Category) -> MakeReplacement:
        def make(plain: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                with recorder.purpose(purpose, category):
                    return plain(*args, **kwargs)

            return call

        return make

    def reshard_the_rest(_plain: Callable[..., None]) -> Callable[[Any], None]:
        """Of what backward left gathered, as real pointers tell it; those of fake tensors are all alike."""

        def reshard(state: Any) -> None:
            handle = state._handle
            if (
                handle
                and handle.flat_param.untyped_storage()._cdata
                != handle.flat_param._local_shard.untyped_storage()._cdata
            ):
                _reshard(state, handle, _should_free_in_backward(state, handle))

        return reshard

    return {
        RESHARD_REST: reshard_the_rest,
        FILL_FLAT: fill,
        EMPTY_FLAT: lambda plain: partial(_empty_storage, plain, recorder),
        FLAT_GRADIENT: named(SHARDS, Category.GRADIENTS),
    }


@contextmanager
def record_fsdp(recorder: Recorder, on_host: bool = False, flat: bool = False) -> Iterator[None]:
    """Within the context the recorder knows what FSDP2 allocates, and for what. on_host: shards and their gradients lie in CPU RAM.
    flat: it is FSDP1. Raises VersionError where torch's FSDP is another."""

    def name_purposes(category: Category, *names: str) -> MakeReplacement:
        """Of calls in turn."""
        next_names = cycle(names)

        def make(plain: Callable[..., Any]) -> Callable[..., Any]:
            def call_with_purpose(*args: Any, **kwargs: Any) -> Any:
                with recorder.purpose(next(next_names), category):
                    return plain(*args, **kwargs)

            return call_with_purpose

        return make

    if flat:
        with patched(_record_flat(recorder)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # which FSDP1 compares
            yield
        return
    named_calls = {
        GATHERED_OUTPUTS: name_purposes(Category.WEIGHTS, GATHERED),
        GATHER_INPUTS: name_purposes(Category.WEIGHTS, COPY_IN),
        GATHER_BUFFER: name_purposes(Category.WEIGHTS, BUFFER),
        SCATTER_BUFFERS: name_purposes(Category.GRADIENTS, SCATTER, SHARDS),  # first the input, then the output
    }
    storage_calls = {
        FILL: lambda plain: partial(_fill_storage, plain, recorder),
        FILL_ALONE: lambda plain: partial(_fill_storage, plain, recorder),
        EMPTY: lambda plain: partial(_empty_storage, plain, recorder),
    }
    host_calls: dict[Target, Any] = {
        INPUTS_OF_GATHER: lambda plain: property(partial(_copy_from_host, plain.fget)),
        SHARDED_GRADIENT: lambda plain: partialmethod(_copy_to_host, plain, recorder),
    }
    calls = {**storage_calls, **named_calls, **(host_calls if on_host else {})}
    with patched(calls), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # a loss of split logits
        yield


def _copy_from_host(plain: Callable[[Any], list[torch.Tensor]], param: Any) -> list[torch.Tensor]:
    """A shard is copied to the card for an all-gather; fake tensors have one device, where nothing is copied."""
    on_host = param._sharded_param_data
    param._sharded_param_data = on_host.clone()
    try:
        return plain(param)
    finally:
        param._sharded_param_data = on_host


def _copy_to_host(
    param: Any, plain: Callable[[Any, torch.Tensor], Any], recorder: Recorder, gradient: torch.Tensor
) -> Any:
    """A shard of a gradient is copied to CPU RAM."""
    copied = gradient.clone()
    recorder.set_category(copied, Category.GRADIENTS, host=True)
    return plain(param, copied)


def _fill_storage(plain: Callable[[torch.Tensor], None], recorder: Recorder, tensor: torch.Tensor) -> None:
    size_before = tensor.untyped_storage().size()
    plain(tensor)
    if tensor.untyped_storage().size() != size_before:
        with recorder.purpose(GATHERED, Category.WEIGHTS):
            recorder.record_filled(tensor)


def _empty_storage(plain: Callable[[torch.Tensor], None], recorder: Recorder, tensor: torch.Tensor) -> None:
    plain(tensor)
    recorder.record_emptied(tensor)
