"""What a CUDA card does where fake tensors on the CPU would do something else. `as_on_cuda` puts all of it in place, but for
what mstplan's own part of the step does otherwise (`fake_runtime.py`).

| on the card | source |
|---|---|
| attention by cuDNN, its row statistics and workspace | from source: aten native/cudnn/MHA.cpp; measured |
| attention by FlashAttention-2, its row statistics and workspace | from source: aten native/transformers/cuda/flash_attn/flash_api.cpp, mha_fwd and mha_bwd |
| with a mask, or head sizes not for that, the memory-efficient kernel | from source: aten transformers/cuda/attention.cu, attention_backward.cu |
| its sums and workspace | mstplan/step/cuda.py |
| a mask as a bias, padded to rows of 8 | from source: aten transformers/attention.cpp, convert_boolean_attn_mask and preprocess_mask |
| which kernel scaled_dot_product_attention takes | from source: aten transformers/cuda/sdp_utils.cpp |
| batched products copy matrices of which neither axis lies in order | from source: aten native/cuda/Blas.cpp, prepare_batch_matrix_for_cublas |
| what an adapter adds to a router's weight is made in the adapter's dtype | from source: peft tuners/lora/layer.py, Linear.get_delta_weight |
| softmax's backward multiplies gradient and output first | from source: aten native/cuda/SoftMax.cu, softmax_backward_cuda_out |
| layer norm keeps its row statistics in fp32 | from source: aten native/cuda/layer_norm_kernel.cu, layer_norm_cuda |
| dropout keeps a mask of one byte a number | from source: aten native/Dropout.cpp, native_dropout |
| masked_scatter holds its mask at full size, and sums of it in int64 | from source: aten native/cuda/IndexKernel.cpp, masked_scatter__cuda |
| its backward lists the places where the mask is true | from source: aten native/cuda/IndexKernel.cpp, masked_select_out_cuda_impl |
| norms of gradients are made for all of them at once | from source: aten native/cuda/ForeachReduceOp.cu |
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch

from ..spec.platform import AMPERE, Platform
from ..step.clipping import CHUNK, parts_of_norm
from ..step.kernels import NO_SDPA, SDPA, chosen, runs_sdpa
from ..step.kernels.base import AttentionCall
from ..train.lazy import LazyTensor
from .kernels import STAND_INS
from .kernels.base import SIXTEEN_BIT, Call
from .patches import (
    ATTENTION,
    AUTOCAST_ENABLED,
    BIDIRECTIONAL_MASK,
    CAUSAL_MASK,
    DELTA,
    DROPOUT,
    FOREACH,
    GROUPED_PRODUCTS,
    LAYER_NORM,
    PACKED_SEQUENCES,
    TENSOR,
    MakeReplacement,
    Target,
    patched,
)
from .recorder import Recorder


class _Dropout(torch.autograd.Function):
    """CUDA's fused dropout, which keeps a mask of one byte a number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (_mask,) = ctx.saved_tensors
        return torch.empty_like(grads[0])


class _LayerNorm(torch.autograd.Function):
    """CUDA's layer norm of 16-bit rows, whose mean and deviation are fp32. It copies rows whose numbers do not lie in order, as a vision
    tower's patches, and so does its backward; what it makes lies in order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        rows = x.contiguous()
        out = torch.empty_like(rows)
        ctx.save_for_backward(x, weight, *(x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(2)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight, *_ = ctx.saved_tensors
        rows, _gradient = x.contiguous(), grads[0].contiguous()
        return torch.empty_like(rows), torch.empty_like(weight), torch.empty_like(weight)


def _attention_on_cuda(
    plain: Callable[..., torch.Tensor], recorder: Recorder, named: str, platform: Platform, samples: int
) -> Callable[..., torch.Tensor]:
    """scaled_dot_product_attention as CUDA chooses its kernel. named: a recipe's attention; samples: in a row."""
    name = named if named == NO_SDPA else named if runs_sdpa(named) else SDPA

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        q, k, v = _autocast(query, key, value)
        asked = AttentionCall(
            str(q.dtype)[6:],
            q.shape[-1],
            v.shape[-1],
            enable_gqa and k.shape[1] != q.shape[1],
            attn_mask is not None,
            dropout_p,
            platform,
            not enable_gqa and k.shape[1] != q.shape[1],
        )
        call = Call(q, k, v, attn_mask, dropout_p, is_causal, scale, plain, samples, enable_gqa)
        return STAND_INS[chosen(name, asked).name].attend(call, recorder)

    return attention


def _gradient_x_output(gradient: torch.Tensor, output: torch.Tensor, *_: object) -> tuple[str, torch.Tensor]:
    return "softmax: gradient x output", torch.empty_like(output)


def _contiguous_matrices(*matrices: torch.Tensor) -> tuple[str, torch.Tensor | None]:
    """A copy of the matrices of which neither axis lies in order, as experts' adapters have them: of one factor at most."""
    turned = next((each for each in matrices if 1 not in each.stride()[-2:] and not each.is_contiguous()), None)
    return "product: contiguous matrices", None if turned is None else turned.new_empty(turned.shape)


def _mask_sums(destination: torch.Tensor, *_: object) -> tuple[str, torch.Tensor]:
    """Of a masked_scatter (image features into embeddings): running sums of the mask in int64, and the mask in order, of full size."""
    size = 9 * destination.numel()
    return "masked_scatter: mask and its sums", destination.new_empty(size, dtype=torch.uint8)


def _mask_places(gradient: torch.Tensor, _mask: torch.Tensor, sizes: Sequence[int]) -> tuple[str, torch.Tensor]:
    """Of its backward: an index for each axis of every place where the mask is true, as many as there are features."""
    places = gradient.new_empty(gradient.dim(), prod(sizes), dtype=torch.int64)
    return "masked_scatter: places in the mask", places


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As autocast does for scaled_dot_product_attention."""
    return tuple(x.to(torch.bfloat16) for x in tensors) if torch.is_autocast_enabled("cpu") else tensors


def _delta(layer: Any, adapter: str) -> torch.Tensor:
    """What an adapter adds to a matrix."""
    product: torch.Tensor = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
    return product * layer.scaling[adapter]


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    if not training or p == 0:
        return x
    if isinstance(x, LazyTensor):  # of an MLP in chunks: drop in its pieces
        return x.record_step(lambda rows: _dropout(rows, p, training), random=True)  # type: ignore[return-value]
    out: torch.Tensor = _Dropout.apply(x)
    return out


def _layer_norm(
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        x = x.float()  # as autocast does on a card
    if x.dtype not in SIXTEEN_BIT or weight is None or bias is None or len(shape) != 1:
        return torch.layer_norm(x, shape, weight, bias, eps)
    out: torch.Tensor = _LayerNorm.apply(x, weight, bias)
    return out


@contextmanager
def as_on_cuda(
    recorder: Recorder, attention: str = SDPA, platform: Platform = AMPERE, samples: int = 1
) -> Iterator[None]:
    """Within the context a step on fake CPU tensors, seen by `recorder`, allocates what it would on a card of that platform. attention: a
    recipe's; samples: in a row. Raises VersionError where torch or transformers has no place for that."""
    recorder.temporaries = {
        torch.ops.aten._softmax_backward_data: _gradient_x_output,
        torch.ops.aten.bmm: _contiguous_matrices,
        torch.ops.aten.masked_scatter: _mask_sums,
        torch.ops.aten.masked_scatter_backward: _mask_places,
        torch.ops.aten.baddbmm: lambda _added, *matrices, **_scales: _contiguous_matrices(*matrices),
    }
    kernels: dict[Target, MakeReplacement] = {
        ATTENTION: lambda plain: _attention_on_cuda(plain, recorder, attention, platform, samples),
        DROPOUT: lambda _plain: _dropout,
        LAYER_NORM: lambda _plain: _layer_norm,
        AUTOCAST_ENABLED: lambda plain: lambda device="cpu": plain(device),
    }
    if "peft" in sys.modules:
        kernels[DELTA] = lambda _plain: _delta
    with patched(kernels), on_fake_tensors(samples):
        yield


@contextmanager
def clipping_on_cuda(recorder: Recorder) -> Iterator[None]:
    """Within the context torch's clip_grad_norm_ of tensors without values, or FSDP1's, makes what it does on a card. Raises VersionError as above."""

    def norm_parts(tensors: Sequence[torch.Tensor], *_: object) -> tuple[str, torch.Tensor]:
        parts = max(-(-tensor.numel() // CHUNK) for tensor in tensors)
        return "parts of norms", tensors[0].new_empty(len(tensors), parts, dtype=torch.float32)

    def one_norms_parts(tensor: torch.Tensor, *_: object, **__: object) -> tuple[str, torch.Tensor]:
        return "parts of a norm", tensor.new_empty(parts_of_norm(tensor.numel()), dtype=torch.uint8)

    norms: dict[Any, Callable[..., tuple[str, torch.Tensor | None]]] = {
        torch.ops.aten._foreach_norm: norm_parts,
        torch.ops.aten.linalg_vector_norm: one_norms_parts,
    }
    recorder.temporaries = {**recorder.temporaries, **norms}
    with patched({FOREACH: lambda _plain: lambda _tensors, _device: True}):
        yield


@contextmanager
def on_fake_tensors(samples: int = 1) -> Iterator[None]:
    """Within the context what needs values of tensors goes on as if it had seen usual ones. samples: in a row. Raises VersionError as
    above."""
    without_values: dict[Target, MakeReplacement] = {
        CAUSAL_MASK: _ignore_padding,
        BIDIRECTIONAL_MASK: _ignore_padding,
        PACKED_SEQUENCES: _ignore_packing if samples == 1 else lambda packed: packed,
        GROUPED_PRODUCTS: _multiply_grouped,
        TENSOR: _make_of_numbers,
    }
    with patched(without_values):
        yield


def _ignore_padding(skips_mask: Callable[..., bool]) -> Callable[..., bool]:
    """A padding mask of ones, which some models make for themselves, is none."""
    return lambda _padding_mask, *args, **kwargs: skips_mask(None, *args, **kwargs)


def _ignore_packing(packed: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], None]:
    """No sequence is several, whatever position ids say."""

    def find_none(position_ids: torch.Tensor) -> None:
        packed(position_ids)  # for what it allocates

    return find_none


def _make_of_numbers(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """torch.tensor of a list in which tensors stand for numbers, which fake ones have not: a tensor of the same size."""

    def make(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if isinstance(data, list | tuple) and any(isinstance(each, torch.Tensor) for each in data):
            return torch.stack([torch.as_tensor(each) for each in data]).to(*args, **kwargs)
        return plain(data, *args, **kwargs)

    return make


def _multiply_grouped(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Products of experts' matrices, which kernels make in every dtype, but torch's rules for fake tensors in bf16 only."""

    def multiply_grouped(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if a.dtype not in (torch.float32, torch.float16):
            return plain(a, b, *args, **kwargs)
        return plain(a.bfloat16(), b.bfloat16(), *args, **kwargs).to(a.dtype)

    return multiply_grouped
