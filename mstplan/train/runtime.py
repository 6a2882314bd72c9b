"""What the runtime asks of the device, of the host and of chance, in one object that is handed to whatever asks.

Training takes `RUNTIME`. A step of which only the memory is wanted hands in a subclass that answers otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from ..errors import MissingError, RecipeError, one_line
from ..spec.hardware import free_host_memory
from .ring import RingKernel, on_cpu


class Runtime:
    """As training has it. Holds nothing, so one serves all models."""

    def adds_to_fp32(self, device_type: str) -> bool:
        """Has this kind of device a product of 16-bit matrices that adds to an fp32 one? CPUs take fp32 copies instead."""
        return device_type != "cpu"

    def add_product(self, total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """total (m, n) + a (m, k) b (k, n), in place, in fp32 (fp64 for fp64); no total: the product alone."""
        if a.dtype in (torch.float32, torch.float64):
            return a @ b if total is None else total.addmm_(a, b)
        if not self.adds_to_fp32(a.device.type):
            return self.add_product(total, a.float(), b.float())
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)

    def replicate(self, model: PreTrainedModel) -> DistributedDataParallel | None:
        """The model whose gradients are averaged over ranks, each with all weights; None without ranks."""
        return DistributedDataParallel(model) if dist.is_initialized() else None

    def empty_on_host(self, like: torch.Tensor, pinned: bool, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """Room on the host for a tensor like `like`, or of other sizes. Raises RuntimeError when there is none."""
        try:
            if sizes is not None:
                return torch.empty(sizes, dtype=like.dtype, device="cpu", pin_memory=pinned)
            return torch.empty_like(like, device="cpu", pin_memory=pinned)
        except RuntimeError as e:
            if not pinned:
                raise
            # CUDA's words for it are those for a full card
            raise RuntimeError(f"no pinned CPU RAM for {like.numel() * like.itemsize} bytes more") from e

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the host, pinned if it comes from a GPU."""
        room = self.empty_on_host(tensor, is_pinned_from(tensor))
        self.send(tensor, room)
        return room

    def send(self, tensor: torch.Tensor, room: torch.Tensor) -> None:
        """Copy a tensor (b, ...) into room on the host, on the stream that computes. What does not lie as the room does is laid out so
        first, on the device: torch would copy it by way of memory that is not pinned."""
        if not _has_strides(tensor, _strides_without_gaps(room)):
            tensor = torch.empty_like(room, device=tensor.device, pin_memory=False).copy_(tensor)
        for here, there in zip(tensor.unbind(), room.unbind(), strict=True):
            there.copy_(here, non_blocking=True)

    def to_device(self, on_host: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A tensor (b, ...) of the host, or a part of one, on the device, on the stream that computes; on a CPU a copy as well."""
        tensor = torch.empty_like(on_host, device=device, pin_memory=False)
        for there, here in zip(on_host.unbind(), tensor.unbind(), strict=True):
            if device.type != "cpu" and not _has_strides(there, _strides_without_gaps(there)):
                torch.accelerator.current_stream(
                    device
                ).synchronize()  # the CPU reads it, so what was sent must be there
            here.copy_(there, non_blocking=True)
        return tensor

    def free_on_host(self) -> int | None:
        """Bytes of CPU RAM that can still be had; None: not known."""
        return free_host_memory()

    def draw_seed(self) -> int | None:
        """For the random numbers of one MLP's chunks; None: they need not be the same in both passes."""
        return int(torch.randint(1 << 62, ()))

    def chunk_slices(self, tokens: int, rows: int) -> Iterator[tuple[int, slice]]:
        """(number, place) of each chunk of at most `rows` of `tokens` tokens."""
        for n, start in enumerate(range(0, tokens, rows)):
            yield n, slice(start, min(start + rows, tokens))

    def offload_saved(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """What the forward and the backward pass of a step run in whose saved tensors are kept in CPU RAM: TRL's activation_offloading.
        Raises MissingError without trl, RecipeError on a CPU."""
        if next(model.parameters()).device.type == "cpu":
            raise RecipeError(
                "saved tensors move from a GPU to CPU RAM, and here is no GPU.\nLeave offload='saved-tensors' out, or take a GPU."
            )
        try:
            from trl.models.activation_offloading import get_act_offloading_ctx_manager
        except ImportError as e:
            raise MissingError(
                f"offload='saved-tensors' runs TRL's activation_offloading, and trl cannot be imported ({one_line(e)}).\n"
                "pip install trl, or use offload='layer-inputs'."
            ) from None
        context: AbstractContextManager[Any] = get_act_offloading_ctx_manager(model, warn_if_no_head=False)
        return context

    def ring_kernel(self, device_type: str) -> RingKernel | None:
        """The kernel of attention whose sequences ranks share in a ring; None: the one that torch's dispatcher takes, which knows GPUs'."""
        return on_cpu(_keep_whole) if device_type == "cpu" else None

    def keep_attention(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """What the first run of a selective checkpoint runs in, and the second, which finds attention's results there."""
        results: deque[Any] = deque()
        return _Attention(results, again=False), _Attention(results, again=True)


def is_pinned_from(x: torch.Tensor) -> bool:
    """Whether what is copied from it to the host goes to pinned memory."""
    return x.device.type != "cpu"


def _strides_without_gaps(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of a tensor of this one's sizes and order of axes, as torch.empty_like has them."""
    strides, step = list(x.stride()), 1
    for d in sorted(range(x.dim()), key=lambda d: (strides[d], -d)):
        strides[d], step = step, step * x.shape[d]
    return tuple(strides)


def _has_strides(x: torch.Tensor, strides: tuple[int, ...]) -> bool:
    """Whether a tensor lies so; an axis of one entry may have any."""
    return all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), strides, strict=True))


_ATTENTION = {
    getattr(torch.ops.aten, name).default
    for name in (f"_scaled_dot_product_{kernel}_attention" for kernel in ("flash", "efficient", "cudnn"))
    if hasattr(torch.ops.aten, name)
} | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}


def is_attention(operation: Any) -> bool:
    """TRL's choice for its `selective` (trl/models/selective_activation_checkpointing.py): attention's kernels, also of the flash-attn
    package, whose name its operations have in theirs."""
    return operation in _ATTENTION or "flash_attn" in str(operation)


class _Attention(TorchDispatchMode):
    """Results of attention's kernels go into `results`, or come from there. As torch's create_selective_checkpoint_contexts does it, but
    that asks for the same operations in both runs, and an MLP in chunks runs others the second time."""

    def __init__(self, results: deque[Any], again: bool):
        super().__init__()
        self.results, self.again = results, again
        self.runs_whole = False  # several kernels, whose result is kept as one's

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = partial(func, *args, **(kwargs or {}))
        return self.keep(run) if is_attention(func) and not self.runs_whole else run()

    def keep(self, run: Callable[[], Any]) -> Any:
        """What `run` makes, which is kept, or what it made before."""
        if not self.again:
            self.runs_whole = True
            try:
                out = run()
            finally:
                self.runs_whole = False
            self.results.append(tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, out))
            return out
        if not self.results:
            raise RuntimeError("a step with selective checkpoints is backpropagated once")
        return self.results.popleft()


def _keep_whole(run: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """What several kernels make together, which a selective checkpoint that is entered keeps as one's."""
    entered = (mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, _Attention))
    mode = next(entered, None)
    made: tuple[torch.Tensor, ...] = run() if mode is None else mode.keep(run)
    return made


@contextmanager
def saving_here() -> Iterator[None]:
    """Within the context saved tensors stay where they are: a chunk's own graph is gone before hooks around the step could move them."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in older torch
    if top is not None and top(False) is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


RUNTIME = Runtime()
