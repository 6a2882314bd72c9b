"""The code of docs/training.md runs as it stands, on a tiny model in place of the one that it names."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mstplan.train import minisequence

from .llama import VOCABULARY, small_llama

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
pytestmark = pytest.mark.filterwarnings("default:::(trl|peft|accelerate|datasets)")


def _tokenizer():
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{str(n): n for n in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_it_runs(number, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    if "init_process_group" in BLOCKS[number]:
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)  # on a port that is free
        meet = partial(torch.distributed.init_process_group, store=store, rank=0, world_size=1)
        monkeypatch.setattr(torch.distributed, "init_process_group", meet)
    made = []

    def from_pretrained(name, dtype):
        made.append(small_llama().to(dtype))
        return made[-1]

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    rows = torch.randint(3, VOCABULARY, (8, 16)).tolist()
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    known = {
        "dataset": dataset,
        "tokenizer": _tokenizer(),
        "loader": [{"input_ids": torch.tensor(rows[:2])}],
    }
    before = {name: w.clone() for name, w in small_llama().to(torch.bfloat16).named_parameters()}
    source = BLOCKS[number].replace("report_to=[]", "report_to=[], use_cpu=True, bf16=False")  # there is no GPU here
    exec(source, known)
    (model,) = made
    assert any(not torch.equal(w.detach().cpu(), before[name]) for name, w in model.named_parameters())
    minisequence.undo(model)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_there_are_four():
    assert len(BLOCKS) == 4 and all("minisequence(" in block for block in BLOCKS)
