"""Attention kernels as the formula lays them out, beside what they allocated on an H200."""

from __future__ import annotations

from collections import Counter

import pytest

from mstplan.errors import RecipeError
from mstplan.spec.config import read_config
from mstplan.spec.model import LayerKind
from mstplan.spec.platform import AMPERE, Platform
from mstplan.step.cuda import CUDNN_SPARE, cudnn_row_sums, efficient_workspace, flash_rows
from mstplan.step.kernels import KERNELS, attentions, chosen
from mstplan.step.kernels.base import AttentionCall
from mstplan.step.layers import Numerics, Writer
from mstplan.step.steps import Sizes
from mstplan.step.tape import Tensor

from ..attention_calls import H200, SMALL, MeasuredCall, measured_calls

CALLS = measured_calls()
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 4096,
    "vocab_size": 1000,
    "intermediate_size": 8,
}


def test_all_calls_are_here() -> None:
    assert len(CALLS) == 151 and sum(call.refused for call in CALLS) == 8


@pytest.mark.parametrize("call", [call for call in CALLS if call.named != "sdpa"], ids=repr)
def test_a_kernel_serves_what_it_served(call: MeasuredCall) -> None:
    assert call.kernel.serves(call.asked) != call.refused


CHOICES = [
    (AttentionCall("bfloat16", 128, 128, True, False, 0.0, H200), "cudnn"),
    (AttentionCall("bfloat16", 256, 256, False, True, 0.0, H200), "cudnn"),
    (AttentionCall("bfloat16", 192, 128, False, False, 0.0, H200), "cudnn"),
    (AttentionCall("bfloat16", 100, 100, False, False, 0.0, H200), "flash"),
    (AttentionCall("bfloat16", 64, 64, False, False, 0.1, H200), "cudnn"),
    (AttentionCall("bfloat16", 64, 64, False, False, 0.1, H200._replace(cudnn=92000, torch=(2, 13))), "flash"),
    (AttentionCall("bfloat16", 64, 64, False, False, 0.125, H200._replace(cudnn=92000, torch=(2, 13))), "cudnn"),
    (AttentionCall("bfloat16", 128, 128, True, False, 0.0, H200._replace(cudnn=91002)), "flash"),
    (AttentionCall("bfloat16", 256, 256, True, False, 0.0, Platform((10, 0), 92000)), "flash"),
    (AttentionCall("bfloat16", 192, 128, False, False, 0.0, Platform((10, 3), 92000)), "cudnn"),
    (AttentionCall("bfloat16", 128, 128, True, False, 0.0, Platform((12, 0), 92000)), "flash"),
    (AttentionCall("bfloat16", 128, 128, False, True), "efficient"),
    (AttentionCall("bfloat16", 192, 128, False, False), "efficient"),
    (AttentionCall("float32", 128, 128, False, False, 0.0, H200), "efficient"),
    (AttentionCall("float32", 128, 128, True, False, 0.0, H200), "math"),
]


@pytest.mark.parametrize(("asked", "name"), CHOICES, ids=str)
def test_sdpa_chooses(asked: AttentionCall, name: str) -> None:
    assert chosen("sdpa", asked).name == name


@pytest.mark.parametrize("name", [name for name in KERNELS if name in attentions()])
def test_a_named_kernel_is_that_one_or_an_error(name: str) -> None:
    assert chosen(name, AttentionCall("bfloat16", 128, 128, False, False)).name == name
    grouped = AttentionCall("bfloat16", 128, 128, True, False)
    if name == "efficient":
        with pytest.raises(RecipeError, match="does not serve grouped heads of size 128"):
            chosen(name, grouped)
    else:
        assert chosen(name, grouped).name == name


def test_platforms_that_choose_alike_are_one() -> None:
    assert Platform((8, 9), 92000).alike == Platform((9, 0), 91002).alike == Platform(None).alike == AMPERE
    assert Platform((9, 0), 92000).alike != AMPERE


def laid_out(call: MeasuredCall) -> list[Tensor]:
    """All tensors that a call makes by the formula, forward and backward, but for the copy that transformers makes."""
    _, heads, kv_heads, _, size, v_size = call.sizes
    model = read_config(
        {**CONFIG, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size}, "x"
    )
    model = model._replace(attention=model.attention._replace(v_head_dim=v_size))
    dtype = call.row["dtype"].replace("float16", "bfloat16").replace("bbfloat16", "bfloat16")
    w = Writer(model, Numerics(weights=dtype))
    w.tape.dims["ev"] = v_size
    first = "b H s e" if call.row["layout"] == "bhsd" else "b s H e"
    q, k = w.tape.new("Q", first, dtype), w.tape.new("K", first.replace("H", "G"), dtype)
    v = w.tape.new("V", first.replace("H", "G").replace(" e", " e" if v_size == size else " ev"), dtype)
    call.kernel.lay_out(w, q, k, v, LayerKind(), call.row["mask"] is not None)
    ops = [op for op in w.tape.ops if op.name != "join heads"]
    forward = [t for op in ops for t in (*op.temps, *op.makes)]
    backward = [t for op in ops for t in (*(grad for _, grad in op.grads if grad is not None), *op.back_temps)]
    return forward + backward


@pytest.mark.parametrize("call", [c for c in CALLS if not c.refused and c.kernel.name != "math"], ids=repr)
def test_what_a_kernel_makes(call: MeasuredCall) -> None:
    """Every allocation, but for numbers and seeds; the measured one has also the gradient that came in."""
    batch, heads, kv_heads, tokens, _, v_size = call.sizes
    if call.row["mask"] is not None and heads != kv_heads:
        pytest.skip("transformers repeats keys and values under a mask")
    units = Sizes(batch, tokens, tokens, tokens).units
    told = Counter(t.bytes * units[t.basis] for t in laid_out(call))
    measured = Counter(n for n in call.allocations if n > SMALL)
    output = batch * heads * tokens * v_size * (4 if call.row["dtype"] == "float32" else 2)
    measured[output] -= 1  # its gradient
    measured.update({n: -count for n, count in told.items()})
    known = known_differences(call, output)
    assert {n: measured[n] for n in {*measured, *known} if measured[n] != known[n]} == {}


def known_differences(call: MeasuredCall, output: int) -> Counter[int]:
    """How many more of so many bytes were measured than the formula counts."""
    batch, heads, kv_heads, tokens, size, v_size = call.sizes
    known: Counter[int] = Counter()
    if call.row["mask"] == "1":  # one for all sequences; transformers has one for each
        bias = tokens * tokens * (output // (batch * heads * tokens * v_size))
        known.update({bias: 1, batch * bias: -1})
    if call.kernel.name == "cudnn":
        sums = batch * tokens * cudnn_row_sums(heads, size, v_size, kv_heads != heads)
        known.update({sums: -1, sums + CUDNN_SPARE: 1})
    elif call.kernel.name == "efficient":
        known.update(_efficient(call, output))
    elif call.row["layout"] == "bhsd":
        known[output] += 1  # a copy of the gradient, which here does not come from a copy tokens first
    if str(call) in SPLIT:
        known.update(SPLIT[str(call)])
    return known


SPLIT = {
    "flash-1-8-4-1024-256-bfloat16-None-0.0-bshd": {2 * 8 * 1024 * 256 * 4: 1, 2 * 8 * 1024 * 4: 1},
    "flash-1-12-12-1024-64-bfloat16-None-0.0-bshd": {4 * 12 * 1024 * 64 * 4: 1, 4 * 12 * 1024 * 4: 1},
}
"""FlashAttention-2's forward splits keys where queries are too few for all multiprocessors, and sums the splits' outputs and their rows."""


def _efficient(call: MeasuredCall, output: int) -> Counter[int]:
    """Rows in whole blocks, and in fp32 the product of output and gradient and its sums, which are gone before the workspace comes."""
    batch, heads, _, tokens, size, v_size = call.sizes
    itemsize = 4 if call.row["dtype"] == "float32" else 2
    space, rows = efficient_workspace(size, v_size, itemsize), batch * heads * tokens * 4
    known = Counter({rows: -1, batch * heads * -(-tokens // 32) * 32 * 4: 1})
    known.update({batch * heads * space.of_row * flash_rows(tokens): -1, space.bytes(batch * heads, tokens): 1})
    known.update({output: 1, rows: 1} if itemsize == 4 else {})
    return known
