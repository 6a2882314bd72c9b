"""Chunks that are not given are those the planner recommends for the model, the card and the length at hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mstplan import card, strategy
from mstplan.errors import ModelError
from mstplan.plan.solve import choose_chunks
from mstplan.spec.config import read_config
from mstplan.step.steps import Chunks
from mstplan.train import chunks as chunks_module
from mstplan.train import minisequence
from mstplan.train.chunks import ChunkCounts, card_of

from .families import small_batch, small_model

LLAMA = AutoConfig.for_model(
    "llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    dtype="bfloat16",
)
AUTO = strategy("mst")


def hidden(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, 4096, dtype=dtype, device="meta")


@pytest.fixture
def on_h100(monkeypatch):
    monkeypatch.setattr(chunks_module, "card_of", lambda device: card("h100"))


@pytest.mark.usefixtures("on_h100")
@pytest.mark.parametrize(("batch", "length"), [(1, 2048), (1, 32768), (1, 80000), (4, 8192), (1, 300_000)])
def test_as_the_planner_recommends(batch, length):
    model = read_config(LLAMA.to_dict(), "llama")
    found = ChunkCounts(LLAMA, AUTO).chunks_for(hidden(batch, length))
    assert found == choose_chunks(model, AUTO.changed(batch=batch), card("h100"), length)


@pytest.mark.usefixtures("on_h100")
def test_longer_sequences_get_more_chunks():
    counts = ChunkCounts(LLAMA, AUTO)
    chunks = [counts.chunks_for(hidden(1, length)) for length in (1024, 16384, 65536)]
    assert chunks[0] == Chunks(1, 1) and chunks[-1].mlp > 1 and chunks[-1].loss > 1
    assert [c.loss for c in chunks] == sorted(c.loss for c in chunks)


@pytest.mark.usefixtures("on_h100")
def test_one_of_the_two_may_be_given():
    counts = ChunkCounts(LLAMA, AUTO.changed(mlp_chunks=7))
    assert counts.chunks_for(hidden(1, 65536)).mlp == 7 and counts.chunks_for(hidden(1, 65536)).loss > 1
    assert ChunkCounts(LLAMA, AUTO.changed(mlp_chunks=7, loss_chunks=3)).chunks_for(hidden(1, 8)) == Chunks(7, 3)


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_the_card_by_the_name_that_torch_gives_it(monkeypatch, reported, name):
    properties = SimpleNamespace(name=reported, total_memory=70 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = card_of(torch.device("cuda"))
    assert found.gpu.name == name and found.total_bytes == 70 * 2**30


def test_an_unknown_card_counts_by_its_memory_and_a_cpu_by_the_machines(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="Graphics 9", total_memory=24 * 2**30)
    )
    assert card_of(torch.device("cuda")).total_bytes == 24 * 2**30
    assert card_of(torch.device("cpu")).total_bytes > 2**28


def test_a_model_that_cannot_be_planned_asks_for_numbers():
    with pytest.raises(ModelError, match="Give mlp_chunks and loss_chunks"):
        ChunkCounts(AutoConfig.for_model("mamba"), AUTO)
    ChunkCounts(AutoConfig.for_model("mamba"), AUTO.changed(mlp_chunks=2, loss_chunks=2))


def test_a_recipe_that_the_formula_does_not_count_is_recommended_by_the_modules_sizes():
    """Mamba-2's layers are counted with weights in bf16 alone."""
    config = AutoConfig.for_model("bamba", num_hidden_layers=2, hidden_size=64, intermediate_size=96, mamba_n_heads=8)
    config.num_attention_heads, config.num_key_value_heads, config.vocab_size = 4, 2, 99
    model = minisequence(AutoModelForCausalLM.from_config(config).train())
    ids = torch.arange(16).view(1, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_without_numbers_a_model_trains():
    model = minisequence(small_model("llama"))
    ids, labels = small_batch(1, 13)
    model(input_ids=ids, labels=labels).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
