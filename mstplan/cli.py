"""The command line: options in, one library call, a table or JSON out, an exit code.

Exit codes: 0 an answer (for `plan`: it fits), 1 it does not fit, 2 the input cannot be used, 130 interrupted.
"""

from __future__ import annotations

import gc
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for plugins reads every installed package's metadata

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from .plan.hardware import Card
    from .plan.model import Model
    from .plan.recipe import Recipe

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
_Option = tuple[str, Any, Any]  # name, annotation, default


def _option(kind: Any, flags: str, help: str, default: Any = None, panel: str | None = None, **more: Any) -> Any:
    return Annotated[kind, typer.Option(*flags.split(), help=help, rich_help_panel=panel, **more)], default


_CARD, _RECIPE = "Card", "Recipe"
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
}  # fmt: skip
STRATEGY = {"strategy": _option(str, "--strategy -s", "standard | checkpoint | checkpoint-sqrt | mst | mst-offload.", "mst", metavar="NAME")}


_COMMANDS: dict[str, Callable[[], object]] = {}
"""How to add each command to `app`: done for the one that was asked for only, as typer takes a while over each."""


def command(name: str, *groups: dict[str, Any], help: str, epilog: str) -> Callable[[Callable[[Asked], None]], Callable[[Asked], None]]:
    """Register a command that takes the options of `groups` in one namespace; its errors become lines and exit codes."""
    options = {key: value for group in groups for key, value in group.items()}

    def register(run: Callable[[Asked], None]) -> Callable[[Asked], None]:
        def called(**values: Any) -> None:
            from .errors import MstplanError

            try:
                run(Asked(**values))
            except MstplanError as e:
                typer.echo(f"mstplan: {e}", err=True)
                raise typer.Exit(2) from None

        called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=d, annotation=a) for k, (a, d) in options.items()]
        )
        called.__annotations__ = {key: annotation for key, (annotation, _) in options.items()}
        _COMMANDS[name] = lambda: app.command(name, help=help, epilog=epilog)(called)
        return run

    return register


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
    named = ("precision", "optimizer", "adamw_kernel", "accumulation", "batch", "attention", "loss")
    changes: dict[str, object] = {name: getattr(asked, name) for name in named if getattr(asked, name) is not None}
    for switch in ("optimizer_in_backward", "optimizer_on_host", "weights_on_host"):
        if getattr(asked, switch):
            changes[switch] = True
    if asked.offload:
        changes["offload_layer_inputs"] = True
    if asked.no_recompute:
        changes["mlp_recompute"] = False
    if asked.checkpoint is not None:
        changes["checkpoint"] = int(asked.checkpoint) if asked.checkpoint.isdigit() else asked.checkpoint
    return changes


def _chunks(text: str | None) -> dict[str, object]:
    """mlp_chunks and loss_chunks from '8', '8,32' or 'auto'."""
    from .errors import RecipeError

    if text is None:
        return {}
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 2 or not all(part == "auto" or (part.isdecimal() and int(part) > 0) for part in parts):
        raise RecipeError(f"cannot read --chunks '{text}'.\nWrite one number for both (8), two (MLP,loss: 8,32), or auto.")
    values = ["auto" if part == "auto" else int(part) for part in parts]
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
    return {name: _apply(recipe, asked, adopt_chunks=False) for name, recipe in STRATEGIES.items()}


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


@command(
    "max-seq", MODEL, CARD, RECIPE, JSON,
    help="The longest sequence that fits, for each strategy, and what holds it back.",
    epilog="mstplan max-seq --model llama3.1-8b --gpu h100 --optimizer-in-backward   |   "
    "mstplan max-seq -m ./my-model --gpu-mem 24GB --chunks 8,32",
)  # fmt: skip
def max_seq(asked: Asked) -> None:
    from .plan import solve

    model, card = _model(asked), _card(asked)
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


@command(
    "plan", MODEL, {"seq_len": _option(str, "--seq-len", "Tokens per sequence: 65536, 64k, 1M.", ..., metavar="TOKENS")},
    STRATEGY, CARD, RECIPE,
    {"write_recipe": _option(Path | None, "--write-recipe", "Write the recipe as JSON.", panel=_RECIPE, metavar="FILE")}, JSON,
    help="Does this length fit? The peak, its instant, and what would make it fit. Exit code 0: fits, 1: does not.",
    epilog="mstplan plan -m llama3.1-8b --gpu h100 --seq-len 64k --strategy mst",
)  # fmt: skip
def plan(asked: Asked) -> None:
    from .plan import advice, solve
    from .plan.recipe import strategy

    model, card = _model(asked), _card(asked)
    base = _base(asked) if asked.recipe is not None else strategy(asked.strategy)
    recipe = _apply(base, asked, adopt_chunks=True)
    step = solve.plan_at(model, recipe, card, _length(asked.seq_len))
    singles, run = ((), None) if step.fits else advice.ways_to_fit(step)
    if asked.write_recipe is not None:
        recipe.write(asked.write_recipe)
    if asked.json:
        from .show import payload

        _print_json(payload.plan_document(step, asked.strategy, singles, run))
    else:
        from .show import report

        report.plan(_console(), step, asked.strategy if asked.recipe is None else "this recipe", singles, run)
    if not step.fits:
        raise typer.Exit(1)


def _coefficient(flag: str, what: str, metavar: str) -> Any:
    return _option(str | None, flag, what, panel="Coefficients", metavar=metavar)


@command(
    "theorem", MODEL, {"seq_len": _option(str | None, "--seq-len", "Also the memory at this length.", metavar="TOKENS")}, CARD, RECIPE,
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
    view = report.theorem_view(model, card, _changes_for_theorem(asked), overrides, seq_len)
    if asked.json:
        from .show import payload

        _print_json(payload.theorem_document(model, card, view))
    else:
        report.theorem(_console(), model, card, view)


def _changes_for_theorem(asked: Asked) -> Recipe:
    """The user's recipe without what the four formulas themselves vary."""
    from .plan.recipe import STRATEGY_FIELDS

    return _base(asked).changed(**{name: value for name, value in _changes(asked).items() if name not in STRATEGY_FIELDS})


def _overrides(asked: Asked) -> dict[str, int | None]:
    from .errors import UnitError
    from .units import parse_memory

    def number(name: str, text: str | None) -> int | None:
        if text is not None and not text.replace("_", "").replace(",", "").isdigit():
            raise UnitError(f"cannot read --{name} '{text}' as a whole number.")
        return int(text.replace("_", "").replace(",", "")) if text is not None else None

    sizes = {name: parse_memory(getattr(asked, name)) if getattr(asked, name) is not None else None for name in ("w_mem", "m_max")}
    counts = {"i_mem": number("i-mem", asked.i_mem), "a_mem": number("a-mem", asked.a_mem), "layers": number("layers", asked.layers)}
    return {**sizes, **counts, "chunks": number("m", asked.m)}


@command(
    "shapes", MODEL, {
        "seq_len": _option(str, "--seq-len", "Tokens per sequence.", "128k", metavar="TOKENS"),
        "batch": _option(int, "--batch -b", "Sequences.", 1, metavar="N", min=1),
        "dtype": _option(str, "--dtype", "bfloat16 | float32.", "bfloat16", metavar="NAME"),
    }, JSON,
    help="The large tensors of a layer and the LM head: shape and bytes.",
    epilog="mstplan shapes -m llama3.1-8b --seq-len 131072",
)  # fmt: skip
def shapes(asked: Asked) -> None:
    from .errors import RecipeError
    from .plan.shapes import shapes as table

    if asked.dtype not in ("bfloat16", "float32"):
        raise RecipeError(f"unknown dtype '{asked.dtype}'.\nKnown: bfloat16, float32.")
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
        "force": _option(bool, "--force", "Overwrite the file.", False),
    }, JSON,
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
        _print_json(payload.document("plot", **about, file=str(asked.out), curves=[curve.as_data() for curve in curves]))
    else:
        typer.echo(f"wrote {asked.out}")


@command("models", {"names": _option(str | None, "--filter", "Only names that contain this.", metavar="TEXT")}, JSON,
         help="The models that ship with mstplan.", epilog="mstplan models --filter qwen3")  # fmt: skip
def models(asked: Asked) -> None:
    from .plan.catalog import load_model, model_names

    rows = [load_model(name) for name in model_names() if asked.names is None or asked.names.lower() in name]
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


def main() -> None:
    """Run the command of sys.argv; ends in SystemExit, as typer's programs do."""
    asked = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    for name in [asked] if asked in _COMMANDS else _COMMANDS:
        _COMMANDS[name]()
    app()


def process() -> None:
    """`main` as a process of its own, which may skip what only matters to processes that live on."""
    gc.disable()  # collecting the many objects that imports make is wasted time here
    code: object = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        code = 1
    os._exit(code if isinstance(code, int) else int(code is not None))  # all is written; tearing down takes as long as answering
