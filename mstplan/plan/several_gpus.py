"""The ways to train on several GPUs beside each other: how they share weights, sequences and matrices, and what lies in CPU RAM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from ..errors import RecipeError, one_line
from ..spec.hardware import Card
from ..spec.model import Model
from ..step.recipe import OF_ZERO, OF_ZERO_3, Recipe, planned
from .solve import Answer, max_seq, max_seq_of_tensors

ON_HOST: Mapping[str, object] = {"optimizer_on_host": True, "weights_on_host": True}


_IN_PARTS = {"sequence_parallel_norms": "norms", "loss_parallel": "loss"}
IN_PARTS: Sequence[Mapping[str, object]] = ({}, dict.fromkeys(_IN_PARTS, True))
"""Fields of GPUs that split matrices as transformers does, and as torchtitan does."""


class GpusWay(NamedTuple):
    """A way to use several GPUs. fields: of a recipe, by which it differs from others."""

    fields: Mapping[str, object]

    @property
    def sharding(self) -> str:
        return str(self.fields["sharding"])

    @property
    def name(self) -> str:
        """'fsdp, sequences over 4, weights in CPU RAM'."""
        ranks, splits = self.fields["sequence_parallel"], self.fields.get("tensor_parallel", 1)
        words = [self.sharding] if self.sharding != "none" else []
        words += [f"sequences over {ranks:,}"] if ranks != 1 else []
        in_parts = [words for field, words in _IN_PARTS.items() if self.fields.get(field)]
        norms = f", {' and '.join(in_parts)} in parts" if in_parts else ""
        words += [f"matrices over {splits:,}{norms}"] if splits != 1 else []
        words += [f"experts over {self.fields['expert_parallel']:,}"] if "expert_parallel" in self.fields else []
        return ", ".join([*words, *(["weights in CPU RAM"] if "weights_on_host" in self.fields else [])])


class Compared(NamedTuple):
    """Answers of the ways that a recipe can go, the longest first: of each way with the strategy that reaches furthest. left_out: names of
    the others by what is in their way."""

    answers: tuple[tuple[GpusWay, Answer], ...]
    left_out: Mapping[str, tuple[str, ...]]


OF_SHARDINGS: Mapping[str, tuple[str, ...]] = {
    "zero1": OF_ZERO,
    "zero2": OF_ZERO,
    "zero3": (*OF_ZERO, *OF_ZERO_3),
    "fsdp": ("sync_each_batch", "reduce_dtype", "replicas"),
    "fsdp1": ("backward_prefetch", "use_orig_params", "sync_each_batch", "reduce_dtype"),
}
"""Fields of a recipe that mean something under these shardings alone."""


def with_own_fields(ways: Iterable[GpusWay], fields: Mapping[str, object]) -> list[GpusWay]:
    """Ways with those of the fields that mean something under their sharding."""
    return [
        GpusWay({**way.fields, **{name: fields[name] for name in OF_SHARDINGS.get(way.sharding, ()) if name in fields}})
        for way in ways
    ]


def list_ways(
    gpus: int,
    ranks: int | None = None,
    splits: int | None = None,
    experts: int = 0,
    in_parts: Sequence[Mapping[str, object]] = IN_PARTS,
) -> Iterator[GpusWay]:
    """All ways there are for so many GPUs, those that make no sense among them. ranks: GPUs that share each sequence, splits: those that split
    each matrix; None: powers of two that divide `gpus`, and all of them. experts: of a layer, which such numbers of GPUs share out as well; 0:
    there are none. in_parts: what else is in parts where matrices are, in turn."""
    usual = sorted({1, gpus} | {n for n in _POWERS if n < gpus and gpus % n == 0})
    if ranks in (None, 1):
        yield from _list_splits(gpus, [splits] if splits is not None else usual, in_parts)
    if splits not in (None, 1):
        return
    shared = [ranks] if ranks is not None else usual
    for sharding in planned("sharding")[0]:
        for n in shared:
            if sharding == "none" and n == 1:  # a GPU alone
                continue
            fields = {"gpus": gpus, "sharding": sharding, "sequence_parallel": n}
            yield GpusWay(fields)
            yield GpusWay({**fields, **ON_HOST})
    for n in usual if ranks in (None, 1) else ():
        if n > 1 and experts and experts % n == 0:
            yield GpusWay({"gpus": gpus, "sharding": "fsdp", "sequence_parallel": 1, "expert_parallel": n})


def _list_splits(gpus: int, numbers: Sequence[int], in_parts: Sequence[Mapping[str, object]]) -> Iterator[GpusWay]:
    """Ways to split matrices: over all GPUs; or over some, which share the parts with the others."""
    for n in numbers:
        fields = {
            "gpus": gpus,
            "sequence_parallel": 1,
            "tensor_parallel": n,
            "sharding": "none" if n == gpus else "fsdp",
        }
        if n > 1:
            yield from (GpusWay({**fields, **more}) for more in in_parts)


_POWERS = [1 << n for n in range(1, 17)]


def compare(
    model: Model,
    card: Card,
    recipes: Mapping[str, Recipe],
    ways: Sequence[GpusWay],
    map_each: Callable[[Callable[[GpusWay], Answer | str], Sequence[GpusWay]], Iterable[Answer | str]] = map,
) -> Compared:
    """The longest sequences of each way, with the strategy of `recipes` that reaches furthest. map_each: calls a function for every way, in order, as
    map does; another one may do so in several processes."""
    if all(recipe.weights_on_host for recipe in recipes.values()):  # in every way
        ways = [way for way in ways if "weights_on_host" in way.fields]
    answers: list[tuple[GpusWay, Answer]] = []
    left_out: dict[str, tuple[str, ...]] = {}
    for way, found in zip(ways, map_each(partial(_longest_of, model, card, recipes), ways), strict=True):
        if isinstance(found, str):
            left_out[found] = (*left_out.get(found, ()), way.name)
        else:
            answers.append((way, found))
    return Compared(tuple(sorted(answers, key=lambda each: -each[1].s_max)), left_out)


def _longest_of(model: Model, card: Card, recipes: Mapping[str, Recipe], way: GpusWay) -> Answer | str:
    """The longest sequences with the strategy that reaches furthest a way; or what is in the way of the first, where all are refused."""
    found = {name: _reach(model, card, recipe, way) for name, recipe in recipes.items()}
    reaches = {name: each for name, each in found.items() if isinstance(each, int)}
    if not reaches:
        return next(each for each in found.values() if isinstance(each, str))
    name = max(reaches, key=lambda each: reaches[each])
    return max_seq(model, recipes[name].changed(**way.fields), card, name)


def _reach(model: Model, card: Card, recipe: Recipe, way: GpusWay) -> int | str:
    """Tokens whose tensors fit; or what is in the way."""
    try:
        return max_seq_of_tensors(model, recipe.changed(**way.fields), card)[0]
    except RecipeError as e:
        return one_line(str(e).split("\n")[0], 200)
