"""The command of real steps, measure; and what it shares with those that measure to check."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from .commands import command, declared, given, option
from .options import (
    WHICH_MODEL,
    AssumeOptions,
    FormatOptions,
    MeasuringOptions,
    RecipesOptions,
    length,
    memory,
    one_of,
    recipes_of,
    shipped_models,
)
from .output import complain, emit

if TYPE_CHECKING:
    from ..measuring.launch import Launch
    from ..measuring.measurement import Case
    from ..step.recipe import Recipe


def _suite() -> str:
    from ..measuring.suites import shipped_suites

    return f"Points in a JSON file, or a suite that ships: {', '.join(shipped_suites())}."


def _suites() -> list[str]:
    from ..measuring.suites import shipped_suites

    return list(shipped_suites())


class PointsOptions(AssumeOptions):
    model = option(
        str, "--model -m", WHICH_MODEL, metavar="MODEL", choices=shipped_models
    )  # none: a suite names its own
    seq_len = option(
        str,
        "--seq-len",
        "Tokens per sequence; several with commas between: 8k,16k,32k.",
        adds_up=True,
        metavar="TOKENS[,TOKENS]",
    )
    suite = option(str, "--suite", _suite, metavar="FILE", choices=_suites)


class MeasureOptions(PointsOptions, MeasuringOptions, RecipesOptions, FormatOptions):
    pass


@command(
    "measure",
    MeasureOptions,
    help="Real training steps with random weights and tokens on this machine's device, each in a process of its own: peaks of memory, "
    "time, tokens per second. What runs out of memory or fails is a result, too. A rerun measures what is missing. Under torchrun, with "
    "--sharding fsdp, one point of all ranks together.",
    examples=(
        "mstplan measure -m llama3.1-8b --seq-len 8k,16k,32k --strategy all",
        "mstplan measure -m smollm2-135m --seq-len 512 --device cpu",
        "mstplan measure --suite cards -o h100.jsonl",
    ),
)
def measure(asked: MeasureOptions) -> None:
    from ..measuring import sweep
    from ..measuring.launch import read_launch
    from ..show import measuring
    from ..show.progress import progress

    check_device(asked.device)
    if (launch := read_launch()) is not None:
        _measure_on_all_ranks(asked, launch)
        return
    known = sweep.ask_environment(asked.device)
    cases, (begins, tell) = _cases(asked, known), measuring.telling(known)
    with kept(asked):
        found = sweep.measure_all(cases, known, asked.out, asked.timeout, asked.again, begins, tell, progress)
    emit(asked, measuring.report(found, known, asked.out))
    if not found.complete:
        raise typer.Exit(1)


def check_device(device: str) -> None:
    from ..measuring.measurement import DEVICES
    from ..tracing import cache

    one_of("device", device, DEVICES)
    cache.versions()  # no torch: said before anything else


@contextmanager
def kept(asked: MeasuringOptions) -> Iterator[None]:
    """Who interrupts a sweep hears what became of it."""
    from ..errors import one_line

    try:
        yield
    except KeyboardInterrupt:
        kept = f"results are kept in {one_line(asked.out, 200)}" if asked.out.exists() else "nothing was measured yet"
        complain(f"interrupted; {kept}.\nThe same command{', without --again,' * asked.again} goes on from there.")
        raise


def _cases(asked: MeasureOptions, known: dict[str, Any], alone: bool = True) -> list[Case]:
    """The points that --suite, or the model, lengths and strategies, describe. alone: is this the only rank?"""
    from ..errors import RecipeError
    from ..measuring import suites, sweep

    limit = memory(asked.gpu_mem)
    card = sweep.card_of(known, limit)
    more: dict[str, Any] = {"card": card, "device": asked.device, "limit": limit, "steps": asked.steps}
    if asked.suite is not None:
        if not alone:
            raise RecipeError(
                "a suite is measured point by point, each in a process of its own: not under torchrun.\nName one point: --model, --seq-len, -s."
            )
        beside = ("model", "assume", *declared(RecipesOptions), "seq_len", "layers")
        if flags := given(asked, beside):
            raise RecipeError(
                f"--suite says what is measured: {', '.join(flags)} cannot be given beside it.\nWrite it in the suite, or leave --suite out."
            )
        found = suites.read_cases(asked.suite, **more)
        refuse_sharded(case.recipe for case in found)
        return found
    if asked.model is None or asked.seq_len is None:
        raise RecipeError("no point to measure.\nGive --model and --seq-len, or --suite.")
    lengths = [length(part) for part in asked.seq_len.split(",")]
    recipes = recipes_of(asked)
    if alone:
        refuse_sharded(recipes.values())
    return sweep.plan_cases(asked.model, lengths, recipes, layers=asked.layers, assume=asked.assume, **more)


def refuse_sharded(recipes: Iterable[Recipe]) -> None:
    from ..errors import RecipeError

    if gpus := next((recipe.gpus for recipe in recipes if recipe.sharded), None):
        raise RecipeError(
            f"several ranks are measured under torchrun.\nRun: torchrun --nproc-per-node {gpus} -m mstplan measure ... --sharding fsdp"
        )


def _measure_on_all_ranks(asked: MeasureOptions, launch: Launch) -> None:
    """One point, in the processes that torchrun started."""
    from .. import files
    from ..errors import RecipeError
    from ..measuring import measurement, sweep
    from ..show import measuring as shown

    os.environ.update(sweep.process_environment(asked.device))  # torch reads its allocator's settings once
    from ..measuring import ranks

    if asked.sharding != "fsdp" or asked.gpus not in (None, launch.ranks):
        raise RecipeError(
            f"torchrun started {launch.ranks} ranks: say --sharding fsdp, and no other number with --gpus."
        )
    if unused := given(asked, ("timeout", "again")):
        raise RecipeError(
            f"{', '.join(unused)}: nothing to do under torchrun, where a command measures its point each time.\nLeave it out."
        )
    if launch.rank == 0:  # not all of them: each would find another's lock
        measurement.check_appendable(asked.out)
    else:
        files.check_writable(asked.out, force=True)
    asked = asked.changed(gpus=launch.ranks)
    with ranks.Ranks(asked.device, launch) as group:
        known = group.environment()
        cases = _cases(asked, known, alone=False)
        if len(cases) != 1:
            raise RecipeError(
                f"{len(cases)} points under torchrun: measure one with each command.\nName one strategy and one length."
            )
        found = group.measure(cases[0], known, asked.out)
    if found is None:  # another rank says it
        return
    alone = sweep.Sweep([found], 0, [])
    emit(asked, shown.report(alone, known, asked.out))
    if not alone.complete:
        raise typer.Exit(1)
