"""What mstplan asks of an optimizer: its tensors in bytes, and how torch makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ..meshes import by_mesh
from ..selection import WeightKind

if TYPE_CHECKING:
    import torch

    from ..recipe import Recipe
    from ..selection import Kinds
    from ..tape import Weight

    Make = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
    KindsOf = Callable[[torch.nn.Parameter], Kinds]
    """What kinds of weight one is: an embedding, a head."""


class Held(NamedTuple):
    """Tensors of an optimizer that are alike. bytes: of all `copies`. torch_keys: of a state, what torch's optimizer calls it in its
    `state`; words: for its dtype, where that says it badly; managed: in CUDA's managed memory, beside torch's allocator."""

    name: str  # for people
    dtype: str
    bytes: int
    torch_keys: tuple[str, ...] = ()
    copies: int = 1
    words: str = ""
    managed: bool = False

    def times(self, count: int) -> Held:
        return self._replace(bytes=self.bytes * count, copies=self.copies * count)


class Memory(NamedTuple):
    """An optimizer's tensors: those that stay, and those that live during its step only, at their largest moment."""

    states: tuple[Held, ...] = ()
    temporaries: tuple[Held, ...] = ()

    @property
    def managed(self) -> int:
        """Bytes of states that are beside torch's allocator, in CUDA's managed memory."""
        return sum(held.bytes for held in self.states if held.managed)


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
    no_shards: ClassVar[str] = ""
    """Why it cannot step FSDP2's shards; empty: it can."""
    has_kernels: ClassVar[bool] = False
    """Whether --adamw-kernel chooses how it steps."""
    keeps_fp32_for_embeddings: ClassVar[bool] = False
    """Whether it can keep states of embeddings in fp32 where those of others are in 8 bits (`fp32_embedding_states`)."""
    paged: ClassVar[bool] = False
    """Whether states of large weights are in CUDA's managed memory."""
    trainer: ClassVar[str] = ""
    """What transformers' TrainingArguments call it; empty: they do not have it, or it goes by --adamw-kernel."""

    def states(self, recipe: Recipe, weight: Weight) -> tuple[Held, ...]:
        """What it keeps of a weight, on the device."""
        raise NotImplementedError

    def shared_states(self, recipe: Recipe, weights: Sequence[Weight]) -> tuple[Held, ...]:
        """What it keeps once for all of its weights."""
        return ()

    def one_step(self, recipe: Recipe, weight: Weight) -> tuple[Held, ...]:
        """Temporaries while it steps a single weight."""
        return ()

    def step(self, recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> tuple[Held, ...]:
        """Temporaries while it steps all weights, given as (weight, how many): unless it says otherwise, one after the other."""
        return max((self.one_step(recipe, weight) for weight, _ in weights), key=bytes_of, default=())

    def memory(self, recipe: Recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
        """All of its tensors on the device, over weights given as (weight, how many)."""
        states = [held.times(count) for weight, count in weights for held in self.states(recipe, weight)]
        if recipe.optimizer_in_backward:  # an optimizer for each weight
            alone = [(self.shared_states(recipe, [weight]), count) for weight, count in weights]
            states += [held.times(count) for shared, count in alone for held in shared]
        else:
            states += self.shared_states(recipe, [weight for weight, _ in weights])
        steps = (self.step(recipe, group) for group in by_mesh_of_cards(recipe, weights))
        return Memory(summed(states), max(steps, key=bytes_of, default=()))

    def traffic(self, recipe: Recipe, weights: int, states: int) -> int:
        """Bytes that a step reads and writes, of so many bytes of weights, as many of gradients, and states: in one go it reads
        all three, and writes weights and states."""
        return 3 * weights + 2 * states

    def asks_kinds(self, recipe: Recipe) -> bool:
        """Whether what it keeps or makes of a weight depends on the weight's kinds."""
        return recipe.fp32_embedding_states

    def make(self, recipe: Recipe, kinds_of: KindsOf) -> Make:
        """A function from weights to torch's optimizer. Needs torch. Raises MissingError where a package is not installed."""
        raise NotImplementedError

    def keys_on_host(self, recipe: Recipe) -> frozenset[str]:
        """Torch's keys of those states that stay in CPU RAM while the weights are on a card."""
        return frozenset()

    def is_fused(self, recipe: Recipe) -> bool:
        """Whether one kernel steps all weights: it knows no meta tensors, and counts its steps on the device."""
        return False


def by_mesh_of_cards(recipe: Recipe, weights: Iterable[tuple[Weight, int]]) -> list[list[tuple[Weight, int]]]:
    """Weights, given as (weight, how many), by mesh."""
    return by_mesh(weights, lambda each: mesh_of(recipe, each[0]))


OF_ALL = (1, False)


def mesh_of(recipe: Recipe, weight: Weight) -> tuple[int, bool]:
    """What tells a weight's mesh from others: experts that cards share out are on another than all else, as are matrices that they split than norms, unless
    these are DTensors of the same cards."""
    norms_apart = recipe.tensor_parallel > 1 and not recipe.sequence_parallel_norms
    return weight.spread_over, norms_apart and WeightKind.NORMS not in weight.kinds


def dtype_of(recipe: Recipe, weight: Weight) -> str:
    """The dtype of a weight on the device."""
    return weight.dtype or recipe.weight_dtype


def itemsize_of(recipe: Recipe, weight: Weight) -> int:
    """Bytes of one of its values."""
    return 2 if dtype_of(recipe, weight) == "bfloat16" else 4


def bytes_of(held: Iterable[Held]) -> int:
    return sum(each.bytes for each in held)


def summed(held: Iterable[Held]) -> tuple[Held, ...]:
    """Tensors that go by the same name, together; none without bytes."""
    totals: dict[tuple[str, str], Held] = {}
    for each in held:
        before = totals.get((each.name, each.dtype), each._replace(bytes=0, copies=0))
        totals[each.name, each.dtype] = before._replace(
            bytes=before.bytes + each.bytes, copies=before.copies + each.copies
        )
    return tuple(each for each in totals.values() if each.bytes)
