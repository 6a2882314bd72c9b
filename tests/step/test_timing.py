"""Step times are lower bounds that move the right way."""

from __future__ import annotations

import pytest

from mstplan.plan.solve import compute_bound_tokens, plan_at
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.steps import Chunks, Layout, build

MODEL, H100 = load_model("llama3.1-8b"), card("h100")


def seconds(name: str, seq_len: int = 16384, chunks: Chunks | None = None, **fields: object) -> float:
    return plan_at(MODEL, strategy(name, **fields), H100, seq_len, chunks or Chunks(1, 1)).step_seconds


def test_no_faster_than_its_arithmetic() -> None:
    """6 operations per parameter and token, and causal attention, at the nominal rate."""
    tokens, parameters = 16384, 8_030_261_248 - 128256 * 4096  # the embedding is a look-up
    attention = 3 * 32 * (2 * 2 * tokens * tokens * 4096) / 2
    least = (6 * parameters * tokens + attention) / H100.gpu.bf16_flops
    assert least < seconds("standard") < 2 * least


def test_a_measured_step_is_slower_than_the_bound() -> None:
    """mini-s' notebook: 2251.78 tokens/s, Llama-3-8B, 8192 tokens, MsT (GPU not printed; 80 GB, so at least an A100)."""
    on = card("a100-80gb")
    bound = plan_at(load_model("llama3-8b"), strategy("mst"), on, 8192).step_seconds
    assert bound < 8192 / 2251.78 < 3 * bound


def test_recomputing_costs_about_a_forward() -> None:
    plain, checkpointed = seconds("standard"), seconds("checkpoint")
    assert 1.25 < checkpointed / plain < 1.40
    assert seconds("mst") == pytest.approx(checkpointed, rel=0.02)  # chunks are recomputed once, not twice


def test_a_checkpointed_layer_stops_before_its_last_product() -> None:
    """torch.utils.checkpoint, early stop: the down projection's input is the last that backward needs. Pieces of the MLP run whole."""
    layers, tokens = 32, 16384
    down = layers * 2 * tokens * MODEL.hidden * MODEL.mlp_width / H100.gpu.bf16_flops
    forward = (seconds("checkpoint") + down) - seconds("standard")
    per_token = 2 * (8_030_261_248 - 2 * 128256 * 4096)  # of the layers
    attention = layers * 2 * tokens * tokens * 4096 / H100.gpu.bf16_flops
    least = per_token * tokens / H100.gpu.bf16_flops + attention
    assert least < forward < 1.4 * least  # norms and the like take the rest; were it run whole, 1.5
    pieces = seconds("mst", chunks=Chunks(4, 1)) - seconds("checkpoint")
    assert pieces == pytest.approx(down, rel=0.1)


def test_layers_in_pieces_make_queries_keys_and_values_once_more() -> None:
    """For attention, as under any checkpoint, and in backward piece by piece; the rest runs again once, as with chunks of the MLP."""
    tokens, a = 16384, MODEL.attention
    products = 2 * tokens * MODEL.hidden * (a.heads + 2 * a.kv_heads) * a.head_dim * 32 / H100.gpu.bf16_flops
    more = seconds("mst-layer", chunks=Chunks(4, 1)) - seconds("mst", chunks=Chunks(4, 1))
    assert products < more < 4 * products  # a norm, the rotary embedding and the output product take the rest
    in_groups = seconds("mst-layer", chunks=Chunks(4, 1, 8)) - seconds("mst-layer", chunks=Chunks(4, 1))
    assert abs(in_groups) < 0.01 * seconds("mst", chunks=Chunks(4, 1))


def test_accumulation_and_batch_scale() -> None:
    assert seconds("checkpoint", accumulation=4) == pytest.approx(4 * seconds("checkpoint"), rel=0.05)
    assert seconds("checkpoint", seq_len=8192, batch=2) == pytest.approx(
        2 * seconds("checkpoint", seq_len=8192), rel=0.05
    )


def test_tiny_chunks_cost_time() -> None:
    assert seconds("mst", chunks=Chunks(512, 512)) > 1.1 * seconds("mst", chunks=Chunks(4, 4))


@pytest.mark.parametrize("name", ["t4", "a100-80gb", "h100", "b200"])
def test_ridge_point(name: str) -> None:
    gpu = card(name).gpu
    rows = compute_bound_tokens(gpu, 4096, 14336)

    def intensity(r: int) -> float:
        return r * 4096 * 14336 / (r * 4096 + 4096 * 14336 + r * 14336)

    ridge = gpu.bf16_flops / gpu.memory_bandwidth
    assert intensity(rows) >= ridge > intensity(rows - 2)


def test_flops_of_a_forward_are_two_per_active_weight() -> None:
    tape = build(MODEL, Layout(Recipe(), False, False, False))
    per_token = sum(
        f
        for op in tape.ops
        for inner in (op.part.tape.ops if op.part else [op])
        for basis, f in inner.flops
        if basis == 1
    )
    weights = 8_030_261_248 - 128256 * 4096 - (2 * 32 + 1) * 4096
    assert per_token == 2 * weights
