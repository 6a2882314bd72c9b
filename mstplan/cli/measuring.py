"""The command of real steps, measure; and what it shares with those that measure to check."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from .commands import command, declared, flags_given, option
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


def _allocators() -> list[str]:
    from ..spec.hardware import ALLOCATORS

    return list(ALLOCATORS)


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
    workers = option(
        int,
        "--workers",
        "Points measured at a time, as far as their memory fits together. Times are of points that ran alone.",
        1,
        panel="Measurement",
        metavar="N",
        min=1,
        max=64,
    )
    allocator = option(
        str,
        "--allocator",
        "torch's allocator for CUDA: expandable (segments), or default. As PYTORCH_CUDA_ALLOC_CONF says, else expandable.",
        panel="Measurement",
        metavar="NAME",
        choices=_allocators,
    )


@command(
    "measure",
    MeasureOptions,
    help="Real training steps with random weights and tokens on this machine's device, each in a process of its own: peaks of memory, "
    "time, tokens per second. What runs out of memory or fails is a result, too. A rerun measures what is missing. Under torchrun, "
    "accelerate launch, deepspeed or srun, with --sharding fsdp or ddp, one point of all ranks together.",
    examples=(
        "mstplan measure -m llama3.1-8b --seq-len 8k,16k,32k --strategy all",
        "mstplan measure -m smollm2-135m --seq-len 512 --device cpu",
        "mstplan measure --suite cards --workers 5 -o h100.jsonl",
    ),
)
def measure(options: MeasureOptions) -> None:
    from ..measuring import sweep
    from ..measuring.launch import read_launch
    from ..measuring.processes import Processes
    from ..show import measuring
    from ..show.progress import progress

    check_device(options.device)
    if (launch := read_launch()) is not None:
        _measure_on_all_ranks(options, launch)
        return
    _check_company(options)
    with report_interruption(options), Processes() as processes:
        environment = sweep.ask_environment(options.device, processes)
        cases, (begins, tell) = _cases(options, environment), measuring.telling(environment)
        results = sweep.measure_all(
            cases,
            environment,
            options.out,
            options.timeout,
            options.again,
            begins,
            tell,
            progress,
            processes,
            options.workers,
        )
    emit(options, measuring.report(results, environment, options.out))
    if not results.complete:
        raise typer.Exit(1)


def check_device(device: str) -> None:
    from ..measuring.measurement import DEVICES
    from ..tracing import cache

    one_of("device", device, DEVICES)
    cache.versions()  # no torch: said before anything else


def _check_company(options: MeasureOptions) -> None:
    from ..errors import RecipeError
    from ..spec.hardware import ALLOCATORS

    if options.allocator is not None:
        one_of("allocator", options.allocator, ALLOCATORS)
        if options.device != "cuda":
            raise RecipeError(f"--allocator: a {options.device} has no such allocator.\nLeave it out.")
    if options.workers > 1 and options.gpu_mem is not None and options.device == "cuda":
        raise RecipeError(
            "--gpu-mem counts what others hold of the GPU, so its points run alone: not with --workers.\nLeave one of the two out."
        )


@contextmanager
def report_interruption(options: MeasuringOptions) -> Iterator[None]:
    """Who interrupts a sweep hears what became of it."""
    from ..errors import one_line

    try:
        yield
    except KeyboardInterrupt:
        outcome = (
            f"results are kept in {one_line(options.out, 200)}" if options.out.exists() else "nothing was measured yet"
        )
        complain(f"interrupted; {outcome}.\nThe same command{', without --again,' * options.again} goes on from there.")
        raise


def _cases(options: MeasureOptions, environment: dict[str, Any], alone: bool = True) -> list[Case]:
    """The points that --suite, or the model, lengths and strategies, describe. alone: is this the only rank?"""
    from ..errors import RecipeError
    from ..measuring import suites, sweep
    from ..measuring.measurement import card_of

    limit = memory(options.gpu_mem)
    card = card_of(environment, limit)
    more: dict[str, Any] = {"card": card, "device": options.device, "limit": limit, "steps": options.steps}
    if options.suite is not None:
        if not alone:
            raise RecipeError(
                "a suite is measured point by point, each in a process of its own: not by several ranks.\nName one point: --model, --seq-len, -s."
            )
        beside = ("model", "assume", *declared(RecipesOptions), "seq_len", "layers", "allocator")
        if flags := flags_given(options, beside):
            raise RecipeError(
                f"--suite says what is measured: {', '.join(flags)} cannot be given beside it.\nWrite it in the suite, or leave --suite out."
            )
        cases = suites.read_cases(options.suite, leave_out=complain, **more)
        refuse_sharded(case.recipe for case in cases)
        return cases
    if options.model is None or options.seq_len is None:
        raise RecipeError("no point to measure.\nGive --model and --seq-len, or --suite.")
    lengths = [length(part) for part in options.seq_len.split(",")]
    recipes = recipes_of(options)
    if alone:
        refuse_sharded(recipes.values())
    more |= {"assume": options.assume, "allocator": options.allocator}
    return sweep.plan_cases(options.model, lengths, recipes, layers=options.layers, **more)


def refuse_sharded(recipes: Iterable[Recipe]) -> None:
    from ..errors import RecipeError

    if several := next((recipe for recipe in recipes if recipe.gpus > 1), None):
        raise RecipeError(
            "several ranks are measured under a launcher: torchrun, accelerate launch, deepspeed or srun.\n"
            f"Run: torchrun --nproc-per-node {several.gpus} -m mstplan measure ... --sharding {several.sharding if several.sharding != 'none' else 'fsdp'}"
        )


def _measure_on_all_ranks(options: MeasureOptions, launch: Launch) -> None:
    """One point, in the processes that a launcher started."""
    from .. import files
    from ..errors import RecipeError
    from ..measuring import measurement, sweep
    from ..measuring.processes import process_environment
    from ..show import measuring as shown

    os.environ.update(process_environment(options.device))  # torch reads its allocator's settings once
    from ..measuring import ranks

    if options.sharding in (None, "none") or options.gpus not in (None, launch.ranks):
        raise RecipeError(
            f"{launch.ranks} ranks were started: say --sharding fsdp or ddp, and no other number with --gpus."
        )
    if unused := flags_given(options, ("timeout", "again", "workers", "allocator")):
        raise RecipeError(
            f"{', '.join(unused)}: nothing to do among several ranks, where a command measures its point each time.\nLeave it out."
        )
    if launch.rank == 0:  # not all of them: each would find another's lock
        measurement.check_appendable(options.out)
    else:
        files.check_writable(options.out, force=True)
    options = options.changed(gpus=launch.ranks)
    with ranks.Ranks(options.device, launch) as group:
        environment = group.environment()
        cases = _cases(options, environment, alone=False)
        if len(cases) != 1:
            raise RecipeError(
                f"{len(cases)} points of several ranks: measure one with each command.\nName one strategy and one length."
            )
        measurement_of_all = group.measure(cases[0], environment, options.out)
    if measurement_of_all is None:  # another rank says it
        return
    alone = sweep.Sweep([measurement_of_all], 0, [])
    emit(options, shown.report(alone, environment, options.out))
    if not alone.complete:
        raise typer.Exit(1)
