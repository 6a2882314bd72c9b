"""What a trace found: a training step of the whole model as a sequence of allocations, and what can be read off it.

Plain data, so that a trace can be kept and read again without torch. `tracer.py` makes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from ..kept import adapter_for
from ..spec.hardware import CUBLAS_HANDLES
from ..step.allocator import MIN_BLOCK
from ..step.cuda import CUBLASLT_WORKSPACE
from ..step.instants import Instant, Pass
from ..step.optimizers import OPTIMIZERS
from ..step.recipe import Recipe
from ..step.steps import GRADIENT_BUCKETS
from ..units import format_gib, format_tokens
from .extend import extend, make_row
from .recording import Category, Place, Recording, RecordingData, Size, Storage

BIAS_PRODUCT = "addmm with a bias"
"""What the product that cuBLASLt makes is called."""
SORTED_IDS, SUMS_OF_IDS, PARTS_OF_SUM = "embedding: sorted ids", "embedding: sums of equal ids", "parts of a sum"
"""What workspaces are called that kernels take for gradients of weights (step/workspaces.py)."""


class Weight(NamedTuple):
    """A parameter or buffer of the whole model."""

    name: str
    shape: tuple[Size, ...]
    dtype: str
    bytes: Size
    trained: bool
    on_host: bool = False
    beyond: Size = 0
    """Bytes that its gradient has more than it."""


class State(NamedTuple):
    """A tensor that the optimizer keeps, under a key of torch's."""

    name: str
    dtype: str
    bytes: Size


class Peak(NamedTuple):
    """The largest moment of an instant: bytes on the device, requested ones rounded up to blocks."""

    instant: Instant
    bytes: int
    event: int  # of the trace's `events`


class Alive(NamedTuple):
    """Tensors alive at a moment that are alike. bytes: of all copies, rounded up to blocks.

    resident: they are there all the time; operation: of a state of the optimizer that is, torch's key of it.
    """

    category: Category
    module: str  # with * for the number of a layer
    operation: str
    shape: tuple[int, ...]
    dtype: str
    copies: int
    bytes: int
    resident: bool = False


@dataclass(frozen=True)
class Trace:
    """A step. `short`: the forward and backward pass of the layers that were run, `kept`; kinds: of all layers, `every` of them to
    a checkpoint; `update`: the optimizer's step; `short_first`: as `short`, of the first micro-batch, which finds no gradients, or of the first
    step, whose optimizer in backward finds no states.

    on: "cuda" or "cpu". workspace: bytes that cuBLAS holds. seq_len in tokens.
    """

    recipe: Recipe
    seq_len: int
    on: str
    workspace: int
    weights: tuple[Weight, ...]
    states: tuple[State, ...]
    kinds: tuple[int, ...]
    kept: tuple[int, ...]
    every: int
    reach: int
    short: Recording
    update: Recording
    short_first: Recording | None = None

    def __repr__(self) -> str:
        peak = f"peak {format_gib(self.peak.bytes)} ({self.peak.instant})"
        return f"<Trace {format_tokens(self.seq_len)} tokens on {self.on}, {self.units} layers: {peak}>"

    def with_workspace(self, workspace: int) -> Trace:
        """Trace on a card whose cuBLAS holds that many bytes."""
        other = replace(self, workspace=workspace)
        for name in {"step", "first_passes"} & vars(self).keys():
            vars(other)[name] = vars(self)[name]  # which takes a while to write down
        return other

    def without_gradient_workspaces(self) -> Trace:
        """Trace in which kernels take nothing beside the gradients of weights: its bytes are shares of batch and length."""
        names = SORTED_IDS, SUMS_OF_IDS, PARTS_OF_SUM
        omitted = {n for n, made in enumerate(self.short.storages) if made.operation in names}
        return replace(self, short=self.short.without(omitted))

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        rows = {name: [list(row) for row in getattr(self, name)] for name in ("weights", "states")}
        return {
            "recipe": self.recipe.model_dump(),
            "seq_len": self.seq_len,
            "on": self.on,
            "workspace": self.workspace,
            **rows,
            "kinds": list(self.kinds),
            "kept": list(self.kept),
            "every": self.every,
            "reach": self.reach,
            "short": self.short.as_data(),
            "update": self.update.as_data(),
            "short_first": None if self.short_first is None else self.short_first.as_data(),
        }

    @classmethod
    def from_json(cls, text: bytes) -> Trace:
        """Trace from JSON. Raises ValueError, RecipeError or Unlike for what is none: one that is read can be used."""
        data: _Kept = adapter_for(_Kept).validate_json(text)
        layers = sorted(set(data.kept)) == list(data.kept) and all(0 <= unit < len(data.kinds) for unit in data.kept)
        if not (layers and data.kept and min(data.every, data.reach, data.seq_len) > 0):
            raise ValueError("layers that there cannot be")
        fields = {
            **data._asdict(),
            "recipe": Recipe(**data.recipe),
            "short": Recording.from_data(data.short),
            "update": Recording.from_data(data.update),
            "short_first": None if data.short_first is None else Recording.from_data(data.short_first),
        }
        trace = cls(**fields)
        trace.write_down()
        if not trace.step.events:
            raise ValueError("nothing happens")
        return trace

    def write_down(self) -> None:
        """Write the whole step down, once, for whoever asks next. Raises Unlike for layers that are not alike."""
        _ = self.step, self.first_passes

    @property
    def units(self) -> int:
        return len(self.kinds)

    @property
    def block(self) -> int:
        return MIN_BLOCK if self.on == "cuda" else 1

    def rounded(self, size: int) -> int:
        return -(-size // self.block) * self.block

    @cached_property
    def step(self) -> Recording:
        """Forward, backward and update of the whole model."""
        long = self._of_all_layers(self.short)
        first = len(long.storages)
        return Recording(
            long.storages + self.update.storages,
            long.events + [(first + index, sign) for index, sign in self.update.events],
            [*long.places, (Place(Pass.OPTIMIZER, -1), len(long.events))],
        )

    @cached_property
    def first_passes(self) -> Recording | None:
        """Forward and backward of the whole model in the first micro-batch or step; None: as in `step`."""
        return None if self.short_first is None else self._of_all_layers(self.short_first)

    def _of_all_layers(self, short: Recording) -> Recording:
        return extend(short, self.kept, make_row(self.kinds, self.every, self.reach))

    @property
    def held_states(self) -> tuple[State, ...]:
        """The optimizer's states on the device."""
        if self.recipe.optimizer_on_host:
            return ()
        on_host = OPTIMIZERS[self.recipe.optimizer].keys_on_host(self.recipe) if self.on == "cuda" else ()
        return tuple(state for state in self.states if state.name not in on_host)

    @property
    def held_weights(self) -> tuple[Weight, ...]:
        """Weights and buffers on the device."""
        return tuple(w for w in self.weights if not w.on_host)

    @cached_property
    def resident(self) -> tuple[Alive, ...]:
        """Entries that are there all the time: weights, the optimizer's states, cuBLAS' workspaces, gradients that are added to."""

        def group(category: Category, name: str, sizes: list[tuple[str, int]]) -> Iterator[Alive]:
            for dtype in dict.fromkeys(d for d, _ in sizes):
                same = [self.rounded(size) for d, size in sizes if d == dtype]
                yield Alive(category, "", name, (), dtype, len(same), sum(same), resident=True)

        entries = [*group(Category.WEIGHTS, "weights and buffers", [(w.dtype, w.bytes) for w in self.held_weights])]
        for name in dict.fromkeys(state.name for state in self.held_states):
            entries += group(Category.STATES, name, [(s.dtype, s.bytes) for s in self.held_states if s.name == name])
        if self.recipe.finds_gradients:
            gradients = [(w.dtype, w.bytes + w.beyond) for w in self.held_weights if w.trained]
            entries += group(Category.GRADIENTS, "gradients", gradients)
        for dtype, size in self.gradient_buckets.items():
            entries.append(
                Alive(Category.GRADIENTS, "", GRADIENT_BUCKETS, (), dtype, 1, self.rounded(size), resident=True)
            )
        if self.workspace:
            entries.append(
                Alive(Category.WORKSPACE, "", "cuBLAS", (), "uint8", CUBLAS_HANDLES, self.workspace, resident=True)
            )
        if self.lt_handles:
            size = self.lt_handles * CUBLASLT_WORKSPACE
            entries.append(Alive(Category.WORKSPACE, "", "cuBLASLt", (), "uint8", self.lt_handles, size, resident=True))
        return tuple(entries)

    @cached_property
    def gradient_buckets(self) -> dict[str, int]:
        """Bytes of DDP's copy of all gradients, by dtype."""
        trained = [w for w in self.weights if w.trained] if self.recipe.has_gradient_buckets else []
        return {
            dtype: sum(w.bytes for w in trained if w.dtype == dtype)
            for dtype in dict.fromkeys(w.dtype for w in trained)
        }

    @cached_property
    def lt_handles(self) -> int:
        """Handles for which cuBLASLt holds a workspace: that of the forward pass, and that of autograd's thread, where each adds a bias in
        a product. None where cuBLAS holds none."""
        passes = {
            place.run == Pass.FORWARD
            for place, span in self.short.blocks()
            for index, sign in self.short.events[span.start : span.stop]
            if sign > 0 and self.short.storages[index].operation == BIAS_PRODUCT
        }
        return len(passes) if self.workspace else 0

    @cached_property
    def live(self) -> list[int]:
        """Bytes on the device after each event, all that is resident included."""
        total, totals = sum(alive.bytes for alive in self.resident), []
        sizes = [0 if made.host else self.rounded(made.bytes) for made in self.step.storages]
        for index, sign in self.step.events:
            total += sign * sizes[index]
            totals.append(total)
        return totals

    @cached_property
    def requested(self) -> list[int]:
        """`live` without the rounding up to blocks: whole numbers of bytes per token."""
        step = self.step
        sizes = [0 if made.host else made.bytes for made in step.storages]
        fixed = sum(w.bytes for w in self.held_weights) + sum(s.bytes for s in self.held_states)
        fixed += sum(self.gradient_buckets.values()) + self.workspace + self.lt_handles * CUBLASLT_WORKSPACE
        fixed += sum(w.bytes + w.beyond for w in self.held_weights if w.trained) if self.recipe.finds_gradients else 0
        return [fixed + total for total in accumulate(sign * sizes[index] for index, sign in step.events)]

    @cached_property
    def host_peak(self) -> int:
        """The most bytes in CPU RAM."""
        total = most = 0
        for index, sign in self.step.events:
            total += sign * self.step.storages[index].bytes if self.step.storages[index].host else 0
            most = max(most, total)
        return most

    def instant_of(self, place: Place) -> Instant:
        """The step model counts what is checkpointed together as one layer."""
        checkpoints = -(-self.units // self.every)
        return instant_of(
            Place(place.run, checkpoints if place.unit == self.units else place.unit // self.every), checkpoints
        )

    @cached_property
    def peaks(self) -> tuple[Peak, ...]:
        """Peaks of every instant, in the order of a step."""
        peaks: dict[str, Peak] = {}
        for place, span in self.step.blocks():
            instant = self.instant_of(place)
            for event in span:
                if instant not in peaks or self.live[event] > peaks[instant].bytes:
                    peaks[instant] = Peak(instant, self.live[event], event)
        recipe = self.recipe
        if Instant.OPTIMIZER not in peaks and not (
            recipe.optimizer_in_backward or recipe.optimizer_on_host
        ):  # one that makes nothing
            peaks[Instant.OPTIMIZER] = Peak(Instant.OPTIMIZER, self.live[-1], len(self.live) - 1)
        return tuple(peaks[name] for name in Instant if name in peaks)

    @property
    def peak(self) -> Peak:
        return max(self.peaks, key=lambda p: p.bytes)

    def alive(self, event: int) -> tuple[Alive, ...]:
        """Entries alive after an event, alike tensors together, largest first; they add up to `live[event]`."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index in self.step.alive_at(event):
            made = self.step.storages[index]
            group = groups.setdefault(_kind(made), [0, 0])
            group[0] += 1
            group[1] += self.rounded(made.bytes)
        alive = [Alive(*kind, *numbers) for kind, numbers in groups.items()]
        return tuple(sorted([*self.resident, *alive], key=lambda a: -a.bytes))


class _Kept(NamedTuple):
    """A trace as JSON has it."""

    recipe: dict[str, Any]
    seq_len: int
    on: Literal["cuda", "cpu"]
    workspace: Size
    weights: tuple[Weight, ...]
    states: tuple[State, ...]
    kinds: tuple[int, ...]
    kept: tuple[int, ...]
    every: int
    reach: int
    short: RecordingData
    update: RecordingData
    short_first: RecordingData | None


def instant_of(place: Place, units: int) -> Instant:
    """The step model's name for what happens at a place of a step of so many units."""
    if place.run == Pass.OPTIMIZER:
        return Instant.OPTIMIZER
    if place.run == Pass.FORWARD:
        return Instant.END_OF_FORWARD if place.unit < units else Instant.LOSS
    at_ends = {-1: Instant.EMBEDDING, 0: Instant.FIRST_LAYER, units: Instant.LOSS_BACKWARD}
    return at_ends.get(place.unit) or (Instant.LAST_LAYER if place.unit == units - 1 else Instant.MIDDLE_LAYER)


def _kind(made: Storage) -> tuple[Any, ...]:
    if made.category == Category.GRADIENTS:
        return Category.GRADIENTS, "", "gradients", (), made.dtype
    module = ".".join("*" if part.isdigit() else part for part in made.module.split("."))
    return made.category, module, made.operation, made.shape, made.dtype
