"""The commands that plan: max-seq, plan, theorem, shapes, plot. Without torch but for `max-seq --rung trace`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .commands import command, flags_given, option
from .options import (
    FORCE,
    HOW_TRACED,
    ONE_RECIPE,
    CardOptions,
    FormatOptions,
    ModelOptions,
    PlannedOptions,
    RecipesOptions,
    StepOptions,
    TensorsOptions,
    TracedOptions,
    as_published,
    assumptions_of,
    base_recipe,
    card_of,
    changed,
    changes_of,
    left_out_notes,
    length,
    listed,
    memory,
    model_of,
    model_or_stand_in,
    of_one_gpu,
    one_of,
    plans_of,
    recipes_of,
    simplest,
)
from .output import emit

if TYPE_CHECKING:
    from ..spec.hardware import Card
    from ..spec.model import Model
    from ..step.recipe import Recipe


RUNGS = {"formula": "at once", "trace": "needs torch, takes seconds"}


class RungOptions(TracedOptions):
    rung = option(
        str,
        "--rung",
        f"{listed(RUNGS, RUNGS)}. Default formula.",
        "formula",
        panel="Trace",
        metavar="NAME",
        choices=lambda: RUNGS,
    )


class MaxSeqOptions(RungOptions, RecipesOptions, CardOptions, TensorsOptions, FormatOptions):
    pass


@command(
    "max-seq",
    MaxSeqOptions,
    help=f"The longest sequence that fits, and every shorter one with it, for each strategy, and what holds it back. {ONE_RECIPE}",
    examples=(
        "mstplan max-seq --model llama3.1-8b --gpu h100 --optimizer-in-backward",
        "mstplan max-seq -m llama3.1-8b --gpu rtx-4090 --lora 16 --quantize nf4",
        "mstplan max-seq -m qwen3-0.6b --gpu-mem 24GB --checkpoint layer --chunks 8,32",
        "mstplan max-seq -m qwen3-4b --gpu h100 --rung trace",
        "mstplan max-seq -m qwen3-8b --gpu h100 --gpus 2 --sharding all",
    ),
)
def max_seq(options: MaxSeqOptions) -> None:
    from ..plan import findings

    one_of("rung", options.rung, RUNGS)
    card, model = card_of(options), model_or_stand_in(options)
    if options.sharding == "all":
        _compare_ways_of_gpus(options, model, card)
        return
    recipes = recipes_of(options, model=model)
    if options.rung == "trace" or model.stand_in is not None:
        _max_seq_by_trace(options, model, card, recipes)
        return
    _refuse_tracing(options, "Add --rung trace, or leave it out.")
    longest = findings.find_longest(model, card, recipes)
    longest = longest._replace(notes=(*assumptions_of(options), *left_out_notes(options, model), *longest.notes))
    from ..show import planning as reports

    emit(options, reports.max_seq(longest, options.tensors))
    if longest.best.s_max == 0:
        raise typer.Exit(1)


def _compare_ways_of_gpus(options: MaxSeqOptions, model: Model, card: Card) -> None:
    """What `max-seq --sharding all` answers: every way to use so many GPUs."""
    from ..errors import RecipeError
    from ..plan import several_gpus

    if options.rung == "trace" or model.stand_in is not None:
        raise RecipeError("--sharding all compares by the formula.\nName one with --sharding.")
    gpus = options.gpus or (base_recipe(options).gpus if options.recipe is not None else 1)
    if gpus < 2:
        raise RecipeError("--sharding all compares ways to use several GPUs: add --gpus 8.")
    alone, given = of_one_gpu(options)
    experts = model.experts.number if model.experts is not None else 0
    in_parts = {name: True for name in ("sequence_parallel_norms", "loss_parallel") if getattr(options, name)}
    listed_ways = several_gpus.list_ways(
        gpus,
        options.sequence_parallel,
        options.tensor_parallel,
        experts,
        [in_parts] if in_parts else several_gpus.IN_PARTS,
    )
    ways = several_gpus.with_own_fields(listed_ways, given)
    recipes = recipes_of(alone, model=model)
    from ..show import planning as reports
    from .processes import in_processes

    with in_processes("comparing ways", [way.name for way in ways]) as map_each:
        compared = several_gpus.compare(model, card, recipes, ways, map_each)

    emit(options, reports.ways_of_gpus(model, card, compared, assumptions_of(options)))
    if not any(answer.s_max for _, answer in compared.answers):
        raise typer.Exit(1)


def _refuse_tracing(options: TracedOptions, way_out: str) -> None:
    from ..errors import RecipeError

    if unused := flags_given(options, HOW_TRACED):
        raise RecipeError(f"{', '.join(unused)}: nothing to do with the formula.\n{way_out}")


def _max_seq_by_trace(options: MaxSeqOptions, model: Model, card: Card, recipes: dict[str, Recipe]) -> None:
    from ..tracing import cache, findings, search
    from .tracing import explain_stand_in, tracing

    with explain_stand_in(model), tracing(options) as trace_step:
        results, model = search.find_longest_of_each(model, recipes, card, trace_step)
    longest = findings.longest(model, card, results, cache.versions())
    from ..show import trace as reports

    emit(options, reports.max_seq(longest, options.tensors))
    if longest.best.answer.s_max == 0:
        raise typer.Exit(1)


class PlanOptions(PlannedOptions, TensorsOptions, FormatOptions):
    seq_len = option(
        str, "--seq-len", "Tokens per sequence: 65536, 64k, 1M; several with commas between.", ..., metavar="TOKENS"
    )
    write_recipe = option(Path, "--write-recipe", "Write the recipe as JSON.", panel="Recipe", metavar="FILE")
    force = FORCE


@command(
    "plan",
    PlanOptions,
    help="Do batches of up to this length fit? For each strategy; of the first that fits, the peak and where it is, or what would make one fit. "
    f"{ONE_RECIPE} Exit code 0: fits, 1: does not.",
    examples=(
        "mstplan plan -m llama3.1-8b --gpu h100 --seq-len 64k",
        "mstplan plan -m llama3.1-8b --gpu h100 --seq-len 16k,32k,64k",
        "mstplan plan -m qwen3-4b --gpu h100 --seq-len 32k --write-recipe recipe.json",
    ),
)
def plan(options: PlanOptions) -> None:
    from .. import files
    from ..errors import RecipeError
    from ..plan import findings

    if options.write_recipe is not None:
        files.check_writable(options.write_recipe, options.force)
    if options.sharding == "all":
        raise RecipeError(
            "--sharding all compares ways to use several GPUs, which max-seq does.\nName one here: --sharding fsdp."
        )
    card, model = card_of(options), model_or_stand_in(options)
    if model.stand_in is not None:
        from .tracing import plan_by_trace

        plan_by_trace(options, model, card)
        return
    _refuse_tracing(options, "Use mstplan trace, or leave it out.")
    if "," in options.seq_len:
        _plan_lengths(options, model, card)
        return
    plans = plans_of(options, model, card)
    name = simplest(plans)
    finding = findings.assess_length(plans, name)
    finding = finding._replace(notes=(*assumptions_of(options), *left_out_notes(options, model), *finding.notes))
    if options.write_recipe is not None:
        finding.plan.recipe.write(options.write_recipe, options.force)
    from ..show import planning as reports

    emit(options, reports.plan(finding, options.tensors))
    if not finding.plan.fits:
        raise typer.Exit(1)


def _plan_lengths(options: PlanOptions, model: Model, card: Card) -> None:
    """What `plan` says of several lengths."""
    from ..errors import RecipeError
    from ..plan import findings
    from ..show import planning as reports

    if options.write_recipe is not None:
        raise RecipeError("--write-recipe writes one recipe.\nGive one length.")
    plans_by_length = [plans_of(options, model, card, part.strip() or ",") for part in options.seq_len.split(",")]
    finding = findings.assess_lengths([(plans, simplest(plans)) for plans in plans_by_length])
    emit(options, reports.plans(finding))
    if not finding.all_fit:
        raise typer.Exit(1)


def _coefficient(flag: str, what: str, metavar: str) -> str | None:
    return option(str, flag, what, panel="Coefficients", metavar=metavar)


class TheoremOptions(ModelOptions, StepOptions, CardOptions, FormatOptions):
    seq_len = option(str, "--seq-len", "Also the memory at this length.", metavar="TOKENS")
    w_mem = _coefficient("--w-mem", "W_mem, e.g. 60GiB.", "SIZE")
    i_mem = _coefficient("--i-mem", "I_mem, bytes per token.", "BYTES")
    a_mem = _coefficient("--a-mem", "A_mem, bytes per token and layer.", "BYTES")
    layers = _coefficient("--layers", "L.", "N")
    m = _coefficient("--m", "M, the number of mini-sequences.", "N")
    m_max = _coefficient("--m-max", "M_max, e.g. 80GiB.", "SIZE")


@command(
    "theorem",
    TheoremOptions,
    help="The paper's formulas with this model's coefficients, next to the step model's answer.",
    examples=("mstplan theorem -m llama3.1-8b --gpu a100-80gb --seq-len 64k --m 32",),
)
def theorem(options: TheoremOptions) -> None:
    from ..plan import advice
    from ..plan import theorem as formulas
    from ..show import planning as reports

    model, card = model_of(options), card_of(options)
    seq_len = length(options.seq_len) if options.seq_len is not None else None
    overrides = _overrides(options)
    view = formulas.view(model, card, _theorem_recipe(options, model), overrides, seq_len)
    emit(options, reports.theorem(model, card, view, advice.left_out_notes(model)))


def _theorem_recipe(options: TheoremOptions, model: Model) -> Recipe:
    """The user's recipe without what the four formulas themselves vary."""
    from ..errors import RecipeError
    from ..step.recipe import STRATEGY_FIELDS, Recipe

    base = base_recipe(options)
    if base.gpus > 1:
        raise RecipeError(
            "the paper's formulas are of one GPU and know no sharding.\nPlan this recipe with mstplan max-seq or mstplan plan."
        )
    own = {name: value for name, value in base.model_dump().items() if name not in STRATEGY_FIELDS}
    return changed(Recipe.model_construct(), {**own, **as_published(base, options, model), **changes_of(options)})


def _overrides(options: TheoremOptions) -> dict[str, int | None]:
    from ..units import parse_whole

    def number(name: str, text: str | None) -> int | None:
        return parse_whole(text, f"--{name}") if text is not None else None

    sizes = {"w_mem": memory(options.w_mem, "--w-mem"), "m_max": memory(options.m_max, "--m-max")}
    counts = {
        "i_mem": number("i-mem", options.i_mem),
        "a_mem": number("a-mem", options.a_mem),
        "layers": number("layers", options.layers),
    }
    return {**sizes, **counts, "chunks": number("m", options.m)}


DTYPES = ("bfloat16", "float32")


class ShapesOptions(ModelOptions, FormatOptions):
    seq_len = option(str, "--seq-len", "Tokens per sequence.", "128k", metavar="TOKENS")
    batch = option(int, "--batch -b", "Sequences.", 1, metavar="N", min=1, max=1_000_000)
    dtype = option(str, "--dtype", f"{listed(DTYPES)}.", DTYPES[0], metavar="NAME", choices=lambda: DTYPES)


@command(
    "shapes",
    ShapesOptions,
    help="The large tensors of a layer and the LM head: shape and bytes.",
    examples=("mstplan shapes -m llama3.1-8b --seq-len 131072",),
)
def shapes(options: ShapesOptions) -> None:
    from ..plan.shapes import shapes as table
    from ..show import planning as reports

    one_of("dtype", options.dtype, DTYPES)
    model, seq_len = model_of(options), length(options.seq_len)
    rows = table(model, options.batch, seq_len, options.dtype)
    emit(options, reports.shapes(rows, model, options.batch, seq_len))


class PlotOptions(ModelOptions, RecipesOptions, CardOptions, FormatOptions):
    out = option(Path, "--out -o", "PNG, SVG or PDF picture, or CSV of the points.", Path("memory.png"), metavar="FILE")
    to = option(str, "--to", "The longest length drawn. Default: a little beyond the largest S_max.", metavar="TOKENS")
    points = option(int, "--points", "Lengths per curve.", 200, metavar="N", min=2, max=100_000)
    force = FORCE


@command(
    "plot",
    PlotOptions,
    help=f"Memory against sequence length for the strategies, with the GPU, S_max and where the peak is. {ONE_RECIPE}",
    examples=("mstplan plot -m llama3.1-8b --gpu h100 -o llama.svg",),
)
def plot(options: PlotOptions) -> None:
    from ..plan import advice, solve
    from ..show import planning as reports
    from ..show import plot as drawing

    drawing.check_output(options.out, options.force)
    model, card = model_of(options), card_of(options)
    longest = length(options.to) if options.to is not None else None
    answers = [solve.max_seq(model, recipe, card, name) for name, recipe in recipes_of(options, model=model).items()]
    curves = drawing.curves(answers, longest, options.points)
    drawing.write(curves, model, card, options.out)
    emit(options, reports.plot(model, card, curves, options.out, advice.left_out_notes(model)))
