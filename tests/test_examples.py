"""The scripts in examples/ run, on a small model and a small file, and write a model that can be loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from .train.families import small_model
from .train.test_trainers import documents, words_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with its tokenizer, and documents as .jsonl and as text."""
    folder = tmp_path_factory.mktemp("example")
    tokenizer = words_tokenizer()
    small_model("llama", vocab_size=len(tokenizer)).bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    texts = [row["text"] for row in documents(40, seed=0)]
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "documents.txt").write_text("\n\n".join(texts))
    return folder


def run(script: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), str(folder / "model"), *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("name", ["documents.txt", "documents.jsonl"])
def test_a_plain_loop(name, folder):
    done = run("train_loop.py", folder, name, "--seq-len", "32", "--steps", "3", "--out", f"loop-{name}")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [f"step {n} of 3" for n in (1, 2, 3)]
    assert "minisequence chose no-checkpointing for 1 x 32 tokens" in done.stderr
    assert AutoModelForCausalLM.from_pretrained(folder / f"loop-{name}").config.model_type == "llama"


def test_too_little_text_is_said(folder):
    done = run("train_loop.py", folder, "documents.txt", "--seq-len", "1M")
    assert (
        done.returncode == 1 and "are fewer than --seq-len 1,048,576" in done.stderr and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize("words", [(), ("--lora", "4", "--offload")], ids=["whole", "adapters"])
def test_trl(words, folder):
    out = f"trl{len(words)}"
    done = run("train_trl.py", folder, "documents.jsonl", "--seq-len", "32", "--steps", "2", "--out", out, *words)
    assert done.returncode == 0, done.stderr
    assert (folder / out / ("adapter_model.safetensors" if words else "model.safetensors")).exists()
