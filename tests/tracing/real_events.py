"""Allocations that a real process made on the CPU, as tests/tracing/two_ranks.py records them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest

from mstplan.tracing.recording import Category, Storage
from mstplan.tracing.trace import Trace

LARGE = 8192
"""Bytes; smaller ones are scalars, row statistics, and the random generator's state that a checkpoint keeps."""


def without(events: list[list[Any]], made_by: re.Pattern[str]) -> list[list[Any]]:
    """Events (bytes, phase, address, operations) without the tensors that such operations make, in both directions."""
    kept, out = [], set()
    for event in events:
        size, _, address, operations = event
        if size > 0 and made_by.search(" > ".join(operations)):
            out.add(address)
        elif size < 0 and address in out:
            out.remove(address)
        else:
            kept.append(event)
    return kept


def peak(runs: list[list[list[Any]]]) -> int:
    """The most bytes at once beyond those of the beginning."""
    return max(peaks(runs).values())


def peaks(runs: list[list[list[Any]]]) -> dict[str, int]:
    """The same of each phase that allocates, where each tensor goes at the earliest place of all runs: gloo's thread lets go of what it has sent when
    it gets round to it. Of runs whose allocations differ, the most that are alike count."""
    by_sizes: dict[tuple[int, ...], list[list[_Life]]] = {}
    for life in map(_lives, runs):
        by_sizes.setdefault(tuple(one.bytes for one in life), []).append(life)
    alike = max(by_sizes.values(), key=len)
    gone = [0] * (len(alike[0]) + 1)
    for tensors in zip(*alike, strict=True):
        gone[min(one.end for one in tensors)] += tensors[0].bytes
    most: dict[str, int] = {}
    now = 0
    for one, given_back in zip(alike[0], gone, strict=False):
        now += one.bytes - given_back
        most[one.phase] = max(most.get(one.phase, 0), now)
    return most


class _Life(NamedTuple):
    bytes: int
    phase: str
    end: int  # how many tensors have been made when it goes


def _lives(events: list[list[Any]]) -> list[_Life]:
    """Every tensor that is made."""
    lives: list[_Life] = []
    there: dict[int, int] = {}
    for size, phase, address, _ in events:
        if size > 0:
            there[address] = len(lives)
            lives.append(_Life(size, phase, -1))
        elif address in there:
            number = there.pop(address)
            lives[number] = lives[number]._replace(end=len(lives))
    return [one if one.end >= 0 else one._replace(end=len(lives)) for one in lives]


def check_order(found: Trace, ranks: list[dict[str, Any]], made_by: re.Pattern[str]) -> None:
    """Check that each rank allocates what is large in the trace's order, in one of its runs: in some gloo's thread makes one more. made_by: what
    makes tensors that are not traced."""
    expected = [made.bytes for made in _of_all_micro_batches(found) if made.bytes > LARGE]
    for rank in ranks:
        runs = (without(events, made_by) for events in rank["runs"])
        assert expected in ([size for size, *_ in events if size > LARGE] for events in runs)


def _of_all_micro_batches(found: Trace) -> list[Storage]:
    """What a step makes: where a micro-batch finds gradients the first, those after it, which are alike, and the optimizer's step."""
    storages = found.step.storages
    if found.first_passes is None:
        return storages
    passes = storages[: len(storages) - len(found.update.storages)]
    return [*found.first_passes.storages, *passes * (found.recipe.accumulation - 2), *storages]


def check_held(found: Trace, ranks: list[dict[str, Any]], made_by: re.Pattern[str]) -> None:
    """Check what each rank holds before a step, to the byte, and at most in it, within what random generators' states make, which are not
    followed: 0.05%."""
    for rank in ranks:
        assert rank["resident"] == sum(a.bytes for a in found.resident if a.category is not Category.GRADIENTS)
        most = peak([without(events, made_by) for events in rank["runs"]])
        assert max(found.live) == pytest.approx(rank["resident"] + most, rel=0.0005)
