"""What mstplan asks of an optimizer: its tensors in bytes, and how torch makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    import torch

    from ..recipe import Recipe
    from ..tape import Weight

    Make = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


class Held(NamedTuple):
    """Tensors of an optimizer, in sum. torch_keys: of a state, what torch's optimizer calls it in its `state`."""

    name: str  # for people
    dtype: str
    bytes: int
    torch_keys: tuple[str, ...] = ()


class Memory(NamedTuple):
    """An optimizer's tensors: those that stay, and those that live during its step only."""

    states: tuple[Held, ...]
    temporaries: tuple[Held, ...]
    per_weight: int  # bytes of temporaries per element while a single weight is stepped


class Optimizer:
    """An optimizer as recipes name it. A new one is a file with a subclass, and a line in this folder's `__init__.py`."""

    name: ClassVar[str]
    """What recipes and --optimizer call it."""
    label: ClassVar[str]
    """Whose it is, for messages: "bitsandbytes' AdamW8bit"."""
    short: ClassVar[str]
    """As a change of a recipe is called: "8-bit AdamW"."""
    gives_up: ClassVar[str] = ""
    """What one gives up with it who trains with AdamW, to hold less; empty: it is no stand-in for AdamW."""
    host_state_bytes: ClassVar[int] = 0
    """Bytes of states for each parameter, beside the fp32 weight, where it steps on the host."""
    steps_shards: ClassVar[bool] = True
    """Whether it can step FSDP2's shards."""
    runs: ClassVar[bool] = True
    """Whether the step that is traced and measured can be run with it."""
    has_kernels: ClassVar[bool] = False
    """Whether --adamw-kernel chooses how it steps."""

    def memory(self, recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
        """States and temporaries on the device, over weights given as (weight, how many)."""
        raise NotImplementedError

    def traffic(self, recipe: Recipe, weights: int, states: int) -> int:
        """Bytes that a step reads and writes, of so many bytes of weights, as many of gradients, and states: in one go it reads
        all three, and writes weights and states."""
        return 3 * weights + 2 * states

    def make(self, recipe: Recipe) -> Make:
        """A function from weights to torch's optimizer. Needs torch; asked only where `runs`."""
        raise NotImplementedError

    def keys_on_host(self, recipe: Recipe) -> frozenset[str]:
        """Torch's keys of those states that stay in CPU RAM while the weights are on a card."""
        return frozenset()

    def is_fused(self, recipe: Recipe) -> bool:
        """Whether one kernel steps all weights: it knows no meta tensors, and counts its steps on the device."""
        return False


def numel_of(weights: Sequence[tuple[Weight, int]]) -> int:
    return sum(weight.numel * count for weight, count in weights)


def largest_of(weights: Sequence[tuple[Weight, int]]) -> int:
    return max(weight.numel for weight, _ in weights)
