"""One measured step, in a process of its own, which processes.py begins: it reads a case from standard input (a line of JSON) and writes
what it took to standard output. It ends when its standard input does, that is, with the process that asked it.

With `describe DEVICE` for arguments it writes the device's environment only; with `serve` it forks processes that do the one or the other.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import InputError, MeasurementError, MissingError, one_line
from ..spec.hardware import card_that_torch_names, host_memory
from ..step.instants import Instant
from ..step.kernels import runs_sdpa
from ..step.recipe import Recipe
from ..tracing import cache
from ..tracing.fsdp import mesh_of, shard_model
from ..tracing.kernels import STAND_INS, real_implementation
from ..tracing.tracer import attention_of
from ..train.step import NO_HOST_MEMORY, TrainingStep, build_model, read_settings
from ..units import format_gib
from .allocations import managed_bytes, record_allocations, record_step, resident_bytes, storage_bytes
from .instant_hooks import Mark, Trained, marking
from .launch import read_launch
from .measurement import FAILED, OK, OUT_OF_MEMORY, PHASES, REFUSED, Case, Figures, MeasuredPeak


def read_environment(device: str) -> dict[str, Any]:
    """Facts that figures depend on beside the case. Raises MeasurementError where there is no such device."""
    versions = cache.versions()
    libraries = {
        "python": platform.python_version(),
        "torch": versions["torch"],
        "transformers": versions["transformers"],
    }
    if device == "cpu":
        return {
            "card": "cpu",
            "total_bytes": host_memory(),
            "driver": None,
            "allocator": "",
            "threads": torch.get_num_threads(),
            **libraries,
        }
    check_cuda()
    torch.cuda.set_device(local_rank())
    properties = torch.cuda.get_device_properties(local_rank())
    return {
        "card": properties.name,
        "total_bytes": properties.total_memory,
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "sdpa": _sdpa_kernel(),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or "",
        **libraries,
    }


def check_cuda() -> None:
    if not torch.cuda.is_available():
        raise MeasurementError(
            "no CUDA device that torch can use.\n--device cpu measures the same step on the CPU, with its own kernels."
        )


def _driver_version() -> str | None:
    """The version of the NVIDIA driver, as NVML tells it."""
    with suppress(OSError, AttributeError):
        nvml, buffer = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(buffer, ctypes.c_uint(96)) == 0:
            return buffer.value.decode()
    return None


def _sdpa_kernel(device: str = "cuda") -> str:
    """The kernel that scaled_dot_product_attention chooses for causal attention in bf16."""
    query = torch.ones(1, 1, 128, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    names = {kernel.value: name.lower() for name, kernel in SDPBackend.__members__.items()}
    with suppress(AttributeError):  # the question is not among torch's public functions
        return names.get(torch._fused_sdp_choice(query, query, query, is_causal=True), "unknown")
    return "unknown"


def local_rank() -> int:
    """The device of this rank, of those that it sees."""
    launch = read_launch()
    return launch.local_rank % max(1, torch.cuda.device_count()) if launch is not None else 0


# ---- one step -------------------------------------------------------------------------------------------------------------


def measure_here(case: Case) -> Figures:
    """Run the case's steps on its device, as a rank among others when a process group is there. Raises what torch raises."""
    with _named_kernel(case.recipe):
        return _measure_step(case)


def _named_kernel(recipe: Recipe) -> AbstractContextManager[None]:
    """Within the context scaled_dot_product_attention has the kernel only that a recipe names."""
    stand_in = STAND_INS.get(recipe.attention)  # none: sdpa, which chooses itself
    return sdpa_kernel(stand_in.backend) if stand_in is not None and stand_in.backend is not None else nullcontext()


def _measure_step(case: Case) -> Figures:
    cuda = case.device == "cuda"
    workspace = _prepare_cuda(case) if cuda else None
    if case.trainer is not None:
        return _measure_trainer(case, workspace)
    step = TrainingStep(_build_model(case), case.recipe, case.seq_len)
    loss = step.run()  # the first makes the optimizer's states
    seconds = tuple(_time_step(step, cuda) for _ in range(case.steps))
    instants, phases = _watch_on_cuda(step) if cuda else _watch_on_cpu(step)
    instants, phases = (_with_managed(peaks, managed_bytes(step)) for peaks in (instants, phases))
    _check_limit_of_cpu(case, instants)
    static = resident_bytes(step)
    return Figures(static, instants, phases, seconds, float(loss), _bytes_beside_tensors() if cuda else None, workspace)


def _with_managed(peaks: dict[str, MeasuredPeak], managed: int) -> dict[str, MeasuredPeak]:
    """Peaks with tensors that are in managed memory all the time, which torch's allocator does not count."""
    return {name: peak._replace(allocated=peak.allocated + managed) for name, peak in peaks.items()}


def _measure_trainer(case: Case, workspace: int | None) -> Figures:
    """Steps of transformers' Trainer. Peaks are of all steps together: none is higher in the first, which has no optimizer states yet."""
    from .trainers import Watch, train  # accelerate, which few cases need

    cuda, model = case.device == "cuda", _build_model(case)
    static = sum(storage_bytes([*model.parameters(), *model.buffers()]).values())
    begun = 0.0
    seconds: list[float] = []
    losses: list[float] = []

    def step_begins(_step: int) -> None:
        nonlocal begun
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()

    def step_ends(step: int) -> None:
        if cuda:
            torch.cuda.synchronize()
        if step:
            seconds.append(time.perf_counter() - begun)

    def run(mark: Mark) -> None:
        with marking(Trained(model, case.recipe), mark) as pass_begins:
            losses.append(
                train(model, case.recipe, case.seq_len, 1 + case.steps, Watch(step_begins, pass_begins, step_ends))
            )

    if cuda:
        counters = _PeakCounters()
        run(counters)
        counters("")
        instants = counters.peaks
    else:
        allocations = record_allocations(run)
        allocations.resident = static
        instants = {name: MeasuredPeak(size) for name, size in allocations.peaks().items() if name}
        _check_limit_of_cpu(case, instants)
    phases = {
        phase: max((peak for name, peak in instants.items() if Instant(name).phase == phase), key=lambda p: p.allocated)
        for phase in PHASES
    }
    context = _bytes_beside_tensors() if cuda else None
    return Figures(static, instants, phases, tuple(seconds), losses[0], context, workspace)


def _check_limit_of_cpu(case: Case, instants: dict[str, MeasuredPeak]) -> None:
    """Nothing limits a process's tensors on a CPU: the peak is compared. Raises MemoryError."""
    peak = max(peak.allocated for peak in instants.values())
    if case.device == "cpu" and case.limit is not None and peak > case.limit:
        raise MemoryError(f"the peak of {format_gib(peak)} is more than {format_gib(case.limit)}")


def _build_model(case: Case) -> PreTrainedModel:
    settings = read_settings(case.config, whole=bool(case.recipe.images))
    attention = real_attention(case.recipe, settings, case.device)
    device = f"cuda:{local_rank()}" if case.device == "cuda" else case.device
    if not case.recipe.sharded:
        return build_model(settings, case.recipe, attention, device)
    model = build_model(settings, case.recipe, attention, "meta")  # no card need hold it whole
    shard_model(model, case.recipe, mesh_of(case.device, case.recipe))
    model.to_empty(device=device)
    with torch.no_grad():
        model.initialize_weights()
    return model


def real_attention(recipe: Recipe, settings: PreTrainedConfig, device: str) -> str:
    """attn_implementation for kernels that run; the trace has stand-ins for them."""
    if not runs_sdpa(recipe.attention):
        return STAND_INS[recipe.attention].real
    return real_implementation(attention_of(recipe, settings, device))


def _time_step(step: TrainingStep, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()  # what earlier steps left to do
    started = time.perf_counter()
    step.run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


WatchedPeaks = tuple[dict[str, MeasuredPeak], dict[str, MeasuredPeak]]


def _watch_on_cpu(step: TrainingStep) -> WatchedPeaks:
    """Watch a step by torch's profiler, which sees every allocation. Between ranks the least of a few steps: gloo's thread may hold on to a
    finished collective's buffers for a moment."""
    peaks_of_runs = [record_step(step).peaks() for _ in range(3 if step.recipe.gpus > 1 else 1)]
    instants = {name: min(peaks[name] for peaks in peaks_of_runs) for name in peaks_of_runs[0]}
    return {name: MeasuredPeak(size) for name, size in instants.items()}, {
        phase: MeasuredPeak(size) for phase, size in max_by_phase(instants).items()
    }


def max_by_phase(instants: dict[str, int]) -> dict[str, int]:
    peaks: dict[str, int] = {}
    for name, size in instants.items():
        phase = Instant(name).phase
        peaks[phase] = max(size, peaks.get(phase, 0))
    return peaks


def _bytes_beside_tensors() -> int:
    """Bytes of the card in use beside what torch's allocator has reserved."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _prepare_cuda(case: Case) -> int:
    """Limits the process where the case does. Gives the bytes of cuBLAS' workspaces: of the handle of this thread, and of that of
    autograd's."""
    torch.cuda.set_device(local_rank())
    before = torch.cuda.memory_allocated()
    _multiply_and_attend()
    workspaces = torch.cuda.memory_allocated() - before
    if case.limit is not None:
        total = torch.cuda.mem_get_info()[1]
        context = card_that_torch_names(
            torch.cuda.get_device_name(), total
        ).gpu.context_bytes  # as predictions have it: kernels are yet to be loaded
        share = (case.limit - max(context, _bytes_beside_tensors())) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)))
    return workspaces


def _multiply_and_attend() -> None:
    """A pass forward and back of what brings libraries in: cuBLAS, cuDNN, and between ranks NCCL. Leaves no tensor."""
    square = torch.ones(1, 1, 128, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(square @ square, square, square, is_causal=True).sum().backward()
    if dist.is_initialized():
        dist.all_reduce(torch.ones(1, device="cuda"))
    torch.cuda.synchronize()


class _PeakCounters:
    """Peaks of whatever is named, one after the other, from the caching allocator's own counters. They count on the host, when
    a tensor is made: nothing needs to be waited for."""

    def __init__(self) -> None:
        self.peaks: dict[str, MeasuredPeak] = {}
        self.name = ""

    def __call__(self, name: str) -> None:
        """End what was named before; `name` begins."""
        if self.name:
            now, before = (
                MeasuredPeak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()),
                self.peaks.get(self.name, MeasuredPeak(0, 0)),
            )
            self.peaks[self.name] = MeasuredPeak(
                max(now.allocated, before.allocated), max(now.reserved or 0, before.reserved or 0)
            )
        torch.cuda.reset_peak_memory_stats()
        self.name = name


def _watch_on_cuda(step: TrainingStep) -> WatchedPeaks:
    """One step for the instants, one for the phases, whose end is waited for."""
    peaks = _PeakCounters()
    with marking(step, peaks) as begin:
        step.run(begin)
    peaks("")
    instants = peaks.peaks
    device: dict[str, int] = {}
    peaks = _PeakCounters()

    def begin_phase(name: str) -> None:
        torch.cuda.synchronize()
        if peaks.name:
            free, total = torch.cuda.mem_get_info()
            device[peaks.name] = max(total - free, device.get(peaks.name, 0))
        peaks(name)

    step.run(begin_phase)
    begin_phase("")
    return instants, {name: peak._replace(device=device[name]) for name, peak in peaks.peaks.items()}


# ---- the process ------------------------------------------------------------------------------------------------------------


_NO_MEMORY_WORDS = (
    NO_HOST_MEMORY,
    "CUDA error: out of memory",  # loading a kernel
    "ALLOC_FAILED",
    "when calling `cublasCreate",  # cuBLAS and cuDNN
)
"""Words of RuntimeErrors that tell of memory: only torch's allocator for cards has an error of its own."""


def attempt_step(measure_step: Callable[[], Figures]) -> dict[str, Any]:
    """{outcome, error, figures} of one rank."""
    try:
        return {"outcome": OK, "error": "", "figures": asdict(measure_step())}
    except InputError as e:
        return {"outcome": REFUSED, "error": str(e), "figures": None}
    except (torch.OutOfMemoryError, MemoryError) as e:
        return {"outcome": OUT_OF_MEMORY, "error": one_line(e, 300), "figures": None}
    except RuntimeError as e:
        no_memory = any(words in str(e) for words in _NO_MEMORY_WORDS)
        return {
            "outcome": OUT_OF_MEMORY if no_memory else FAILED,
            "error": f"{type(e).__name__}: {one_line(e, 300)}",
            "figures": None,
        }
    except Exception as e:  # noqa: BLE001  a model's code, or a kernel, raises what it likes
        return {"outcome": FAILED, "error": f"{type(e).__name__}: {one_line(e, 300)}", "figures": None}


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(3)


def _offer_to_be_killed() -> None:
    """When the machine runs out of memory, let it be this process that the kernel ends, not another."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def main() -> None:
    if sys.argv[1:] == ["serve"]:
        serve()
    answer(sys.argv[1:])


def answer(arguments: Sequence[str]) -> NoReturn:
    """Write what is asked for to standard output, and end the process."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no part of the answer
    reply: dict[str, Any]
    if arguments[:1] == ["describe"]:
        try:
            reply = read_environment(arguments[1])
        except (MeasurementError, MissingError) as e:
            reply = {"error": str(e)}
    else:
        case = Case.from_data(json.loads(sys.stdin.readline()))
        threading.Thread(target=_end_with_parent, daemon=True).start()
        _offer_to_be_killed()
        reply = {"environment": read_environment(case.device), **attempt_step(lambda: measure_here(case))}
        reply["retries"] = _retries(case)
    output.write(json.dumps(reply) + "\n")
    output.flush()
    os._exit(0)  # tearing down CUDA and torch takes seconds


def _retries(case: Case) -> int:
    """How often the device had no room for a segment, so that the allocator gave back what it held and asked again."""
    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0)) if case.device == "cuda" else 0


# ---- the process that forks others ------------------------------------------------------------------------------------------


def serve() -> NoReturn:
    """Fork a process for each message on standard input, a socket, that asks for one, and end with it. torch and transformers are imported
    here once; CUDA is not touched, as what a process has of it is lost in those that it forks."""
    requests = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asks hears it, and ends those that measure
    if torch.cuda.is_initialized():
        _send(
            requests,
            error="CUDA was initialised by an import (torch.cuda.is_initialized), so it is lost in forked processes",
        )
        os._exit(0)
    _send(requests, ok=True)
    while True:
        message, ends, _, _ = socket.recv_fds(requests, 1 << 16, 3)
        if not message:
            os._exit(0)
        request = json.loads(message)
        if "wait" in request:
            _send(requests, ok=_wait_for(request["wait"], request["seconds"]))
        else:
            _send(requests, ok=_fork(request["begin"], ends, requests))


def _send(requests: socket.socket, **reply: Any) -> None:
    with suppress(OSError):  # nobody listens any more, which the next message tells
        requests.send(json.dumps(reply).encode())


def _fork(arguments: Sequence[str], ends: Sequence[int], requests: socket.socket) -> int:
    """The process id of a process whose standard input, output and errors are `ends`."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            requests.close()
            for standard, end in enumerate(ends):
                os.dup2(end, standard)
                os.close(end)
            answer(arguments)
        except BaseException:  # noqa: BLE001  this process must not go on as another
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)
    for end in ends:
        os.close(end)
    return pid


def _wait_for(pid: int, seconds: float) -> int:
    """Exit code of a process that was forked here, less than 0: of a signal. It is killed when it takes longer than that to end."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
