"""Tokens per second and peak memory of a training step: plain, checkpoint, mst, and what other libraries offer.

    python bench/runtime.py                                  # on the CPU: a llama of 88M parameters, some 15 minutes
    python bench/runtime.py --quick                          # one length and few rounds: 2 minutes
    python bench/runtime.py --lengths 512,4k --ways checkpoint,mst --rounds 9 --json out.json
    python bench/runtime.py --device cuda --model llama3.1-8b --layers 8 --lengths 8k,32k,128k

Every way at every length is a process of its own, so that a peak is its own: that of torch's allocator, in a step that is not
timed. On the CPU the ways take turns, a step each per round, and ratios are those within a round; with one thread (the
default) the clock is the process's CPU time, so that other programs count as little as can be. A GPU holds one way at a time.

The claim, on the CPU: mst reaches 95% of checkpoint's tokens per second in the median round, at every length. Exit code 1 when
it does not.

plain: no checkpoints. checkpoint: of each layer, as transformers makes them. mst: with the chunks given. mst-auto: with those
recommended. mst-offload: layer inputs on the host. The others: checkpoint with another library's chunked MLP and loss; install it
beside mstplan to have it compared. All must have checkpoint's loss and gradient norm.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peers import WAYS, Absent
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from mstplan import parse_length, profiles
from mstplan.units import format_gib

CLAIMED, CLAIM = ("mst", "mst-auto"), 0.95
SMALL = {
    "model_type": "llama", "hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 10, "num_attention_heads": 10,
    "num_key_value_heads": 5, "vocab_size": 32000, "max_position_embeddings": 2**17, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass
class Job:
    """One way at one length. dtype: of weights, gradients and moments. threads: of the CPU, for one operation."""

    way: str
    seq_len: int
    device: str
    dtype: str
    model: str
    layers: int | None
    mlp_chunks: int
    loss_chunks: int
    threads: int


@dataclass
class Row:
    """What came out: seconds of each round's step, peaks in bytes, chunks (MLP, loss); why there is nothing of it."""

    job: Job
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    allocated: int = 0
    reserved: int = 0
    chunks: tuple[int, int] | None = None
    check: tuple[float, float] | None = None
    why: str = ""
    failed: bool = False

    def speeds(self) -> list[float]:
        return [self.job.seq_len / seconds for seconds in self.seconds]


# ---- in the process of one way ----------------------------------------------------------------------------------------


class Training:
    """A model, its optimizer and one sequence."""

    def __init__(self, job: Job):
        torch.set_num_threads(job.threads)
        torch.manual_seed(0)
        self.device = torch.device(job.device)
        self.clock = time.process_time if job.threads == 1 and job.device == "cpu" else time.perf_counter
        self.model = _build(job)
        self.loss = WAYS[job.way](self.model, job.mlp_chunks, job.loss_chunks)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.ids = torch.randint(0, self.model.config.vocab_size, (1, job.seq_len), device=self.device)

    def first(self) -> dict[str, Any]:
        """The first step makes the optimizer's states. check: loss and norm of the gradients, the same whatever the way."""
        loss = self.loss(self.ids)
        loss.backward()
        norm = sum(weight.grad.float().square().sum() for weight in self.model.parameters()).sqrt()
        self.optimizer.step()
        self.optimizer.zero_grad()
        settings = getattr(self.model, "_mstplan", None)
        hidden = torch.empty(*self.ids.shape, 1, device=self.device, dtype=self.model.dtype)
        counts = settings.counts.of(hidden) if settings is not None else None
        return {"check": (loss.item(), norm.item()), "chunks": (counts.mlp, counts.loss) if counts is not None else None}

    def step(self) -> float:
        """Seconds."""
        self._synchronize()
        started = self.clock()
        self.loss(self.ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._synchronize()
        return self.clock() - started

    def peak(self) -> dict[str, int]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        live = peak = self._held()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self.step()
        changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        for change in sorted(changes, key=lambda event: event.start_ns()):
            live += change.nbytes()
            peak = max(peak, live)
        return {"allocated": peak}

    def _held(self) -> int:
        """Bytes that live between steps."""
        states = [value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        storages = [t.untyped_storage() for t in (*self.model.parameters(), *self.model.buffers(), *states, self.ids)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _build(job: Job) -> nn.Module:
    path = profiles.ROOT / "models" / f"{job.model}.json"
    config = SMALL if job.model == "small" else json.loads(path.read_text(encoding="utf-8"))
    changes = {"use_cache": False, **({"num_hidden_layers": job.layers} if job.layers else {})}
    with torch.device(job.device):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, **changes}), dtype=getattr(torch, job.dtype))
    return made.train()


def serve(pipe: Connection, job: Job) -> None:
    """Do what is asked for through the pipe; an error is an answer too, and the last one."""
    os.dup2(2, 1)  # what libraries print does not belong into the table
    try:
        training = Training(job)
        for request in iter(pipe.recv, "stop"):
            pipe.send((getattr(training, request)(), "", False))
    except Absent as e:
        pipe.send((None, str(e), False))
    except Exception as e:  # noqa: BLE001 - one line in the table, never the end of the others
        full = isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)
        why = "out of memory" if full else f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:90]}"
        pipe.send((None, why, not full and job.way.startswith("mst")))


# ---- all of them --------------------------------------------------------------------------------------------------------


class Worker:
    """The process of one way, and the row that it fills."""

    def __init__(self, job: Job):
        self.row = Row(job)

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.row.job), daemon=True)
        self.process.start()
        theirs.close()
        for request in ("first", "peak"):
            for name, value in (self.ask(request) or {}).items():
                setattr(self.row, name, value)

    def ask(self, request: str) -> Any:
        """None once it has failed."""
        if self.row.why:
            return None
        try:
            self.pipe.send(request)
            answer, self.row.why, self.row.failed = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            answer, self.row.why = None, f"its process ended with {self.process.exitcode} (-9: killed, as when memory is full)"
        return answer

    def step(self) -> None:
        if (seconds := self.ask("step")) is not None:
            self.row.seconds.append(seconds)

    def stop(self) -> None:
        if not self.row.why:
            self.pipe.send("stop")
        self.process.join()


def measure(jobs: list[Job], rounds: int, together: bool) -> list[Row]:
    """together: the ways take turns."""
    workers = [Worker(job) for job in jobs]
    for group in [workers] if together else [[worker] for worker in workers]:
        for worker in group:
            worker.start()
        for n in range(rounds):
            for worker in group if n % 2 == 0 else reversed(group):
                worker.step()
        for worker in group:
            worker.stop()
    rows = [worker.row for worker in workers]
    base = next((row for row in rows if row.job.way == "checkpoint" and not row.why), None)
    for row in rows if base is not None else []:
        _compare(row, base)
    return rows


def _compare(row: Row, base: Row) -> None:
    if row.why:
        return
    row.ratios = [theirs / mine for mine, theirs in zip(row.seconds, base.seconds, strict=True)]
    for mine, theirs, what in zip(row.check, base.check, ("loss", "gradient norm"), strict=True):
        if not abs(mine - theirs) <= 0.02 * abs(theirs):
            row.why = f"trains something else: {what} {mine:.4g}, checkpoint's is {theirs:.4g}"
            row.failed = row.job.way.startswith("mst")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) > 3:
        low, middle, high = statistics.quantiles(values, n=4)
        return low, middle, high
    return min(values), statistics.median(values), max(values)


def show(rows: list[Row]) -> None:
    base = next((row.allocated for row in rows if row.job.way == "checkpoint"), 0)
    print(f"\n{rows[0].job.seq_len:,} tokens")
    print(f"{'':20s} {'chunks':>7s} {'tokens/s (quartiles)':>29s} {'x checkpoint (quartiles)':>27s} {'peak':>10s} {'x':>5s}")
    for row in rows:
        if row.why:
            print(f"{row.job.way:20s}         {row.why}")
            continue
        low, middle, high = quartiles(row.speeds())
        speed = f"{middle:,.1f} ({low:,.1f} to {high:,.1f})"
        ratio = "{1:.3f} ({0:.3f} to {2:.3f})".format(*quartiles(row.ratios)) if row.ratios else ""
        chunks = "{}/{}".format(*row.chunks) if row.chunks else ""
        peak = f"{format_gib(row.allocated):>10s}" + (f" {row.allocated / base:5.2f}" if base else "")
        reserved = f"  reserved {format_gib(row.reserved)}" if row.reserved else ""
        print(f"{row.job.way:20s} {chunks:>7s} {speed:>29s} {ratio:>27s} {peak}{reserved}", flush=True)


def verdict(rows: list[Row]) -> bool:
    """Is mst within 5% of checkpoint?"""
    ratios = {row.job.way: statistics.median(row.ratios) for row in rows if row.job.way in CLAIMED and row.ratios and not row.why}
    for way, ratio in ratios.items():
        print(f"{'PASS' if ratio >= CLAIM else 'FAIL'}: {way} at {ratio:.3f} of checkpoint's speed (claim: at least {CLAIM})", flush=True)
    return all(ratio >= CLAIM for ratio in ratios.values())


def as_json(row: Row) -> dict[str, Any]:
    def spread(values: list[float], unit: str) -> dict[str, Any] | None:
        return {"unit": unit, **dict(zip(("q1", "median", "q3"), quartiles(values), strict=True))} if values else None

    speed = {"speed": spread(row.speeds(), "tokens/s"), "speed_to_checkpoint": spread(row.ratios, "1")}
    peak = {"unit": "bytes", "allocated": row.allocated, "reserved": row.reserved or None} if row.allocated else None
    return {**asdict(row.job), "chunks": row.chunks, **speed, "peak": peak, "why": row.why or None}


def place(options: argparse.Namespace) -> dict[str, Any]:
    """Where this runs: device, versions, and how busy the machine was before."""
    installed = {dist.name: dist.version for dist in metadata.distributions()}
    wanted = ("mstplan", "torch", "transformers", "deepspeed", "liger-kernel", "liger_kernel")
    info = Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    processor = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, threads {options.threads}"
    device = torch.cuda.get_device_name() if options.device == "cuda" else processor
    return {"device": device, "rounds": options.rounds, "versions": {name: installed[name] for name in wanted if name in installed}}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", help="tokens, such as 512,4k (default: 512,1024,2048; on CUDA 4k,16k,64k,128k)")
    parser.add_argument("--rounds", type=int, help="timed steps of each way (default: 7)")
    parser.add_argument("--ways", default=",".join(WAYS), help="some of them (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help="a shipped name (mstplan models), or small (default: small; on CUDA llama3.1-8b)")
    parser.add_argument("--layers", type=int, help="another number of layers than the model's (default on CUDA: 8)")
    parser.add_argument("--mlp-chunks", type=int, default=4, help="of mst, mst-offload and the others (default: %(default)s)")
    parser.add_argument("--loss-chunks", type=int, default=8, help="likewise (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1; more wait for each other where other programs run)")
    parser.add_argument("--quick", action="store_true", help="1,024 tokens, four layers, four rounds, where not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.lengths = options.lengths or ("1024" if options.quick else "4k,16k,64k,128k" if on_gpu else "512,1024,2048")
    options.rounds = options.rounds or (4 if options.quick else 7)
    options.model = options.model or ("llama3.1-8b" if on_gpu else "small")
    options.layers = options.layers or (4 if options.quick else 8 if on_gpu else None)
    options.ways = options.ways.split(",")
    if unknown := sorted(set(options.ways) - set(WAYS)):
        parser.error(f"unknown ways: {', '.join(unknown)}. Known: {', '.join(WAYS)}")
    return options


def main() -> int:
    options = read_options()
    here = place(options)
    print(", ".join(f"{name} {number}" for name, number in here["versions"].items()))
    print(f"{here['device']}; {options.model}, {options.dtype}, batch 1, fused AdamW, {options.rounds} rounds")
    rows, good = [], True
    for length in map(parse_length, options.lengths.split(",")):
        shared = (options.device, options.dtype, options.model, options.layers, options.mlp_chunks, options.loss_chunks, options.threads)
        found = measure([Job(way, length, *shared) for way in options.ways], options.rounds, together=options.device == "cpu")
        show(found)
        good &= (options.device != "cpu" or verdict(found)) and not any(row.failed for row in found)
        rows += found
    if options.json:
        options.json.write_text(json.dumps({"schema_version": 1, **here, "rows": [as_json(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
