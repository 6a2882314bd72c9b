"""What a traced step runs on: few chunks, and products that add to a sum without running."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mstplan.step.recipe import strategy
from mstplan.tracing.cuda_stand_ins import as_on_cuda
from mstplan.tracing.fake_runtime import FakeCardRuntime, FakeRuntime
from mstplan.tracing.recorder import Recorder
from mstplan.train.runtime import RUNTIME
from mstplan.train.step import TrainingStep, build_model, read_settings


@pytest.mark.parametrize(("tokens", "rows"), [(1, 8), (24, 8), (23, 8), (9, 3)])
def test_up_to_three_chunks_are_all_run(tokens, rows):
    assert list(FakeRuntime(3).chunk_slices(tokens, rows)) == list(RUNTIME.chunk_slices(tokens, rows))


@pytest.mark.parametrize(("tokens", "rows"), [(25, 8), (32, 8), (1000, 7)])
def test_of_more_the_first_two_and_the_last_as_they_are(tokens, rows):
    every = list(RUNTIME.chunk_slices(tokens, rows))
    assert list(FakeRuntime(3).chunk_slices(tokens, rows)) == [*every[:2], every[-1]]
    assert list(FakeRuntime().chunk_slices(tokens, rows)) == every


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_in_16_bits_is_in_fp32_and_adds_in_place(dtype):
    runtime = FakeCardRuntime(Recorder({}, 0))
    with FakeTensorMode():
        a, b = torch.empty(5, 3, dtype=dtype), torch.empty(3, 7, dtype=dtype)
        total = runtime.add_product(None, a, b)
        assert (total.shape, total.dtype) == ((5, 7), torch.float32)
        assert runtime.add_product(total, a, b) is total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_products_are_made_as_they_are(dtype):
    runtime = FakeCardRuntime(Recorder({}, 0))
    a, b = torch.ones(5, 3, dtype=dtype), torch.ones(3, 7, dtype=dtype)
    total = runtime.add_product(None, a, b)
    assert runtime.add_product(total, a, b) is total
    assert (total == 6).all()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_dropout_right_after_a_chunked_mlp_keeps_its_backward(dropout):
    """OPT's code calls F.dropout on what its MLP gives, which is not there yet."""
    config = {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    config |= {"vocab_size": 61, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "dropout": dropout}
    recipe = strategy("mst", mlp_chunks=4, loss_chunks=4, optimizer="sgd")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, recorder = build_model(read_settings(config), recipe, "sdpa", "cpu"), Recorder({}, 0)
        with as_on_cuda(recorder):
            step = TrainingStep(model, recipe, 32, FakeCardRuntime(recorder))
            step.forward().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
