"""Tokens per second and peak memory of a training step: plain, checkpoint, mst, and what other libraries offer.

    python bench/runtime.py                                  # on the CPU: a llama of 88M parameters, some 20 minutes
    python bench/runtime.py --quick                          # one length and few rounds: 3 minutes
    python bench/runtime.py --lengths 512,4k --ways checkpoint,mst --rounds 9 --json out.json
    python bench/runtime.py --device cuda --model llama3.1-8b --layers 8 --lengths 8k,32k,128k

Every way at every length is a process of its own, so that a peak is its own: that of torch's allocator, in a step that is not
timed. On the CPU the ways take turns, a step each per round, and ratios are those within a round; with one thread (the
default) the clock is the process's CPU time, so that other programs count as little as can be. A GPU holds one way at a time.

The claim, on the CPU: mst and mst-layer with the chunks that are recommended reach 95% of checkpoint's tokens per second in the median
round, at every length; or exit code 1. Chunks that are given are shown beside them: a product of few rows waits for memory, which
is why none are recommended (512 tokens in 4 and 8 chunks: 0.81 in bf16, 0.90 in fp32), and where the CPU multiplies bf16 fast
(AMX), 512 rows are few, too (2,048 tokens in 4 and 8: mst 0.84, mst-layer 0.78; recommended 1.04).

plain: no checkpoints. checkpoint: of each layer, as transformers makes them. mst: with the chunks given. mst-auto: with
those recommended. mst-offload: layer inputs on the host. mst-layer: all of a layer but attention in the chunks. The others:
checkpoint with another library's chunked MLP and loss; install it beside mstplan to have it compared. All must have
checkpoint's loss and gradient norm.
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
from peers import WAYS, Absent, build
from torch.profiler import ProfilerActivity, profile

from mstplan import parse_length
from mstplan.units import format_gib

CLAIMED, CLAIM = ("mst-auto", "mst-layer-auto"), 0.95
OUT_OF_MEMORY = "out of memory"


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
    ratios: list[float] = field(default_factory=list)  # to checkpoint's speed, round by round
    allocated: int = 0
    reserved: int = 0
    chunks: tuple[int, int] | None = None
    check: tuple[float, float] | None = None
    why: str = ""

    def speeds(self) -> list[float]:
        return [self.job.seq_len / s for s in self.seconds]


class Training:
    """A model, its optimizer and one sequence, in the process of one way."""

    def __init__(self, job: Job):
        torch.set_num_threads(job.threads)
        torch.manual_seed(0)
        self.device = torch.device(job.device)
        self.clock = time.process_time if job.threads == 1 and job.device == "cpu" else time.perf_counter
        self.synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        self.model = build(job.model, job.layers, job.device, getattr(torch, job.dtype))
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
        hidden = torch.empty(*self.ids.shape, 1, device=self.device, dtype=self.model.dtype)
        settings = getattr(self.model, "_mstplan", None)
        counts = (
            (settings.counts.chunks_for(hidden).mlp, settings.counts.chunks_for(hidden).loss)
            if settings is not None
            else None
        )
        return {"check": (loss.item(), norm.item()), "chunks": counts}

    def step(self) -> float:
        """Seconds."""
        self.synchronize()
        started = self.clock()
        self.loss(self.ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.synchronize()
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
        states = [
            value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        storages = [t.untyped_storage() for t in (*self.model.parameters(), *self.model.buffers(), *states, self.ids)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def serve(pipe: Connection, job: Job) -> None:
    """Do what is asked for through the pipe; an error is an answer too, and the last one."""
    os.dup2(2, 1)  # what libraries print does not belong into the table
    try:
        training = Training(job)
        for request in iter(pipe.recv, "stop"):
            pipe.send((getattr(training, request)(), ""))
    except Exception as e:  # noqa: BLE001 - one line in the table, never the end of the others
        full = isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)
        kind = "" if isinstance(e, Absent) else f"{type(e).__name__}: "
        pipe.send((None, OUT_OF_MEMORY if full else (kind + str(e)).splitlines()[0][:120]))


class Worker:
    """The process of one way, and the row that it fills."""

    def __init__(self, job: Job):
        self.row = Row(job)
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
            answer, self.row.why = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode  # -9: killed, as the system does when memory is full
            answer, self.row.why = None, OUT_OF_MEMORY if code == -9 else f"its process ended with {code}"
        return answer

    def stop(self) -> None:
        if not self.row.why:
            self.pipe.send("stop")
        self.process.join()


def measure(jobs: list[Job], rounds: int, together: bool) -> list[Row]:
    """together: the ways take turns, one step each."""
    rows = []
    for group in [jobs] if together else [[job] for job in jobs]:
        workers = [Worker(job) for job in group]
        for n in range(rounds):
            for worker in workers if n % 2 == 0 else reversed(workers):
                worker.row.seconds += [seconds] if (seconds := worker.ask("step")) is not None else []
        for worker in workers:
            worker.stop()
        rows += [worker.row for worker in workers]
    ran = {row.job.way: row for row in rows if not row.why}
    for row in ran.values() if "checkpoint" in ran else []:
        base = ran["checkpoint"]
        row.ratios = [theirs / mine for mine, theirs in zip(row.seconds, base.seconds, strict=True)]
        if any(
            not abs(mine - theirs) <= 0.02 * abs(theirs) for mine, theirs in zip(row.check, base.check, strict=True)
        ):
            row.why = f"trains something else: loss and gradient norm {row.check}, those of checkpoint {base.check}"
    return rows


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Of few values the least, the median and the largest."""
    low, high = statistics.quantiles(values, n=4)[::2] if len(values) > 3 else (min(values), max(values))
    return low, statistics.median(values), high


def show(rows: list[Row]) -> None:
    base = next((row.allocated for row in rows if row.job.way == "checkpoint"), 0)  # bytes
    print(f"\n{rows[0].job.seq_len:,} tokens")
    print(
        f"{'':20s} {'chunks':>7s} {'tokens/s (quartiles)':>29s} {'x checkpoint (quartiles)':>27s} {'peak':>10s} {'x':>5s}"
    )
    for row in rows:
        if row.why:
            print(f"{row.job.way:20s}         {row.why}")
            continue
        speed = "{1:,.1f} ({0:,.1f} to {2:,.1f})".format(*quartiles(row.speeds()))  # median (quartiles)
        ratio = "{1:.3f} ({0:.3f} to {2:.3f})".format(*quartiles(row.ratios)) if row.ratios else ""
        chunks = "{}/{}".format(*row.chunks) if row.chunks else ""
        peak = f"{format_gib(row.allocated):>10s}" + (f" {row.allocated / base:5.2f}" if base else "")
        reserved = f"  reserved {format_gib(row.reserved)}" if row.reserved else ""
        print(f"{row.job.way:20s} {chunks:>7s} {speed:>29s} {ratio:>27s} {peak}{reserved}", flush=True)


def verdict(rows: list[Row]) -> bool:
    """Are the recommended chunks within 5% of checkpoint? They are not where they cannot run."""
    good, compared = True, [row for row in rows if row.job.way in CLAIMED and (row.ratios or row.why)]
    if not compared:
        print("the claim was not checked: that takes checkpoint and mst-auto or mst-layer-auto")
    for row in compared:
        ratio = 0 if row.why else statistics.median(row.ratios)
        kept, reached = ratio >= CLAIM, row.why or f"{ratio:.3f} of checkpoint's speed"
        print(f"{'PASS' if kept else 'FAIL'}: {row.job.way}: {reached} (claim: at least {CLAIM})", flush=True)
        good &= kept
    return good


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
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    clock = "CPU time" if options.threads == 1 else "wall time"
    device = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{cpu}, {options.threads} thread(s), {clock}"
    )
    return {
        "device": device,
        "rounds": options.rounds,
        "versions": {name: installed[name] for name in wanted if name in installed},
    }


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", help="tokens, such as 512,4k (default: 2048,4096; on CUDA 4k,16k,64k,128k)")
    parser.add_argument("--rounds", type=int, help="timed steps of each way (default: 7)")
    parser.add_argument("--ways", default=",".join(WAYS), help="some of them (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--model", help="a shipped name (mstplan models), or small (default: small; on CUDA llama3.1-8b)"
    )
    parser.add_argument("--layers", type=int, help="another number of layers than the model's (default on CUDA: 8)")
    parser.add_argument(
        "--mlp-chunks", type=int, default=4, help="of mst, mst-offload and the others (default: %(default)s)"
    )
    parser.add_argument("--loss-chunks", type=int, default=8, help="likewise (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of the CPU (default: 1; more wait for each other where other programs run)",
    )
    parser.add_argument("--quick", action="store_true", help="2,048 tokens, four layers, four rounds, where not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.ways = options.ways.split(",")
    options.lengths = options.lengths or ("2048" if options.quick else "4k,16k,64k,128k" if on_gpu else "2048,4096")
    options.rounds = options.rounds or (4 if options.quick else 7)
    options.model = options.model or ("llama3.1-8b" if on_gpu else "small")
    options.layers = options.layers or (4 if options.quick else 8 if on_gpu else None)
    if unknown := sorted(set(options.ways) - set(WAYS)):
        parser.error(f"unknown ways: {', '.join(unknown)}. Known: {', '.join(WAYS)}")
    return options


def main() -> int:
    options = read_options()
    here = place(options)
    print(", ".join(f"{name} {number}" for name, number in here["versions"].items()))
    print(f"{here['device']}; {options.model}, {options.dtype}, batch 1, fused AdamW, {options.rounds} rounds")
    rows, good = [], True
    shared = {name: getattr(options, name) for name in Job.__annotations__ if hasattr(options, name)}
    for length in map(parse_length, options.lengths.split(",")):
        jobs = [Job(way=way, seq_len=length, **shared) for way in options.ways]
        found = measure(jobs, options.rounds, together=options.device == "cpu")
        show(found)
        good &= options.device != "cpu" or verdict(found)
        rows += found
    if options.json:
        options.json.write_text(
            json.dumps({"schema_version": 1, **here, "rows": [as_json(row) for row in rows]}, indent=1) + "\n",
            encoding="utf-8",
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
