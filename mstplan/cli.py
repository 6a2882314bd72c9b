"""The command line: options in, one library call, a table or JSON out, an exit code.

Exit codes: 0 an answer (for `plan`: it fits), 1 it does not fit, 2 the input cannot be used, 130 interrupted, 141 the reader
of the output went away.
"""

from __future__ import annotations

import gc
import inspect
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for plugins reads every installed package's metadata

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from .observe.measurement import Case
    from .observe.trace import Trace
    from .plan.hardware import Card
    from .plan.model import Model
    from .plan.recipe import Recipe
    from .show.measuring import Sweep

app = typer.Typer(
    name="mstplan",
    help="How long a sequence can I train on this GPU, with which settings, and how sure is that?",
    epilog="Start with:  mstplan max-seq --model llama3.1-8b --gpu-mem 80GB",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


# ---- options, each said once -----------------------------------------------------------------------------------------

Asked = SimpleNamespace


class _Option(NamedTuple):
    annotation: Any
    default: Any
    flags: tuple[str, ...]


def _option(kind: Any, flags: str, help: str, default: Any = None, panel: str | None = None, **more: Any) -> _Option:
    option = typer.Option(*flags.split(), help=help, rich_help_panel=panel, **more)
    return _Option(Annotated[kind, option], default, tuple(flags.replace("/", " ").split()))


_CARD, _RECIPE, _TRACE = "Card", "Recipe", "Trace"
JSON = {"json": _option(bool, "--json", "Print JSON instead of tables.", False)}
MODEL = {
    "model": _option(str, "--model -m", "A shipped name (see `mstplan models`), a config.json or its folder, or a Hugging Face id.", ...),
}
CARD = {
    "gpu": _option(str | None, "--gpu", "A card by name (see `mstplan gpus`).", panel=_CARD, metavar="NAME"),
    "gpu_mem": _option(str | None, "--gpu-mem", "Any amount of card memory: 80GB, 79.15GiB, 24576MiB.", panel=_CARD, metavar="SIZE"),
    "host_mem": _option(str | None, "--host-mem", "Host memory for what is offloaded.", panel=_CARD, metavar="SIZE"),
    "reserve": _option(str, "--reserve", "Card memory that other processes hold.", "0B", panel=_CARD, metavar="SIZE"),
}
RECIPE = {
    "recipe": _option(Path | None, "--recipe", "A recipe in a JSON file; options below override it.", panel=_RECIPE, metavar="FILE"),
    "precision": _option(str | None, "--precision", "bf16 | mixed (fp32 weights, bf16 autocast) | fp32. Default bf16.", panel=_RECIPE, metavar="NAME"),
    "optimizer": _option(str | None, "--optimizer", "adamw | adamw-8bit | adafactor | sgd. Default adamw.", panel=_RECIPE, metavar="NAME"),
    "adamw_kernel": _option(str | None, "--adamw-kernel", "foreach | fused | for-loop. Default foreach, as on CUDA.", panel=_RECIPE, metavar="NAME"),
    "optimizer_in_backward": _option(bool, "--optimizer-in-backward", "Step each weight as its gradient is made.", False, panel=_RECIPE),
    "optimizer_on_host": _option(bool, "--optimizer-on-host", "Optimizer states and step on the host.", False, panel=_RECIPE),
    "weights_on_host": _option(bool, "--weights-on-host", "Weights on the host too, gathered layer by layer.", False, panel=_RECIPE),
    "accumulation": _option(int | None, "--accumulation", "Micro-batches per optimizer step. Default 1.", panel=_RECIPE, metavar="N"),
    "batch": _option(int | None, "--batch -b", "Sequences per micro-batch. Default 1.", panel=_RECIPE, metavar="N"),
    "checkpoint": _option(str | None, "--checkpoint", "none | layer | sqrt | a number of layers.", panel=_RECIPE, metavar="HOW"),
    "chunks": _option(str | None, "--chunks", "M for MLP and loss: 8, or 8,32, or auto (as recommended).", panel=_RECIPE, metavar="M[,M]"),
    "no_recompute": _option(bool, "--no-recompute", "Do not recompute each MLP chunk by itself.", False, panel=_RECIPE),
    "offload": _option(bool, "--offload", "Layer inputs in host memory.", False, panel=_RECIPE),
    "attention": _option(str | None, "--attention", "sdpa | flash | eager. Default sdpa.", panel=_RECIPE, metavar="NAME"),
    "loss": _option(str | None, "--loss", "transformers | 'transformers<4.45' | chunked.", panel=_RECIPE, metavar="NAME"),
    "gpus": _option(int | None, "--gpus", "Cards that train together, all alike; answers are per card. Default 1.", panel=_RECIPE, metavar="N"),
    "sharding": _option(str | None, "--sharding", "none | fsdp (FSDP2, ZeRO-3: everything in shards over --gpus).", panel=_RECIPE, metavar="NAME"),
}  # fmt: skip
_VARIED_BY_THE_FORMULAS = ("checkpoint", "chunks", "no_recompute", "offload", "loss")
THEOREM_RECIPE = {name: option for name, option in RECIPE.items() if name not in _VARIED_BY_THE_FORMULAS}
STRATEGY = {
    "strategy": _option(str | None, "--strategy -s", "standard | checkpoint | checkpoint-sqrt | mst | mst-offload. Default mst.", metavar="NAME"),
}
FORCE = {"force": _option(bool, "--force", "Overwrite the file.", False)}


_COMMANDS: dict[str, Callable[[], object]] = {}
"""How to add each command to `app`: done for the one that was asked for only, as typer takes a while over each."""


def command(name: str, *groups: dict[str, _Option], help: str, epilog: str) -> Callable[[Callable[[Asked], None]], Callable[[Asked], None]]:
    """Register a command that takes the options of `groups` in one namespace; its errors become lines and exit codes."""
    options = {key: option for group in groups for key, option in group.items()}

    def register(run: Callable[[Asked], None]) -> Callable[[Asked], None]:
        def called(**given: Any) -> None:
            from .errors import MstplanError

            values = {key: given.get(key, option.default) for key, option in options.items()}
            try:
                missing = next((o for key, o in options.items() if o.default is ... and values[key] in (None, ...)), None)
                if missing is not None:  # some releases of typer and click together do not notice
                    flags = " / ".join(f"'{flag}'" for flag in missing.flags)
                    _complain(f"Missing option {flags}.\nTry 'mstplan {name} --help'.")
                    raise typer.Exit(2)
                run(Asked(**values))
            except MstplanError as e:
                _complain(str(e))
                raise typer.Exit(2) from None

        def add() -> None:
            built = _asked_for(options, sys.argv[1:])
            called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
                [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=o.default, annotation=o.annotation) for k, o in built.items()]
            )
            called.__annotations__ = {key: option.annotation for key, option in built.items()}
            app.command(name, help=help, epilog=epilog)(called)

        _COMMANDS[name] = add
        return run

    return register


def _asked_for(options: dict[str, _Option], arguments: list[str]) -> dict[str, _Option]:
    """The options that the arguments name, and the required ones: typer takes a while over each. All of them when an
    argument is none of them, be it --help or a slip to complain about."""
    named = {a.split("=")[0] if a.startswith("--") else a[:2] for a in arguments if a.startswith("-")}
    if not named <= {flag for option in options.values() for flag in option.flags}:
        return options
    return {key: option for key, option in options.items() if option.default is ... or not named.isdisjoint(option.flags)}


# ---- from options to the library's objects -----------------------------------------------------------------------------


def _model(asked: Asked) -> Model:
    from .plan.catalog import load_model

    return load_model(asked.model)


def _card(asked: Asked) -> Card:
    from .plan.hardware import card
    from .units import parse_memory

    memory = parse_memory(asked.gpu_mem) if asked.gpu_mem is not None else None
    host = parse_memory(asked.host_mem) if asked.host_mem is not None else None
    return card(asked.gpu, memory, parse_memory(asked.reserve), host)


def _changes(asked: Asked) -> dict[str, object]:
    """The recipe fields that the options set."""
    from .units import parse_whole

    named = ("precision", "optimizer", "adamw_kernel", "accumulation", "batch", "attention", "loss", "gpus", "sharding")
    changes: dict[str, object] = {name: getattr(asked, name) for name in named if getattr(asked, name) is not None}
    for switch in ("optimizer_in_backward", "optimizer_on_host", "weights_on_host"):
        if getattr(asked, switch):
            changes[switch] = True
    if asked.offload:
        changes["offload_layer_inputs"] = True
    if asked.no_recompute:
        changes["mlp_recompute"] = False
    if asked.checkpoint is not None:
        changes["checkpoint"] = parse_whole(asked.checkpoint, "--checkpoint") if "0" <= asked.checkpoint[:1] <= "9" else asked.checkpoint
    return changes


def _chunks(text: str | None) -> dict[str, object]:
    """mlp_chunks and loss_chunks from '8', '8,32' or 'auto'."""
    from .errors import RecipeError, UnitError, quoted
    from .units import parse_whole

    if text is None:
        return {}
    parts = [part.strip() for part in text[:100].split(",")]
    try:
        values = ["auto" if part == "auto" else parse_whole(part) for part in parts]
    except UnitError:
        values = []
    if len(values) not in (1, 2) or 0 in values or len(text) > 100:
        raise RecipeError(f"cannot read --chunks {quoted(text)}.\nWrite one number for both (8), two (MLP,loss: 8,32), or auto.")
    return {"mlp_chunks": values[0], "loss_chunks": values[-1]}


def _apply(base: Recipe, asked: Asked, adopt_chunks: bool) -> Recipe:
    """`base` with the options' changes. --chunks goes to recipes that run in chunks, and with adopt_chunks to any."""
    changes, chunks = _changes(asked), _chunks(asked.chunks)
    chunked = base.loss == "chunked" or base.mlp_recompute or base.mlp_chunks != 1
    if chunks and not chunked and adopt_chunks:
        changes = {"loss": "chunked", "mlp_recompute": True, **changes}
    if chunks and (chunked or adopt_chunks):
        changes.update(chunks)
    loss = changes.get("loss", base.loss)
    if loss != "chunked":
        changes["loss_chunks"] = 1
    elif base.loss != "chunked":
        changes.setdefault("loss_chunks", "auto")
    return base.changed(**changes)


def _custom(asked: Asked) -> bool:
    """Do the options describe one recipe, rather than vary the five strategies?"""
    return asked.recipe is not None or asked.checkpoint is not None or asked.loss is not None or asked.offload


def _base(asked: Asked) -> Recipe:
    """What a custom recipe starts from: the recipe file, else the standard strategy."""
    from .plan.recipe import Recipe

    return Recipe.read(asked.recipe) if asked.recipe is not None else Recipe.model_construct()


def _recipes(asked: Asked) -> dict[str, Recipe]:
    """The five strategies with the options' changes, or the one recipe that the options describe."""
    from .plan.recipe import STRATEGIES

    if _custom(asked):
        return {"custom": _apply(_base(asked), asked, adopt_chunks=True)}
    strategies = STRATEGIES
    if asked.sharding == "fsdp":  # which gathers one layer at a time
        strategies = {name: recipe for name, recipe in STRATEGIES.items() if recipe.checkpoint != "sqrt"}
    return {name: _apply(recipe, asked, adopt_chunks=False) for name, recipe in strategies.items()}


def _one_recipe(asked: Asked) -> tuple[str, Recipe]:
    """The one recipe that --strategy or --recipe and the other options describe, and its name."""
    from .errors import RecipeError
    from .plan.recipe import strategy

    if asked.recipe is not None and asked.strategy is not None:
        raise RecipeError("--strategy and --recipe exclude each other: a recipe says what a strategy says.\nLeave one of the two out.")
    name = "custom" if asked.recipe is not None else asked.strategy if asked.strategy is not None else "mst"
    base = _base(asked) if asked.recipe is not None else strategy(name)
    return name, _apply(base, asked, adopt_chunks=True)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, soft_wrap=False)


def _print_json(document: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(document, indent=1))


def _length(text: str) -> int:
    from .units import parse_length

    return parse_length(text)


# ---- commands ------------------------------------------------------------------------------------------------------------


TRACING = {
    "no_cache": _option(bool, "--no-cache", "Trace anew, and keep nothing.", False, panel=_TRACE),
    "trust_remote_code": _option(bool, "--trust-remote-code", "Run the model's own code where transformers has none.", False, panel=_TRACE),
}


@command(
    "max-seq", MODEL, CARD, RECIPE,
    {"rung": _option(str, "--rung", "formula (at once) | trace (needs torch, takes seconds). Default formula.", "formula", panel=_TRACE, metavar="NAME")},
    TRACING, JSON,
    help="The longest sequence that fits, for each strategy, and what holds it back. With --checkpoint, --loss, --offload or --recipe, "
    "the options describe one recipe (\"custom\") instead of varying the five strategies.",
    epilog="mstplan max-seq --model llama3.1-8b --gpu h100 --optimizer-in-backward   |   "
    "mstplan max-seq -m ./my-model --gpu-mem 24GB --chunks 8,32   |   mstplan max-seq -m qwen3-4b --gpu h100 --rung trace",
)  # fmt: skip
def max_seq(asked: Asked) -> None:
    from .errors import RecipeError, quoted
    from .plan import solve

    if asked.rung not in ("formula", "trace"):
        raise RecipeError(f"unknown rung {quoted(asked.rung)}.\nKnown: formula, trace.")
    model, card = _model(asked), _card(asked)
    if asked.rung == "trace":
        _max_seq_by_trace(asked, model, card)
        return
    found = [solve.max_seq(model, recipe, card, name) for name, recipe in _recipes(asked).items()]
    best = max(found, key=lambda a: a.s_max)
    if asked.json:
        from .show import payload

        _print_json(payload.max_seq(model, card, found, best))
    else:
        from .show import report

        report.max_seq(_console(), model, card, found, best)
    if best.s_max == 0:
        raise typer.Exit(1)


def _max_seq_by_trace(asked: Asked, model: Model, card: Card) -> None:
    from .observe import search

    with _tracing(asked) as trace_step:
        found = [search.longest(model, recipe, card, trace_step, name) for name, recipe in _recipes(asked).items()]
    best = max(found, key=lambda f: f.answer.s_max)
    if asked.json:
        from .show import payload

        _print_json(payload.max_seq_by_trace(model, card, found, best))
    else:
        from .show import trace as shown

        shown.max_seq(_console(), model, card, found, best)
    if best.answer.s_max == 0:
        raise typer.Exit(1)


@command(
    "plan", MODEL, {"seq_len": _option(str, "--seq-len", "Tokens per sequence: 65536, 64k, 1M.", ..., metavar="TOKENS")},
    STRATEGY, CARD, RECIPE,
    {"write_recipe": _option(Path | None, "--write-recipe", "Write the recipe as JSON.", panel=_RECIPE, metavar="FILE")}, FORCE, JSON,
    help="Does this length fit? The peak, its instant, and what would make it fit. Exit code 0: fits, 1: does not.",
    epilog="mstplan plan -m llama3.1-8b --gpu h100 --seq-len 64k --strategy mst",
)  # fmt: skip
def plan(asked: Asked) -> None:
    from . import files
    from .plan import advice, solve

    if asked.write_recipe is not None:
        files.check_writable(asked.write_recipe, asked.force)
    model, card = _model(asked), _card(asked)
    name, recipe = _one_recipe(asked)
    step = solve.plan_at(model, recipe, card, _length(asked.seq_len))
    singles, run = ((), None) if step.fits else advice.ways_to_fit(step)
    if asked.write_recipe is not None:
        recipe.write(asked.write_recipe, asked.force)
    if asked.json:
        from .show import payload

        _print_json(payload.plan_document(step, name, singles, run))
    else:
        from .show import report

        report.plan(_console(), step, name if asked.recipe is None else "this recipe", singles, run)
    if not step.fits:
        raise typer.Exit(1)


@command(
    "trace", MODEL, {"seq_len": _option(str, "--seq-len", "Tokens per sequence: 65536, 64k, 1M.", ..., metavar="TOKENS")},
    STRATEGY, CARD, RECIPE, TRACING,
    {
        "plot": _option(Path | None, "--plot", "Draw the step's memory over its course (PNG, SVG, PDF).", panel=_TRACE, metavar="FILE"),
        "snapshot": _option(Path | None, "--snapshot", "Write what PyTorch's memory viewer opens (pytorch.org/memory_viz).", panel=_TRACE, metavar="FILE"),
    }, FORCE, JSON,
    help="Run the model's real code, one training step on fake tensors, and see every allocation: no GPU needed, but torch. "
    "Exit code 0: fits, 1: does not.",
    epilog="mstplan trace -m llama3.1-8b --seq-len 64k --strategy mst --gpu h100 --plot step.png",
)  # fmt: skip
def trace(asked: Asked) -> None:
    from . import files
    from .plan import solve

    for path in (asked.plot, asked.snapshot):
        if path is not None:
            files.check_writable(path, asked.force)
    if asked.plot is not None:
        from .show import timeline

        timeline.check_output(asked.plot)
    model, card = _model(asked), _card(asked)
    name, recipe = _one_recipe(asked)
    step = solve.plan_at(model, recipe, card, _length(asked.seq_len))
    fixed = recipe.changed(mlp_chunks=step.chunks.mlp, loss_chunks=step.chunks.loss)
    with _tracing(asked) as trace_step:
        found = trace_step(fixed, step.seq_len, card)
    from .observe import cache
    from .show import trace as shown

    view = shown.view(model, card, name, found, step, cache.versions())
    if asked.plot is not None:
        timeline.write(view, asked.plot)
    if asked.snapshot is not None:
        from .observe.card import all_events, name_of
        from .observe.snapshot import snapshot, to_pickle

        files.write(asked.snapshot, to_pickle(snapshot(all_events(found), lambda key: name_of(found, key), expandable=True)))
    if asked.json:
        from .show import payload

        _print_json(payload.trace_document(view))
    else:
        shown.report(_console(), view)
        for path in (asked.plot, asked.snapshot):
            if path is not None:
                typer.echo(f"wrote {path}")
    if not view.fits:
        raise typer.Exit(1)


@contextmanager
def _tracing(asked: Asked) -> Iterator[Callable[[Recipe, int, Card], Trace]]:
    """A function that traces a step of the model, with a word on the terminal while it does."""
    from .observe import cache
    from .plan.catalog import load_config

    config = load_config(asked.model)
    cache.versions()  # no torch: said before anything else

    def run(recipe: Recipe, seq_len: int, card: Card) -> Trace:
        waiting.update(f"tracing {recipe_words(recipe)} at {seq_len:,} tokens")
        workspace = card.gpu.cublas_workspace_bytes
        code_from = asked.model if asked.trust_remote_code else None
        return cache.trace_of(config, recipe, seq_len, workspace=workspace, keep=not asked.no_cache, code_from=code_from)

    from .show.trace import recipe_words, status

    with status() as waiting:
        yield run


@command(
    "calibrate", {
        "models": _option(str, "--model -m", "A model, as elsewhere; several with commas between; or all-dense, all.", ..., metavar="NAME[,NAME]"),
        "source": _option(str, "--from", "trace | measurements.", ..., metavar="RUNG"),
        "results": _option(
            str | None, "--results", "From measurements: results files, with commas between. Default: measurements.jsonl.", metavar="FILE[,FILE]"
        ),
        "strategies": _option(str | None, "--strategy -s", "Some strategies only, with commas between. Default: all five.", metavar="NAME[,NAME]"),
        "out": _option(Path | None, "--out -o", "The folder to write to. Default: the user's own, which the planner reads first.", metavar="FOLDER"),
        "no_cache": TRACING["no_cache"],
    }, JSON,
    help="Solve a model's coefficients from traces of its steps, or from measurements of them, for the planner to use in place of the formula's; "
    "from measurements, a card's CUDA context and workspace, too. Older files are kept.",
    epilog="mstplan calibrate --from trace --model llama3.1-8b   |   mstplan calibrate --from measurements --model llama3.1-8b --results h100.jsonl",
)  # fmt: skip
def calibrate(asked: Asked) -> None:
    from .errors import RecipeError, quoted
    from .plan import calibration
    from .plan.recipe import STRATEGIES, strategy

    if asked.source not in ("trace", "measurements"):
        raise RecipeError(f"cannot calibrate from {quoted(asked.source)}.\nKnown: trace, measurements.")
    unused = ("--results", asked.results is not None) if asked.source == "trace" else ("--no-cache", asked.no_cache)
    if unused[1]:
        raise RecipeError(f"{unused[0]}: nothing to do with --from {asked.source}.\nLeave it out, or see 'mstplan calibrate --help'.")
    names = asked.strategies.split(",") if asked.strategies else list(STRATEGIES)
    for name in names:
        strategy(name)  # refuses unknown ones
    folder = asked.out if asked.out is not None else calibration.folders()[0]
    from .show import calibrating

    said: list[str] = []
    if asked.source == "trace":
        rows = calibrating.run(_models_named(asked.models), names, folder, keep=not asked.no_cache)
    else:
        results = _results(asked.results if asked.results is not None else "measurements.jsonl")
        rows, said = calibrating.from_measurements(_models_named(asked.models), names, folder, results, asked.out is not None)
    if asked.json:
        from .show import payload

        rung = "trace" if asked.source == "trace" else "measurement"
        _print_json(payload.document("calibrate", rung, folder=str(folder), calibrations=[row._asdict() for row in rows], notes=said))
    else:
        calibrating.report(_console(), rows)
        for line in said:
            _console().print(line, soft_wrap=True)


def _results(text: str) -> list[Path]:
    from .errors import MeasurementError

    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise MeasurementError("a results file without a name.\nWrite --results a.jsonl or --results a.jsonl,b.jsonl.")
    return [Path(part) for part in parts]


def _models_named(text: str) -> list[str]:
    """Specs of models: one, several with commas between, or all that ship, the dense ones or all."""
    from .plan.catalog import load_model, model_names

    if text not in ("all", "all-dense"):
        return [part.strip() for part in text.split(",")]
    return [name for name in model_names() if text == "all" or load_model(name).experts is None]


_MEASURE = "Measurement"
MEASURING = {
    "layers": _option(int | None, "--layers", "The model's first N layers only, for one too large to hold.", panel=_MEASURE, metavar="N", min=1),
    "device": _option(str, "--device", "cuda | cpu (its own kernels, seen by torch's profiler). Default cuda.", "cuda", panel=_MEASURE, metavar="NAME"),
    "gpu_mem": _option(str | None, "--gpu-mem", "Let the process use that much of the card only.", panel=_MEASURE, metavar="SIZE"),
    "steps": _option(int, "--steps", "Steps that are timed, after a first one.", 3, panel=_MEASURE, metavar="N", min=1, max=1_000_000),
    "timeout": _option(float | None, "--timeout", "Give up on a point after so many seconds.", panel=_MEASURE, metavar="SECONDS", min=1, max=1_000_000),
    "out": _option(Path, "--out -o", "The results file, which is appended to.", Path("measurements.jsonl"), panel=_MEASURE, metavar="FILE"),
    "again": _option(bool, "--again", "Also points that the results file has already.", False, panel=_MEASURE),
}


@command(
    "measure", {
        "model": MODEL["model"]._replace(default=None),
        "seq_len": _option(str | None, "--seq-len", "Tokens per sequence; several with commas between: 8k,16k,32k.", metavar="TOKENS[,TOKENS]"),
        "strategy": _option(str, "--strategy -s", "Strategies with commas between, or all. Default all.", "all", metavar="NAME[,NAME]"),
        "suite": _option(str | None, "--suite", "Points in a JSON file, or a suite that ships (quick, cards).", metavar="FILE"),
    }, MEASURING, RECIPE, JSON,
    help="Real training steps with random weights and tokens on this machine's device, each in a process of its own: peaks of memory, "
    "time, tokens per second. What runs out of memory or fails is a result, too. A rerun measures what is missing. Under torchrun, with "
    "--sharding fsdp, one point of all ranks together.",
    epilog="mstplan measure -m llama3.1-8b --seq-len 8k,16k,32k --strategy all   |   mstplan measure -m smollm2-135m --seq-len 512 --device cpu   |   "
    "torchrun --nproc-per-node 8 -m mstplan measure -m llama3.1-8b --seq-len 64k -s mst --sharding fsdp",
)  # fmt: skip
def measure(asked: Asked) -> None:
    from .errors import RecipeError, quoted
    from .observe import cache, sweep
    from .show import measuring

    if asked.device not in ("cuda", "cpu"):
        raise RecipeError(f"unknown device {quoted(asked.device)}.\nKnown: cuda, cpu.")
    cache.versions()  # no torch: said before anything else
    if _under_torchrun():
        _measure_on_all_ranks(asked)
        return
    known = sweep.environment(asked.device)
    console = None if asked.json else _console()
    cases = _cases(asked, known)
    with _kept(asked.out):
        found = measuring.run(cases, known, asked.out, asked.timeout, console, asked.again, headed=True)
    if console is not None:
        measuring.report(console, found, asked.out)
    else:
        _print_measured(asked, known, found)
    if not found.complete:
        raise typer.Exit(1)


@contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Who interrupts a sweep hears what became of it."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"what was measured is kept in {out}" if out.exists() else "nothing was measured yet"
        _complain(f"interrupted; {kept}.\nThe same command goes on from there.")
        raise


def _print_measured(asked: Asked, known: dict[str, Any], found: Sweep) -> None:
    from .show import payload

    rows = [m.as_data() for m in found.measurements]
    _print_json(payload.document("measure", "measurement", environment=known, file=str(asked.out), damaged=found.damaged, results=rows))


def _under_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or "TORCHELASTIC_RUN_ID" in os.environ


def _cases(asked: Asked, known: dict[str, Any]) -> list[Case]:
    """The points that --suite, or the model, lengths and strategies, describe."""
    from .errors import RecipeError
    from .observe import suites, sweep
    from .units import parse_memory

    limit = parse_memory(asked.gpu_mem) if asked.gpu_mem is not None else None
    card = sweep.card_of(known, limit)
    more: dict[str, Any] = {"card": card, "device": asked.device, "limit": limit, "steps": asked.steps}
    if asked.sharding == "fsdp" and not _under_torchrun():
        gpus = asked.gpus or "N"
        raise RecipeError(f"several ranks are measured under torchrun.\nRun: torchrun --nproc-per-node {gpus} -m mstplan measure ... --sharding fsdp")
    if asked.suite is not None:
        given = [RECIPE[name].flags[0] for name in RECIPE if getattr(asked, name) != RECIPE[name].default]
        given += [flag for flag, value in (("--model", asked.model), ("--seq-len", asked.seq_len), ("--layers", asked.layers)) if value is not None]
        if given:
            raise RecipeError(f"--suite says what is measured: {', '.join(given)} cannot be given beside it.\nWrite it in the suite, or leave --suite out.")
        return suites.cases(asked.suite, **more)
    if asked.model is None or asked.seq_len is None:
        raise RecipeError("no point to measure.\nGive --model and --seq-len, or --suite.")
    lengths = [_length(part) for part in asked.seq_len.split(",")]
    return sweep.cases(asked.model, lengths, _chosen(asked), layers=asked.layers, **more)


def _chosen(asked: Asked) -> dict[str, Recipe]:
    """The strategies that --strategy names, or the one recipe that the options describe."""
    from .plan.recipe import strategy

    recipes = _recipes(asked)
    if asked.strategy == "all" or _custom(asked):
        return recipes
    names = [name.strip() for name in asked.strategy.split(",")]
    for name in names:
        strategy(name)  # refuses unknown ones
    return {name: _apply(strategy(name), asked, adopt_chunks=False) for name in names}


def _measure_on_all_ranks(asked: Asked) -> None:
    """One point, in the processes that torchrun started."""
    from .errors import RecipeError
    from .observe import ranks

    gpus = int(os.environ["WORLD_SIZE"])
    if asked.sharding != "fsdp" or asked.gpus not in (None, gpus):
        raise RecipeError(f"torchrun started {gpus} ranks: say --sharding fsdp, and no other number with --gpus.")
    asked.gpus = gpus
    with ranks.process_group(asked.device):
        known = ranks.environment(asked.device)
        cases = _cases(asked, known)
        if len(cases) != 1:
            raise RecipeError(f"{len(cases)} points under torchrun: measure one with each command.\nName one strategy and one length.")
        found = ranks.measure(cases[0], known, asked.out)
    if found is None:  # another rank says it
        return
    from .show import measuring

    sweep = measuring.Sweep([found], 0, [])
    if asked.json:
        _print_measured(asked, known, sweep)
    else:
        measuring.heading(_console(), known)
        _console().print(measuring.line(found), soft_wrap=True)
    if not sweep.complete:
        raise typer.Exit(1)


_CHECK = "What is checked"


@command(
    "validate", {
        "results": _option(str | None, "--results", "Results files, with commas between. Default: those that ship.", metavar="FILE[,FILE]"),
        "rungs": _option(str, "--rung", "formula, calibrated, trace: some of them, with commas between. Default all.", "all", metavar="NAME[,NAME]"),
        "published": _option(bool, "--published", "Published figures instead, with the assumptions that each is read with.", False, panel=_CHECK),
        "smax": _option(bool, "--smax", "Measure now, at 98% and 103% of the predicted S_max, then find the true one.", False, panel=_CHECK),
        "throughput": _option(bool, "--throughput", "Measure now what M, M/2 and 2M cost against one chunk.", False, panel=_CHECK),
        "model": MODEL["model"]._replace(default=None),
        "seq_len": _option(str | None, "--seq-len", "For --throughput: tokens per sequence.", metavar="TOKENS"),
        "strategy": _option(str, "--strategy -s", "For --smax and --throughput: strategies with commas between, or all.", "mst", metavar="NAME[,NAME]"),
        "mean": _option(str, "--mean", "The mean error that trace and calibrated formula may have.", "1%", metavar="SHARE"),
        "worst": _option(str, "--worst", "The worst.", "3%", metavar="SHARE"),
        "formula_worst": _option(str, "--formula-worst", "The worst of the bare formula.", "5%", metavar="SHARE"),
        "plot": _option(Path | None, "--plot", "Draw predicted against measured: PNG, SVG or PDF.", metavar="FILE"),
        "markdown": _option(bool, "--markdown", "The errors as the table that README shows.", False),
    }, MEASURING, RECIPE, FORCE, JSON,
    help="Hold predictions against measurements: formula, calibrated formula and trace beside every measured step. Exit code 1 when an "
    "error is beyond its bound, or a step that was to fit ran out of memory.",
    epilog="mstplan validate --results h100.jsonl --plot errors.png   |   mstplan validate --published   |   "
    "mstplan validate --smax -m llama3.1-8b --gpu-mem 80GB -s checkpoint,mst",
)  # fmt: skip
def validate(asked: Asked) -> None:
    from .errors import RecipeError

    if asked.published + asked.smax + asked.throughput > 1:
        raise RecipeError("--published, --smax and --throughput exclude each other.\nCheck one after the other.")
    if asked.markdown and asked.json:
        raise RecipeError("--markdown and --json exclude each other.\nLeave one of the two out.")
    now = asked.smax or asked.throughput
    unused = [
        flag for flag, value, used in (
            ("--results", asked.results, not (asked.published or now)), ("--plot", asked.plot, not (asked.published or now)),
            ("--model", asked.model, not asked.published), ("--layers", asked.layers, now), ("--seq-len", asked.seq_len, asked.throughput),
        ) if value is not None and not used
    ]  # fmt: skip
    if unused:
        raise RecipeError(f"{', '.join(unused)}: nothing to do with this check.\nLeave it out, or see 'mstplan validate --help'.")
    if asked.published:
        _validate_published(asked)
    elif asked.smax or asked.throughput:
        _validate_now(asked)
    else:
        _validate_results(asked)


def _validate_results(asked: Asked) -> None:
    from . import files
    from .errors import MeasurementError, RecipeError, quoted
    from .observe import measurement, validate
    from .show import timeline, validating
    from .show.progress import progress

    if asked.plot is not None:
        files.check_writable(asked.plot, asked.force)
        timeline.check_output(asked.plot)
    rungs = validate.RUNGS if asked.rungs == "all" else tuple(name.strip() for name in asked.rungs.split(","))
    if unknown := [name for name in rungs if name not in validate.RUNGS]:
        raise RecipeError(f"unknown rung {quoted(unknown[0])}.\nKnown: {', '.join(validate.RUNGS)}.")
    bounds = _bounds(asked)
    read = measurement.read_all(_results(asked.results) if asked.results is not None else measurement.archive())
    chosen = [m for m in read.measurements if asked.model is None or m.case.model == _model(asked).name]
    if not any(m.outcome in (measurement.OK, measurement.OUT_OF_MEMORY) for m in chosen):
        of = f" of {_model(asked).name}" if asked.model is not None else ""
        raise MeasurementError(f"no measurement{of} to hold predictions against.\nmstplan measure makes some; --results names the file.")
    with progress("comparing", len(chosen)) as advance:
        found = validate.validate(chosen, rungs, lambda words: advance(words, 1))
    said = validate.beyond(found, bounds)
    if asked.plot is not None:
        validating.plot(found, asked.plot)
    if asked.json:
        from .show import payload

        _print_json(payload.document("validate", "measurement", **validating.as_data(found, said, read.skipped)))
    elif asked.markdown:
        typer.echo(validating.markdown(found), nl=False)
    else:
        validating.report(_console(), found, read.skipped, said)
        if asked.plot is not None:
            typer.echo(f"wrote {asked.plot}")
    if said:
        raise typer.Exit(1)


def _bounds(asked: Asked) -> dict[str, Any]:
    from .observe.validate import CALIBRATED, FORMULA, TRACE, Bounds
    from .units import parse_share

    bounds = Bounds(parse_share(asked.mean, "--mean"), parse_share(asked.worst, "--worst"))
    formula = parse_share(asked.formula_worst, "--formula-worst")
    return {FORMULA: Bounds(formula, formula), CALIBRATED: bounds, TRACE: bounds}


def _validate_published(asked: Asked) -> None:
    from .plan.published import comparisons
    from .show import published

    rows = comparisons()
    if asked.json:
        from .show import payload

        _print_json(payload.document("validate", published=[published.as_data(row) for row in rows]))
    elif asked.markdown:
        typer.echo(published.page(), nl=False)
    else:
        published.report(_console(), rows)


def _validate_now(asked: Asked) -> None:
    """Predictions that are measured at once."""
    from .errors import RecipeError
    from .observe import cache, sweep
    from .show import checking
    from .units import parse_memory

    if asked.model is None or (asked.throughput and asked.seq_len is None):
        raise RecipeError("nothing to measure.\nGive --model" + (" and --seq-len." if asked.throughput else "; --gpu-mem limits what is used of the card."))
    cache.versions()  # no torch: said before anything else
    known = sweep.environment(asked.device)
    limit = parse_memory(asked.gpu_mem) if asked.gpu_mem is not None else None
    bench = checking.Bench(asked.model, known, sweep.card_of(known, limit), asked.device, limit, asked.layers, asked.steps, asked.timeout, asked.out)
    recipes = _chosen(asked)
    console = None if asked.json else _console()
    with _kept(asked.out):
        found = checking.smax(bench, recipes, console) if asked.smax else checking.throughput(bench, recipes, _length(asked.seq_len), console)
    if asked.json:
        from .show import payload

        _print_json(payload.document("validate", "measurement", environment=known, file=str(asked.out), **found.data))
    if not found.holds:
        raise typer.Exit(1)


def _coefficient(flag: str, what: str, metavar: str) -> Any:
    return _option(str | None, flag, what, panel="Coefficients", metavar=metavar)


@command(
    "theorem", MODEL, {"seq_len": _option(str | None, "--seq-len", "Also the memory at this length.", metavar="TOKENS")}, CARD, THEOREM_RECIPE,
    {
        "w_mem": _coefficient("--w-mem", "W_mem, e.g. 60GiB.", "SIZE"),
        "i_mem": _coefficient("--i-mem", "I_mem, bytes per token.", "BYTES"),
        "a_mem": _coefficient("--a-mem", "A_mem, bytes per token and layer.", "BYTES"),
        "layers": _coefficient("--layers", "L.", "N"),
        "m": _coefficient("--m", "M, the number of mini-sequences.", "N"),
        "m_max": _coefficient("--m-max", "M_max, e.g. 80GiB.", "SIZE"),
    },
    JSON,
    help="The paper's formulas with this model's coefficients, next to the step model's answer.",
    epilog="mstplan theorem -m llama3.1-8b --gpu a100-80gb --seq-len 64k --m 32",
)  # fmt: skip
def theorem(asked: Asked) -> None:
    from .show import report

    model, card = _model(asked), _card(asked)
    seq_len = _length(asked.seq_len) if asked.seq_len is not None else None
    overrides = _overrides(asked)
    view = report.theorem_view(model, card, _theorem_recipe(asked), overrides, seq_len)
    if asked.json:
        from .show import payload

        _print_json(payload.theorem_document(model, card, view))
    else:
        report.theorem(_console(), model, card, view)


def _theorem_recipe(asked: Asked) -> Recipe:
    """The user's recipe without what the four formulas themselves vary."""
    from .plan.recipe import STRATEGY_FIELDS, Recipe

    left_out = {name: RECIPE[name][1] for name in _VARIED_BY_THE_FORMULAS}
    base = {name: value for name, value in _base(asked).model_dump().items() if name not in STRATEGY_FIELDS}
    return Recipe.model_construct().changed(**{**base, **_changes(Asked(**left_out, **vars(asked)))})


def _overrides(asked: Asked) -> dict[str, int | None]:
    from .units import parse_memory, parse_whole

    def number(name: str, text: str | None) -> int | None:
        return parse_whole(text, f"--{name}") if text is not None else None

    sizes = {name: parse_memory(getattr(asked, name)) if getattr(asked, name) is not None else None for name in ("w_mem", "m_max")}
    counts = {"i_mem": number("i-mem", asked.i_mem), "a_mem": number("a-mem", asked.a_mem), "layers": number("layers", asked.layers)}
    return {**sizes, **counts, "chunks": number("m", asked.m)}


@command(
    "shapes", MODEL, {
        "seq_len": _option(str, "--seq-len", "Tokens per sequence.", "128k", metavar="TOKENS"),
        "batch": _option(int, "--batch -b", "Sequences.", 1, metavar="N", min=1, max=1_000_000),
        "dtype": _option(str, "--dtype", "bfloat16 | float32.", "bfloat16", metavar="NAME"),
    }, JSON,
    help="The large tensors of a layer and the LM head: shape and bytes.",
    epilog="mstplan shapes -m llama3.1-8b --seq-len 131072",
)  # fmt: skip
def shapes(asked: Asked) -> None:
    from .errors import RecipeError, quoted
    from .plan.shapes import shapes as table

    if asked.dtype not in ("bfloat16", "float32"):
        raise RecipeError(f"unknown dtype {quoted(asked.dtype)}.\nKnown: bfloat16, float32.")
    model, seq_len = _model(asked), _length(asked.seq_len)
    rows = table(model, asked.batch, seq_len, asked.dtype)
    if asked.json:
        from .show import payload

        _print_json(payload.document("shapes", model=payload.model(model), batch=asked.batch, seq_len=seq_len, shapes=[payload.shape(r) for r in rows]))
    else:
        from .show import tables

        tables.shapes(_console(), rows, model, asked.batch, seq_len)


@command(
    "plot", MODEL, CARD, RECIPE, {
        "out": _option(Path, "--out -o", "PNG, SVG or PDF picture, or CSV of the points.", Path("memory.png"), metavar="FILE"),
        "to": _option(str | None, "--to", "The longest length drawn. Default: a little beyond the largest S_max.", metavar="TOKENS"),
        "points": _option(int, "--points", "Lengths per curve.", 200, metavar="N", min=2, max=100_000),
    }, FORCE, JSON,
    help="Memory against sequence length for the strategies, with the card, S_max and the binding instants.",
    epilog="mstplan plot -m llama3.1-8b --gpu h100 -o llama.svg",
)  # fmt: skip
def plot(asked: Asked) -> None:
    from .plan import solve
    from .show import plot as drawing

    drawing.check_output(asked.out, asked.force)
    model, card = _model(asked), _card(asked)
    longest = _length(asked.to) if asked.to is not None else None
    found = [solve.max_seq(model, recipe, card, name) for name, recipe in _recipes(asked).items()]
    curves = drawing.curves(found, longest, asked.points)
    drawing.write(curves, model, card, asked.out)
    if asked.json:
        from .show import payload

        about = {"model": payload.model(model), "card": payload.card(card), "budget_bytes": card.budget_bytes}
        data = [{**curve.as_data(), "calibration": payload.calibrated(curve.calibration)} for curve in curves]
        _print_json(payload.document("plot", **about, file=str(asked.out), curves=data))
    else:
        typer.echo(f"wrote {asked.out}")


@command("models", {"names": _option(str | None, "--filter", "Only names that contain this.", metavar="TEXT")}, JSON,
         help="The models that ship with mstplan.", epilog="mstplan models --filter qwen3")  # fmt: skip
def models(asked: Asked) -> None:
    from .errors import ModelError, quoted
    from .plan.catalog import load_model, model_names

    rows = [load_model(name) for name in model_names() if asked.names is None or asked.names.lower() in name]
    if not rows:
        raise ModelError(f"no model's name contains {quoted(asked.names)}")
    if asked.json:
        from .show import payload

        _print_json(payload.document("models", models=[payload.model(m) for m in rows]))
    else:
        from .show import tables

        tables.models(_console(), rows)


@command("gpus", {"sources": _option(bool, "--sources", "Also where each figure is from.", False)}, JSON,
         help="The cards that mstplan knows.", epilog="mstplan gpus --json")  # fmt: skip
def gpus(asked: Asked) -> None:
    from .plan.hardware import gpus as known

    if asked.json:
        from .show import payload

        _print_json(payload.document("gpus", gpus=[payload.gpu(g) for g in known()]))
    else:
        from .show import tables

        tables.gpus(_console(), known(), asked.sources)


def _version(value: bool) -> None:
    if value:
        from . import __version__

        typer.echo(f"mstplan {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


def _complain(message: str) -> None:
    with suppress(OSError):  # nobody is there to read it
        print(f"mstplan: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Run the command of sys.argv; ends in SystemExit, as typer's programs do."""
    asked = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    for name in [asked] if asked in _COMMANDS else _COMMANDS:
        _COMMANDS[name]()
    try:
        code = app(prog_name="mstplan", standalone_mode=False)  # or else typer draws a box around each mistake
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except Exception as e:
        if not hasattr(e, "format_message"):
            raise
        code = _misused(e)
    raise SystemExit(code if isinstance(code, int) else 0)


def _misused(error: Any) -> int:
    """Says what is wrong with the command line, in two lines. `error` is click's UsageError, wherever typer has it from."""
    from .errors import one_line

    said = " ".join(error.format_message().split())
    if type(error).__name__ != "NoArgsIsHelpError":
        context = getattr(error, "ctx", None)
        _complain(f"{one_line(said, 200)}\nTry '{context.command_path if context else 'mstplan'} --help'.")
    elif said:  # else typer has printed the help already
        typer.echo(error.format_message(), err=True)
    return 2


class _Unwritten(Exception):
    """Standard output takes no more. Not an OSError: click and rich have their own ideas about those."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.gone = isinstance(error, BrokenPipeError)
        self.reason = error.strerror or str(error)


class _Output(io.TextIOWrapper):
    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as e:
            raise _Unwritten(e) from None

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as e:
            raise _Unwritten(e) from None


def _open_streams() -> None:
    """Standard output whose errors reach `process`; a stream that the caller closed swallows what it gets."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        now = sys.stdout
        about = {"encoding": now.encoding, "errors": "backslashreplace" if now.errors == "strict" else now.errors}
        lines, through = now.line_buffering, now.write_through
        sys.stdout = _Output(now.detach(), **about, line_buffering=lines, write_through=through)  # type: ignore[arg-type]


def process() -> None:
    """`main` as a process of its own, which may skip what only matters to processes that live on."""
    gc.disable()  # collecting the many objects that imports make is wasted time here
    _open_streams()
    code: object = 0
    try:
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
    except _Unwritten as e:
        code = 141 if e.gone else 2  # 141: as for a process that SIGPIPE ended; what a reader that left, as `head` does, expects
        if not e.gone:
            _complain(f"cannot write the answer: {e.reason}")
    except KeyboardInterrupt:
        code = 130
    except BaseException:  # noqa: BLE001  a defect of mstplan's: say where
        sys.excepthook(*sys.exc_info())
        code = 1
    os._exit(code if isinstance(code, int) else int(code is not None))  # all is written; tearing down takes as long as answering
