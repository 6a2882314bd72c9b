"""Fine-tune a causal language model on long documents with TRL's SFTTrainer, with LoRA adapters or whole.

    python examples/train_trl.py Qwen/Qwen3-0.6B documents.jsonl --seq-len 64k --lora 16

One document to a line of a JSON Lines file with a field "text". Documents are packed into sequences of --seq-len tokens. TRL computes its
loss in pieces itself; mstplan sees to the layers: `minisequence` runs all of them but attention in pieces, and keeps their inputs in CPU RAM
with --offload. `mstplan max-seq --like trl -m MODEL --gpu GPU` tells beforehand how long the sequences can be.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from mstplan import parse_length
from mstplan.train import minisequence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("documents", type=Path, help="a .jsonl file")
    parser.add_argument(
        "--seq-len", type=parse_length, default=parse_length("32k"), help="tokens, such as 64k (default: 32k)"
    )
    parser.add_argument(
        "--lora", type=int, metavar="RANK", help="train adapters of this rank (default: the whole model)"
    )
    parser.add_argument("--offload", action="store_true", help="keep layer inputs in CPU RAM")
    parser.add_argument("--steps", type=int, default=100, help="of the optimizer (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("trained"), help="folder for the model (default: %(default)s)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    minisequence(model, layer_in_chunks=True, offload=options.offload)
    adapters = (
        LoraConfig(r=options.lora, lora_alpha=2 * options.lora, target_modules="all-linear", task_type="CAUSAL_LM")
        if options.lora
        else None
    )
    arguments = SFTConfig(
        str(options.out),
        max_length=options.seq_len,
        packing=True,
        packing_strategy="wrapped",
        per_device_train_batch_size=1,
        max_steps=options.steps,
        learning_rate=options.lr,
        warmup_steps=max(1, options.steps // 20),
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=load_dataset("json", data_files=str(options.documents), split="train"),
        processing_class=tokenizer,
        peft_config=adapters,
    )
    trainer.train()
    minisequence.undo(trainer.model)
    trainer.save_model(str(options.out))


if __name__ == "__main__":
    main()
