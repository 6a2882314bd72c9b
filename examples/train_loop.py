"""Fine-tune a causal language model on long documents with a plain loop.

    python examples/train_loop.py Qwen/Qwen3-0.6B documents.txt --seq-len 64k

One document to a line of a JSON Lines file with a field "text", or a text file whose documents are parted by empty lines. Documents are
joined and cut into sequences of --seq-len tokens. How a step fits is left to mstplan: `minisequence(model, plan="auto")` takes the fastest
strategy that does, and says which.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from mstplan import parse_length
from mstplan.train import minisequence


def read_documents(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
    return [document for document in text.split("\n\n") if document.strip()]


def sequences(tokenizer, documents: list[str], seq_len: int) -> torch.Tensor:
    """Token ids (sequences, seq_len) of all documents, one after the other, each with its end."""
    ids = [token for text in documents for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    count = len(ids) // seq_len
    if not count:
        raise SystemExit(f"{len(ids):,} tokens are fewer than --seq-len {seq_len:,}: take a shorter one, or more text.")
    return torch.tensor(ids[: count * seq_len]).view(count, seq_len)


def batches(rows: torch.Tensor, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """One sequence (1, seq_len) for each step, in an order that is drawn anew when all were seen."""
    generator, order = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        order = order or torch.randperm(len(rows), generator=generator).tolist()
        yield rows[order.pop()].unsqueeze(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("documents", type=Path, help="a .jsonl or a text file")
    parser.add_argument(
        "--seq-len", type=parse_length, default=parse_length("32k"), help="tokens, such as 64k (default: 32k)"
    )
    parser.add_argument("--steps", type=int, default=100, help="of the optimizer (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-5, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("trained"), help="folder for the model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(options.seed)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to(device).train()
    rows = sequences(tokenizer, read_documents(options.documents), options.seq_len)
    minisequence(model, plan="auto")

    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, options.steps // 20), options.steps)
    started = time.perf_counter()
    for step, batch in enumerate(batches(rows, options.steps, options.seed), 1):
        ids = batch.to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        speed = step * options.seq_len / (time.perf_counter() - started)
        print(f"step {step} of {options.steps}: loss {loss.item():.4f}, {speed:,.0f} tokens/s", flush=True)

    minisequence.undo(model)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
