"""Measurements: what a real training step took on a device, and the files they are kept in. No torch.

A results file has one measurement a line (JSON), appended as soon as it is made, so that what ends a sweep costs one point at
most. Several files are merged by putting one behind the other.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from functools import cache, cached_property
from hashlib import sha256
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from .. import files, profiles
from ..errors import MeasurementError, ModelError, OutputError, one_line, quoted
from ..spec.config import TEXT_PARTS, read_config
from ..spec.hardware import ALLOCATORS, Card, card_that_torch_names
from ..spec.model import Model
from ..spec.platform import build_measured
from ..spec.releases import is_release
from ..step.recipe import Recipe
from ..units import LEAST_MEMORY, LONGEST, MOST_MEMORY, format_gib

SCHEMA_VERSION = 1
OK, OUT_OF_MEMORY, REFUSED, FAILED = "ok", "out of memory", "refused", "failed"
"""Outcomes. refused: the model or recipe cannot be run; failed: an error, a crash, a kill, too little time."""
PHASES = ("forward", "backward", "optimizer")
_LARGEST_FILE = 200_000_000  # bytes
_FIRST_BYTES = b'{"case":'


Bytes = Annotated[int, Field(ge=0, le=1 << 62)]
Tokens = Annotated[int, Field(ge=1, le=LONGEST)]  # results of before have one token, too
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _check_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("not printable")
    return text


def _check_name(text: str) -> str:
    if not text.strip():
        raise ValueError("no name")
    return text


ShortText = Annotated[str, Field(max_length=200), AfterValidator(_check_printable)]
NameText = Annotated[
    str, Field(max_length=255), AfterValidator(_check_name)
]  # whatever characters: a folder's name becomes a model's
MeasuredLoss = Annotated[
    float | None, AfterValidator(lambda loss: loss if loss is not None and isfinite(loss) else None)
]


DEVICES = ("cuda", "cpu")
"""What steps are measured on."""


class MeasuredPeak(NamedTuple):
    """The most bytes within an instant or a phase. None: the device does not tell.

    allocated: in tensors; reserved: by torch's allocator; device: in use on the whole card, other processes and the CUDA
    context included, at the end of the phase.
    """

    allocated: Annotated[int, Field(gt=0, le=1 << 62)]
    reserved: Bytes | None = None
    device: Bytes | None = None


@dataclass(frozen=True)
class Figures:
    """Figures of one rank in a step that is not its first. Bytes; seconds."""

    static: Bytes  # in weights, buffers and optimizer states, between steps
    instants: Annotated[dict[str, MeasuredPeak], Field(min_length=1)]
    phases: Annotated[dict[str, MeasuredPeak], Field(min_length=1)]
    step_seconds: tuple[Seconds, ...]  # of every timed step; none where others were on the device
    loss: MeasuredLoss  # None: infinite, or no number
    context: Bytes | None = (
        None  # in use on the card beside what the allocator reserved: the CUDA context, and other processes
    )
    workspace: Bytes | None = None  # of cuBLAS, for all of its handles

    @property
    def peak(self) -> MeasuredPeak:
        """The largest of the step, each figure by itself."""
        columns = [
            [value for value in column if value is not None] for column in zip(*self.phases.values(), strict=True)
        ]
        return MeasuredPeak(max(columns[0]), *(max(column) if column else None for column in columns[1:]))

    def beside_others(self) -> Figures:
        """Figures without those that others on the device change: times, and what of the device is in use."""

        def leave_out(peaks: Mapping[str, MeasuredPeak]) -> dict[str, MeasuredPeak]:
            return {name: peak._replace(device=None) for name, peak in peaks.items()}

        return replace(
            self,
            instants=leave_out(self.instants),
            phases=leave_out(self.phases),
            step_seconds=(),
            context=None,
        )

    @classmethod
    def from_data(cls, data: object) -> Figures:
        """Raises ValueError."""
        figures: Figures = _adapter_for(Figures).validate_python(data)
        return figures


TRANSFORMERS = "transformers"
TRAINERS = (TRANSFORMERS,)
"""Whose training loop may run the steps, beside that of mstplan."""
_LATER_FIELDS = ("assume", "allocator", "trainer")
"""Fields that results of before have not, and that are left out where they say nothing."""


@dataclass(frozen=True)
class Case:
    """A step to measure. `config`: of the model as it is to be run, that is of `layers` of its layers when they are not all."""

    model: NameText
    strategy: NameText
    config: dict[str, Any]
    recipe: Recipe  # its chunks are numbers
    seq_len: Tokens
    layers: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    device: Annotated[str, Field(pattern=f"^({'|'.join(DEVICES)})$")] = "cuda"
    limit: Bytes | None = None  # of the card that the process may use, its CUDA context included
    steps: Annotated[int, Field(ge=1, le=1 << 20)] = 3  # that are timed
    assume: str | None = None  # how the formula reads a config that it does not know
    allocator: Annotated[str, Field(pattern=f"^({'|'.join(ALLOCATORS)})$")] | None = (
        None  # of CUDA's memory; None: as the environment says
    )
    trainer: Annotated[str, Field(pattern=f"^({'|'.join(TRAINERS)})$")] | None = (
        None  # whose loop runs the steps; None: mstplan's
    )

    @cached_property
    def described(self) -> Model:
        return read_config(self.config, self.model, self.assume)

    def as_data(self) -> dict[str, Any]:
        names = [f.name for f in fields(Case) if f.name not in _LATER_FIELDS or getattr(self, f.name) is not None]
        return {**{name: getattr(self, name) for name in names}, "recipe": self.recipe.model_dump()}

    @classmethod
    def from_data(cls, data: object) -> Case:
        """Raises ValueError."""
        case: Case = _adapter_for(Case).validate_python(data)
        return case

    @property
    def words(self) -> str:
        layers_words = f", {self.layers} layers" if self.layers else ""
        trainer_words = f", {self.trainer}' Trainer" if self.trainer else ""
        return f"{one_line(self.model, 80)}{layers_words}, {one_line(self.strategy, 40)}, {self.seq_len:,} tokens{trainer_words}"


class _Environment(BaseModel):
    """Facts that every measurement's environment holds; whatever else it tells may be anything."""

    model_config = ConfigDict(strict=True)

    card: ShortText
    total_bytes: Annotated[int, Field(ge=LEAST_MEMORY, lt=MOST_MEMORY)]
    torch: ShortText
    transformers: ShortText
    allocator: Annotated[str, Field(max_length=10_000)]
    threads: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    driver: ShortText | None = None
    cuda: ShortText | None = None
    cudnn: int | None = None
    sdpa: ShortText | None = None
    python: ShortText | None = None


def _check_environment(environment: dict[str, Any]) -> dict[str, Any]:
    checked = _Environment.model_validate(environment)
    if checked.card == "cpu" and checked.threads is None:
        raise ValueError("no number of threads")
    return environment


@dataclass(frozen=True)
class Measurement:
    """Outcome of a case. environment: card, its bytes, driver, versions; of a CPU, its threads. ranks: the figures of each, when the outcome is ok."""

    case: Case
    environment: Annotated[dict[str, Any], AfterValidator(_check_environment)]
    outcome: Annotated[str, Field(pattern=f"^({OK}|{OUT_OF_MEMORY}|{REFUSED}|{FAILED})$")]
    error: str = ""
    ranks: tuple[Figures, ...] = ()
    when: ShortText = ""  # ISO date and time, UTC
    schema_version: int = field(default=SCHEMA_VERSION)

    def as_data(self) -> dict[str, Any]:
        return {
            **{f.name: getattr(self, f.name) for f in fields(Measurement)},
            "case": self.case.as_data(),
            "ranks": [asdict(r) for r in self.ranks],
        }

    @classmethod
    def from_data(cls, data: object) -> Measurement:
        """Raises ValueError, also for what contradicts itself, and ModelError for a model that cannot be read."""
        measurement: Measurement = _adapter_for(Measurement).validate_python(data)
        recipe, instant_names = measurement.case.recipe, {tuple(sorted(rank.instants)) for rank in measurement.ranks}
        contradicts = (measurement.case.device == "cpu") != (measurement.environment["card"] == "cpu")
        unreadable = not (measurement.case.described.layers and measurement.key)  # raises now what it would later
        if recipe.is_open or len(instant_names) != (measurement.outcome == OK) or contradicts or unreadable:
            raise ValueError("no measurement")
        return measurement

    def __repr__(self) -> str:
        peak = f", peak {format_gib(self.peak.allocated)}" if self.ranks else ""
        return f"<Measurement {self.case.words}: {self.outcome}{peak}>"

    @property
    def reason(self) -> str:
        """Why there are no figures, in some words."""
        return one_line(next(iter(self.error.splitlines()), ""), 150) or "no reason given"

    @cached_property
    def model(self) -> Model:
        """The model as the release of transformers that ran has it."""
        case, ran = self.case, self.environment["transformers"]
        return read_config(case.config, case.model, case.assume, ran if is_release(ran) else None)

    @cached_property
    def key(self) -> str:
        """Identity of a measurement: its case, the kind of device, the libraries' versions."""
        return key_of(self.case, self.environment)

    @property
    def peak(self) -> MeasuredPeak:
        """Peak of the rank that used the most memory."""
        return max((rank.peak for rank in self.ranks), key=lambda peak: peak.allocated)

    @property
    def seconds(self) -> float | None:
        """The median time of a step, of the slowest rank; None where it was not timed, as others were on the device."""
        if not all(rank.step_seconds for rank in self.ranks):
            return None
        return max(median(rank.step_seconds) for rank in self.ranks)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of all ranks together; None where the step was not timed."""
        recipe, seconds = self.case.recipe, self.seconds
        return recipe.batch * recipe.accumulation * self.case.seq_len * len(self.ranks) / seconds if seconds else None

    @property
    def instants(self) -> dict[str, int]:
        """Bytes allocated at most in each instant, of the rank that holds most there."""
        return {name: max(rank.instants[name].allocated for rank in self.ranks) for name in self.ranks[0].instants}


@cache
def _adapter_for(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def key_of(case: Case, environment: Mapping[str, Any]) -> str:
    facts = {
        name: environment.get(name)
        for name in ("card", "torch", "transformers", "allocator", "threads", "cudnn", "sdpa")
    }
    case_data = {**case.as_data(), "model": "", "strategy": "", "steps": 0}
    case_data.pop("allocator", None)  # its settings stand among the facts
    return sha256(json.dumps([case_data, facts], sort_keys=True).encode()).hexdigest()[:32]


def card_of(environment: Mapping[str, Any], limit: int | None = None) -> Card:
    """The card to plan for: the device of that environment (for a CPU any card with as much memory), or `limit` bytes of it."""
    named = card_that_torch_names(environment["card"], environment["total_bytes"])
    whole = named._replace(build=build_measured(environment))
    return whole if limit is None else whole._replace(total_bytes=min(limit, whole.total_bytes))


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def slice_config(config: Mapping[str, Any], layers: int, name: str, assume: str | None = None) -> dict[str, Any]:
    """The config.json of a model's first layers. Raises ModelError when it has no more than that."""
    count = read_config(config, name, assume).layers
    if not 1 <= layers <= count:
        raise ModelError(f"--layers {layers}: {name} has {count} layers.\nGive a number from 1 to {count}.")
    return _shorten(config, count, layers)


def _shorten(config: Mapping[str, Any], count: int, layers: int) -> dict[str, Any]:
    shortened = dict(config)
    for name, value in config.items():
        if name in ("num_hidden_layers", "n_layer") and value == count:
            shortened[name] = layers
        elif (isinstance(value, list) or (name == "hybrid_override_pattern" and isinstance(value, str))) and len(
            value
        ) == count:
            shortened[name] = value[:layers]
        elif name == "num_kv_shared_layers" and isinstance(value, int):  # of the last ones, which go first
            shortened[name] = max(0, value - (count - layers))
        elif name in TEXT_PARTS and isinstance(value, dict):
            shortened[name] = _shorten(value, count, layers)
    return shortened


# ---- files --------------------------------------------------------------------------------------------------------------


class ResultsContent(NamedTuple):
    """Contents of a results file; `skipped`: a line for each that is damaged, with its number."""

    measurements: list[Measurement]
    skipped: list[str]


def read_results(path: Path) -> ResultsContent:
    """Read a results file. Raises MeasurementError for a file that is none, or all written by a newer mstplan."""
    data = files.read_bytes(path, "a results file of `mstplan measure`", _LARGEST_FILE, MeasurementError)
    results, newer = ResultsContent([], []), None
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        why = "is damaged"
        try:
            document = json.loads(line.decode())
            schema = document.get("schema_version") if isinstance(document, dict) else None
            if not isinstance(schema, int) or schema <= SCHEMA_VERSION:
                results.measurements.append(Measurement.from_data(document))
                continue
            newer = newer or f"of schema {one_line(schema, 20)}, and this mstplan reads up to {SCHEMA_VERSION}"
            why = f"is {newer}"
        except (ValueError, ModelError, RecursionError):
            pass
        results.skipped.append(f"{one_line(path)}: line {number} {why} and left out.")
    if newer is not None and not results.measurements:
        raise MeasurementError(f"{quoted(path)} has results {newer}.\nUpdate mstplan.")
    return results


def read_all_results(paths: Iterable[Path]) -> ResultsContent:
    """Several files together; of measurements with the same key the last one."""
    results = [read_results(path) for path in paths]
    return ResultsContent(
        latest_by_key(m for result in results for m in result.measurements),
        [line for result in results for line in result.skipped],
    )


def shipped_results() -> list[Path]:
    """The results files that ship with mstplan."""
    return sorted((profiles.ROOT / "measurements").glob("*.jsonl"))


def latest_by_key(measurements: Iterable[Measurement]) -> list[Measurement]:
    return list({m.key: m for m in measurements}.values())


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Measurement], None]]:
    """Lock a results file and yield a function that appends to it. A truncated last line is terminated, not removed.

    Raises MeasurementError, also for a file that holds something else, and OutputError."""
    files.check_writable(path, force=True)
    file = _LockedFile(path)
    try:
        yield file.append
    finally:
        file.close()


def check_appendable(path: Path) -> None:
    """Check that `appending` would work on the file as it is; write nothing. Raises what it raises."""
    with appending(path):
        pass


class _LockedFile:
    """A results file that this process alone writes to, and alone may remove."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle, self.locked = _open_locked(path)

    def append(self, measurement: Measurement) -> None:
        line = (json.dumps(measurement.as_data(), separators=(",", ":")) + "\n").encode()
        if not _is_file_at(self.handle, self.path):  # removed or replaced: what is written to it nobody would find
            before, (self.handle, self.locked) = self.handle, _open_locked(self.path)
            os.close(before)
        with files.refusing(self.path):
            _end_last_line(self.handle)
            while line:
                line = line[os.write(self.handle, line) :]
            os.fsync(self.handle)

    def close(self) -> None:
        with suppress(OSError):
            if (
                self.locked and _is_file_at(self.handle, self.path) and not os.fstat(self.handle).st_size
            ):  # nothing came of it
                os.unlink(os.path.realpath(self.path))  # not a link to it
        os.close(self.handle)


def _open_locked(path: Path) -> tuple[int, bool]:
    """Open and lock a results file; also whether there are locks here. A lock is of the file that was opened: whether the path still
    names that one is certain only once it is locked."""
    for _ in range(100):
        with files.refusing(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            locked = _lock_file(handle, path)
            if _is_file_at(handle, path):
                _check_results(path, handle)
                return handle, locked
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # who had the lock removed the file meanwhile
    raise OutputError(f"cannot write {quoted(path)}: it is removed as soon as it is made.\nName another file.")


def _is_file_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


def _end_last_line(handle: int) -> None:
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":
        os.write(handle, b"\n")


def _check_results(path: Path, handle: int) -> None:
    """Check that a file holds results. Raises MeasurementError for one that holds something else."""
    beginning = os.pread(handle, len(_FIRST_BYTES), 0)
    if (
        not _FIRST_BYTES.startswith(beginning) and not read_results(path).measurements
    ):  # of results the only line may be cut off
        raise MeasurementError(
            f"{quoted(path)} holds no results of `mstplan measure`, so none are added.\nName another file with --out."
        )


def _lock_file(handle: int, path: Path) -> bool:
    """Lock the file where there are locks, and say whether; lines are appended whole in any case. Raises MeasurementError when another process has this one."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EAGAIN, errno.EACCES):
            return False  # a file system without locks
        raise MeasurementError(
            f"another mstplan is writing to {quoted(path)}.\nWait for it, or name another file with --out."
        ) from None
    return True
