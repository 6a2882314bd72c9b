"""Tokens per second and peak memory of a training step: plain, checkpoint, mst, mst-offload and other libraries.

    python bench/runtime.py                                  # on the CPU: a llama of 88M parameters, several minutes
    python bench/runtime.py --quick                          # less of everything, a minute
    python bench/runtime.py --lengths 512,4096 --rounds 9 --json out.json
    python bench/runtime.py --device cuda --model llama3.1-8b --layers 8 --lengths 8k,32k,128k

Every way at every length is a process of its own, so that a peak is its own. Peaks are those of torch's allocator, from a step
that is not timed. On the CPU the ways take turns, a step each per round, and ratios are those within a round, so that whatever
slows the machine for a while slows all; a GPU holds one way at a time. The claim, on the CPU: mst reaches 95% of
checkpoint's tokens per second, in the median round, at every length. Exit code 1 when it does not.

Ways: plain (no checkpoints); checkpoint (each layer, as transformers does it); mst (checkpoint, with the given number of chunks);
mst-auto (as recommended); mst-offload (layer inputs on the host); the rest are checkpoint with what another library offers. Their
losses and gradients are compared with those of checkpoint.
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
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peers import PEERS, Absent, Loss, checkpointed
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from mstplan import parse_length, profiles
from mstplan.train import minisequence
from mstplan.units import format_gib

WAYS = ("plain", "checkpoint", "mst", "mst-auto", "mst-offload", *PEERS)
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
    """What came out. chunks: MLP, loss. seconds: of each round's step. Peaks in bytes. why: it gave no figures."""

    job: Job
    chunks: tuple[int, int] | None = None
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    reserved: int = 0
    check: tuple[float, float] | None = None
    why: str = ""
    failed: bool = False
    ratios: list[float] = field(default_factory=list)

    def tokens_per_second(self) -> list[float]:
        return [self.job.seq_len / seconds for seconds in self.seconds]


# ---- in the process of one way ----------------------------------------------------------------------------------------


class Training:
    """A model, its optimizer and one batch."""

    def __init__(self, job: Job):
        torch.set_num_threads(job.threads)
        torch.manual_seed(0)
        self.device = torch.device(job.device)
        self.model = _build(job)
        self.loss = _way(self.model, job)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.ids = torch.randint(0, self.model.config.vocab_size, (1, job.seq_len), device=self.device)

    def first(self) -> dict[str, Any]:
        """The first step makes the optimizer's states. Loss and norm of the gradients say whether all ways train the same."""
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
        started = time.perf_counter()
        self.loss(self.ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._synchronize()
        return time.perf_counter() - started

    def peak(self) -> dict[str, int]:
        """Bytes, of torch's allocator."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        live = peak = sum(storage.nbytes() for storage in self._held())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self.step()
        changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        for change in sorted(changes, key=lambda event: event.start_ns()):
            live += change.nbytes()
            peak = max(peak, live)
        return {"peak": peak, "reserved": 0}

    def _held(self) -> list[torch.UntypedStorage]:
        """What lives between steps."""
        states = [v for state in self.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *states, self.ids]
        return list({t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _build(job: Job) -> nn.Module:
    path = profiles.ROOT / "models" / f"{job.model}.json"
    config = SMALL if job.model == "small" else json.loads(path.read_text(encoding="utf-8"))
    changes = {"use_cache": False, **({"num_hidden_layers": job.layers} if job.layers else {})}
    made = AutoConfig.for_model(**{**config, **changes})
    with torch.device(job.device):
        return AutoModelForCausalLM.from_config(made, dtype=getattr(torch, job.dtype)).train()


def _way(model: nn.Module, job: Job) -> Loss:
    if job.way in PEERS:
        return PEERS[job.way](model, job.mlp_chunks, job.loss_chunks)
    if job.way == "checkpoint":
        return checkpointed(model)
    if job.way != "plain":
        chunks = (None, None) if job.way == "mst-auto" else (job.mlp_chunks, job.loss_chunks)
        minisequence(model, mlp_chunks=chunks[0], loss_chunks=chunks[1], checkpoint="layer", offload=job.way == "mst-offload")
    return lambda ids: model(input_ids=ids, labels=ids).loss


def serve(pipe: Connection, job: Job) -> None:
    """Does what is asked for through the pipe; an error is an answer too, and the last one."""
    try:
        training = Training(job)
        for request in iter(pipe.recv, "stop"):
            pipe.send((getattr(training, request)(), "", False))
    except Absent as e:
        pipe.send((None, str(e), False))
    except torch.OutOfMemoryError:
        pipe.send((None, "out of memory", False))
    except Exception as e:  # noqa: BLE001 - one line in the table, never the end of the others
        full = "allocate memory" in str(e)
        pipe.send((None, "out of memory" if full else f"{type(e).__name__}: {str(e).splitlines()[0][:90]}", not full))


# ---- all of them --------------------------------------------------------------------------------------------------------


class Worker:
    """The process of one way and the row that it fills."""

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
            answer, self.row.why = None, "killed (out of memory?)" if self.process.exitcode == -9 else "died"
            self.row.failed = self.process.exitcode != -9
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
    base = next((row for row in rows if row.job.way == "checkpoint"), None)
    for row in rows:
        _compare(row, base)
    return rows


def _compare(row: Row, base: Row | None) -> None:
    if base is None or row.why or base.why:
        return
    row.ratios = [theirs / mine for mine, theirs in zip(row.seconds, base.seconds, strict=True)]
    for mine, theirs, what in zip(row.check, base.check, ("loss", "norm of the gradients"), strict=True):
        if abs(mine - theirs) > 0.02 * abs(theirs):
            row.why, row.failed = f"trains something else: {what} {mine:.4g}, checkpoint's is {theirs:.4g}", row.job.way not in PEERS


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) > 3:
        low, middle, high = statistics.quantiles(values, n=4)
        return low, middle, high
    return min(values), statistics.median(values), max(values)


def show(rows: list[Row]) -> None:
    base = next((row.peak for row in rows if row.job.way == "checkpoint"), 0)
    print(f"\n{rows[0].job.seq_len:,} tokens\n{'':31s}{'chunks':>7s} {'tokens/s (quartiles)':>27s} {'x checkpoint (quartiles)':>26s} {'peak':>11s} {'x':>5s}")
    for row in rows:
        if row.why:
            print(f"{row.job.way:31s}   {row.why}")
            continue
        low, middle, high = quartiles(row.tokens_per_second())
        chunks = "{}/{}".format(*row.chunks) if row.chunks else ""
        ratio = "{1:12.3f} ({0:.3f} to {2:.3f})".format(*quartiles(row.ratios)) if row.ratios else ""
        share = f"{row.peak / base:5.2f}" if base else ""
        reserved = f"  reserved {format_gib(row.reserved)}" if row.reserved else ""
        print(f"{row.job.way:31s}{chunks:>7s} {middle:10,.1f} ({low:,.1f} to {high:,.1f}) {ratio:>26s} {format_gib(row.peak):>11s} {share}{reserved}", flush=True)


def verdict(rows: list[Row]) -> bool:
    """Is mst within 5% of checkpoint?"""
    good = True
    for row in (row for row in rows if row.job.way in CLAIMED and row.ratios and not row.why):
        ratio = statistics.median(row.ratios)
        good &= ratio >= CLAIM
        print(f"{'PASS' if ratio >= CLAIM else 'FAIL'}: {row.job.way} at {row.job.seq_len:,} tokens: {ratio:.3f} of checkpoint (claim: at least {CLAIM})")
    return good


def as_json(row: Row) -> dict[str, Any]:
    def spread(values: list[float], unit: str) -> dict[str, Any] | None:
        return dict(zip(("q1", "median", "q3"), quartiles(values), strict=True), unit=unit, rounds=len(values)) if values else None

    figures = {"speed": spread(row.tokens_per_second(), "tokens/s"), "speed_to_checkpoint": spread(row.ratios, "1")}
    memory = {"unit": "bytes", "allocated": row.peak, "reserved": row.reserved or None} if row.peak else None
    return {**asdict(row.job), "chunks": row.chunks, **figures, "peak": memory, "why": row.why or None}


def facts(options: argparse.Namespace) -> dict[str, Any]:
    found = {"python": platform.python_version()}
    for package in ("mstplan", "torch", "transformers", "deepspeed", "liger_kernel"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{names[0] if names else platform.machine()}, {options.threads} threads"
    return {"device": name, "cores": os.cpu_count(), "load": os.getloadavg()[0], "versions": found}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--lengths", help="tokens, separated by commas: 512,4k (default: 512,1024,2048; on CUDA 4k to 128k)")
    parser.add_argument("--rounds", type=int, help="timed steps of each way (default: 7)")
    parser.add_argument("--ways", help=f"some of them, separated by semicolons: {'; '.join(WAYS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--model", help="a shipped name (mstplan models), or small (default: small; on CUDA llama3.1-8b)")
    parser.add_argument("--layers", type=int, help="fewer than the model has (default: all; on CUDA 8)")
    parser.add_argument("--mlp-chunks", type=int, default=4, help="of mst, mst-offload and the peers (default: %(default)s)")
    parser.add_argument("--loss-chunks", type=int, default=8, help="likewise (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s: several wait for each other where other programs run)")
    parser.add_argument("--quick", action="store_true", help="three layers, 512 tokens, three rounds, unless given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.lengths = options.lengths or ("512" if options.quick else "4k,16k,64k,128k" if on_gpu else "512,1024,2048")
    options.rounds = options.rounds or (3 if options.quick else 7)
    options.model = options.model or ("llama3.1-8b" if on_gpu else "small")
    options.layers = options.layers or (3 if options.quick else 8 if on_gpu else None)
    options.ways = [way.strip() for way in options.ways.split(";")] if options.ways else list(WAYS)
    if unknown := set(options.ways) - set(WAYS):
        parser.error(f"unknown ways: {'; '.join(unknown)}. Known: {'; '.join(WAYS)}")
    return options


def main() -> int:
    options = read_options()
    known = facts(options)
    print(", ".join(f"{name} {number}" for name, number in known["versions"].items()))
    print(f"{known['device']}, {known['cores']} cores, load {known['load']:.1f}; {options.model}, {options.dtype}, {options.rounds} rounds, batch 1, AdamW (fused)")
    rows, good = [], True
    for length in map(parse_length, options.lengths.split(",")):
        common = (length, options.device, options.dtype, options.model, options.layers, options.mlp_chunks, options.loss_chunks, options.threads)
        found = measure([Job(way, *common) for way in options.ways], options.rounds, together=options.device == "cpu")
        show(found)
        if options.device == "cpu":
            good &= verdict(found)
        good &= not any(row.failed for row in found)
        rows += found
    if options.json:
        options.json.write_text(json.dumps({"schema_version": 1, **known, "rows": [as_json(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
