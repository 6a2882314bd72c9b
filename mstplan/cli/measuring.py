"""The commands of real steps: measure, and validate, which holds predictions against them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .commands import Asked, command, option
from .options import (
    FORCE,
    JSON,
    MEASURING,
    MODEL,
    RECIPE,
    RESULTS_FILES,
    STRATEGIES,
    given,
    length,
    memory,
    recipes_of,
    results_files,
)
from .output import complain, new_console, print_json, say_written

if TYPE_CHECKING:
    from ..observe.launch import Launch
    from ..observe.measurement import Case, Measurement
    from ..observe.sweep import Sweep
    from ..plan.recipe import Recipe


_MODEL = {**MODEL, "model": MODEL["model"]._replace(default=None)}  # a suite, or a results file, names its own
_LENGTHS = {
    "seq_len": option(
        str | None,
        "--seq-len",
        "Tokens per sequence; several with commas between: 8k,16k,32k.",
        adds_up=True,
        metavar="TOKENS[,TOKENS]",
    ),
}


@command(
    "measure",
    _MODEL,
    _LENGTHS,
    {
        "suite": option(
            str | None, "--suite", "Points in a JSON file, or a suite that ships (quick, small, cards).", metavar="FILE"
        ),
    },
    STRATEGIES,
    MEASURING,
    RECIPE,
    JSON,
    help="Real training steps with random weights and tokens on this machine's device, each in a process of its own: peaks of memory, "
    "time, tokens per second. What runs out of memory or fails is a result, too. A rerun measures what is missing. Under torchrun, with "
    "--sharding fsdp, one point of all ranks together.",
    epilog="mstplan measure -m llama3.1-8b --seq-len 8k,16k,32k --strategy all   |   mstplan measure -m smollm2-135m --seq-len 512 --device cpu   |   "
    "torchrun --nproc-per-node 8 -m mstplan measure -m llama3.1-8b --seq-len 64k -s mst --sharding fsdp",
)
def measure(asked: Asked) -> None:
    from ..observe import sweep
    from ..observe.launch import launched
    from ..show import measuring
    from ..show.progress import progress

    _check_device(asked)
    if (launch := launched()) is not None:
        _measure_on_all_ranks(asked, launch)
        return
    known = sweep.environment(asked.device)
    cases, (begins, tell) = _cases(asked, known), _telling(asked, known)
    with _kept(asked):
        found = sweep.measure_all(cases, known, asked.out, asked.timeout, asked.again, begins, tell, progress)
    if asked.json:
        _print_measured(asked, known, found)
    else:
        measuring.report(new_console(), found, asked.out)
    if not found.complete:
        raise typer.Exit(1)


def _check_device(asked: Asked) -> None:
    from ..errors import RecipeError, quoted
    from ..observe import cache

    if asked.device not in ("cuda", "cpu"):
        raise RecipeError(f"unknown device {quoted(asked.device)}.\nKnown: cuda, cpu.")
    cache.versions()  # no torch: said before anything else


@contextmanager
def _kept(asked: Asked) -> Iterator[None]:
    """Who interrupts a sweep hears what became of it."""
    from ..errors import one_line

    try:
        yield
    except KeyboardInterrupt:
        kept = f"results are kept in {one_line(asked.out, 200)}" if asked.out.exists() else "nothing was measured yet"
        complain(f"interrupted; {kept}.\nThe same command{', without --again,' * asked.again} goes on from there.")
        raise


def _print_measured(asked: Asked, known: dict[str, Any], found: Sweep) -> None:
    from ..show import payload

    rows = [m.as_data() for m in found.measurements]
    print_json(
        payload.document(
            "measure", "measurement", environment=known, file=str(asked.out), damaged=found.damaged, results=rows
        )
    )


def _cases(asked: Asked, known: dict[str, Any], alone: bool = True) -> list[Case]:
    """The points that --suite, or the model, lengths and strategies, describe. alone: is this the only rank?"""
    from ..errors import RecipeError
    from ..observe import suites, sweep

    limit = memory(asked.gpu_mem)
    card = sweep.card_of(known, limit)
    more: dict[str, Any] = {"card": card, "device": asked.device, "limit": limit, "steps": asked.steps}
    if asked.suite is not None:
        if not alone:
            raise RecipeError(
                "a suite is measured point by point, each in a process of its own: not under torchrun.\nName one point: --model, --seq-len, -s."
            )
        beside = {**_MODEL, **RECIPE, **STRATEGIES, **_LENGTHS, "layers": MEASURING["layers"]}
        if flags := given(asked, beside):
            raise RecipeError(
                f"--suite says what is measured: {', '.join(flags)} cannot be given beside it.\nWrite it in the suite, or leave --suite out."
            )
        found = suites.cases(asked.suite, **more)
        _refuse_sharded(case.recipe for case in found)
        return found
    if asked.model is None or asked.seq_len is None:
        raise RecipeError("no point to measure.\nGive --model and --seq-len, or --suite.")
    lengths = [length(part) for part in asked.seq_len.split(",")]
    recipes = recipes_of(asked)
    if alone:
        _refuse_sharded(recipes.values())
    return sweep.cases(asked.model, lengths, recipes, layers=asked.layers, assume=asked.assume, **more)


def _refuse_sharded(recipes: Iterable[Recipe]) -> None:
    from ..errors import RecipeError

    if gpus := next((recipe.gpus for recipe in recipes if recipe.sharded), None):
        raise RecipeError(
            f"several ranks are measured under torchrun.\nRun: torchrun --nproc-per-node {gpus} -m mstplan measure ... --sharding fsdp"
        )


def _measure_on_all_ranks(asked: Asked, launch: Launch) -> None:
    """One point, in the processes that torchrun started."""
    from .. import files
    from ..errors import RecipeError
    from ..observe import measurement, sweep

    os.environ.update(sweep.variables(asked.device))  # torch reads its allocator's settings once
    from ..observe import ranks

    if asked.sharding != "fsdp" or asked.gpus not in (None, launch.ranks):
        raise RecipeError(
            f"torchrun started {launch.ranks} ranks: say --sharding fsdp, and no other number with --gpus."
        )
    if unused := given(asked, {name: MEASURING[name] for name in ("timeout", "again")}):
        raise RecipeError(
            f"{', '.join(unused)}: nothing to do under torchrun, where a command measures its point each time.\nLeave it out."
        )
    if launch.rank == 0:  # not all of them: each would find another's lock
        measurement.check_appendable(asked.out)
    else:
        files.check_writable(asked.out, force=True)
    asked.gpus = launch.ranks
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
    alone, (begins, tell) = sweep.Sweep([found], 0, []), _telling(asked, known)
    begins()
    tell(found)
    if asked.json:
        _print_measured(asked, known, alone)
    if not alone.complete:
        raise typer.Exit(1)


_PANEL = "What is checked"
_RESULTS = {
    **RESULTS_FILES,
    "results": option(
        str | None,
        "--results",
        "Results files, with commas between. Default: those that ship.",
        adds_up=True,
        metavar="FILE[,FILE]",
    ),
    "rungs": option(
        str,
        "--rung",
        "formula, calibrated, trace: some of them, with commas between. Default all.",
        "all",
        adds_up=True,
        metavar="NAME[,NAME]",
    ),
    "mean": option(str, "--mean", "The mean error that trace and calibrated formula may have.", "1%", metavar="SHARE"),
    "worst": option(str, "--worst", "The worst.", "3%", metavar="SHARE"),
    "formula_worst": option(str, "--formula-worst", "The worst of the bare formula.", "5%", metavar="SHARE"),
    "plot": option(Path | None, "--plot", "Draw predicted against measured: PNG, SVG or PDF.", metavar="FILE"),
}
_PAGE = {"markdown": option(bool, "--markdown", "As the documentation shows it.", False)}
_CHECKS = {
    "published": option(
        bool,
        "--published",
        "Published figures instead, with the assumptions that each is read with.",
        False,
        panel=_PANEL,
    ),
    "smax": option(
        bool,
        "--smax",
        "Measure now, at 98% and 103% of the predicted S_max, then find the true one.",
        False,
        panel=_PANEL,
    ),
    "throughput": option(
        bool, "--throughput", "Measure now what M, M/2 and 2M cost against one chunk.", False, panel=_PANEL
    ),
}
_NOW = {
    "seq_len": option(str | None, "--seq-len", "For --throughput: tokens per sequence.", metavar="TOKENS"),
    "strategy": option(
        str | None,
        "--strategy -s",
        "For --smax and --throughput: strategies with commas between, or all. Default mst.",
        adds_up=True,
        metavar="NAME[,NAME]",
    ),
    **MEASURING,
    **RECIPE,
}


@command(
    "validate",
    _RESULTS,
    _CHECKS,
    _MODEL,
    _PAGE,
    _NOW,
    FORCE,
    JSON,
    help="Hold predictions against measurements: formula, calibrated formula and trace beside every measured step. Exit code 1 when an "
    "error is beyond its bound, or a step that was to fit ran out of memory.",
    epilog="mstplan validate h100.jsonl a100.jsonl --plot errors.png   |   mstplan validate --published   |   "
    "mstplan validate --smax -m llama3.1-8b --gpu-mem 80GB -s checkpoint,mst",
)
def validate(asked: Asked) -> None:
    from ..errors import RecipeError

    if asked.published + asked.smax + asked.throughput > 1:
        raise RecipeError("--published, --smax and --throughput exclude each other.\nCheck one after the other.")
    if asked.markdown and asked.json:
        raise RecipeError("--markdown and --json exclude each other.\nLeave one of the two out.")
    now = asked.smax or asked.throughput
    idle = {
        **({} if now else _NOW),
        **(_RESULTS if now or asked.published else {}),
        **(_PAGE if now else {}),
        **(_MODEL if asked.published else {}),
    }
    if not now:
        idle["assume"] = MODEL["assume"]
    if asked.smax:
        idle["seq_len"] = _NOW["seq_len"]
    if unused := given(asked, idle):
        raise RecipeError(
            f"{', '.join(unused)}: nothing to do with this check.\nLeave it out, or see 'mstplan validate --help'."
        )
    if asked.published:
        _validate_published(asked)
    elif now:
        _validate_now(asked)
    else:
        _validate_results(asked)


def _validate_results(asked: Asked) -> None:
    from .. import files
    from ..errors import MeasurementError, RecipeError, quoted
    from ..observe import measurement, validate
    from ..plan.catalog import named
    from ..show import timeline, validating
    from ..show.progress import progress

    if asked.plot is not None:
        files.check_writable(asked.plot, asked.force)
        timeline.check_output(asked.plot)
    rungs = validate.RUNGS if asked.rungs == "all" else tuple(name.strip() for name in asked.rungs.split(","))
    if unknown := [name for name in rungs if name not in validate.RUNGS]:
        raise RecipeError(f"unknown rung {quoted(unknown[0])}.\nKnown: {', '.join(validate.RUNGS)}.")
    bounds = _bounds(asked)
    read = measurement.read_all(results_files(asked) or measurement.archive())
    name = named(asked.model)[0] if asked.model is not None else None
    chosen = [m for m in read.measurements if name in (None, m.case.model)]
    if not any(m.outcome in (measurement.OK, measurement.OUT_OF_MEMORY) for m in chosen):
        of, damaged = f" of {name}" if name else "", f" ({read.skipped[0]})" if read.skipped else ""
        raise MeasurementError(
            f"no measurement{of} to hold predictions against{damaged}.\nmstplan measure makes some; --results names the file."
        )
    with progress("comparing", len(chosen)) as advance:
        found = validate.validate(chosen, rungs, lambda words: advance(words, 1))
    if not found.rows and not found.out_of_memory:
        why = f" ({found.left_out[0]})" if found.left_out else ""
        raise MeasurementError(
            f"{asked.rungs} has no answer for any of these {len(chosen)} measurements{why}.\nName other rungs, or leave --rung out."
        )
    said = validate.beyond(found, bounds)
    if asked.plot is not None:
        validating.plot(found, asked.plot)
    if asked.json:
        from ..show import payload

        print_json(payload.document("validate", "measurement", **validating.as_data(found, said, read.skipped)))
    elif asked.markdown:
        typer.echo(validating.markdown(found), nl=False)
    else:
        validating.report(new_console(), found, read.skipped, said)
        if asked.plot is not None:
            say_written(asked.plot)
    if said:
        raise typer.Exit(1)


def _bounds(asked: Asked) -> dict[str, Any]:
    from ..observe.validate import CALIBRATED, FORMULA, TRACE, Bounds
    from ..units import parse_share

    bounds = Bounds(parse_share(asked.mean, "--mean"), parse_share(asked.worst, "--worst"))
    formula = parse_share(asked.formula_worst, "--formula-worst")
    return {FORMULA: Bounds(formula, formula), CALIBRATED: bounds, TRACE: bounds}


def _validate_published(asked: Asked) -> None:
    from ..plan.published import comparisons
    from ..show import published

    rows = comparisons()
    if asked.json:
        from ..show import payload

        print_json(payload.document("validate", published=[published.as_data(row) for row in rows]))
    elif asked.markdown:
        typer.echo(published.page(), nl=False)
    else:
        published.report(new_console(), rows)


def _validate_now(asked: Asked) -> None:
    """Predictions that are measured at once."""
    from ..errors import RecipeError
    from ..observe import limits, sweep
    from ..show import checking
    from ..show.progress import progress

    if asked.model is None or (asked.throughput and asked.seq_len is None):
        raise RecipeError(
            "nothing to measure.\nGive --model"
            + (" and --seq-len." if asked.throughput else "; --gpu-mem limits what is used of the card.")
        )
    _check_device(asked)
    known = sweep.environment(asked.device)
    limit = memory(asked.gpu_mem)
    settings = (
        asked.device,
        limit,
        asked.layers,
        asked.steps,
        asked.timeout,
        asked.out,
        asked.again,
        progress,
        asked.assume,
    )
    bench = limits.Bench(asked.model, known, sweep.card_of(known, limit), *settings)
    recipes, (begins, tell) = recipes_of(asked, "mst"), _telling(asked, known)
    _refuse_sharded(recipes.values())
    seq_len = length(asked.seq_len) if asked.throughput else 0
    if asked.throughput:  # refuses what cannot be run, before anything is; of S_max, the trace does
        sweep.cases(asked.model, [seq_len], recipes, bench.card, asked.layers, asked.device, limit, assume=asked.assume)
    with _kept(asked):
        if asked.smax:
            limited = limits.smax(bench, recipes, begins, tell)
            data, holds = checking.smax_data(bench, limited), all(limit.holds for limit, _ in limited)
        else:
            found = limits.throughputs(bench, recipes, seq_len, begins, tell)
            data, holds = checking.throughput_data(seq_len, found), all(map(limits.holds, found.values()))
    if asked.json:
        from ..show import payload

        print_json(payload.document("validate", "measurement", environment=known, file=str(asked.out), **data))
    elif asked.smax:
        checking.smax(new_console(), bench, limited)
    else:
        for strategy, rows in found.items():
            checking.throughput(new_console(), strategy, rows)
    if not holds:
        raise typer.Exit(1)


def _telling(asked: Asked, known: dict[str, Any]) -> tuple[Callable[[], None], Callable[[Measurement], None]]:
    """What to say when measuring begins, and of each point as it comes: nothing under --json."""
    from ..show import checking, measuring

    if asked.json:
        return lambda: None, lambda _m: None
    console, name = new_console(), checking.chunks if getattr(asked, "throughput", False) else measuring.subject
    return lambda: measuring.heading(console, known), lambda m: console.print(measuring.line(m, name), soft_wrap=True)
