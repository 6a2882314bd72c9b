"""A recipe: how one trains. One validated object, readable from and writable to JSON, and the named strategies."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from math import lcm
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .. import files
from ..errors import RecipeError, did_you_mean, quoted
from .kernels import KERNELS, SDPA, attentions
from .losses import LOSSES
from .mixer_packages import kernels_in_words
from .optimizers import OPTIMIZERS

REGISTRIES: dict[str, Callable[[], list[str]]] = {
    "optimizer": lambda: list(OPTIMIZERS),
    "loss": lambda: list(LOSSES),
    "attention": attentions,
}
"""Fields whose values are the names of what is registered."""
_EIGHT_BIT = [name for name, each in OPTIMIZERS.items() if each.keeps_fp32_for_embeddings]
ChunkCount = Literal["auto"] | int
CHUNK_FIELDS = ("mlp_chunks", "loss_chunks", "attention_groups")
"""Fields that can be left open, in the order of `steps.Chunks`."""
EVERY_NTH = "^every-[1-9][0-9]{0,4}$"
Pattern = Annotated[str, Field(min_length=1, max_length=200)]
Patterns = Annotated[tuple[Pattern, ...], Field(max_length=100, strict=False)]
_LARGEST_FILE = 1_000_000  # bytes; a recipe has some hundred


OF_ZERO = ("reduce_bucket_size", "overlap_comm")
"""Fields that mean something under ZeRO alone."""
OF_ZERO_3 = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "sub_group_size",
)
"""Those that do under its stage 3."""


class Recipe(BaseModel):
    """Recipe by which a model is fine-tuned, as the step model sees it. `print` shows the fields that are not as usual."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    precision: Literal["bf16", "mixed", "fp32"] = "bf16"
    """bf16: weights, gradients and moments in bf16. mixed: fp32 weights under bf16 autocast. fp32: fp32 throughout."""
    autocast: bool = False
    """bf16 autocast over whatever dtype the weights have, as Trainer's bf16=True; mixed has it in any case. Under fsdp accelerate makes of it a
    MixedPrecisionPolicy, which gathers weights in bf16: frozen ones as they are, beside adapters in fp32."""
    optimizer: str = "adamw"
    """One of `optimizers.OPTIMIZERS`: adamw and sgd (torch's), adafactor (transformers'), adamw-8bit, paged-adamw-8bit,
    paged-adamw, lion and lion-8bit (bitsandbytes'), adamw-8bit-torchao and adamw-4bit (torchao's), muon (torch's, with adamw for
    embeddings, head and what is no matrix)."""
    adamw_kernel: Literal["foreach", "fused", "for-loop"] = "fused"
    """How torch's AdamW steps: fused, as transformers' Trainer, TRL and Axolotl run it; foreach, torch's own default, makes a temporary
    as large as the weights."""
    fp32_embedding_states: bool = False
    """States of embeddings in fp32, though those of other weights are in 8 bits: so transformers' Trainer has bitsandbytes keep them."""
    optimizer_in_backward: bool = False
    """Step each weight as soon as its gradient is made, then free the gradient."""
    optimizer_on_host: bool = False
    """Optimizer states and step on the host; gradients travel there, updated weights back."""
    weights_on_host: bool = False
    """Weights on the host as well, gathered layer by layer (ZeRO-3 parameter offload); needs optimizer_on_host."""
    accumulation: int = Field(default=1, ge=1, le=1_000_000)
    """Micro-batches per optimizer step; beyond 1, gradients exist during every forward."""
    batch: int = Field(default=1, ge=1, le=1_000_000)
    """Sequences per micro-batch."""
    pad_to: int = Field(default=1, ge=1, le=1_000_000)
    """Tokens that batches are padded to a multiple of (a collator's pad_to_multiple_of)."""
    checkpoint: (
        Literal["none", "layer", "reentrant", "sqrt", "selective", "children"]
        | Annotated[str, Field(pattern=EVERY_NTH)]
        | int
    ) = "none"
    """Checkpointing: none, every layer, every layer by torch's older way (reentrant: use_reentrant=True, transformers' default before 5, which keeps
    a layer's output and the gradient that came in until its backward is done), every sqrt(L) layers, every k layers together (an integer), each
    layer but for its attention's output (selective), each n-th layer while the others keep everything (every-n, transformers' every_n_layers),
    or each module of a layer by itself, norms, attention and MLP (children, as accelerate's FSDP2 did before August 2026)."""
    mlp_chunks: ChunkCount = 1
    """Pieces of the sequence the MLP runs over; "auto": as recommended for model, card and length."""
    mlp_recompute: bool = False
    """Recompute each MLP chunk by itself in backward, so that its intermediates live for one chunk in both passes."""
    layer_in_chunks: bool = False
    """The pieces are of a whole layer but for attention itself, each recomputed by itself in backward; needs mlp_recompute."""
    attention_groups: ChunkCount = 1
    """Groups of heads that attention runs over one after the other, where the layer runs in chunks; "auto": as recommended."""
    attention_on_host: bool = False
    """Where layers run in chunks: queries, keys, values and attention's results wait in CPU RAM, and are on the GPU for a group of heads
    at a time."""
    loss_chunks: ChunkCount = 1
    """Pieces for the LM head and the chunked loss; "auto": as recommended."""
    loss: str = "transformers"
    """One of `losses.LOSSES`: the loss of current transformers, those of releases before 4.49 and before 4.45 (one more fp32 copy of the
    logits, in forward or in both passes), MsT's (chunked), or one that is fused with the LM head: liger (Liger's), cce (cut
    cross-entropy), trl (TRL's, from 1.15 on)."""
    offload: Literal["none", "layer-inputs", "saved-tensors"] = "none"
    """What is kept in CPU RAM between forward and backward: layer-inputs: those of checkpointed layers. saved-tensors: all that autograd
    saves, as TRL's activation_offloading does it."""
    kernels: Literal["torch", "liger", "fla", "causal-conv1d", "fla+causal-conv1d", "mamba-ssm"] = "torch"
    """torch: the operations of the model's own code. liger: Liger's kernels for RMSNorm, rotary embedding and SwiGLU or GeGLU. Packages that
    transformers calls where they are installed: fla (flash-linear-attention's gated delta rule), causal-conv1d (short convolutions), or both;
    mamba-ssm (Mamba-2, with causal-conv1d)."""
    max_grad_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Gradients are scaled down to this norm before the optimizer steps; None: they are not."""
    lora_rank: int = Field(default=0, ge=0, le=65_536)
    """Rank of LoRA adapters (peft's); 0: none. With them the model's own weights are frozen."""
    lora_targets: Patterns = ("all-linear",)
    """Modules that get an adapter: all-linear (every linear layer but the head), attention, or names such as q_proj."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, allow_inf_nan=False)
    """Dropout of an adapter's input."""
    lora_modules_to_save: Patterns = ()
    """Modules that are trained whole, in a copy beside the frozen one (peft's modules_to_save): embed_tokens, lm_head."""
    dora: bool = False
    """Adapters with a magnitude (peft's use_dora)."""
    adapter_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of adapters: fp32 is peft's default, whatever the model's dtype."""
    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Linear layers' frozen weights, but for the head's, in 4 or 8 bits (bitsandbytes)."""
    double_quantize: bool = False
    """The scales of 4-bit weights are quantised, too."""
    quant_storage: Literal["uint8", "bf16", "fp32"] = "uint8"
    """Dtype that the bytes of 4-bit weights pass for (bnb_4bit_quant_storage): bytes, as bitsandbytes has it, which FSDP leaves whole on every
    card; or a dtype of numbers, that it shards them as it does other weights. Scales are whole in any case."""
    kbit_preparation: bool = False
    """peft's prepare_model_for_kbit_training: all that is not quantised in fp32."""
    packing: int = Field(default=1, ge=1, le=1_000_000)
    """Samples that a row of the batch is made of, told apart in attention."""
    padding_free: bool = False
    """All samples of a batch in one row, without padding."""
    images: int = Field(default=0, ge=0, le=100_000)
    """Images in each sequence, of a model that reads images; 0: text alone, and its towers wait."""
    image_tokens: int | None = Field(default=None, ge=1, le=1 << 24)
    """Tokens that each image takes; None: as many as the family's rule says."""
    image_size: str = Field(default="", pattern="^([1-9][0-9]{0,4}x[1-9][0-9]{0,4})?$")
    """Height and width of each image in pixels (896x896), in place of image_tokens."""
    attention: str = "sdpa"
    """One of `kernels.attentions()`: sdpa (the kernel that torch chooses, explicit masks for sliding windows), cudnn or efficient (sdpa with
    that kernel only), flash (attn_implementation flash_attention_2), or eager."""
    train: Patterns = ()
    """The weights that are trained, by patterns over their names or words (`selection.py`); none: all of them."""
    freeze: Patterns = ()
    """Weights that are not."""
    input_gradients: bool = False
    """Backward goes down to the embeddings' output even where nothing below is trained: transformers' enable_input_require_grads,
    which its gradient_checkpointing_enable and peft call. `minisequence` does without."""
    gpus: int = Field(default=1, ge=1, le=65_536)
    """Cards that train together, each with `batch` sequences of its own."""
    sharding: Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp1"] = "none"
    """fsdp: weights, gradients and optimizer states in shards over all cards, each decoder layer gathered while it runs
    (PyTorch's fully_shard of every layer, then of the model; ZeRO-3). mixed is then its MixedPrecisionPolicy: fp32 shards,
    gathered in bf16, gradients reduced in fp32, and no autocast. fsdp1: the same by FullyShardedDataParallel, torch's FSDP1, whose groups are one
    flat tensor each. zero1, zero2: DeepSpeed's ZeRO of stages 1 and 2: bf16 weights whole on each card,
    fp32 weights and optimizer states in partitions, in stage 2 gradients too. zero3: its stage 3, weights in parts as well, with DeepSpeed's own buffers."""
    reduce_bucket_size: Literal["auto"] | int = 500_000_000
    """Values in the bucket in which zero1, zero2 and zero3 sum gradients (DeepSpeed's reduce_bucket_size, whose default this is); auto: the hidden size
    squared, as transformers fills it in."""
    overlap_comm: bool = False
    """zero1 and zero2 reduce while backward goes on, with two buckets (DeepSpeed's overlap_comm). zero3 does so as it comes, with one."""
    prefetch_bucket_size: Literal["auto"] | int = 50_000_000
    """Values that zero3 gathers ahead at a time (DeepSpeed's stage3_prefetch_bucket_size, whose default this is); auto: nine tenths of the hidden size
    squared, as transformers fills it in."""
    param_persistence_threshold: Literal["auto"] | int = 100_000
    """Weights of at most so many values are whole on each card between steps of zero3 (DeepSpeed's stage3_param_persistence_threshold, whose default
    this is); auto: ten times the hidden size, as transformers fills it in."""
    max_live_parameters: int = 1_000_000_000
    """Gathered values from which zero3 gathers no more ahead (DeepSpeed's stage3_max_live_parameters, whose default this is)."""
    max_reuse_distance: int = 1_000_000_000
    """zero3 keeps weights gathered that are used again within so many values (DeepSpeed's stage3_max_reuse_distance, whose default this is)."""
    sub_group_size: int = 1_000_000_000
    """Values of a card's part of the weights that zero3's optimizer steps at a time (DeepSpeed's sub_group_size, whose default this is)."""
    backward_prefetch: Literal["pre", "none"] = "pre"
    """Whether fsdp1 gathers the group before while backward runs one (BACKWARD_PRE, torch's own choice and that of accelerate's questionnaire),
    or each when it is asked for (NO_PREFETCH, which transformers' Trainer has where fsdp_config does not say)."""
    use_orig_params: bool = False
    """fsdp1's optimizer steps views of each weight (use_orig_params=True, which transformers' Trainer has where fsdp_config does not say), not
    flat ones: each begins at 16 bytes in the flat tensor, and peft finds adapters in the dtype of their shards."""
    sync_each_batch: bool = False
    """With accumulation fsdp scatters the gradients of each micro-batch (accelerate's gradient_accumulation_kwargs). Without it, as in
    accelerate and transformers' Trainer, whole gradients of all weights stay on every card until the last micro-batch scatters them."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which fsdp sums gradients under `mixed` or `autocast`: fp32, or bf16 as accelerate's mixed_precision bf16 has it."""
    replicas: int = Field(default=1, ge=1, le=65_536)
    """Groups of cards that hold the same shards under fsdp (hybrid sharding, HSDP): weights are in shards over gpus / replicas cards."""
    gpus_per_node: int = Field(default=8, ge=1, le=65_536)
    """Cards of a machine, whose processes share its CPU RAM."""
    sequence_parallel: int = Field(default=1, ge=1, le=65_536)
    """Cards that share each sequence (DeepSpeed's Ulysses, ALST): each has its part of the tokens, and in attention its part of the heads.
    Lengths are those of whole sequences, padded to a multiple of it; micro-batches are those of so many cards together."""
    context_parallel: int = Field(default=1, ge=1, le=65_536)
    """Cards that share each sequence in a ring (torch's context_parallel, accelerate's cp_size): each has its part of the tokens, and keys and
    values come round. Lengths are those of whole sequences, padded to a multiple of twice it, for each has a piece of the head and one of the tail."""
    tensor_parallel: int = Field(default=1, ge=1, le=65_536)
    """Cards that split every matrix (transformers' tp_plan="auto"): each has its part of the heads, of the MLP's width and of the vocabulary, and
    all tokens."""
    sequence_parallel_norms: bool = False
    """Cards that split matrices share out the tokens of norms and of hidden states between layers (Megatron's sequence parallelism, torch's
    SequenceParallel as torchtitan plans it). Lengths are padded to a multiple of tensor_parallel."""
    loss_parallel: bool = False
    """Beside sequence_parallel_norms the loss is computed of each card's part of the vocabulary (torch's loss_parallel), and no card has all logits."""
    expert_parallel: int = Field(default=1, ge=1, le=65_536)
    """Cards that share out the experts of every layer (transformers' ep_size): each has whole experts, its part of them, and is sent the tokens that
    are routed to these. Under fsdp, whose cards are the same ones; experts are in shards over gpus / expert_parallel cards."""
    expert_imbalance: float = Field(default=1.0, ge=1.0, le=65_536.0, allow_inf_nan=False)
    """Under expert_parallel how many times the rows of an even router the planned card receives: 1 where the router shares tokens out evenly, at most
    expert_parallel, where all choose the experts of one card."""
    rotate_method: Literal["allgather", "alltoall"] = "allgather"
    """How keys and values come round under context_parallel (torch's set_rotate_method, accelerate's cp_comm_strategy): allgather, torch's own
    choice, has those of all cards at once; alltoall those of one card more at a time."""

    if not TYPE_CHECKING:  # type checkers know the fields better than this signature does

        def __init__(self, **fields: object) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as e:
                raise RecipeError(first_problem(e)) from None

        __init__.__pydantic_base_init__ = True  # so that model_validate, which raises ValidationError, does not come by

    @model_validator(mode="before")
    @classmethod
    def _rename_older(cls, data: Any) -> Any:
        """Recipes of before 0.9 say offload_layer_inputs, yes or no."""
        if not isinstance(data, dict) or "offload_layer_inputs" not in data:
            return data
        data = dict(data)
        moved = data.pop("offload_layer_inputs")
        if not isinstance(moved, bool):
            raise ValueError(f"offload_layer_inputs: must be true or false (got {quoted(moved)})")
        return {**data, "offload": "layer-inputs"} if moved else data

    def model_post_init(self, _context: object) -> None:
        for name, list_names in REGISTRIES.items():
            if getattr(self, name) not in (planned_names := list_names()):
                from . import names

                raise ValueError(names.unknown_value(name, getattr(self, name), planned_names))
        for name in CHUNK_FIELDS:
            value = getattr(self, name)
            if value != "auto" and not 1 <= value <= 1 << 32:
                raise ValueError(f"{name}: {_MUST_BE[name]} (got {quoted(value)})")
        if not isinstance(self.checkpoint, str) and not 1 <= self.checkpoint <= 100_000:
            raise ValueError(f"checkpoint: {_MUST_BE['checkpoint']} (got {quoted(self.checkpoint)})")
        for bad, message in (
            (not self.loss_in_chunks and self.loss_chunks != 1, "loss_chunks needs loss='chunked' (--loss chunked)"),
            (
                self.layer_in_chunks and not self.mlp_recompute,
                "layers in chunks are recomputed chunk by chunk: leave mlp_recompute=False (--no-recompute) out",
            ),
            (
                self.layer_in_chunks and self.offload == "saved-tensors",
                "layers in chunks are not planned with offload='saved-tensors': offload layer-inputs, or take the strategy mst (-s mst)",
            ),
            (
                self.attention_groups != 1 and not self.layer_in_chunks,
                "attention_groups (--attention-groups) are of layers in chunks: take the strategy mst-layer (-s mst-layer)",
            ),
            (
                self.attention_on_host and not self.layer_in_chunks,
                "attention_on_host (--attention-on-host) is of layers in chunks: take the strategy mst-layer-offload (-s mst-layer-offload)",
            ),
            (
                self.checkpoint == "reentrant" and (self.layer_in_chunks or self.offload == "saved-tensors"),
                "reentrant checkpoints with layers in chunks or saved tensors in CPU RAM are not planned: set checkpoint='layer' (--checkpoint layer)",
            ),
            (
                self.attention_on_host and self.checkpoint != "layer",
                "attention_on_host (--attention-on-host) needs every layer checkpointed by itself: set checkpoint='layer' (--checkpoint layer)",
            ),
            (
                self.checkpoint == "children" and self.mlp_chunks != 1,
                "checkpoints of a layer's children leave nothing to run in chunks: set checkpoint='layer' (--checkpoint layer)",
            ),
            (
                self.offload_layer_inputs and not self.checkpoints_layers,
                "offload='layer-inputs' (--offload layer-inputs) needs checkpointing, or no inputs can move: set checkpoint='layer' (--checkpoint layer)",
            ),
            (
                self.optimizer_in_backward and self.accumulation > 1,
                "optimizer_in_backward uses up each gradient at once, so it cannot accumulate: set accumulation=1 (--accumulation 1)",
            ),
            (
                self.optimizer_in_backward and self.optimizer_on_host,
                "optimizer_in_backward and optimizer_on_host exclude each other: leave one of the two out",
            ),
            (
                self.optimizer_in_backward and self.max_grad_norm is not None,
                "max_grad_norm needs all gradients at once, and optimizer_in_backward lets each go: leave one of the two out",
            ),
            (
                self.fp32_embedding_states and not OPTIMIZERS[self.optimizer].keeps_fp32_for_embeddings,
                f"fp32_embedding_states needs states in 8 bits: set optimizer to {', '.join(_EIGHT_BIT[:-1])} or {_EIGHT_BIT[-1]}",
            ),
            (
                self.attention != SDPA and KERNELS[self.attention].sixteen_bit_only and self.runs_in_fp32,
                f"attention {self.attention} computes in bf16 or fp16 only: use precision bf16 or mixed, or autocast=True (--autocast)",
            ),
            (
                self.weights_on_host and not self.optimizer_on_host,
                "weights_on_host needs optimizer_on_host (--optimizer-on-host)",
            ),
            *self._bad_adapters(),
            (
                self.offload == "saved-tensors" and self.mlp_chunks != 1 and not self.mlp_recompute,
                "with saved tensors in CPU RAM each MLP chunk is recomputed by itself: leave mlp_recompute=False (--no-recompute) out",
            ),
            *self._bad_packing(),
            *self._bad_images(),
            *self._bad_tensor_parallel(),
            *self._bad_sharding(),
            *self._bad_sequence_parallel(),
            *self._bad_context_parallel(),
            *self._bad_expert_parallel(),
        ):
            if bad:
                raise ValueError(message)

    def _bad_adapters(self) -> tuple[tuple[bool, str], ...]:
        of_adapters = (
            "dora",
            "lora_targets",
            "lora_dropout",
            "lora_modules_to_save",
            "adapter_dtype",
            "kbit_preparation",
        )
        alone = "" if self.lora_rank else self._first_set(*of_adapters)
        on_head = {"lm_head", "embed_out", "output"} & set(self.lora_targets)
        why = (
            ""
            if self.loss in ("transformers", "transformers<4.49", "transformers<4.45")
            else f", and the loss {self.loss!r} never makes its logits"
        )
        return (
            (bool(alone), f"{alone} (--{alone.replace('_', '-')}) is of adapters: add lora_rank=16 (--lora 16)"),
            (
                self.quantize != "none" and not self.lora_rank,
                "quantised weights cannot be trained themselves: add adapters, lora_rank=16 (--lora 16)",
            ),
            (
                self.double_quantize and self.quantize not in ("nf4", "fp4"),
                "double_quantize is of 4-bit weights: add quantize='nf4' (--quantize nf4)",
            ),
            (
                self.quant_storage != "uint8" and self.quantize not in ("nf4", "fp4"),
                "quant_storage (--quant-storage) is of 4-bit weights: add quantize='nf4' (--quantize nf4)",
            ),
            (
                bool(on_head),
                f"no adapter is planned on the LM head{why}: train it whole, with lm_head in lora_modules_to_save (--lora-modules-to-save)",
            ),
            (
                bool(self.lora_rank) and self.weights_on_host and not self.sharded,
                "adapters with weights in CPU RAM are planned in shards alone: leave --weights-on-host out, or add --gpus 8 --sharding fsdp",
            ),
        )

    def _bad_packing(self) -> tuple[tuple[bool, str], ...]:
        return (
            (
                self.padding_free and self.attention != "flash",
                f"padding_free needs flash attention to tell samples apart, not {self.attention}: add attention='flash' (--attention flash)",
            ),
            (
                self.packing > 1 and self.attention == "flash" and self.batch > 1 and not self.padding_free,
                "flash attention tells samples apart in a batch of one row only: set batch=1 (--batch 1), or put all in one row, padding_free (--padding-free)",
            ),
        )

    def _bad_images(self) -> tuple[tuple[bool, str], ...]:
        alone = next((n for n in ("image_tokens", "image_size") if getattr(self, n) and not self.images), "")
        return (
            (bool(alone), f"{alone} (--{alone.replace('_', '-')}) is of images: add images=1 (--images 1)"),
            (
                bool(self.image_tokens and self.image_size),
                "image_tokens (--image-tokens) and image_size (--image-size) both say how large an image is: leave one of the two out",
            ),
            (
                bool(self.images) and (self.packing > 1 or self.padding_free),
                "images in packed samples are not planned: leave --packing and --padding-free out, or --images",
            ),
            (
                bool(self.images) and self.checkpoint == "reentrant",
                "images with reentrant checkpoints, which towers would have too, are not planned: set checkpoint='layer' (--checkpoint layer)",
            ),
            (
                bool(self.images) and (self.optimizer_on_host or self.weights_on_host),
                "images with weights or optimizer in CPU RAM are not planned: leave one of the two out",
            ),
            (
                bool(self.images) and self.sharding == "zero3",
                "images with zero3 are not planned: take sharding='fsdp' (--sharding fsdp), which shares weights out as well",
            ),
            (
                bool(self.images) and max(self.sharers, self.tensor_parallel, self.expert_parallel) > 1,
                "images with GPUs that share sequences, matrices or experts are not planned: share weights alone (--sharding fsdp), or leave images out",
            ),
        )

    def _bad_sharding(self) -> tuple[tuple[bool, str], ...]:
        alone = "" if self.sharded else self._first_set("sync_each_batch", "reduce_dtype", "replicas")
        if alone:
            message = f"{alone} ({option_of(alone)}) is of fsdp: add sharding='fsdp' (--sharding fsdp), or leave it out"
            return ((True, message),)
        if (alone := self._first_set("backward_prefetch", "use_orig_params")) and not self.flat:
            message = (
                f"{alone} ({option_of(alone)}) is of fsdp1: add sharding='fsdp1' (--sharding fsdp1), or leave it out"
            )
            return ((True, message),)
        of_stages = {"ZeRO": OF_ZERO if not self.zero_stage else (), "ZeRO-3": OF_ZERO_3 if self.zero_stage < 3 else ()}
        for stage, fields in of_stages.items():
            if alone := self._first_set(*fields):
                name = "zero3" if stage == "ZeRO-3" else "zero2"
                message = f"{alone} ({option_of(alone)}) is of {stage}: add sharding={name!r} (--sharding {name}), or leave it out"
                return ((True, message),)
        if self.sharding == "none":
            return (
                (
                    self.gpus > 1 and self.sharers == self.tensor_parallel == self.expert_parallel == 1,
                    (
                        "several gpus train in shards or each with all: add sharding='fsdp' (--sharding fsdp), "
                        "sharding='zero3' (--sharding zero3) or sharding='ddp' (--sharding ddp)"
                    ),
                ),
            )
        few = (
            self.gpus < 2,
            f"sharding={self.sharding!r} (--sharding {self.sharding}) needs 2 gpus or more: add gpus=8 (--gpus 8)",
        )
        if self.sharding == "ddp":
            return (
                few,
                (
                    self.optimizer_in_backward,
                    "ddp reduces gradients after backward, and optimizer_in_backward lets each go in it: leave one of the two out",
                ),
                (
                    self.optimizer_on_host or self.weights_on_host,
                    "ddp with weights or optimizer in CPU RAM is not planned",
                ),
            )
        if self.zero_stage:
            return (few, *self._bad_zero())
        optimizer = OPTIMIZERS[self.optimizer]
        stepping = " or ".join(name for name, each in OPTIMIZERS.items() if not each.no_shards)
        sharing = self.gpus // self.tensor_parallel
        sharers = "gpus" if self.tensor_parallel == 1 else f"groups of {self.tensor_parallel:,} gpus"
        return (
            few,
            (
                sharing % self.replicas != 0 or self.shards < 2,
                f"{self.replicas:,} replicas of {sharing:,} {sharers} leave no whole number of 2 or more for shards: {_replicas_that_do(sharing)}",
            ),
            (
                self.offload == "saved-tensors",
                "fsdp with saved tensors in CPU RAM is not planned: set offload='layer-inputs' (--offload layer-inputs)",
            ),
            (
                self.checkpoint == "sqrt" or (isinstance(self.checkpoint, int) and self.checkpoint > 1),
                "fsdp gathers one layer at a time, so a checkpoint cannot span several: set checkpoint='layer' (--checkpoint layer)",
            ),
            (
                bool(optimizer.no_shards),
                f"{optimizer.label} cannot step fsdp's shards, for {optimizer.no_shards}: use {stepping}",
            ),
            (
                self.optimizer_on_host and not self.weights_on_host,
                "fsdp moves weights, gradients and optimizer to CPU RAM together (CPUOffloadPolicy): add weights_on_host (--weights-on-host)",
            ),
            (
                self.reduce_dtype == "bf16" and not self.gathers_in_bf16,
                "reduce_dtype is of fp32 shards: add precision='mixed' (--precision mixed), or leave it out",
            ),
            *self._bad_adapters_in_shards(),
            *(self._bad_flat_shards() if self.flat else ()),
        )

    def _bad_adapters_in_shards(self) -> tuple[tuple[bool, str], ...]:
        return (
            (
                self.autocast and not self.lora_rank,
                "fsdp has no autocast: of bf16=True accelerate makes a MixedPrecisionPolicy over fp32 shards, precision='mixed' (--precision mixed)",
            ),
            (
                self.gathers_in_bf16
                and bool(self.lora_rank)
                and self.adapter_dtype == "bf16"
                and (self.quantize == "none" or self.flat),
                "under mixed precision accelerate keeps what fsdp trains in fp32: leave --adapter-dtype bf16 out, or --autocast",
            ),
            (
                bool(self.lora_modules_to_save),
                "fsdp with copies of modules beside adapters is not planned: leave --lora-modules-to-save out",
            ),
            (
                self.quantize != "none" and self.quant_storage == "uint8" and self.weights_on_host,
                "fsdp leaves 4-bit weights in bytes whole on each card: add quant_storage='bf16' (--quant-storage bf16), or leave --weights-on-host out",
            ),
            (
                self.quant_storage == "fp32" and self.gathers_in_bf16,
                "fsdp's mixed precision casts 4-bit weights stored in fp32 as if they were numbers: set quant_storage='bf16' (--quant-storage bf16)",
            ),
            (
                self.quantize == "int8",
                "fsdp with int8 weights is not planned, for bitsandbytes' scales are no parameters: use nf4 (--quantize nf4)",
            ),
        )

    def _bad_flat_shards(self) -> tuple[tuple[bool, str], ...]:
        take = "take sharding='fsdp' (--sharding fsdp), FSDP2"
        return (
            (
                self.mlp_chunks != 1 or self.layer_in_chunks or self.loss_in_chunks,
                f"fsdp1's weights are views of flat ones, which pieces of the sequence do not serve: {take}",
            ),
            (
                self.checkpoint not in ("none", "layer", "reentrant", 1) or self.offload != "none",
                "fsdp1 is planned with every layer checkpointed, also reentrant, or none: set checkpoint='layer' (--checkpoint layer), leave --offload out",
            ),
            (
                bool(self.train or self.freeze or self.images),
                f"fsdp1 with a part of the weights or images is not planned: {take}",
            ),
            (
                self.dora,
                f"fsdp1 with DoRA is not planned: leave --dora out, or {take}",
            ),
            (
                self.use_orig_params and self.sync_each_batch,
                "fsdp1 with views of weights and gradients scattered in each micro-batch is not planned: leave --use-orig-params or --sync-each-batch out",
            ),
            (
                self.quantize != "none" and self.quant_storage == "uint8",
                "fsdp1 cannot join bytes with other weights ('Cannot flatten integer dtype tensors'): add quant_storage='bf16' (--quant-storage bf16)",
            ),
            (
                self.replicas > 1 or self.weights_on_host or self.optimizer_in_backward,
                f"fsdp1 with replicas, weights in CPU RAM or an optimizer that steps in backward is not planned: {take}",
            ),
            (
                self.sharers > 1 or self.tensor_parallel > 1,
                f"fsdp1 with sequences or matrices over several GPUs is not planned: {take}",
            ),
        )

    def _bad_zero(self) -> tuple[tuple[bool, str], ...]:
        bucket, name = self.reduce_bucket_size, self.sharding
        return (
            (
                bucket != "auto" and not 1 <= bucket <= 1 << 40,
                f"reduce_bucket_size: must be 'auto' or a whole number from 1 (got {quoted(bucket)})",
            ),
            *(self._bad_zero_3() if self.zero_stage == 3 else ()),
            (
                self.precision != "bf16" or self.autocast,
                f"{name} is planned with bf16 weights, fp32 ones in its optimizer: set precision='bf16' (--precision bf16), leave autocast (--autocast) out",
            ),
            (
                self.optimizer not in ("adamw", "sgd"),
                f"{name} steps a flat part of the weights, planned with adamw or sgd: use --optimizer adamw",
            ),
            (
                self.optimizer_in_backward,
                f"{name} steps when all gradients are summed, and optimizer_in_backward lets each go: leave one of the two out",
            ),
            (
                self.weights_on_host and self.zero_stage < 3,
                f"{name} has all weights on each card: leave weights_on_host (--weights-on-host) out, or take sharding='fsdp' (--sharding fsdp)",
            ),
            (
                self.context_parallel > 1,
                f"{name} and a ring do not go together, accelerate runs rings with FSDP2: take sharding='fsdp' (--sharding fsdp), or --sequence-parallel",
            ),
            (
                self.dora,
                f"{name} with DoRA is not planned: leave --dora out, or take sharding='ddp' (--sharding ddp)",
            ),
            (
                self.quantize == "int8",
                f"{name} with int8 weights is not planned: use nf4 (--quantize nf4)",
            ),
            (
                self.kbit_preparation,
                f"{name} has DeepSpeed cast all weights to bf16, those that kbit preparation made fp32 as well: leave --kbit-preparation out",
            ),
            (
                self.quant_storage == "fp32",
                f"{name} has DeepSpeed cast 4-bit weights stored in fp32 to bf16, as if they were numbers: set quant_storage='bf16' (--quant-storage bf16)",
            ),
        )

    def _bad_zero_3(self) -> tuple[tuple[bool, str], ...]:
        sizes = {name: getattr(self, name) for name in OF_ZERO_3}
        wrong = next((name for name, size in sizes.items() if size != "auto" and not 0 <= size <= 1 << 40), "")
        is_part = bool(self.lora_rank or self.train or self.freeze)
        return (
            (
                bool(wrong),
                f"{wrong}: {_MUST_BE.get(wrong, 'must be a whole number from 0')} (got {quoted(sizes.get(wrong))})",
            ),
            (
                self.checkpoint not in ("none", "layer", "reentrant"),
                "zero3 is planned with every layer checkpointed by itself, or none: set checkpoint='layer' (--checkpoint layer)",
            ),
            (
                self.offload == "saved-tensors",
                "zero3 with saved tensors in CPU RAM is not planned: set offload='layer-inputs' (--offload layer-inputs)",
            ),
            (
                self.layer_in_chunks,
                "zero3 with layers in pieces is not planned: take the strategy mst-offload (-s mst-offload)",
            ),
            (
                self.quantize in ("nf4", "fp4") and self.quant_storage == "uint8",
                "zero3 with 4-bit weights in bytes is not planned: set quant_storage='bf16' (--quant-storage bf16), as peft says",
            ),
            (
                bool(self.lora_modules_to_save),
                "zero3 with copies of modules beside adapters is not planned: leave --lora-modules-to-save out, or take zero2 (--sharding zero2)",
            ),
            (
                is_part and (self.mlp_chunks != 1 or self.loss_in_chunks),
                "zero3 with adapters or frozen weights is not planned in pieces: use strategy checkpointing (-s checkpointing), with --loss liger, or zero2",
            ),
            (
                is_part and self.weights_on_host,
                "zero3 with frozen weights in CPU RAM is not planned: leave weights_on_host (--weights-on-host) out, or take sharding='fsdp' (--sharding fsdp)",
            ),
        )

    def _bad_sequence_parallel(self) -> tuple[tuple[bool, str], ...]:
        ranks = self.sequence_parallel
        if ranks == 1:
            return ()
        option = f"sequence_parallel={ranks} (--sequence-parallel {ranks})"
        return (
            (self.gpus % ranks != 0, f"{option} {self._divides_no_gpus(ranks, '--sequence-parallel')}"),
            (
                self.attention == "eager",
                f"{option} with eager attention is refused by DeepSpeed, for its mask: use sdpa or flash (--attention)",
            ),
            (
                self.samples_in_row > 1 and self.attention != "flash",
                f"{option} with several samples in a row needs flash attention, for all else is given a mask: add attention='flash' (--attention flash)",
            ),
        )

    def _bad_context_parallel(self) -> tuple[tuple[bool, str], ...]:
        ranks = self.context_parallel
        if ranks == 1:
            alone = self.rotate_method != "allgather"
            return (
                (alone, "rotate_method (--rotate-method) is of a ring: add context_parallel=8 (--context-parallel 8)"),
            )
        option = f"context_parallel={ranks} (--context-parallel {ranks})"
        return (
            (
                self.sequence_parallel > 1,
                f"{option} and sequence_parallel={self.sequence_parallel} (--sequence-parallel) both share sequences out: leave one of the two out",
            ),
            (self.gpus % ranks != 0, f"{option} {self._divides_no_gpus(ranks, '--context-parallel')}"),
            (
                self.attention not in (SDPA, "cudnn"),
                f"{option} with {self.attention} attention is not planned, torch's ring takes sdpa with cuDNN's or flash kernel: use sdpa (--attention sdpa)",
            ),
            (
                self.samples_in_row > 1,
                f"{option} with several samples in a row is refused by torch, for their mask: leave --packing and --padding-free out",
            ),
            (
                self.attention_on_host,
                f"{option} with attention from CPU RAM is not planned: leave --attention-on-host out",
            ),
            (
                self.offload == "saved-tensors",
                f"{option} with saved tensors in CPU RAM is not planned: set offload='layer-inputs' (--offload layer-inputs)",
            ),
            (
                bool(self.images),
                f"{option} with images is not planned: leave one of the two out",
            ),
        )

    def _bad_tensor_parallel(self) -> tuple[tuple[bool, str], ...]:
        ranks = self.tensor_parallel
        if ranks == 1:
            alone = "loss_parallel" if self.loss_parallel else "sequence_parallel_norms"
            return (
                (
                    self.sequence_parallel_norms or self.loss_parallel,
                    f"{alone} (--{alone.replace('_', '-')}) is of GPUs that split matrices: add tensor_parallel=8 (--tensor-parallel 8)",
                ),
            )
        option = f"tensor_parallel={ranks} (--tensor-parallel {ranks})"
        other = self._first_set("loss", *(name for name in _OF_OTHER_STEPS if name not in _BESIDE_SPLITS))
        other = other or ("offload" if self.offload == "saved-tensors" else "")
        return (
            (
                self.loss_parallel and not self.sequence_parallel_norms,
                "loss_parallel (--loss-parallel) is planned where norms share out tokens: add sequence_parallel_norms=True (--sequence-parallel-norms)",
            ),
            (
                self.sharers > 1,
                f"{option} beside GPUs that share sequences is not planned: leave one of the two out",
            ),
            (self.gpus % ranks != 0, f"{option} {self._divides_no_gpus(ranks, '--tensor-parallel')}"),
            (
                self.gpus != ranks and self.sharding == "none",
                f"{option} of {self.gpus} gpus leaves {self.gpus // ranks} copies of the model: add sharding='fsdp' (--sharding fsdp), or --gpus {ranks}",
            ),
            (
                self.gpus == ranks and self.sharding != "none",
                f"{option} of {self.gpus} gpus leaves none to share weights: add --gpus {2 * ranks}, or leave --sharding out",
            ),
            (
                self.sharding == "ddp",
                f"{option} beside ddp does not run, torch's DistributedDataParallel refuses split matrices: take sharding='fsdp' (--sharding fsdp)",
            ),
            (
                self.sharding not in ("none", "fsdp"),
                f"{option} with {self._given('sharding')} is not planned: take --sharding fsdp, or leave it out",
            ),
            (
                bool(other),
                f"{option} with {self._given(other)} is not planned: leave it out (strategies no-checkpointing and checkpointing)",
            ),
            (
                self.checkpoint in ("sqrt", "children") or isinstance(self.checkpoint, int),
                f"{option} with {self._given('checkpoint')} is not planned: set checkpoint='layer' (--checkpoint layer)",
            ),
            (
                self.attention not in (SDPA, "cudnn"),
                f"{option} with {self.attention} attention is not planned: use sdpa (--attention sdpa)",
            ),
        )

    def _given(self, field: str) -> str:
        """A field as it is, in the words of Python and of the command line: packing=4 (--packing 4)."""
        if not field:
            return ""
        words = ["-s", "mst-layer"] if field == "layer_in_chunks" else words_of(self, [field])
        return f"{field}={getattr(self, field)!r} ({shlex.join(words)})"

    def _first_set(self, *fields: str) -> str:
        """The first of the fields that is not as it comes; "": all are."""
        usual = Recipe.model_fields
        return next((name for name in fields if getattr(self, name) != usual[name].default), "")

    def _bad_expert_parallel(self) -> tuple[tuple[bool, str], ...]:
        ranks, most = self.expert_parallel, self.expert_imbalance
        if ranks == 1:
            alone = most != 1
            return (
                (
                    alone,
                    "expert_imbalance (--expert-imbalance) is of experts over several GPUs: add expert_parallel=8 (--expert-parallel 8)",
                ),
            )
        option = f"expert_parallel={ranks} (--expert-parallel {ranks})"
        refused = [name for name in _OF_OTHER_STEPS if name not in _BESIDE_EXPERTS]
        other = "sharding" if self.sharding != "fsdp" else self._first_set("replicas", "reduce_dtype", *refused)
        other = other or ("offload" if self.offload == "saved-tensors" else "")
        beside = ""
        if self.lora_rank:
            beside = "precision" if self.precision == "mixed" else self._first_set(*_NOT_BESIDE_WHOLE_ADAPTERS)
        return (
            (
                other == "sharding",
                f"{option} is planned as transformers trains it, with all other weights in shards: add sharding='fsdp' (--sharding fsdp)",
            ),
            (self.gpus % ranks != 0, f"{option} {self._divides_no_gpus(ranks, '--expert-parallel', more=False)}"),
            (
                most > ranks,
                f"expert_imbalance={most:g} (--expert-imbalance {most:g}) is more than {ranks} GPUs can send one: set it to {ranks} or less",
            ),
            (
                self.sharers > 1 or self.tensor_parallel > 1,
                f"{option} beside GPUs that share sequences or split matrices is not planned: leave one of the two out",
            ),
            (
                bool(other),
                f"{option} with {self._given(other)} is not planned: leave it out (strategies up to chunked-loss)",
            ),
            (
                bool(beside),
                f"{option} with adapters and {self._given(beside)} is not planned: leave it out",
            ),
            (
                self.checkpoint not in ("none", "layer"),
                f"{option} with other checkpoints than of each layer is not planned: set checkpoint='layer' (--checkpoint layer)",
            ),
            (
                self.optimizer not in ("adamw", "sgd") or self.adamw_kernel == "foreach",
                f"{option} is planned with one kernel over all weights of a mesh or one for each: use --optimizer adamw, --adamw-kernel fused",
            ),
        )

    def _divides_no_gpus(self, ranks: int, option: str, more: bool = True) -> str:
        """What is wrong with ranks that share, and the numbers that would do. more: so would more GPUs."""
        splits = option == "--tensor-parallel"
        least = 2 if splits and self.sharded else 1  # groups of ranks: weights are shared out among these
        numbers = [n for n in range(2, self.gpus // least + 1) if self.gpus % n == 0]
        gpus = ranks * max(least, -(-self.gpus // ranks))
        if splits and not self.sharded:  # one group of all
            numbers, gpus = [self.gpus] if self.gpus > 1 else [], ranks
        will_do = f"{option} {', '.join(map(str, numbers))}" if numbers else ""
        if will_do and not more:
            return f"does not divide {self.gpus} gpus: set {will_do}"
        return f"does not divide {self.gpus} gpus: add --gpus {gpus}{f' or {will_do}' if will_do else ''}"

    def __repr__(self) -> str:
        return f"Recipe({', '.join(f'{name}={value!r}' for name, value in self.unusual_fields())})"

    __str__ = __repr__

    def unusual_fields(self) -> list[tuple[str, Any]]:
        """Fields that are not as usual, with their values."""
        usual = ((name, field.default) for name, field in type(self).model_fields.items())
        return [(name, getattr(self, name)) for name, default in usual if getattr(self, name) != default]

    @property
    def sharded(self) -> bool:
        return self.sharding in ("fsdp", "fsdp1")

    @property
    def flat(self) -> bool:
        """Whether the weights of a group are one flat tensor (FSDP1)."""
        return self.sharding == "fsdp1"

    @property
    def divides_states(self) -> bool:
        """Whether each card holds a part of the optimizer's states, the smaller the more cards there are."""
        return self.sharded or self.zero_stage > 0

    @property
    def zero_stage(self) -> int:
        """Stage of DeepSpeed's ZeRO, whose partitions are counted: 1, 2 or 3; 0: it is not ZeRO."""
        return {"zero1": 1, "zero2": 2, "zero3": 3}.get(self.sharding, 0)

    def bucket_values(self, hidden: int) -> int:
        """Values in ZeRO's bucket of a model with so large hidden states (transformers/integrations/deepspeed.py, trainer_config_finalize)."""
        return hidden * hidden if self.reduce_bucket_size == "auto" else self.reduce_bucket_size

    def prefetch_values(self, hidden: int) -> int:
        """Values that ZeRO-3 gathers ahead at a time, of a model with so large hidden states."""
        return int(0.9 * hidden * hidden) if self.prefetch_bucket_size == "auto" else self.prefetch_bucket_size

    def persistent_values(self, hidden: int) -> int:
        """Values of the largest weight that ZeRO-3 leaves whole, of a model with so large hidden states."""
        return 10 * hidden if self.param_persistence_threshold == "auto" else self.param_persistence_threshold

    @property
    def shards(self) -> int:
        """Parts that each weight is split into."""
        return self.gpus // self.replicas // self.tensor_parallel if self.sharded else 1

    @property
    def processes_per_node(self) -> int:
        """Processes that share a machine's CPU RAM: one for each card."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def keeps_whole_gradients(self) -> bool:
        """Whether whole gradients of all weights stay on a card from one micro-batch to the next, and are scattered with the last."""
        return self.sharded and self.accumulation > 1 and not self.sync_each_batch

    @property
    def finds_gradients(self) -> bool:
        """Whether gradients of the micro-batches before are there throughout a micro-batch, in the form in which the optimizer has them."""
        return self.accumulation > 1 and not self.keeps_whole_gradients

    @property
    def adapters_are_whole(self) -> bool:
        """Whether adapters are whole on every card beside weights in shards: they come to a model that transformers has sharded as it loaded it
        (Trainer, _sync_replicated_trainable_parameters)."""
        return self.lora_rank > 0 and self.expert_parallel > 1

    @property
    def packed_in(self) -> str:
        """Dtype that the bytes of 4-bit weights pass for."""
        return {"uint8": "uint8", "bf16": "bfloat16", "fp32": "float32"}[self.quant_storage]

    @property
    def reduced_dtype(self) -> str:
        """Dtype in which fsdp sums gradients, and keeps whole ones."""
        if self.reduce_dtype == "bf16":
            return "bfloat16"
        return "float32" if self.gathers_in_bf16 else self.weight_dtype

    @property
    def gathers_in_bf16(self) -> bool:
        """Whether fsdp has a MixedPrecisionPolicy, which has weights in bf16 where they are used, in place of autocast."""
        return self.sharded and (self.autocast or self.precision == "mixed")

    @property
    def has_gradient_buckets(self) -> bool:
        """Whether DDP holds a copy of all gradients, which it reduces."""
        return self.sharding == "ddp"

    @property
    def loss_in_chunks(self) -> bool:
        return LOSSES[self.loss].in_chunks

    @property
    def is_open(self) -> bool:
        """Whether numbers of chunks are left to be recommended."""
        return any(getattr(self, name) == "auto" for name in CHUNK_FIELDS)

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight on the device that has no dtype of its own."""
        return 2 if self.weight_dtype == "bfloat16" else 4

    @property
    def weight_dtype(self) -> str:
        """Dtype of weights on the device that have none of their own, as adapters have, and are not quantised."""
        return "bfloat16" if self.precision == "bf16" and not self.kbit_preparation else "float32"

    @property
    def uses_adapters_in_bf16(self) -> bool:
        """Whether products are given adapters in bf16: of that dtype, gathered in it, or cast by DeepSpeed's engine, as all weights are."""
        return self.adapter_dtype == "bf16" or self.gathers_in_bf16 or self.zero_stage > 0

    @property
    def prefetches_flat(self) -> bool:
        """Whether FSDP1 gathers the group before while backward runs one: not where reentrant checkpoints are around the groups, for they run and are
        noted again in backward, and what ran without a graph asks for no weights ahead (_get_handle_to_prefetch, _needs_pre_backward_unshard)."""
        return self.backward_prefetch == "pre" and self.checkpoint != "reentrant"

    @property
    def hooks_inputs(self) -> bool:
        """Whether FSDP1's hooks on inputs of frozen layers, which reentrant checkpoints run again, hold all of these until backward is over."""
        return self.flat and bool(self.lora_rank) and self.checkpoint == "reentrant"

    @property
    def runs_beside_autocast(self) -> bool:
        """Whether autocast is on though weights are gathered in bf16: accelerate has it so under FSDP1. It tells where peft sees the shards of adapters
        in fp32: it casts their inputs to that, but for those of 4-bit layers, and autocast casts them back."""
        return self.use_orig_params and self.gathers_in_bf16 and bool(self.lora_rank)

    @property
    def runs_autocast(self) -> bool:
        """Whether products cast to bf16 what they are given."""
        return not self.sharded and (self.autocast or self.precision == "mixed")

    @property
    def runs_in_fp32(self) -> bool:
        """Whether everything is computed in fp32."""
        return self.precision == "fp32" and not (self.runs_autocast or self.gathers_in_bf16)

    @property
    def compute_dtype(self) -> str:
        """Dtype of attention, and of products of weights that are not quantised."""
        return "bfloat16" if self.runs_autocast else self.used_dtype

    @property
    def checkpoints_layers(self) -> bool:
        """Whether whole layers are checkpointed, all or some of them."""
        return self.checkpoint not in ("none", "children")

    @property
    def offload_layer_inputs(self) -> bool:
        return self.offload == "layer-inputs"

    @property
    def used_dtype(self) -> str:
        """Dtype of weights in layers and of hidden states between them: under fsdp, what shards are gathered in."""
        return "bfloat16" if self.gathers_in_bf16 else self.weight_dtype

    @property
    def rows(self) -> int:
        """Rows of a micro-batch as it runs."""
        return 1 if self.padding_free else self.batch

    @property
    def samples_in_row(self) -> int:
        """Samples that attention tells apart in a row."""
        return self.packing * self.batch if self.padding_free else self.packing

    @property
    def gives_positions(self) -> bool:
        """Whether position ids come with the batch."""
        return self.packing > 1 or self.sharers > 1 or self.sequence_parallel_norms

    def row_tokens(self, seq_len: int) -> int:
        """Tokens that a card has in a row of a micro-batch whose sequences have `seq_len`."""
        return self.local_tokens(self.batch * seq_len if self.padding_free else seq_len)

    def local_tokens(self, seq_len: int) -> int:
        """Tokens that a card has of a sequence."""
        return -(-seq_len // self.sharers)

    @property
    def sharers(self) -> int:
        """Cards that share each sequence, in whatever way."""
        return self.sequence_parallel * self.context_parallel

    @property
    def norm_sharers(self) -> int:
        """Cards that share out the tokens of norms and hidden states between layers, and have all of them elsewhere."""
        return self.tensor_parallel if self.sequence_parallel_norms else 1

    @property
    def multiple(self) -> int:
        """Tokens that lengths are a multiple of: what batches are padded to, and each card's part is as long as another's."""
        pieces = 2 * self.context_parallel if self.context_parallel > 1 else 1
        return lcm(self.pad_to, self.sequence_parallel, pieces, self.norm_sharers)

    def padded(self, tokens: int) -> int:
        """The length that a batch of so many tokens is run at."""
        return -(-tokens // self.multiple) * self.multiple

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Recipe:
        """A recipe from a JSON file. Raises RecipeError."""
        return cls.from_json(files.read_text(path, "a recipe in JSON", _LARGEST_FILE, RecipeError), quoted(path))

    @classmethod
    def from_json(cls, text: str, source: str = "recipe") -> Recipe:
        """A recipe from JSON text; `source` says in messages where it is from. Raises RecipeError."""
        if (key := files.repeated_key(text)) is not None:
            raise RecipeError(f"{source}: {quoted(key)} is given twice.\nLeave one of the two out.")
        try:
            return cls.model_validate_json(text)
        except ValidationError as e:
            message = first_problem(e)
            raise RecipeError(f"{source}: {message}" + ("" if "\n" in message else f"\n{_WRITES_ONE}")) from None
        except UnicodeError:
            raise RecipeError(f"{source}: holds what is no Unicode text.\n{_WRITES_ONE}") from None

    def write(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write the recipe as JSON; over a file that is there only with `force`. Raises OutputError."""
        files.check_writable(path, force)
        files.write(path, (self.model_dump_json(indent=1) + "\n").encode())

    def changed(self, /, **fields: object) -> Recipe:
        """A copy with other values, validated. Raises RecipeError."""
        if all(repr(getattr(self, name, self)) == repr(value) for name, value in fields.items()):  # 1 is not True
            return self
        try:
            return Recipe.model_validate({**self.model_dump(), **fields})
        except ValidationError as e:
            raise RecipeError(first_problem(e)) from None


def _replicas_that_do(gpus: int) -> str:
    """Numbers of replicas that leave a whole number of shards from 2."""
    numbers = [f"{n:,}" for n in range(2, min(gpus // 2, 1_000) + 1) if gpus % n == 0]
    if not numbers:
        return f"{gpus:,} GPUs allow none, leave replicas (--replicas) out"
    return f"replicas (--replicas) can be {', '.join(numbers[:8])}{', ...' if len(numbers) > 8 else ''}"


_OF_OTHER_STEPS = (
    *(
        "autocast",
        "kernels",
        "lora_rank",
        "mlp_chunks",
        "layer_in_chunks",
        "optimizer_in_backward",
        "optimizer_on_host",
    ),
    *("accumulation", "packing", "padding_free", "images", "train", "freeze"),
)
"""What changes how a step runs."""
_BESIDE_SPLITS = frozenset({"accumulation", "autocast"})
"""What of it matrices over several GPUs are planned with."""
_BESIDE_EXPERTS = frozenset({"accumulation", "train", "freeze", "optimizer_on_host", "lora_rank"})
"""What of it experts over several GPUs are planned with."""
_NOT_BESIDE_WHOLE_ADAPTERS = (
    *("optimizer_on_host", "dora", "lora_modules_to_save", "quantize", "kbit_preparation"),
    *("train", "freeze"),
)
"""What these are not planned with where there are adapters, too."""
_MUST_BE = {
    "reduce_bucket_size": "must be 'auto' or a whole number from 1",
    **dict.fromkeys(("prefetch_bucket_size", "param_persistence_threshold"), "must be 'auto' or a whole number from 0"),
    "max_grad_norm": "must be a number greater than 0; --max-grad-norm 0 does not clip",
    "expert_imbalance": "must be a number from 1 to 65,536",
    "lora_dropout": "must be a number from 0, less than 1",
    "checkpoint": "must be none, layer, reentrant, sqrt, selective, children, every-n (every-2), or a number of layers from 1",
    **dict.fromkeys(CHUNK_FIELDS, "must be 'auto' or a whole number from 1"),
}
_WRITES_ONE = "`mstplan plan ... --write-recipe FILE` writes one to start from."


def planned(field: str) -> tuple[list[str], str]:
    """The names that a field of a recipe can have as its value; and what else, in words."""
    if field in REGISTRIES:
        return REGISTRIES[field](), ""
    kinds = get_args(Recipe.model_fields[field].annotation)
    names = [name for kind in kinds for name in get_args(kind) or (kind,) if isinstance(name, str)]
    if field == "checkpoint":
        return names, ", every-n (every-2), or a number of layers from 1"
    return names, ""


def first_problem(error: ValidationError) -> str:
    """One or two lines for the first thing pydantic found wrong."""
    from . import names

    problem = error.errors(include_url=False)[0]
    where = str(problem["loc"][0]) if problem["loc"] else ""
    message = _MUST_BE.get(where) or problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if problem["type"] == "extra_forbidden":
        return (
            names.unknown_field(where)
            or f"a recipe has no field {quoted(where)}.{did_you_mean(where, Recipe.model_fields)}"
        )
    if problem["type"] in ("literal_error", "string_type") and where in names.VALUES:
        return names.unknown_value(where, problem["input"], *planned(where))
    if problem["type"] == "json_invalid":
        return f"{message.replace('Invalid JSON', 'not valid JSON')}\n{_WRITES_ONE}"
    if where:
        return f"{where}: {message} (got {quoted(problem['input'])})"
    return message if problem["type"] == "value_error" else f"{message}\n{_WRITES_ONE}"


_MST: dict[str, Any] = {
    "checkpoint": "layer",
    "mlp_chunks": "auto",
    "mlp_recompute": True,
    "loss": "chunked",
    "loss_chunks": "auto",
}
_MST_LAYER: dict[str, Any] = {**_MST, "layer_in_chunks": True, "attention_groups": "auto"}
# Constructed without validation: that would build pydantic's validators at every start (a test validates them).
STRATEGIES: dict[str, Recipe] = {
    "standard": Recipe.model_construct(),
    "checkpoint": Recipe.model_construct(checkpoint="layer"),
    "chunked-loss": Recipe.model_construct(checkpoint="layer", loss="chunked", loss_chunks="auto"),
    "mst": Recipe.model_construct(**_MST),
    "mst-offload": Recipe.model_construct(**_MST, offload="layer-inputs"),
    "mst-layer": Recipe.model_construct(**_MST_LAYER),
    "mst-layer-offload": Recipe.model_construct(**_MST_LAYER, offload="layer-inputs"),
    "checkpoint-sqrt": Recipe.model_construct(checkpoint="sqrt"),
}
USUAL_STRATEGIES = ("standard", "checkpoint", "chunked-loss", "mst", "mst-offload")
"""Strategies of an answer where none is asked for: each adds to the one before what lets the sequence grow."""
LABELS = {"standard": "no-checkpointing", "checkpoint": "checkpointing", "checkpoint-sqrt": "checkpointing-sqrt"}
"""What people read and type for a strategy whose name, in JSON and in results files, says something else in the field."""
STRATEGY_FIELDS = (
    *("checkpoint", "mlp_chunks", "mlp_recompute", "loss_chunks", "loss", "offload"),
    *("layer_in_chunks", "attention_groups"),
)
"""What a strategy decides; everything else about a recipe is the user's choice."""


def strategy(name: str, **fields: object) -> Recipe:
    """The named strategy, with some fields changed. Raises RecipeError."""
    named = STRATEGIES[strategy_name(name)]
    return named.changed(**fields) if fields else named


def strategy_name(typed: str) -> str:
    """The name of the strategy that is called so, by its name or its label. Raises RecipeError."""
    if isinstance(typed, str):
        name = next((name for name, label in LABELS.items() if label == typed), typed)
        if name in STRATEGIES:
            return name
    from . import names

    raise RecipeError(names.unknown_value("strategy", typed, strategy_labels(), older=list(LABELS)))


def strategy_label(name: str) -> str:
    """What people read for a strategy, also for one with changes ('checkpoint*')."""
    changed = name.endswith("*")
    return LABELS.get(name.removesuffix("*"), name.removesuffix("*")) + "*" * changed


def strategy_of(recipe: Recipe) -> str:
    """The name of the strategy that decides what the recipe does; empty: none."""
    return next((name for name in STRATEGIES if _decides_same(recipe, name, STRATEGY_FIELDS)), "")


def _decides_same(recipe: Recipe, name: str, fields: Iterable[str]) -> bool:
    return all(getattr(recipe, field) == getattr(STRATEGIES[name], field) for field in fields)


def strategy_labels() -> list[str]:
    return [strategy_label(name) for name in STRATEGIES]


# ---- a recipe in words ----------------------------------------------------------------------------------------------------

_SHORT = {"bfloat16": "bf16", "float32": "fp32", "uint8": "8-bit"}


def recipe_in_words(recipe: Recipe, kernel: str = "", attends: bool = True) -> str:
    """How one trains, but for what a strategy decides, in a line. kernel: what the recipe's attention comes to, in words."""
    optimizer = OPTIMIZERS[recipe.optimizer]
    how: list[str] = [recipe.adamw_kernel] if optimizer.has_kernels else []
    states = " and ".join(_dtypes_of_states(recipe))
    how += ["in CPU RAM"] if recipe.optimizer_on_host else [f"{states} states"] if states else []
    how += ["fp32 those of embeddings"] if recipe.fp32_embedding_states else []
    how += ["in backward"] if recipe.optimizer_in_backward else []
    words = [
        _trained_in_words(recipe),
        _weights_in_words(recipe),
        optimizer.short + (f" ({', '.join(how)})" if how else ""),
        f"batch {recipe.batch}" + (f" x accumulation {recipe.accumulation}" if recipe.accumulation > 1 else ""),
        *_rows_in_words(recipe),
        *([f"{recipe.images:,} {'image' if recipe.images == 1 else 'images'} a sequence"] if recipe.images else []),
        *([f"{recipe.attention} by {kernel}" if kernel else recipe.attention] if attends else []),
        *(["attention's inputs and results in CPU RAM"] if recipe.attention_on_host else []),
        *([kernels_in_words(recipe.kernels)] if recipe.kernels != "torch" else []),
    ]
    if recipe.sequence_parallel > 1:
        words.append(f"sequences over {recipe.sequence_parallel:,} GPUs (Ulysses)")
    if recipe.context_parallel > 1:
        words.append(f"sequences over {recipe.context_parallel:,} GPUs (ring, {recipe.rotate_method})")
    if recipe.tensor_parallel > 1:
        norms = ", norms over tokens" if recipe.sequence_parallel_norms else ""
        loss = ", loss over the vocabulary" if recipe.loss_parallel else ""
        words.append(f"matrices over {recipe.tensor_parallel:,} GPUs (tensor parallel{norms}{loss})")
    if recipe.expert_parallel > 1:
        uneven = f", {recipe.expert_imbalance:g} times an even router's rows" if recipe.expert_imbalance != 1 else ""
        words.append(f"experts over {recipe.expert_parallel:,} GPUs (expert parallel{uneven})")
    return ", ".join([*words, *([_sharding_in_words(recipe)] if recipe.sharding != "none" else [])])


def _sharding_in_words(recipe: Recipe) -> str:
    """'FSDP2 over 16 GPUs in 2 replicas, weights in CPU RAM, whole gradients between micro-batches', 'ZeRO-2 over 8 GPUs', 'DDP over 8 GPUs'."""
    if recipe.sharding == "ddp":
        return f"DDP over {recipe.gpus:,} GPUs"
    if recipe.zero_stage:
        host = ", weights in CPU RAM" if recipe.weights_on_host else ""
        return f"ZeRO-{recipe.zero_stage} over {recipe.gpus:,} GPUs (DeepSpeed), fp32 weights in the optimizer{host}"
    replicas = f" in {recipe.replicas:,} replicas" if recipe.replicas > 1 else ""
    host = ", weights, gradients and optimizer in CPU RAM" if recipe.weights_on_host else ""
    whole = ", whole gradients between micro-batches" if recipe.keeps_whole_gradients else ""
    version = "FSDP1" if recipe.flat else "FSDP2"
    return f"{version} over {recipe.gpus:,} GPUs{replicas}{host}{whole}"


def _trained_in_words(recipe: Recipe) -> str:
    if not recipe.lora_rank:
        return "a part of the weights trained" if recipe.train or recipe.freeze else "full fine-tuning"
    kind = "DoRA" if recipe.dora else "QLoRA" if recipe.quantize != "none" else "LoRA"
    dtype = "bf16" if recipe.zero_stage else recipe.adapter_dtype
    return f"{kind} of rank {recipe.lora_rank} on {', '.join(recipe.lora_targets)} ({dtype})"


def _weights_in_words(recipe: Recipe) -> str:
    """Dtypes of the model's own weights: 'nf4 weights, the rest fp32 by kbit preparation, bf16 autocast'."""
    if recipe.sharded and recipe.precision == "mixed":
        return "fp32 shards, gathered in bf16"
    prepared = " by kbit preparation" if recipe.kbit_preparation else ""
    plain = f"{_SHORT[recipe.weight_dtype]} weights{prepared}"
    if recipe.quantize != "none":
        how = " with double quantisation" if recipe.double_quantize else ""
        how += f" stored as {recipe.quant_storage}" if recipe.quant_storage != "uint8" else ""
        plain = f"{recipe.quantize} weights{how}, the rest {_SHORT[recipe.weight_dtype]}{prepared}"
    if recipe.gathers_in_bf16:
        return f"{plain}, all gathered in bf16"
    return plain + (" under bf16 autocast" if recipe.runs_autocast else "")


def _rows_in_words(recipe: Recipe) -> list[str]:
    packed = [f"{recipe.packing:,} samples a row"] if recipe.packing > 1 else []
    return [*packed, *(["a batch in one row"] if recipe.padding_free else [])]


def _dtypes_of_states(recipe: Recipe) -> list[str]:
    from .tape import Weight

    if recipe.zero_stage:
        recipe = recipe.model_copy(update={"precision": "fp32"})
    elif recipe.lora_rank:
        recipe = recipe.model_copy(update={"precision": recipe.adapter_dtype, "kbit_preparation": False})
    rows = OPTIMIZERS[recipe.optimizer].memory(recipe, [(Weight("of any size", (4096, 4096)), 1)]).states
    words = (state.words or _SHORT.get(state.dtype, state.dtype) for state in rows if state.bytes > 1 << 20)
    return list(dict.fromkeys(words))


# ---- a recipe as options --------------------------------------------------------------------------------------------------

SWITCHES = (
    "fp32_embedding_states",
    "optimizer_in_backward",
    "optimizer_on_host",
    "weights_on_host",
    "attention_on_host",
    "input_gradients",
    "autocast",
    "dora",
    "double_quantize",
    "kbit_preparation",
    "padding_free",
    "sync_each_batch",
    "use_orig_params",
    "overlap_comm",
    "sequence_parallel_norms",
    "loss_parallel",
)
"""Fields that are an option without a value, of the same name."""
_OPTIONS = {"lora_rank": "--lora", "mlp_chunks": "--chunks", "loss_chunks": "--chunks"}


def option_of(field: str) -> str:
    """The option for a field of a recipe that no strategy decides."""
    return _OPTIONS.get(field, f"--{field.replace('_', '-')}")


def options_of(recipe: Recipe) -> str:
    """The options of the command line that describe a recipe, ready to paste: --strategy where it is a strategy's, else its own."""
    usual = STRATEGIES["standard"]
    own = [name for name in Recipe.model_fields if name not in STRATEGY_FIELDS]
    changed = [name for name in own if getattr(recipe, name) != getattr(usual, name)]
    return shlex.join([*_strategy_options(recipe), *words_of(recipe, changed)])


def words_of(recipe: Recipe, fields: Iterable[str]) -> list[str]:
    """Words of the command line for fields that no strategy decides; none for a switch that is off."""
    words: list[str] = []
    for name in fields:
        value = getattr(recipe, name)
        if name in SWITCHES:
            words += [option_of(name)] if value else []
        else:
            words += [option_of(name), ",".join(value) if isinstance(value, tuple) else str(value)]
    return words


def _strategy_options(recipe: Recipe) -> list[str]:
    """Options for what a strategy decides."""
    if named := strategy_of(recipe):
        return ["--strategy", strategy_label(named)]
    if recipe.layer_in_chunks:
        return _layer_options(recipe)
    chunks = set(CHUNK_FIELDS)
    counts = ["--chunks", ",".join(dict.fromkeys((str(recipe.mlp_chunks), str(recipe.loss_chunks))))]
    in_chunks = (name for name in STRATEGIES if STRATEGIES[name].loss_in_chunks)
    if matching_name := next((n for n in in_chunks if _decides_same(recipe, n, set(STRATEGY_FIELDS) - chunks)), None):
        return ["--strategy", strategy_label(matching_name), *counts]
    words = ["--checkpoint", str(recipe.checkpoint)] if recipe.checkpoint != "none" else []
    words += ["--offload", recipe.offload] if recipe.offload != "none" else []
    if (
        recipe.mlp_chunks == 1
        and not recipe.mlp_recompute
        and recipe.loss_chunks == ("auto" if recipe.loss_in_chunks else 1)
    ):
        return words + (["--loss", recipe.loss] if recipe.loss != "transformers" else [])
    words += counts + (["--loss", recipe.loss] if recipe.loss != "chunked" else [])
    return words + ([] if recipe.mlp_recompute else ["--no-recompute"])


def _layer_options(recipe: Recipe) -> list[str]:
    """Options for a recipe with its layers in chunks, which no option but a strategy asks for."""
    name = "mst-layer-offload" if recipe.offload_layer_inputs else "mst-layer"
    words = ["--strategy", name]
    if (recipe.mlp_chunks, recipe.loss_chunks) != ("auto", "auto"):
        words += ["--chunks", f"{recipe.mlp_chunks},{recipe.loss_chunks}"]
    words += ["--attention-groups", str(recipe.attention_groups)] if recipe.attention_groups != "auto" else []
    words += ["--checkpoint", str(recipe.checkpoint)] if recipe.checkpoint != "layer" else []
    return words + (["--loss", recipe.loss] if recipe.loss != "chunked" else [])
