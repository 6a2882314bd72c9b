"""The functions of torch and transformers that a trace replaces while it runs, for want of an argument or a registry.

Each stands here with the release that it was read from, in which what takes its place was written. `patched` puts the
new ones in place, and afterwards the old ones back. A function that is gone is an error that names it: a trace without
its replacement would be a wrong answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from importlib import import_module, metadata
from typing import Any

from ..errors import VersionError

MakeReplacement = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Of the plain function, the one to take its place."""


@dataclass(frozen=True)
class Target:
    """A function to be replaced: `name` of `module`, "Class.method" for a method. read_in: a package and its release. why: the
    plain one does not do. since: the first release (major, minor) that has it; in older ones there is nothing to replace."""

    module: str
    name: str
    read_in: str
    why: str
    since: tuple[int, int] | None = None

    @property
    def package(self) -> str:
        return self.read_in.split()[0]

    def owner(self) -> Any:
        """The module or class that has it; None where the installed release is older. Raises VersionError when it is gone."""
        try:
            *classes, last = self.name.split(".")
            owner = reduce(getattr, classes, import_module(self.module))
            getattr(owner, last)
        except (ImportError, AttributeError):
            installed = metadata.version(self.package)
            if self.since is not None and _release(installed) < self.since:
                return None
            raise VersionError(
                f"{self.package} {installed} has no {self.module}.{self.name}, which a trace replaces ({self.why})."
                f"\nInstall {self.read_in}, or use the formula rung."
            ) from None
        return owner


def _release(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


@contextmanager
def patched(replacements: Mapping[Target, MakeReplacement]) -> Iterator[None]:
    """Within the context each target is what was made of it. Raises VersionError, with none replaced, when one is gone."""
    owners = {target: target.owner() for target in replacements}
    with ExitStack() as stack:
        for target, owner in owners.items():
            if owner is not None:
                name = target.name.split(".")[-1]
                stack.callback(_restore_function, owner, name, vars(owner).get(name, _INHERITED))
                setattr(owner, name, replacements[target](getattr(owner, name)))
        yield


_INHERITED = object()


def _restore_function(owner: Any, name: str, original: Any) -> None:
    if original is not _INHERITED:
        setattr(owner, name, original)
    elif name in vars(owner):
        delattr(owner, name)


# ---- kernels of a card (cuda_stand_ins.py) -----------------------------------------------------------------------------

_TORCH, _TRANSFORMERS = "torch 2.13.0", "transformers 5.23.0"

ATTENTION = Target(
    "torch.nn.functional",
    "scaled_dot_product_attention",
    _TORCH,
    "on fake CPU tensors it takes no kernel of a GPU",
)
AUTOCAST_ENABLED = Target("torch", "is_autocast_enabled", _TORCH, "without a device it asks about GPUs")
DROPOUT = Target("torch.nn.functional", "dropout", _TORCH, "on the CPU it keeps a mask as wide as its input")
LAYER_NORM = Target("torch.nn.functional", "layer_norm", _TORCH, "on the CPU it keeps its row statistics in 16 bits")
FOREACH = Target(
    "torch.nn.utils.clip_grad", "_has_foreach_support", _TORCH, "it takes the norms of fake tensors one by one"
)

# ---- values that fake tensors have not (cuda_stand_ins.py) -------------------------------------------------------------

CAUSAL_MASK = Target(
    "transformers.masking_utils", "_ignore_causal_mask_sdpa", _TRANSFORMERS, "it reads the values of a padding mask"
)
BIDIRECTIONAL_MASK = Target(
    "transformers.masking_utils",
    "_ignore_bidirectional_mask_sdpa",
    _TRANSFORMERS,
    "it reads the values of a padding mask",
    since=(5, 0),
)
PACKED_SEQUENCES = Target(
    "transformers.masking_utils",
    "find_packed_sequence_indices",
    _TRANSFORMERS,
    "it reads the values of position ids",
    since=(4, 54),
)
GROUPED_PRODUCTS = Target(
    "torch._meta_registrations",
    "_meta_grouped_mm_common",
    _TORCH,
    "it refuses dtypes other than bf16, which kernels take",
    since=(2, 8),
)

TENSOR = Target("torch", "tensor", _TORCH, "it reads numbers of fake tensors from their memory")

# ---- what FSDP2 does to storages, which no dispatch mode sees or could name (fsdp.py) ---------------------------------

_PARAM = "torch.distributed.fsdp._fully_shard._fsdp_param"
_COLLECTIVES = "torch.distributed.fsdp._fully_shard._fsdp_collectives"

CHUNKS_OF_RANKS = Target(
    _PARAM,
    "_chunk_with_empty",
    _TORCH,
    "it makes a tensor for each rank, of which a trace asks for the first ones alone",
)
JOINED_MESHES = Target(
    "torch.distributed.device_mesh",
    "DeviceMesh._concatenate",
    _TORCH,
    "it reads the numbers of ranks, which fake tensors have not",
    since=(2, 10),
)
FILL = Target(_PARAM, "alloc_storage", _TORCH, "it fills gathered weights in place")
EMPTY = Target(_PARAM, "free_storage", _TORCH, "it empties gathered weights in place")
FILL_ALONE = Target(
    "torch.distributed.fsdp._fully_shard._fsdp_param_group",
    "alloc_storage",
    _TORCH,
    "it fills weights that one rank has whole in place",
)
GATHERED_OUTPUTS = Target(_PARAM, "FSDPParam.init_all_gather_outputs", _TORCH, "it makes gathered weights")
GATHER_INPUTS = Target(_COLLECTIVES, "_get_param_all_gather_inputs", _TORCH, "it casts shards before they are gathered")
INPUTS_OF_GATHER = Target(
    _PARAM, "FSDPParam.all_gather_inputs", _TORCH, "it copies shards from CPU RAM, which fake tensors have not"
)
SHARDED_GRADIENT = Target(
    _PARAM,
    "FSDPParam.to_sharded_dtensor",
    _TORCH,
    "it is given what was copied to CPU RAM, which fake tensors have not",
)
_FLAT = "torch.distributed.fsdp._flat_param"
FILL_FLAT = Target(_FLAT, "_alloc_storage", _TORCH, "it fills flat weights in place")
EMPTY_FLAT = Target(_FLAT, "_free_storage", _TORCH, "it empties flat weights in place")
RESHARD_REST = Target(
    "torch.distributed.fsdp._runtime_utils", "_catch_all_reshard", _TORCH, "it compares pointers of flat weights"
)
FLAT_GRADIENT = Target(
    "torch.distributed.fsdp._runtime_utils",
    "_get_reduce_scatter_tensors",
    _TORCH,
    "it makes the output of a reduce-scatter",
)
GATHER_BUFFER = Target(_COLLECTIVES, "DefaultAllGather.allocate", _TORCH, "it makes the buffer of an all-gather")
SCATTER_BUFFERS = Target(
    _COLLECTIVES, "DefaultReduceScatter.allocate", _TORCH, "it makes both buffers of a reduce-scatter"
)

# ---- collectives of torch's ring attention (ring.py) ---------------------------------------------------------------------

_RING = "torch.distributed.tensor.experimental._context_parallel._attention"
_FUNCTIONAL = "torch.distributed._functional_collectives"

RING_GATHER = Target(_FUNCTIONAL, "all_gather_single", _TORCH, "on fake tensors it is done at once, and copied")
RING_SEND = Target(_FUNCTIONAL, "permute_tensor", _TORCH, "on fake tensors it is done at once, and copied")
RING_WAIT = Target(_RING, "_maybe_wait", _TORCH, "what is sent is held until the result is waited for")

# ---- DTensors of split matrices (tensor_parallel.py) ---------------------------------------------------------------------

META_OF_RESULT = Target(
    "torch.distributed.tensor._sharding_prop",
    "ShardingPropagator._propagate_tensor_meta_non_cached",
    _TORCH,
    "it runs operations on whole fake tensors to learn their shapes",
)
LAST_AXIS = Target(
    "transformers.distributed.tensor_parallel",
    "TensorParallelLayer._from_local_last_dim_shard",
    _TRANSFORMERS,
    "it makes a whole tensor on the meta device to learn its strides",
    since=(5, 20),
)
COLLECTIVE_WAIT = Target(_FUNCTIONAL, "wait_tensor", _TORCH, "on fake tensors it makes a copy")

# ---- experts over several ranks (expert_parallel.py) -----------------------------------------------------------------------

_EXPERTS = "transformers.distributed.expert_parallel"

DISPATCH = Target(_EXPERTS, "AllToAllEP._dispatch_tokens", _TRANSFORMERS, "how many rows it sends is to be known")
COUNTS_SENT = Target(_EXPERTS, "all_to_all_single", _TRANSFORMERS, "on fake tensors nobody says how many rows come")
FULLY_SHARD = Target(
    "transformers.distributed.fsdp",
    "fully_shard",
    _TRANSFORMERS,
    "it takes adapters for weights that were there before",
)
HOST_POLICY = Target(
    "transformers.distributed.fsdp", "CPUOffloadPolicy", _TRANSFORMERS, "it pins CPU RAM, which fake tensors have not"
)
WAIT_OF_TRANSFORMERS = Target(
    "transformers.distributed.parallel_utils", "wait_tensor", _TRANSFORMERS, "on fake tensors it makes a copy"
)

# ---- products with quantised weights (quantised.py) --------------------------------------------------------------------

_BITSANDBYTES = "bitsandbytes 0.50.2"

MULTIPLY_4_BITS = Target("bitsandbytes", "matmul_4bit", _BITSANDBYTES, "it needs a GPU's kernels")
MULTIPLY_8_BITS = Target("bitsandbytes.nn.modules", "Linear8bitLt.forward", _BITSANDBYTES, "it needs a GPU's kernels")
FIND_STATE = Target(
    "bitsandbytes.nn.modules",
    "fix_4bit_weight_quant_state_from_module",
    _BITSANDBYTES,
    "it makes a weight of a class of its own",
)
DEQUANTISE = Target("peft.tuners.lora.dora", "dequantize_module_weight", "peft 0.21.2", "it needs a GPU's kernels")

# ---- adapters on parameters (cuda_stand_ins.py) ------------------------------------------------------------------------

DELTA = Target("peft.tuners.lora.layer", "Linear.get_delta_weight", "peft 0.21.2", "on the CPU it computes in fp32")

TARGETS = tuple(value for value in vars().values() if isinstance(value, Target))
