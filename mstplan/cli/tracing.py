"""The commands that run a model's code without a device: trace, and calibrate, which also reads measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .commands import command, declared, flags_given, option
from .options import (
    FORCE,
    ONE_RECIPE,
    CardOptions,
    FormatOptions,
    PlannedOptions,
    RecipesOptions,
    ResultsOptions,
    TensorsOptions,
    TracedOptions,
    card_of,
    changed,
    known_gpus,
    listed,
    model_or_stand_in,
    one_of,
    plans_of,
    results_files,
    shipped_models,
    simplest,
)
from .output import emit

if TYPE_CHECKING:
    from ..errors import UnreadError
    from ..spec.hardware import Card
    from ..spec.model import Model
    from ..step.recipe import Recipe
    from ..tracing.findings import TraceView
    from ..tracing.trace import Trace
    from .planning import PlanOptions


class TraceOptions(PlannedOptions, TensorsOptions, FormatOptions):
    plot = option(
        Path, "--plot", "Draw the step's memory over its course (PNG, SVG, PDF).", panel="Trace", metavar="FILE"
    )
    snapshot = option(
        Path,
        "--snapshot",
        "Write a pickle for PyTorch's memory viewer, https://pytorch.org/memory_viz (FILE.pickle).",
        panel="Trace",
        metavar="FILE",
    )
    force = FORCE


@command(
    "trace",
    TraceOptions,
    help="Run the model's real code, one training step on fake tensors, and see every allocation: no GPU needed, but torch. Of several "
    f"strategies the first that fits by formula. {ONE_RECIPE} Without a GPU, no word on whether it fits. Exit code 0: fits, 1: does not.",
    examples=(
        "mstplan trace -m qwen3-4b --seq-len 64k --gpu h100 -s mst --plot step.png",
        "mstplan trace -m qwen3-0.6b --seq-len 4k --gpu rtx-4090 --snapshot s.pickle",
        "mstplan trace -m qwen3-0.6b --seq-len 4k -s mst",
    ),
)
def trace(options: TraceOptions) -> None:
    from .. import files
    from ..show import trace as shown

    _check_outputs(options)
    card, model = _card_or_any(options), model_or_stand_in(options)
    view, _ = _views(options, model, card)
    if options.plot is not None:
        from ..show import timeline

        timeline.write(view, options.plot)
    if options.snapshot is not None:
        from ..tracing.simulation import all_events, frame_names
        from ..tracing.snapshot import snapshot, to_pickle

        files.write(
            options.snapshot,
            to_pickle(snapshot(all_events(view.trace), lambda key: frame_names(view.trace, key), expandable=True)),
        )
    emit(
        options,
        shown.report(
            view, files=[path for path in (options.plot, options.snapshot) if path is not None], tensors=options.tensors
        ),
    )
    if not view.fits:
        raise typer.Exit(1)


def _card_or_any(options: CardOptions) -> Card:
    """The card that is asked for; any, where nothing is said of one: only the verdict needs it."""
    from ..spec.hardware import any_card

    return card_of(options) if flags_given(options, declared(CardOptions)) else any_card()


def plan_by_trace(options: PlanOptions, model: Model, card: Card) -> None:
    """What `plan` says of a model that the formula does not know."""
    from ..show import trace as shown

    view, others = _views(options, model, card)
    if options.write_recipe is not None:
        view.plan.recipe.write(options.write_recipe, options.force)
    emit(options, shown.report(view, "plan", others, tensors=options.tensors))
    if not view.fits:
        raise typer.Exit(1)


def _views(options: PlannedOptions, model: Model, card: Card) -> tuple[TraceView, list[TraceView]]:
    """The step that is told of, traced: of several strategies the first that fits, else the nearest; and those traced before. The formula
    says which that is, where it knows the model."""
    from ..tracing import cache, findings
    from ..tracing.search import try_each

    plans = plans_of(options, model, card)

    def view(name: str) -> TraceView:
        step = plans[name].exactly()
        fixed = step.chunks.put_into(step.recipe)
        return findings.build_view(
            model, card, name, trace_step(fixed, step.recipe.padded(step.seq_len), card), step, cache.versions()
        )

    views: list[TraceView] = []
    left_out: list[str] = []
    with explain_stand_in(model), tracing(options) as trace_step:
        for one in try_each(plans if model.stand_in is not None else [simplest(plans)], view, left_out):
            views.append(one)
            if one.fits:
                break
    shown_view = min(views, key=lambda each: (not each.fits, each.trace.peak.bytes))
    others = [each for each in views if each is not shown_view]
    return shown_view._replace(model=model._replace(notes=(*model.notes, *left_out))), others


def _check_outputs(options: TraceOptions) -> None:
    from .. import files
    from ..errors import OutputError, quoted
    from ..show import timeline

    if options.plot is not None:
        timeline.check_output(options.plot)
        if options.plot == options.snapshot:
            raise OutputError(f"--plot and --snapshot both name {quoted(options.plot)}.\nName two files.")
    if options.snapshot is not None:
        from ..tracing import snapshot

        snapshot.check_output(options.snapshot)
    for path in (options.plot, options.snapshot):
        if path is not None:
            files.check_writable(path, options.force)


def stand_in(options: TracedOptions, unread: UnreadError) -> Model:
    """What answers are traced for when the formula does not know the model. Raises its refusal where there is no torch."""
    from ..errors import MissingError
    from ..spec.catalog import identify_model, load_config
    from ..step.recipe import Recipe
    from ..tracing import cache

    try:
        cache.versions()
    except MissingError:
        raise unread from None
    from ..show.trace import status

    name, hub_id = identify_model(options.model)
    with status(), _put_first(f"{name}: {unread.reason}"):
        from ..tracing.tracer import stand_in_for, with_images

        config, code_from = load_config(options.model), _code_from(options)
        model = stand_in_for(config, name, unread.reason, code_from, _counts_towers(options))._replace(hub_id=hub_id)
    if not getattr(options, "images", None):
        return model
    said = {field: getattr(options, field) for field in ("images", "image_tokens", "image_size")}
    recipe = changed(Recipe.model_construct(), {name: value for name, value in said.items() if value is not None})
    return with_images(model, config, recipe, code_from)


def explain_stand_in(model: Model) -> AbstractContextManager[None]:
    """Where the trace fails as well, say first why it was asked."""
    return nullcontext() if model.stand_in is None else _put_first(f"{model.name}: {model.stand_in.why}")


@contextmanager
def _put_first(why: str) -> Iterator[None]:
    from ..errors import ModelError
    from ..spec.unread import ASSUME

    try:
        yield
    except ModelError as e:
        reason, *way_out = str(e).splitlines()
        flags = [line for line in way_out if line.startswith("--")]  # the formula, which others offer, was asked before
        full_stop = "" if reason.endswith(".") else "."
        raise ModelError(f"{why}\n{' '.join([f'Nor is it traced: {reason}{full_stop}', *flags, ASSUME])}") from None


def _counts_towers(options: TracedOptions) -> bool:
    from ..spec.config import TEXT_ALONE

    return options.assume != TEXT_ALONE


def _code_from(options: TracedOptions) -> str | None:
    return options.model if options.trust_remote_code else None


@contextmanager
def tracing(options: TracedOptions) -> Iterator[Callable[[Recipe, int, Card], Trace]]:
    """A function that traces a step of the model, with a word on the terminal while it does."""
    from ..spec.catalog import load_config
    from ..tracing import cache

    config = load_config(options.model)
    cache.check_release(cache.versions(), options.transformers)  # no torch: said before anything else

    def run(recipe: Recipe, seq_len: int, card: Card) -> Trace:
        waiting.update(f"tracing {recipe_words(recipe)} at {seq_len:,} tokens")
        return cache.trace_of(
            config,
            recipe,
            seq_len,
            workspace=card.gpu.workspaces_bytes,
            platform=card.platform,
            keep=not options.no_cache,
            code_from=_code_from(options),
            towers=_counts_towers(options),
        )

    from ..show.trace import recipe_words, status

    with status() as waiting:
        yield run


SOURCES = ("trace", "measurements")
EVERY = ("all-dense", "all")
"""Words for all models that ship."""


class CalibrateOptions(ResultsOptions, FormatOptions):
    results = option(
        str,
        "--results",
        "From measurements: results files, with commas between. Default: measurements.jsonl.",
        adds_up=True,
        metavar="FILE[,FILE]",
    )
    models = option(
        str,
        "--model -m",
        "A model, as elsewhere; several with commas between; or all-dense, all.",
        ...,
        adds_up=True,
        metavar="NAME[,NAME]",
        choices=lambda: [*shipped_models(), *EVERY],
    )
    source = option(str, "--from", f"{listed(SOURCES)}.", ..., metavar="RUNG", choices=lambda: SOURCES)
    strategies = RecipesOptions.strategy
    out = option(
        Path,
        "--out -o",
        "The folder to write to. Default: the user's own, which the planner reads first.",
        metavar="FOLDER",
    )
    no_cache = TracedOptions.no_cache
    gpu = option(
        str,
        "--gpu",
        "From traces: the GPU whose attention kernels are traced. Default: h100.",
        panel="GPU",
        metavar="NAME",
        choices=known_gpus,
    )
    torch = CardOptions.torch


@command(
    "calibrate",
    CalibrateOptions,
    help="Solve a model's coefficients from traces of its steps, or from measurements of them, for the planner to use in place of the formula's; "
    "from measurements, a GPU's CUDA context and workspace, too. Older files are kept.",
    examples=(
        "mstplan calibrate --from trace --model llama3.1-8b",
        "mstplan calibrate --from measurements --model llama3.1-8b h100.jsonl",
    ),
)
def calibrate(options: CalibrateOptions) -> None:
    from .. import files
    from ..errors import RecipeError
    from ..plan import calibration
    from ..step.recipe import STRATEGIES, strategy_name

    one_of("from", options.source, SOURCES)
    idle = ("files", "results") if options.source == "trace" else ("no_cache", "gpu", "torch")
    if unused := flags_given(options, idle):
        raise RecipeError(
            f"{', '.join(unused)}: nothing to do with --from {options.source}.\nLeave it out, or see 'mstplan calibrate --help'."
        )
    asked = options.strategies
    names = None if asked in (None, "all") else [strategy_name(name.strip()) for name in asked.split(",")]
    folder = options.out if options.out is not None else calibration.folders()[0]
    files.check_folder(folder)
    from ..checking.calibrate import CALIBRATED_STRATEGIES, calibrate_all
    from ..checking.fit import fit_all
    from ..show import calibrating
    from ..show.progress import progress
    from ..spec.hardware import card

    notes: list[str] = []
    if options.source == "trace":
        platform = card(options.gpu or "h100", torch=options.torch).platform
        keep = not options.no_cache
        rows = calibrate_all(
            _models_named(options.models), names or CALIBRATED_STRATEGIES, folder, keep, progress, platform
        )
    else:
        results = results_files(options) or [Path("measurements.jsonl")]
        rows, notes = fit_all(
            _models_named(options.models), names or list(STRATEGIES), folder, results, options.out is not None
        )
    rung = "trace" if options.source == "trace" else "measurement"
    emit(options, calibrating.report(rows, rung, folder, notes))


def _models_named(text: str) -> list[str]:
    """Specs of models: one, several with commas between, or all that ship, the dense ones or all."""
    from ..spec.catalog import load_model, model_names

    if text not in EVERY:
        return [part.strip() for part in text.split(",")]
    return [name for name in model_names() if text == "all" or load_model(name).experts is None]
