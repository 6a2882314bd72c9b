"""Cards: what torch sees of their memory, how fast they compute and copy; and the budget a training step has on one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .. import files, kept
from ..errors import HardwareError, InputError, did_you_mean, one_line, quoted
from ..kept import KeptFile
from ..profiles import ROOT, user_folder
from ..units import GIB, LEAST_MEMORY, MIB, MOST_MEMORY, format_gib
from .platform import NEWEST_BUILD, Platform, TorchBuild, build_here, read_build

NCCL_BYTES = 2 * GIB
"""What is reserved for NCCL with several GPUs, where nobody says otherwise: its buffers, outside of torch's allocator. from reports: 0.54 to
0.69 GB for each group of processes on four A100s (NVIDIA/nccl issue 964), 1.6 GB (issue 864)."""
GRANULARITY = 22 * MIB
"""What the caching allocator's granularity takes: one partly filled segment of its small (2 MiB) and one of its medium
(20 MiB) pool. Source: kSmallBuffer and kLargeBuffer in c10/core/AllocatorConfig.h. Fragmentation beyond that is not
counted: it depends on the order of allocations, and expandable segments remove nearly all of it."""


_MEASURED_FILE = "devices.json"


class Gpu(NamedTuple):
    """A card. Bytes, FLOP/s and bytes/s; each figure's source beside it."""

    name: str
    aliases: tuple[str, ...]
    label: str
    vendor: str
    architecture: str
    nominal_gib: float
    usable_bytes: int  # torch.cuda.get_device_properties(0).total_memory
    usable_kind: str  # reported | nvidia-smi | estimated
    usable_source: str
    bf16_flops: int  # dense, fp32 accumulation
    memory_bandwidth: int
    host_link: int  # one direction
    host_link_name: str
    rates_source: str
    context_bytes: int
    context_kind: str  # measured | assumed
    context_source: str
    cublas_workspace_bytes: int  # of one handle
    compute_capability: tuple[int, int] | None  # None: AMD's, which have none. Source: developer.nvidia.com/cuda-gpus
    shared_memory: bool = False  # the CPU has its memory in it, too: what goes to CPU RAM stays where it was

    def __repr__(self) -> str:
        return f"<Gpu {self.name}: {self.label}, {format_gib(self.usable_bytes)} ({self.usable_kind})>"

    @property
    def workspaces_bytes(self) -> int:
        """Bytes that cuBLAS holds through a training step: from source (aten cuda/CublasHandlePool.cpp), a handle for every thread, and a
        workspace for every handle."""
        return CUBLAS_HANDLES * self.cublas_workspace_bytes


CUBLAS_HANDLES = 2
"""Threads that multiply: the one that runs the forward pass, and autograd's for the device, which runs the backward pass."""


EXPANDABLE, USUAL = "expandable", "default"
ALLOCATORS = {EXPANDABLE: "expandable_segments:True", USUAL: ""}
"""How torch's caching allocator can be set, by name, as PYTORCH_CUDA_ALLOC_CONF has it."""
EXPANDABLE_SETTING = f"PYTORCH_CUDA_ALLOC_CONF={ALLOCATORS[EXPANDABLE]}"
WITHOUT_SETTINGS = "as torch is without settings"


class Card(NamedTuple):
    """A card as one training process has it. All in bytes."""

    gpu: Gpu  # for its rates; its memory too unless `named` is False
    total_bytes: int  # what torch sees
    reserve_bytes: int = 0  # held by other processes
    named: bool = True  # False: only the amount of memory was given
    host_bytes: int | None = None  # CPU RAM, when known; 0 where it is the GPU's own memory
    allocator: str = EXPANDABLE  # how torch's allocator is set, one of `ALLOCATORS`
    build: TorchBuild = NEWEST_BUILD  # of torch

    @property
    def platform(self) -> Platform:
        """What torch chooses its kernels by."""
        return Platform(self.gpu.compute_capability, self.build.cudnn, self.build.torch).alike

    def __repr__(self) -> str:
        host = f", CPU RAM {format_gib(self.host_bytes)}" if self.host_bytes is not None else ""
        return f"<Card {self.label}: {format_gib(self.total_bytes)}, budget {format_gib(self.budget_bytes)}{host}>"

    @property
    def label(self) -> str:
        """Name to show: its own, or its amount of memory when only that is known."""
        if self.unlimited:
            return "any GPU"
        return self.gpu.name if self.named else f"{format_gib(self.total_bytes)} GPU"

    @property
    def unlimited(self) -> bool:
        """Whether it stands for a card that nobody named: see `any_card`."""
        return self.total_bytes == MOST_MEMORY

    @property
    def expandable(self) -> bool:
        """Whether torch's allocator has expandable segments."""
        return self.allocator == EXPANDABLE

    @property
    def allocatable_bytes(self) -> int:
        """Bytes that torch's allocator can reserve: total - CUDA context - reserve."""
        return max(0, self.total_bytes - self.gpu.context_bytes - self.reserve_bytes)

    @property
    def budget_bytes(self) -> int:
        """Bytes that tensors may take: total - CUDA context - allocator granularity - reserve."""
        return max(0, self.allocatable_bytes - GRANULARITY)


def gpus() -> tuple[Gpu, ...]:
    """Cards that mstplan knows, in the order of the file, with the constants that were measured here."""
    return _merge_gpus(_find_measured_file())


@lru_cache(maxsize=8)
def _merge_gpus(file: KeptFile | None) -> tuple[Gpu, ...]:
    measured = {_gpu_key(name): constants for name, constants in _read_measured(file).cards.items()}
    merged = []
    for gpu in _read_shipped():
        own_constants = next((measured[key] for key in _keys(gpu) if key in measured), None)
        own = {**own_constants._asdict(), "context_kind": "measured"} if own_constants is not None else {}
        merged.append(gpu._replace(**own))
    return tuple(merged)


@lru_cache(maxsize=1)
def _read_shipped() -> tuple[Gpu, ...]:
    rows = json.loads((ROOT / "gpus.json").read_text(encoding="utf-8"))["gpus"]
    return tuple(
        Gpu(**{**row, "aliases": tuple(row["aliases"]), "compute_capability": _capability(row)}) for row in rows
    )


def _capability(row: dict[str, Any]) -> tuple[int, int] | None:
    pair = row["compute_capability"]
    return (pair[0], pair[1]) if pair is not None else None


class Constants(NamedTuple):
    """Constants that `mstplan calibrate --from measurements` finds of a card, in place of what ships."""

    context_bytes: int
    cublas_workspace_bytes: int
    context_source: str


class _MeasuredFile(NamedTuple):
    cards: dict[str, Constants]  # by the card as torch names it


class MeasuredConstants(NamedTuple):
    """Constants in the user's folder; left_out_note: why they are left out, in a line."""

    cards: Mapping[str, Constants] = MappingProxyType({})
    left_out_note: str = ""


def measured_file() -> Path:
    """File of measured constants. Raises OutputError where the user has no folder."""
    return user_folder() / _MEASURED_FILE


def _find_measured_file() -> KeptFile | None:
    return kept.find_user_file(_MEASURED_FILE)


def measured_constants() -> Mapping[str, Constants]:
    """Constants by the card as torch names it. None when the file is not there or damaged."""
    return _read_measured(_find_measured_file()).cards


def left_out_notes() -> list[str]:
    """A line when constants were measured and cannot be used."""
    line = _read_measured(_find_measured_file()).left_out_note
    return [line] if line else []


@lru_cache(maxsize=8)
def _read_measured(file: KeptFile | None) -> MeasuredConstants:
    if file is None:
        return MeasuredConstants()
    try:
        content: _MeasuredFile = kept.read_json(
            file, "the constants of GPUs that `mstplan calibrate` found", _MeasuredFile
        )
        for name, constants in content.cards.items():
            _check_constants(file, name, constants)
    except InputError as e:
        return MeasuredConstants(left_out_note=kept.left_out_note(e))
    return MeasuredConstants(
        {
            name: constants._replace(context_source=one_line(constants.context_source, 200))
            for name, constants in content.cards.items()
        }
    )


def _check_constants(file: KeptFile, name: str, constants: Constants) -> None:
    """Amounts of memory, which leave something of the card, where it is known. Raises InputError."""
    key, amounts = _gpu_key(name), (constants.context_bytes, constants.cublas_workspace_bytes)
    sizes = [gpu.usable_bytes for gpu in _read_shipped() if key in _keys(gpu)]
    if min(amounts) < 0 or amounts[0] + CUBLAS_HANDLES * amounts[1] >= min(sizes, default=MOST_MEMORY):
        raise kept.damage_error(file, f"{one_line(name, 40)}: bytes that no GPU of that name can have taken")


def write_measured(new_constants: Mapping[str, Constants]) -> Path:
    """Keep a card's constants for the planner, those of others as they are. Returns where. Raises OutputError."""
    path = measured_file()
    files.replace_json(
        path,
        {"cards": {name: constants._asdict() for name, constants in {**measured_constants(), **new_constants}.items()}},
    )
    return path


_LINES = ("nvidia", "amd", "geforce", "tesla", "instinct", "rtx")
"""Makers and lines of cards, which stand before a name or not."""
_KINDS = ("gpu", "generation")
"""Words that torch prints after some names."""


def _gpu_key(name: str) -> str:
    """A name of a card as it is compared: in any dress, with or without the maker and the line of cards that torch prints before it."""
    key = "".join(re.findall(r"[^\W_]+", name.lower()))
    for line in _LINES:
        key = key.removeprefix(line)
    for kind in _KINDS:
        key = key.removesuffix(kind)
    return key


@lru_cache(maxsize=256)
def _keys(gpu: Gpu) -> frozenset[str]:
    return frozenset(_gpu_key(name) for name in (gpu.name, *gpu.aliases))


def find_gpu(name: str) -> Gpu:
    """A card by name or alias, in any case. Raises HardwareError with the nearest names."""
    if not isinstance(name, str):
        raise HardwareError(f"{quoted(name)} is no name of a GPU.\n`mstplan gpus` lists all.")
    key = _gpu_key(name)
    for gpu in gpus():
        if key in _keys(gpu):
            return gpu
    names = [gpu.name for gpu in gpus()]
    typed = "-".join(name[:60].lower().replace("_", " ").split())
    raise HardwareError(
        f"unknown GPU {quoted(name)}.{did_you_mean(typed, names)}\n`mstplan gpus` lists all; --gpu-mem 80GB plans for any amount."
    )


def card(
    gpu: str | None = None,
    memory: int | None = None,
    reserve: int = 0,
    host_memory: int | None = None,
    allocator: str = EXPANDABLE,
    torch: str | None = None,
) -> Card:
    """The card to plan for: by name, by amount of memory (bytes), or a named card limited to an amount.

    torch: the build that trains, such as "2.10+cu128"; None: the one that is installed, else the newest that is known. allocator: how torch's is
    set, "expandable" or "default". With an amount alone, rates and kernels are those of the fastest card sold with about that much. Raises
    HardwareError.
    """
    if allocator not in ALLOCATORS:
        raise HardwareError(
            f"no allocator {quoted(allocator)}.{did_you_mean(str(allocator), ALLOCATORS)}\nThere are: {', '.join(ALLOCATORS)}."
        )
    for parameter, size in (("memory", memory), ("reserve", reserve), ("host_memory", host_memory)):
        if size is None and parameter != "reserve":
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < MOST_MEMORY:
            raise HardwareError(
                f"{parameter} is {quoted(size)}, must be a whole number of bytes from 0.\nparse_memory('80GB') reads an amount."
            )
    if gpu is None and memory is None:
        raise HardwareError("no GPU given.\nSay --gpu h100 (`mstplan gpus` lists them) or --gpu-mem 80GB.")
    if memory is not None and memory < LEAST_MEMORY:
        raise HardwareError(
            f"--gpu-mem {format_gib(memory)} is less than any GPU has.\nWrite it like 80GB or 79.15GiB."
        )
    build = build_here() if torch is None else read_build(torch)
    if gpu is not None:
        named_gpu = find_gpu(gpu)
        if memory is not None and memory > named_gpu.nominal_gib * GIB:
            raise HardwareError(
                f"--gpu-mem {format_gib(memory)} is more than {named_gpu.name} has ({named_gpu.nominal_gib:g} GB).\nLeave one of the two out."
            )
        if named_gpu.shared_memory and host_memory is not None:
            raise HardwareError(
                f"the memory of {named_gpu.name} is that of its CPU: it has no CPU RAM beside it.\nLeave --host-mem out."
            )
        planned_card = Card(
            named_gpu,
            min(memory or named_gpu.usable_bytes, named_gpu.usable_bytes),
            reserve,
            True,
            0 if named_gpu.shared_memory else host_memory,
            allocator,
            build,
        )
    else:
        assert memory is not None
        planned_card = Card(_nearest_gpu(memory), memory, reserve, False, host_memory, allocator, build)
    if reserve >= planned_card.total_bytes:
        raise HardwareError(
            f"--reserve {format_gib(reserve)} leaves nothing of {format_gib(planned_card.total_bytes)}.\nGive less."
        )
    return planned_card


def any_card() -> Card:
    """A card for what depends on none, such as a trace: on which all fits, with an H100's kernels, workspace of cuBLAS and rates."""
    return Card(find_gpu("h100"), MOST_MEMORY, named=False, build=build_here())


def host_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_host_memory() -> int | None:
    """Bytes of memory that processes of this machine, or of this container, can still have; None where neither says so."""
    found = []
    with suppress(OSError, ValueError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # a limit that is none reads "max"
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=None)


def card_that_torch_names(name: str, total_bytes: int) -> Card:
    """The card of torch's device properties: a known one by its name, or any with that memory. Raises HardwareError."""
    try:
        gpu = find_gpu(name)
        return Card(gpu, total_bytes, host_bytes=0 if gpu.shared_memory else None)
    except HardwareError:
        return card(memory=total_bytes)


def _nearest_gpu(memory: int) -> Gpu:
    def distance(gpu: Gpu) -> float:
        size = gpu.nominal_gib * GIB
        return max(size / memory, memory / size)

    sold = [gpu for gpu in gpus() if not gpu.shared_memory]
    smallest = min(distance(gpu) for gpu in sold)
    return max((g for g in sold if distance(g) <= smallest * 1.02), key=lambda g: g.bf16_flops)


def gpus_of_size(card: Card) -> tuple[Gpu, ...]:
    """Named cards sold with the amount of memory that was given."""
    size = round(card.total_bytes / GIB)
    return tuple(g for g in gpus() if round(g.nominal_gib) == size and not g.shared_memory)
