"""What an H200 and an H100 allocated otherwise than formula and trace say: the one list of it, each entry with its tensor, bytes and cause.

An entry gives the most bytes that it adds at an instant, and the sizes of allocations that the GPU alone made or the trace alone has.
Where something is mended, its entry explains nothing any more, and `test_archive.py` asks to strike it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import ceil, isqrt
from typing import NamedTuple

from mstplan.measuring.measurement import Case
from mstplan.spec.model import GatedDelta, Model
from mstplan.step.instants import Instant
from mstplan.step.kernels.efficient import efficient_workspace
from mstplan.step.recipe import Recipe
from mstplan.units import MIB

FORMULA, TRACE, SEQUENCE = "formula", "trace", "sequence of allocations"
TRANSFORMERS = "5.17.0"  # what ran on both GPUs


class Facts(NamedTuple):
    """A measured step. kernel: what scaled_dot_product_attention ran without a mask. against: formula, trace or sequence; transformers:
    the release whose code is traced, which the formula follows, too."""

    model: Model
    recipe: Recipe
    seq_len: int
    kernel: str
    expandable: bool
    against: str
    transformers: str

    @classmethod
    def of(cls, case: Case, environment: dict[str, object], against: str, transformers: str) -> Facts:
        kernel = str(environment.get("sdpa", "cudnn_attention")).removesuffix("_attention")
        expandable = "expandable_segments:True" in str(environment.get("allocator", "expandable_segments:True"))
        return cls(case.described, case.recipe, case.seq_len, kernel, expandable, against, transformers)

    @property
    def rows(self) -> int:
        """Tokens of all sequences."""
        return self.recipe.batch * self.seq_len

    @property
    def number_bytes(self) -> int:
        return 4 if self.recipe.precision == "fp32" else 2

    def heads_bytes(self, heads: int, dim: int | None = None) -> int:
        """Bytes of queries, keys or values of so many heads."""
        attention = self.model.attention
        return self.rows * heads * (dim or attention.head_dim) * self.number_bytes

    @property
    def scores(self) -> int:
        """Elements of all queries by all keys."""
        return self.recipe.batch * self.model.attention.heads * self.seq_len * self.seq_len

    @property
    def heads(self) -> tuple[int, int]:
        return self.model.attention.heads, self.model.attention.kv_heads

    @property
    def layers_alive(self) -> int:
        """Layers of which all is kept at once."""
        count, checkpoint = len(self.model.layer_kinds), self.recipe.checkpoint
        if checkpoint == "none":
            return count
        if checkpoint == "sqrt":
            return isqrt(count - 1) + 1
        return 1 if checkpoint == "layer" else int(checkpoint)

    @property
    def has_bias(self) -> bool:
        """Whether products of a layer add a bias."""
        model = self.model
        return (
            model.attention.qkv_bias
            or model.attention.out_bias
            or any(each is not None and each.bias for each in (model.mlp, model.experts))
        )

    @property
    def norms_in_attention(self) -> bool:
        attention = self.model.attention
        return attention.qk_norm != "none" or attention.latent is not None

    @property
    def masked(self) -> bool:
        """Whether a layer asks for a boolean mask: a window that is shorter than the sequence."""
        return any(kind.window is not None and kind.window < self.seq_len for kind in self.model.layer_kinds)

    @property
    def widths(self) -> set[int]:
        """Columns of what is summed over tokens in backward: norms' weights, biases."""
        model, attention = self.model, self.model.attention
        query, key = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        mlps = {each.width for each in (model.mlp, model.experts) if each is not None}
        return {model.hidden, query, key, query + 2 * key, *mlps, *(2 * width for width in mlps)}


class Reason(NamedTuple):
    """name: of what differs. tensor: shape and dtype. at: the instants it reaches, with the most bytes that it adds at them.

    missing: sizes of allocations that the GPU made and the trace has not; extra: the other way round. Both before rounding to blocks.
    """

    name: str
    tensor: str
    cause: str
    source: str
    applies: Callable[[Facts], bool]
    at: tuple[Instant, ...] = ()
    bytes: Callable[[Facts], int] = lambda _: 0
    missing: Callable[[Facts], Iterable[int]] = lambda _: ()
    extra: Callable[[Facts], Iterable[int]] = lambda _: ()
    is_less: bool = False  # than is predicted, not more
    of_release: bool = False  # a trace by the release that ran does not differ
    in_backward: bool = False  # what is missing is made by autograd's thread, which has no frames of Python


FORWARD = (Instant.END_OF_FORWARD, Instant.LOSS, Instant.LOSS_BACKWARD)
LAYERS = (Instant.LAST_LAYER, Instant.MIDDLE_LAYER, Instant.FIRST_LAYER)
PASSES = (*FORWARD, *LAYERS)
ALL = tuple(Instant)


# ---- sizes that PyTorch's source gives ----------------------------------------------------------------------------------


def convolved(f: Facts) -> list[int]:
    """Bytes of queries, keys and values of linear attention, which a convolution runs over together."""
    sizes = f.model.mixer
    assert isinstance(sizes, GatedDelta)
    channels = 2 * sizes.key_heads * sizes.key_dim + sizes.value_heads * sizes.value_dim
    return [f.rows * channels * f.number_bytes]


def sum_buffer(rows: int, width: int) -> int:
    """Bytes of partial sums of (rows, width) over its rows, in fp32: what a reduction keeps in global memory on a GPU of 132
    multiprocessors. from source: aten/native/cuda/Reduce.cuh, setReduceConfig and ReduceConfig.global_memory_size: blocks of 32 by
    4 threads, 4 outputs a thread, 16 blocks to a multiprocessor, at least 16 values to a thread."""
    blocks = min(ceil(132 * 16 / ceil(width / 128)), ceil(ceil(rows / 4) / 16))
    return 4 * width * 128 * blocks


def sum_buffers(f: Facts) -> set[int]:
    attention = f.model.attention
    heads = {sum_buffer(f.rows * n, attention.head_dim) for n in (attention.heads, attention.kv_heads)}
    return {sum_buffer(f.rows, width) for width in f.widths} | heads


def embedding_sums(f: Facts) -> int:
    """Bytes of one fp32 row for every token that comes up, and for every tenth token. from source: aten/native/cuda/EmbeddingBackwardKernel.cu."""
    return 4 * -(-f.model.hidden // 32) * 32 * (min(f.rows, f.model.vocab) + f.rows // 10)


def cudnn_workspace(f: Facts, kv_heads: int | None = None) -> int:
    """Bytes that cuDNN's attention asks for in backward, in one block: dQ and a row sum in fp32, and dK and dV of every query head
    where keys are shared. measured: 151 calls of attention.json.gz."""
    attention = f.model.attention
    shared = attention.heads != (kv_heads or attention.kv_heads)
    of_heads = f.rows * attention.heads * attention.head_dim
    return 4 * of_heads + 4 * f.rows * attention.heads + (2 * 2 * of_heads if shared else 0)


def cudnn_blocks(f: Facts) -> list[int]:
    """With keys as they are, and repeated for every query head; some hundred bytes more than the tensors."""
    sizes = {cudnn_workspace(f), cudnn_workspace(f, f.model.attention.heads)}
    return [size + more for size in sizes for more in range(0, 2048, 512)]


def flash_workspace(f: Facts) -> list[int]:
    """Bytes of FlashAttention-2's dQ in fp32, its row sums, dK and dV of every query head."""
    padded = -(-f.seq_len // 128) * 128 * f.recipe.batch * f.model.attention.heads
    dim = -(-f.model.attention.head_dim // 32) * 32
    return [4 * padded * dim, 4 * padded, 2 * f.rows * f.model.attention.heads * f.model.attention.head_dim]


def efficient_blocks(f: Facts) -> list[int]:
    """Bytes of the memory-efficient kernel's accumulators: of its output in fp32, and of dQ, dK and dV in backward."""
    attention = f.model.attention
    workspace = efficient_workspace(attention.head_dim, attention.v_head_dim, f.number_bytes)
    output = 4 * f.rows * attention.heads * attention.v_head_dim
    return [output, workspace.bytes(f.recipe.batch * attention.heads, f.seq_len)]


def visits(f: Facts) -> int:
    """Tokens times the experts that each visits."""
    assert f.model.experts is not None
    return f.rows * f.model.experts.per_token


def repeated(f: Facts) -> int:
    """Bytes of keys, values repeated for every query head, and of a copy of the keys."""
    attention = f.model.attention
    return 2 * f.heads_bytes(attention.heads) + f.heads_bytes(attention.kv_heads)


REASONS = (
    Reason(
        "cuDNN's attention",
        "dQ (b, H, s, e), row sums (b, H, s) float32, dK and dV (b, H, s, e) bfloat16, in one block",
        "sdpa ran cuDNN's attention, which asks for its workspace at once; FlashAttention-2's is counted, in three",
        "measured: attention.json.gz",
        lambda f: f.recipe.attention == "sdpa",
        missing=cudnn_blocks,
        extra=flash_workspace,
        in_backward=True,
    ),
    Reason(
        "copy of attention's output",
        "(b, s, H, e)",
        "attention's output has the layout of its queries; where they come out of a concatenation (rotary embedding of a part of a "
        "head, Phi-3's code, DeepSeek's latent attention) that is (b, H, s, e), and the next product copies it",
        "from source: transformers' integrations/sdpa_attention.py, transpose(1, 2).contiguous(); measured: frames of the events",
        lambda f: (
            f.model.attention.fused_qkv
            or f.model.attention.latent is not None
            or f.model.attention.rotary_dim not in (0, f.model.attention.head_dim)
        ),
        PASSES,
        lambda f: f.layers_alive * f.heads_bytes(f.model.attention.heads, f.model.attention.v_head_dim),
        missing=lambda f: [f.heads_bytes(f.model.attention.heads, f.model.attention.v_head_dim)],
    ),
    Reason(
        "convolution's input in order",
        "(b, channels, s), in forward and in backward, of the gradient, too",
        "a convolution over tokens of linear attention is given (b, s, channels), transposed: on a GPU it copies that first, and gives it up",
        "from source: aten/native/Convolution.cpp, _convolution and convolution_backward, input.contiguous(); measured: frames of the events",
        lambda f: isinstance(f.model.mixer, GatedDelta),
        missing=convolved,
    ),
    Reason(
        "attention of 192 and 128 numbers a head",
        "the memory-efficient kernel's accumulators, float32",
        "cuDNN's attention ran with values that are narrower than queries, too, where the memory-efficient kernel is counted",
        "from source: aten/native/transformers/cuda/sdp_utils.cpp, check_cudnn_tensor_shapes; measured",
        lambda f: f.model.attention.latent is not None and f.recipe.attention == "sdpa",
        extra=efficient_blocks,
    ),
    Reason(
        "mask as a bias",
        "(b, 1, s, s) bfloat16, and cuDNN's workspace",
        "a window's boolean mask was taken by cuDNN's attention, as a bias in the queries' dtype; the memory-efficient kernel is counted",
        "measured: attention.json.gz, mask",
        lambda f: f.masked and f.recipe.attention == "sdpa",
        (Instant.LOSS_BACKWARD, *LAYERS),
        lambda f: 2 * f.recipe.batch * f.seq_len * f.seq_len + cudnn_workspace(f),
        missing=lambda f: [2 * f.recipe.batch * f.seq_len * f.seq_len, f.heads_bytes(f.model.attention.heads)],
        extra=efficient_blocks,
    ),
    Reason(
        "largest score of a row",
        "(b, H, s) pairs of 8-byte numbers",
        "attention with sinks takes the largest score of every row with its place",
        "measured: frames of the events, Tensor.max",
        lambda f: f.model.attention.sinks and f.recipe.attention == "eager",
        missing=lambda f: [16 * f.scores // f.seq_len],
    ),
    Reason(
        "order of casts",
        "queries (b, H, s, e) and keys (b, G, s, e) bfloat16, and their gradients in float32",
        "autocast casts attention's arguments in the order in which C++ evaluates them; the trace from the first to the last",
        "measured: frames of the events; ATen/autocast_mode.h",
        lambda f: f.recipe.precision == "mixed",
        missing=lambda f: [n * f.heads_bytes(heads) for n in (1, 2) for heads in f.heads],
        extra=lambda f: [n * f.heads_bytes(heads) for n in (1, 2) for heads in f.heads],
    ),
    Reason(
        "partial sums of Adafactor's means",
        "(128 x blocks, width) float32; 264,241,152 bytes for a table of 128,256 by 4,096",
        "it takes means over rows and over columns of every weight's squared gradient",
        "from source: aten/native/cuda/Reduce.cuh; the table's measured: it has more bytes than 32 bits address, and is reduced in pieces",
        lambda f: f.recipe.optimizer == "adafactor",
        missing=lambda f: [264_241_152, *(sum_buffer(rows, width) for rows in f.widths for width in f.widths)],
    ),
    Reason(
        "Gemma-2's attention",
        "keys and values of every query head, a copy of the keys, in every layer; masks (b, 1, s, s)",
        f"it runs sdpa with transformers {TRANSFORMERS}, and flash attention with 5.23, which is counted",
        "from source: transformers' models/gemma2/modeling_gemma2.py of both releases",
        lambda f: f.model.model_type == "gemma2" and (f.against == FORMULA or f.transformers != TRANSFORMERS),
        (*PASSES, Instant.EMBEDDING),
        lambda f: (
            f.layers_alive * repeated(f)
            + 4 * f.recipe.batch * f.seq_len * f.seq_len
            + cudnn_workspace(f, f.model.attention.heads)
        ),
        missing=lambda f: [
            *map(f.heads_bytes, f.heads),
            *(n * f.recipe.batch * f.seq_len * f.seq_len for n in (1, 2)),
        ],
        extra=lambda f: [f.heads_bytes(f.model.attention.kv_heads), *flash_workspace(f)],
        of_release=True,
    ),
    Reason(
        "masked results of experts",
        "(tokens x experts that each visits, width) bfloat16",
        f"transformers {TRANSFORMERS} sets what experts elsewhere would give to zero, in a copy, on one GPU as well; 5.23 with "
        "expert parallelism only",
        "from source: transformers' integrations/moe.py of both releases, grouped_mm_experts_forward",
        lambda f: f.model.experts is not None and f.transformers != TRANSFORMERS,
        missing=lambda f: [2 * visits(f) * n for n in (f.model.hidden, *f.widths)],
        of_release=True,
    ),
    Reason(
        "order of visits",
        "the sort's buffers; the router's probabilities (tokens, experts) float32, in backward",
        "tokens are sorted by expert",
        "measured: frames of the events",
        lambda f: f.model.experts is not None,
        missing=lambda f: [*range(16 * visits(f), 18 * visits(f), 512), 4 * f.rows * f.model.experts.number],
    ),
    Reason(
        "columns of outliers",
        "(b, s, I) float16 or bfloat16, in every layer",
        "bitsandbytes' 8-bit product holds a copy in 16 bits of the columns with values from 6 on, whatever checkpointing says: nearly all "
        "of what goes into the down product, with random weights; which they are depends on values",
        "from source: bitsandbytes autograd/_functions.py, MatMul8bitLt.forward, subA; measured: int8-8bL4's events",
        lambda f: f.recipe.quantize == "int8",
        ALL,
        lambda f: (len(f.model.layer_kinds) + 3) * 2 * f.rows * (f.model.mlp.width if f.model.mlp is not None else 0),
    ),
    Reason(
        "saved tensors in transfer",
        "layer inputs (b, s, d)",
        "the GPU let two go while the forward pass ended, as their copies to CPU RAM were through; both are counted until as many more have "
        "been saved, which is as long as they may stay",
        "from source: trl models/activation_offloading.py, OffloadActivations, fwd_stash",
        lambda f: f.recipe.offload == "saved-tensors",
        FORWARD,
        lambda f: 2 * f.rows * f.model.hidden * f.number_bytes,
        is_less=True,
    ),
    Reason(
        "rests of blocks",
        "up to 1 MiB with each tensor of more than 1 MiB",
        "without expandable segments a free block is given whole where no more than 1 MiB of it would be left over, and counts as allocated",
        "from source: c10/cuda/CUDACachingAllocator.cpp, should_split; allocator.py has it",
        lambda f: not f.expandable,
        ALL,
        lambda f: MIB * 16 * len(f.model.layer_kinds),
    ),
)


_RELEASE = f"its code differs between transformers {TRANSFORMERS}, whose trace is exact, and the release that is traced"
_BIASES = "partial sums of the biases' gradients, and cublasLt's workspaces"
_COPY = "copy of attention's output, as above: part of each head is rotated"
OTHER_FAMILIES = {
    "mamba2": _RELEASE,
    "bamba": _RELEASE,
    "nemotron_h": _RELEASE,
    "gemma4_text": _RELEASE,
    "qwen3_5_text": _RELEASE,
    "qwen3_next": f"{_RELEASE}; {_COPY}",
}
"""Families by trace alone, measured on the H100: what is off by more than 0.1% at some instant of the trace, and why."""
OTHER_SCAN = ("mamba2", "nemotron_h")
"""Of these, code that differs between releases is Mamba-2's scan, most of a step: allocations do not follow each other at all."""
