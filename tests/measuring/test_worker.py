"""One measured step: on the CPU for real, on CUDA as far as that can be seen without a card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mstplan import MeasurementError, ModelError, strategy
from mstplan.measuring import worker
from mstplan.measuring.measurement import FAILED, OK, OUT_OF_MEMORY, REFUSED, Figures, MeasuredPeak
from mstplan.measuring.worker import attempt_step, max_by_phase, measure_here, read_environment, real_attention
from mstplan.step.instants import Instant
from mstplan.step.recipe import STRATEGIES
from mstplan.tracing.tracer import trace
from mstplan.train.step import TrainingStep, build_model, read_settings
from mstplan.units import GIB, MIB

from ..recipes import in_chunks
from ..tracing.tiny import TINY
from .measured import case


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(
    "more",
    [{}, {"optimizer_in_backward": True}, {"accumulation": 2, "batch": 2}],
    ids=["", "in backward", "accumulation"],
)
def test_every_instant_as_the_trace_has_it(name, more):
    one = case(name, 200, precision="fp32", steps=1, **more)
    one = replace(one, recipe=in_chunks(one.recipe, 3, 4))
    found, told = measure_here(one), trace(TINY, one.recipe, 200, on="cpu")
    assert {n: p.allocated for n, p in found.instants.items()} == {
        p.instant: pytest.approx(p.bytes, rel=0.005) for p in told.peaks
    }
    assert found.peak.allocated == max(p.allocated for p in found.instants.values())
    assert found.context is found.workspace is found.peak.reserved is None


def test_a_limit_on_a_cpu():
    peak = measure_here(case(seq_len=64, precision="fp32", steps=1)).peak.allocated
    assert attempt_step(lambda: measure_here(case(seq_len=64, precision="fp32", steps=1, limit=peak)))["outcome"] == OK
    beyond = attempt_step(lambda: measure_here(case(seq_len=64, precision="fp32", steps=1, limit=peak - 1)))
    assert beyond["outcome"] == OUT_OF_MEMORY and "more than" in beyond["error"]


def test_instants_belong_to_phases():
    assert max_by_phase({name: n for n, name in enumerate(Instant)}) == {"forward": 1, "backward": 6, "optimizer": 7}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ModelError("no"), REFUSED),
        (torch.OutOfMemoryError("CUDA out of memory"), OUT_OF_MEMORY),
        (MemoryError(), OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), OUT_OF_MEMORY),
        (RuntimeError("other"), FAILED),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OUT_OF_MEMORY),
        (RuntimeError("no pinned CPU RAM for 9 bytes more of layer inputs"), FAILED),
        (KeyError("x"), FAILED),
    ],
    ids=repr,
)
def test_what_is_raised_is_an_outcome(error, outcome):
    def fails() -> Figures:
        raise error

    found = attempt_step(fails)
    assert found["outcome"] == outcome and found["figures"] is None and isinstance(found["error"], str)


def test_too_much_for_this_machine():
    assert attempt_step(lambda: torch.empty(2**50))["outcome"] == OUT_OF_MEMORY  # type: ignore[arg-type, return-value]


def test_attention_that_runs():
    llama = read_settings(TINY)
    assert real_attention(strategy("standard"), llama, "cuda") == "sdpa"
    assert real_attention(strategy("standard", attention="eager"), llama, "cuda") == "eager"
    assert real_attention(strategy("standard", attention="flash"), llama, "cuda") == "flash_attention_2"


# ---- CUDA's counters, without CUDA ------------------------------------------------------------------------------------


class Counters:
    """torch.cuda's, as its caching allocator keeps them: `took` bytes are allocated at every reading, and given back."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.resets = 0

    def allocate(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def reset(self) -> None:
        self.most = self.now
        self.resets += 1


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Counters:
    found = Counters()
    for name, stand_in in {
        "max_memory_allocated": lambda: found.most,
        "max_memory_reserved": lambda: 2 * found.most,
        "reset_peak_memory_stats": found.reset,
        "memory_reserved": lambda: 2 * found.now,
        "mem_get_info": lambda: (1000 - 3 * found.now, 1000),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return found


def test_peaks_are_of_what_is_named(counters):
    peaks = worker._PeakCounters()
    for name, sizes in (("forward", (5, -2)), ("loss", (10, -10)), ("forward", (1,)), ("optimizer", (0,))):
        peaks(name)
        for size in sizes:
            counters.allocate(size)
    peaks("")
    assert peaks.peaks == {
        "forward": MeasuredPeak(5, 10),
        "loss": MeasuredPeak(13, 26),
        "optimizer": MeasuredPeak(4, 8),
    }


def test_instants_and_phases_from_counters(counters):
    """A step on the CPU, of which each instant adds a byte for every mark: what is read belongs to the right names."""
    recipe = strategy("checkpoint", precision="fp32")
    step = TrainingStep(build_model(read_settings(TINY), recipe, "sdpa", "cpu"), recipe, 16)
    step.run()
    counters.allocate(100)
    instants, phases = worker._watch_on_cuda(step)
    assert list(instants) == [name for name in Instant if name in instants] and len(instants) == len(Instant)
    assert instants["loss"] == MeasuredPeak(100, 200) and counters.resets > 10
    assert phases == {name: MeasuredPeak(100, 200, 300) for name in ("forward", "backward", "optimizer")}
    assert worker._bytes_beside_tensors() == 300 - 200


@pytest.mark.parametrize(("beside", "held"), [(100 * MIB, 804_061_184), (900 * MIB, 900 * MIB)])
def test_a_limit_leaves_room_for_the_context_that_predictions_count(monkeypatch, beside, held):
    """Kernels that are loaded later take more; what is there already counts if it is more than that."""
    counters, shares = Counters(), []
    total = 80 * GIB
    for name, stand_in in {
        "set_device": lambda _n: None,
        "memory_allocated": lambda: counters.now,
        "mem_get_info": lambda: (total - beside, total),
        "memory_reserved": lambda: 0,
        "get_device_name": lambda: "NVIDIA H100 80GB HBM3",
        "set_per_process_memory_fraction": shares.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(worker, "_multiply_and_attend", lambda: counters.allocate(64 * MIB))
    assert worker._prepare_cuda(case(device="cuda", limit=40 * GIB)) == 64 * MIB
    assert shares == [(40 * GIB - held) / total]
    assert worker._prepare_cuda(case(device="cuda")) == 64 * MIB and len(shares) == 1


def test_the_attention_kernel_that_is_chosen(monkeypatch):
    assert worker._sdpa_kernel("cpu") == "flash_attention"
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: 99)
    assert worker._sdpa_kernel("cpu") == "unknown"


def test_environment_of_a_cpu():
    found = read_environment("cpu")
    assert (
        found["card"] == "cpu"
        and found["total_bytes"] > 2**30
        and found["transformers"]
        and found["threads"] == torch.get_num_threads()
    )
    with pytest.raises(MeasurementError, match=r"CUDA[\s\S]*--device cpu"):
        read_environment("cuda")
