"""The commands that run a model's code without a device: trace, and calibrate, which also reads measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .commands import command, declared, given, option
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
    known_or_traced,
    listed,
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
def trace(asked: TraceOptions) -> None:
    from .. import files
    from ..show import trace as shown

    _check_outputs(asked)
    card, model = _card_or_any(asked), known_or_traced(asked)
    view, _ = _views(asked, model, card)
    if asked.plot is not None:
        from ..show import timeline

        timeline.write(view, asked.plot)
    if asked.snapshot is not None:
        from ..tracing.simulation import all_events, frame_names
        from ..tracing.snapshot import snapshot, to_pickle

        files.write(
            asked.snapshot,
            to_pickle(snapshot(all_events(view.trace), lambda key: frame_names(view.trace, key), expandable=True)),
        )
    emit(
        asked,
        shown.report(
            view, files=[path for path in (asked.plot, asked.snapshot) if path is not None], tensors=asked.tensors
        ),
    )
    if not view.fits:
        raise typer.Exit(1)


def _card_or_any(asked: CardOptions) -> Card:
    """The card that is asked for; any, where nothing is said of one: only the verdict needs it."""
    from ..spec.hardware import any_card

    return card_of(asked) if given(asked, declared(CardOptions)) else any_card()


def plan_by_trace(asked: PlanOptions, model: Model, card: Card) -> None:
    """What `plan` says of a model that the formula does not know."""
    from ..show import trace as shown

    view, others = _views(asked, model, card)
    if asked.write_recipe is not None:
        view.plan.recipe.write(asked.write_recipe, asked.force)
    emit(asked, shown.report(view, "plan", others, tensors=asked.tensors))
    if not view.fits:
        raise typer.Exit(1)


def _views(asked: PlannedOptions, model: Model, card: Card) -> tuple[TraceView, list[TraceView]]:
    """The step that is told of, traced: of several strategies the first that fits, else the nearest; and those traced before. The formula
    says which that is, where it knows the model."""
    from ..tracing import cache, findings
    from ..tracing.search import try_each

    plans = plans_of(asked, model, card)

    def view(name: str) -> TraceView:
        step = plans[name].exactly()
        fixed = step.recipe.changed(mlp_chunks=step.chunks.mlp, loss_chunks=step.chunks.loss)
        return findings.build_view(
            model, card, name, trace_step(fixed, step.recipe.padded(step.seq_len), card), step, cache.versions()
        )

    found: list[TraceView] = []
    left_out: list[str] = []
    with told_after(model), tracing(asked) as trace_step:
        for one in try_each(plans if model.stand_in is not None else [simplest(plans)], view, left_out):
            found.append(one)
            if one.fits:
                break
    told = min(found, key=lambda each: (not each.fits, each.trace.peak.bytes))
    others = [each for each in found if each is not told]
    return told._replace(model=model._replace(notes=(*model.notes, *left_out))), others


def _check_outputs(asked: TraceOptions) -> None:
    from .. import files
    from ..errors import OutputError, quoted
    from ..show import timeline

    if asked.plot is not None:
        timeline.check_output(asked.plot)
        if asked.plot == asked.snapshot:
            raise OutputError(f"--plot and --snapshot both name {quoted(asked.plot)}.\nName two files.")
    if asked.snapshot is not None:
        from ..tracing import snapshot

        snapshot.check_output(asked.snapshot)
    for path in (asked.plot, asked.snapshot):
        if path is not None:
            files.check_writable(path, asked.force)


def stand_in(asked: TracedOptions, unread: UnreadError) -> Model:
    """What answers are traced for when the formula does not know the model. Raises its refusal where there is no torch."""
    from ..errors import MissingError
    from ..spec.catalog import identify_model, load_config
    from ..tracing import cache

    try:
        cache.versions()
    except MissingError:
        raise unread from None
    from ..show.trace import status

    name, hub_id = identify_model(asked.model)
    with status(), _said_first(f"{name}: {unread.reason}"):
        from ..tracing.tracer import stand_in_for

        return stand_in_for(load_config(asked.model), name, unread.reason, _code_from(asked))._replace(hub_id=hub_id)


def told_after(model: Model) -> AbstractContextManager[None]:
    """Where the trace fails as well, say first why it was asked."""
    return nullcontext() if model.stand_in is None else _said_first(f"{model.name}: {model.stand_in.why}")


@contextmanager
def _said_first(why: str) -> Iterator[None]:
    from ..errors import ModelError
    from ..spec.unread import ASSUME

    try:
        yield
    except ModelError as e:
        said, *way_out = str(e).splitlines()
        options = [
            line for line in way_out if line.startswith("--")
        ]  # the formula, which others offer, was asked before
        full_stop = "" if said.endswith(".") else "."
        raise ModelError(f"{why}\n{' '.join([f'Nor is it traced: {said}{full_stop}', *options, ASSUME])}") from None


def _code_from(asked: TracedOptions) -> str | None:
    return asked.model if asked.trust_remote_code else None


@contextmanager
def tracing(asked: TracedOptions) -> Iterator[Callable[[Recipe, int, Card], Trace]]:
    """A function that traces a step of the model, with a word on the terminal while it does."""
    from ..spec.catalog import load_config
    from ..tracing import cache

    config = load_config(asked.model)
    cache.versions()  # no torch: said before anything else

    def run(recipe: Recipe, seq_len: int, card: Card) -> Trace:
        waiting.update(f"tracing {recipe_words(recipe)} at {seq_len:,} tokens")
        workspace = card.gpu.workspaces_bytes
        return cache.trace_of(
            config, recipe, seq_len, workspace=workspace, keep=not asked.no_cache, code_from=_code_from(asked)
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
def calibrate(asked: CalibrateOptions) -> None:
    from .. import files
    from ..errors import RecipeError
    from ..plan import calibration
    from ..step.recipe import STRATEGIES, strategy_name

    one_of("from", asked.source, SOURCES)
    idle = ("files", "results") if asked.source == "trace" else ("no_cache",)
    if unused := given(asked, idle):
        raise RecipeError(
            f"{', '.join(unused)}: nothing to do with --from {asked.source}.\nLeave it out, or see 'mstplan calibrate --help'."
        )
    named = [name.strip() for name in asked.strategies.split(",")] if asked.strategies is not None else STRATEGIES
    names = [strategy_name(name) for name in named]
    folder = asked.out if asked.out is not None else calibration.folders()[0]
    files.check_folder(folder)
    from ..checking.calibrate import calibrate_all
    from ..checking.fit import fit_all
    from ..show import calibrating
    from ..show.progress import progress

    said: list[str] = []
    if asked.source == "trace":
        rows = calibrate_all(_models_named(asked.models), names, folder, keep=not asked.no_cache, showing=progress)
    else:
        results = results_files(asked) or [Path("measurements.jsonl")]
        rows, said = fit_all(_models_named(asked.models), names, folder, results, asked.out is not None)
    rung = "trace" if asked.source == "trace" else "measurement"
    emit(asked, calibrating.report(rows, rung, folder, said))


def _models_named(text: str) -> list[str]:
    """Specs of models: one, several with commas between, or all that ship, the dense ones or all."""
    from ..spec.catalog import load_model, model_names

    if text not in EVERY:
        return [part.strip() for part in text.split(",")]
    return [name for name in model_names() if text == "all" or load_model(name).experts is None]
