"""The commands that measure at once what was predicted: check-smax and check-throughput."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from .commands import command, option
from .measuring import check_device, refuse_sharded, report_interruption
from .options import (
    FormatOptions,
    MeasuringOptions,
    ModelOptions,
    RecipesOptions,
    length,
    memory,
    recipes_of,
    strategies,
    strategy_names,
)
from .output import emit

if TYPE_CHECKING:
    from ..checking.limits import Bench
    from ..measuring.processes import Processes
    from ..step.recipe import Recipe


class CheckOptions(ModelOptions, MeasuringOptions, RecipesOptions, FormatOptions):
    strategy = option(
        str, "--strategy -s", strategies(default="mst"), adds_up=True, metavar="NAME[,NAME]", choices=strategy_names
    )


class CheckThroughputOptions(CheckOptions):
    seq_len = option(str, "--seq-len", "Tokens per sequence: 65536, 64k, 1M.", ..., metavar="TOKENS")


@command(
    "check-smax",
    CheckOptions,
    help="Is S_max true? Measures at 98% of what the trace predicts, which must run, and at 103%, which must not; then closes in on the longest "
    "sequence that runs. Exit code 1 when one of the two is otherwise.",
    examples=(
        "mstplan check-smax -m llama3.1-8b --gpu-mem 80GB -s checkpoint,mst",
        "mstplan check-smax -m smollm2-135m --layers 6 --device cpu --gpu-mem 800MB",
    ),
)
def check_smax(options: CheckOptions) -> None:
    from ..checking import limits
    from ..measuring.processes import Processes
    from ..show import checking, measuring

    with report_interruption(options), Processes() as processes:
        bench, recipes = _bench(options, processes)
        begins, tell = measuring.telling(bench.environment)
        rows = limits.check_all_limits(bench, recipes, begins, tell)
    emit(options, checking.smax(bench, rows))
    if not all(limit.holds for limit, _ in rows):
        raise typer.Exit(1)


@command(
    "check-throughput",
    CheckThroughputOptions,
    help="What do chunks cost? Measures the recommended M, half and twice of it, and one chunk. Exit code 1 when the recommended M costs more of "
    "the tokens per second than it may.",
    examples=(
        "mstplan check-throughput -m llama3.1-8b --seq-len 64k",
        "mstplan check-throughput -m smollm2-135m --layers 6 --seq-len 4k --device cpu",
    ),
)
def check_throughput(options: CheckThroughputOptions) -> None:
    from ..checking import limits
    from ..measuring import sweep
    from ..measuring.processes import Processes
    from ..show import checking, measuring

    with report_interruption(options), Processes() as processes:
        bench, recipes = _bench(options, processes)
        seq_len = length(options.seq_len)
        # refuses what cannot be run, before anything is; of S_max, the trace does
        sweep.plan_cases(
            options.model,
            [seq_len],
            recipes,
            bench.card,
            options.layers,
            options.device,
            bench.limit,
            assume=options.assume,
        )
        begins, tell = measuring.telling(bench.environment, checking.chunks)
        throughputs = limits.measure_all_throughputs(bench, recipes, seq_len, begins, tell)
    emit(options, checking.throughput(bench, seq_len, throughputs))
    if not all(map(limits.throughput_holds, throughputs.values())):
        raise typer.Exit(1)


def _bench(options: CheckOptions, processes: Processes) -> tuple[Bench, dict[str, Recipe]]:
    """Where to measure, and what."""
    from ..checking import limits
    from ..measuring import sweep
    from ..measuring.measurement import card_of
    from ..show.progress import progress

    check_device(options.device)
    environment = sweep.ask_environment(options.device, processes)
    limit = memory(options.gpu_mem)
    bench = limits.Bench(
        options.model,
        environment,
        card_of(environment, limit),
        options.device,
        limit,
        options.layers,
        options.steps,
        options.timeout,
        options.out,
        options.again,
        progress,
        options.assume,
        processes,
    )
    recipes = recipes_of(options, "mst")
    refuse_sharded(recipes.values())
    return bench, recipes
