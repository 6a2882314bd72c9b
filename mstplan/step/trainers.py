"""Named starting points: how trainers train when nobody says otherwise, and what is assumed with that. from source: the releases named."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import RecipeError, did_you_mean, quoted
from .recipe import Recipe, options_of


class Trainer(NamedTuple):
    """A trainer's defaults. fields: of a recipe, where they differ from mstplan's own; assumptions: what is taken to be so, for people."""

    name: str
    about: str
    fields: Mapping[str, Any]
    assumptions: tuple[str, ...]

    @property
    def recipe(self) -> Recipe:
        return Recipe(**self.fields)

    @property
    def options(self) -> str:
        """The recipe as options, ready to paste."""
        return options_of(self.recipe)


_CLIPPED = {"max_grad_norm": 1.0}
_LIKE_TRAINER = {**_CLIPPED, "batch": 8}

TRAINERS: Mapping[str, Trainer] = MappingProxyType(
    {
        each.name: each
        for each in (
            Trainer(
                "trl",
                "TRL 1.16's SFTTrainer, a model given by name",
                {**_LIKE_TRAINER, "precision": "mixed", "checkpoint": "layer", "loss": "trl"},
                (
                    "a model given by name is loaded in fp32 and trained under bf16 autocast (bf16=True); dtype=bfloat16 is --precision bf16 --autocast",
                    "gradient_checkpointing=True, which transformers' Trainer has off",
                    "optim=adamw_torch_fused, max_grad_norm=1.0, per_device_train_batch_size=8; max_length=1024 is for you to say with --seq-len",
                    "the loss in tiles of 4,096 tokens, as since TRL 1.15: the logits are never whole",
                ),
            ),
            Trainer(
                "trainer",
                "transformers 5's Trainer, from_pretrained as it comes",
                _LIKE_TRAINER,
                (
                    "weights in the dtype of the checkpoint, taken to be bf16; bf16=False, so no autocast (add --autocast for bf16=True)",
                    "gradient_checkpointing=False, optim=adamw_torch_fused, max_grad_norm=1.0, per_device_train_batch_size=8",
                    "the loss over all logits in fp32 (ForCausalLMLoss)",
                ),
            ),
            Trainer(
                "peft-qlora",
                "QLoRA as peft's examples and most hand-written scripts do it",
                {
                    **_CLIPPED,
                    "lora_rank": 16,
                    "quantize": "nf4",
                    "double_quantize": True,
                    "kbit_preparation": True,
                    "checkpoint": "layer",
                    "input_gradients": True,
                },
                (
                    "prepare_model_for_kbit_training is called: embeddings, head, norms, and with them hidden states and logits, are fp32",
                    "bnb_4bit_compute_dtype=bfloat16 and nf4 with double quantisation, which these scripts set; no autocast (bf16=True is --autocast)",
                    "rank 16 on all linear layers, adapters in fp32; batch 1, AdamW fused, max_grad_norm=1.0",
                ),
            ),
            Trainer(
                "axolotl",
                "Axolotl 0.19, full fine-tuning",
                {**_CLIPPED, "autocast": True, "attention": "flash"},
                (
                    "bf16: auto, weights loaded in bf16, trained under bf16 autocast",
                    "with FlashAttention-2, as its examples set it: with sdpa or eager its full fine-tuning keeps norms, embeddings and head in fp32",
                    "gradient_checkpointing, sample_packing, offloading and loss in chunks are off; optimizer adamw_torch_fused; micro_batch_size 1",
                ),
            ),
            Trainer(
                "llama-factory",
                "LLaMA-Factory 0.9.5, LoRA",
                {
                    **_LIKE_TRAINER,
                    "lora_rank": 8,
                    "autocast": True,
                    "checkpoint": "reentrant",
                    "input_gradients": True,
                },
                (
                    "finetuning_type lora, lora_rank 8, lora_target all, adapters in fp32 unless pure_bf16; bf16: true, autocast",
                    "gradient checkpointing is on, reentrant (use_reentrant_gc); the loss over all logits",
                    "per_device_train_batch_size 8, optim adamw_torch_fused, max_grad_norm 1.0; cutoff_len 2048 is for you to say with --seq-len",
                ),
            ),
            Trainer(
                "torchtune",
                "torchtune 0.6.1's single-device full fine-tuning",
                {"checkpoint": "layer", "batch": 2},
                (
                    "dtype bf16, enable_activation_checkpointing, batch_size 2, fused AdamW, no clipping, as its configs for one GPU have it",
                    "its loss in pieces (CEWithChunkedOutputLoss) keeps bf16 logits whole and is read as transformers', which holds more",
                ),
            ),
        )
    }
)
"""By the name that --like has for them."""


def trainer_named(name: str) -> Trainer:
    """Raises RecipeError."""
    if name in TRAINERS:
        return TRAINERS[name]
    raise RecipeError(
        f"unknown --like {quoted(name)}.{did_you_mean(name, TRAINERS)}\nKnown: {', '.join(TRAINERS)}; mstplan recipes says what each assumes."
    )
