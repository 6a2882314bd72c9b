"""Options, each said once, and what they make: the library's objects."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..plan.optimizers import OPTIMIZERS
from ..plan.selection import WeightKind
from ..show.formats import FORMATS
from .commands import Asked, Option, arguments, option

if TYPE_CHECKING:
    from ..plan.hardware import Card
    from ..plan.model import Model
    from ..plan.recipe import Recipe
    from ..plan.solve import Plan


def formats_told() -> str:
    """What --format takes, for the help."""
    return f"{', '.join(f'{each.name} ({each.about})' for each in FORMATS.values())}. Default text."


JSON = {
    "json": option(bool, "--json", "Short for --format json.", False),
    "own_format": option(
        str | None,
        "--format",
        "text | json; what else there is has an option of its own. Default text.",
        metavar="NAME",
    ),
}
"""Of commands that tell as they go."""
FORMAT = {
    "json": JSON["json"],
    "format": option(str | None, "--format", formats_told, metavar="NAME"),
}
MODEL = {
    "model": option(
        str,
        "--model -m",
        "A shipped name (see `mstplan models`), a config.json or its folder, or a Hugging Face id.",
        ...,
        metavar="MODEL",
    ),
    "assume": option(
        str | None, "--assume", "llama-like: count a model that mstplan does not read as a Llama.", metavar="NAME"
    ),
}
CARD = {
    "gpu": option(str | None, "--gpu", "A card by name (see `mstplan gpus`).", panel="Card", metavar="NAME"),
    "gpu_mem": option(
        str | None, "--gpu-mem", "Any amount of card memory: 80GB, 79.15GiB, 24576MiB.", panel="Card", metavar="SIZE"
    ),
    "host_mem": option(str | None, "--host-mem", "Host memory for what is offloaded.", panel="Card", metavar="SIZE"),
    "reserve": option(str, "--reserve", "Card memory that other processes hold.", "0B", panel="Card", metavar="SIZE"),
}
RECIPE = {
    "recipe": option(
        Path | None, "--recipe", "A recipe in a JSON file; options below override it.", panel="Recipe", metavar="FILE"
    ),
    "precision": option(
        str | None,
        "--precision",
        "bf16 | mixed (fp32 weights, bf16 autocast) | fp32. Default bf16.",
        panel="Recipe",
        metavar="NAME",
    ),
    "optimizer": option(
        str | None,
        "--optimizer",
        f"{' | '.join(OPTIMIZERS)}. Default adamw.",
        panel="Recipe",
        metavar="NAME",
    ),
    "adamw_kernel": option(
        str | None,
        "--adamw-kernel",
        "foreach | fused | for-loop. Default foreach, as on CUDA.",
        panel="Recipe",
        metavar="NAME",
    ),
    "optimizer_in_backward": option(
        bool, "--optimizer-in-backward", "Step each weight as its gradient is made.", False, panel="Recipe"
    ),
    "optimizer_on_host": option(
        bool, "--optimizer-on-host", "Optimizer states and step on the host.", False, panel="Recipe"
    ),
    "weights_on_host": option(
        bool, "--weights-on-host", "Weights on the host too, gathered layer by layer.", False, panel="Recipe"
    ),
    "accumulation": option(
        int | None, "--accumulation", "Micro-batches per optimizer step. Default 1.", panel="Recipe", metavar="N"
    ),
    "batch": option(int | None, "--batch -b", "Sequences per micro-batch. Default 1.", panel="Recipe", metavar="N"),
    "pad_to": option(
        int | None,
        "--pad-to",
        "Tokens that batches are padded to a multiple of. Default 1.",
        panel="Recipe",
        metavar="N",
    ),
    "checkpoint": option(
        str | None, "--checkpoint", "none | layer | sqrt | a number of layers.", panel="Recipe", metavar="HOW"
    ),
    "chunks": option(
        str | None,
        "--chunks",
        "M for MLP and loss: 8, or 8,32, or auto (as recommended).",
        panel="Recipe",
        metavar="M[,M]",
    ),
    "no_recompute": option(bool, "--no-recompute", "Do not recompute each MLP chunk by itself.", False, panel="Recipe"),
    "offload": option(bool, "--offload", "Layer inputs in host memory.", False, panel="Recipe"),
    "attention": option(
        str | None, "--attention", "sdpa | flash | eager. Default sdpa.", panel="Recipe", metavar="NAME"
    ),
    "loss": option(
        str | None, "--loss", "transformers | 'transformers<4.45' | chunked.", panel="Recipe", metavar="NAME"
    ),
    "train": option(
        str | None,
        "--train",
        f"Train these weights only: {' | '.join(WeightKind)}, or patterns over their names.",
        panel="Recipe",
        metavar="NAMES",
    ),
    "freeze": option(
        str | None,
        "--freeze",
        "Do not train these weights.",
        panel="Recipe",
        metavar="NAMES",
    ),
    "input_gradients": option(
        bool,
        "--input-gradients",
        "Backward goes down to the embeddings' output whatever is trained, as with transformers' own checkpointing.",
        False,
        panel="Recipe",
    ),
    "gpus": option(
        int | None,
        "--gpus",
        "Cards that train together, all alike; answers are per card. Default 1.",
        panel="Recipe",
        metavar="N",
    ),
    "sharding": option(
        str | None,
        "--sharding",
        "none | fsdp (FSDP2, ZeRO-3: everything in shards over --gpus).",
        panel="Recipe",
        metavar="NAME",
    ),
}
ONE_RECIPE = (
    'With --checkpoint, --chunks, --no-recompute, --loss, --offload or --recipe, and no --strategy, the options describe one recipe ("custom"), '
    "which starts from standard, in every command alike; all others vary the strategies."
)
VARIED_BY_THE_FORMULAS = ("checkpoint", "chunks", "no_recompute", "offload", "loss")
THEOREM_RECIPE = {
    name: one for name, one in RECIPE.items() if name not in (*VARIED_BY_THE_FORMULAS, "gpus", "sharding")
}
STRATEGIES = {
    "strategy": option(
        str | None,
        "--strategy -s",
        "standard | checkpoint | checkpoint-sqrt | mst | mst-offload: some of them, with commas between. Default: all five.",
        adds_up=True,
        metavar="NAME[,NAME]",
    ),
}
RESULTS_FILES = {"files": arguments(Path, "RESULTS", "Results files, as --results names them.")}
FORCE = {"force": option(bool, "--force", "Overwrite the file.", False)}
TRACING = {
    "no_cache": option(bool, "--no-cache", "Trace anew, and keep nothing.", False, panel="Trace"),
    "trust_remote_code": option(
        bool, "--trust-remote-code", "Run the model's own code where transformers has none.", False, panel="Trace"
    ),
}
MEASURING = {
    "layers": option(
        int | None,
        "--layers",
        "The model's first N layers only, for one too large to hold.",
        panel="Measurement",
        metavar="N",
        min=1,
    ),
    "device": option(
        str,
        "--device",
        "cuda | cpu (its own kernels, seen by torch's profiler). Default cuda.",
        "cuda",
        panel="Measurement",
        metavar="NAME",
    ),
    "gpu_mem": option(
        str | None, "--gpu-mem", "Let the process use that much of the card only.", panel="Measurement", metavar="SIZE"
    ),
    "steps": option(
        int,
        "--steps",
        "Steps that are timed, after a first one.",
        3,
        panel="Measurement",
        metavar="N",
        min=1,
        max=1_000_000,
    ),
    "timeout": option(
        float | None,
        "--timeout",
        "Give up on a point after so many seconds.",
        panel="Measurement",
        metavar="SECONDS",
        min=1,
        max=1_000_000,
    ),
    "out": option(
        Path,
        "--out -o",
        "The results file, which is appended to.",
        Path("measurements.jsonl"),
        panel="Measurement",
        metavar="FILE",
    ),
    "again": option(bool, "--again", "Also points that the results file has already.", False, panel="Measurement"),
}


def given(asked: Asked, options: dict[str, Option]) -> list[str]:
    """The flags, of these options, that the command line sets."""
    return [one.flags[0] for name, one in options.items() if getattr(asked, name, one.default) != one.default]


# ---- what options make: the library's objects --------------------------------------------------------------------------


def model_of(asked: Asked) -> Model:
    from ..plan.catalog import load_model

    return load_model(asked.model, asked.assume)


def known_or_traced(asked: Asked) -> Model:
    """The model as the formula reads it; where that does not know it and torch is there, a stand-in for which answers are traced."""
    from ..errors import UnreadError

    try:
        return model_of(asked)
    except UnreadError as e:
        from .tracing import stand_in

        return stand_in(asked, e)


def card_of(asked: Asked) -> Card:
    from ..plan.hardware import card
    from ..units import parse_memory

    return card(asked.gpu, memory(asked.gpu_mem), parse_memory(asked.reserve), memory(asked.host_mem))


def memory(text: str | None) -> int | None:
    """Bytes; None where nothing was said."""
    from ..units import parse_memory

    return parse_memory(text) if text is not None else None


def changes_of(asked: Asked) -> dict[str, object]:
    """The recipe fields that the options set."""
    from ..units import parse_whole

    named = (
        "precision",
        "optimizer",
        "adamw_kernel",
        "accumulation",
        "batch",
        "pad_to",
        "attention",
        "loss",
        "gpus",
        "sharding",
    )
    changes: dict[str, object] = {name: getattr(asked, name) for name in named if getattr(asked, name) is not None}
    for name in ("train", "freeze"):
        if (patterns := getattr(asked, name)) is not None:
            changes[name] = tuple(part.strip() for part in patterns.split(","))
    for switch in ("optimizer_in_backward", "optimizer_on_host", "weights_on_host", "input_gradients"):
        if getattr(asked, switch):
            changes[switch] = True
    if asked.offload:
        changes["offload_layer_inputs"] = True
    if asked.no_recompute:
        changes["mlp_recompute"] = False
    if asked.checkpoint is not None:
        changes["checkpoint"] = (
            parse_whole(asked.checkpoint, "--checkpoint") if "0" <= asked.checkpoint[:1] <= "9" else asked.checkpoint
        )
    return changes


def _chunks(text: str | None) -> dict[str, object]:
    """mlp_chunks and loss_chunks from '8', '8,32' or 'auto'."""
    from ..errors import RecipeError, UnitError, quoted
    from ..units import parse_whole

    if text is None:
        return {}
    parts = [part.strip() for part in text[:100].split(",")]
    try:
        values = ["auto" if part == "auto" else parse_whole(part) for part in parts]
    except UnitError:
        values = []
    if len(values) not in (1, 2) or 0 in values or len(text) > 100:
        raise RecipeError(
            f"cannot read --chunks {quoted(text)}.\nWrite one number for both (8), two (MLP,loss: 8,32), or auto."
        )
    return {"mlp_chunks": values[0], "loss_chunks": values[-1]}


def runs_in_chunks(recipe: Recipe) -> bool:
    return recipe.loss == "chunked" or recipe.mlp_recompute or recipe.mlp_chunks != 1


def applied(base: Recipe, asked: Asked, adopt_chunks: bool) -> Recipe:
    """`base` with the options' changes. --chunks goes to recipes that run in chunks, and with adopt_chunks to any."""
    changes, chunks = changes_of(asked), _chunks(asked.chunks)
    if chunks and not runs_in_chunks(base) and adopt_chunks:
        changes = {"loss": "chunked", "mlp_recompute": True, **changes}
    if chunks and (runs_in_chunks(base) or adopt_chunks):
        changes.update(chunks)
    loss = changes.get("loss", base.loss)
    if loss != "chunked":
        changes["loss_chunks"] = 1
    elif base.loss != "chunked":
        changes.setdefault("loss_chunks", "auto")
    return base.changed(**changes)


DESCRIBING = ("recipe", "checkpoint", "chunks", "no_recompute", "loss", "offload")
"""Options for what a strategy decides. Without --strategy they describe, with all others, one recipe that starts from the standard
strategy; where there are none of them, the others vary every strategy."""


def base_recipe(asked: Asked) -> Recipe:
    """What a custom recipe starts from: the recipe file, else the standard strategy."""
    from ..plan.recipe import Recipe

    return Recipe.read(asked.recipe) if asked.recipe is not None else Recipe.model_construct()


def recipes_of(asked: Asked, usual: str = "all") -> dict[str, Recipe]:
    """What the options ask for, by name, in every command alike: the strategies that --strategy names, with the options' changes; else
    the one recipe that they describe; else the `usual` strategies."""
    from ..errors import RecipeError

    if asked.strategy is None and given(asked, {name: RECIPE[name] for name in DESCRIBING}):
        return {"custom": applied(base_recipe(asked), asked, adopt_chunks=True)}
    if asked.recipe is not None:
        raise RecipeError(
            "--strategy and --recipe exclude each other: a recipe says what a strategy says.\nLeave one of the two out."
        )
    bases = _named(asked, usual)
    none_in_chunks = not any(map(runs_in_chunks, bases.values()))
    found = {name: applied(base, asked, adopt_chunks=none_in_chunks) for name, base in bases.items()}
    return {_name_of(name, recipe, alone=len(found) == 1): recipe for name, recipe in found.items()}


def plans_of(asked: Asked, model: Model, card: Card) -> dict[str, Plan]:
    """What the options ask for, at the length that they say."""
    from ..plan.solve import plan_at

    seq_len = length(asked.seq_len)
    return {name: plan_at(model, recipe, card, seq_len) for name, recipe in recipes_of(asked).items()}


def simplest(plans: dict[str, Plan]) -> str:
    """The name of the first plan that fits; where none does, of the nearest."""
    from ..plan.ways import nearest

    fitting = next((name for name, plan in plans.items() if plan.fits), None)
    return fitting or next(name for name, plan in plans.items() if plan is nearest(list(plans.values())))


def _named(asked: Asked, usual: str) -> dict[str, Recipe]:
    from ..plan.recipe import STRATEGIES, strategy

    named = asked.strategy if asked.strategy is not None else usual
    names = [name.strip() for name in named.split(",")] if named != "all" else list(STRATEGIES)
    if named == "all" and asked.sharding == "fsdp":  # which gathers one layer at a time
        names.remove("checkpoint-sqrt")
    return {name: strategy(name) for name in names}


def _name_of(name: str, recipe: Recipe, alone: bool) -> str:
    """The strategy's while the recipe is one, with any number of chunks."""
    from ..plan.recipe import STRATEGIES, STRATEGY_FIELDS

    fields = (field for field in STRATEGY_FIELDS if not field.endswith("_chunks"))
    if all(getattr(recipe, field) == getattr(STRATEGIES[name], field) for field in fields):
        return name
    return "custom" if alone else f"{name}*"


def length(text: str) -> int:
    from ..units import parse_length

    return parse_length(text)


def results_files(asked: Asked) -> list[Path]:
    """Those that stand by themselves, whatever their names, and those of --results."""
    from ..errors import MeasurementError

    parts = [part.strip() for part in asked.results.split(",")] if asked.results is not None else []
    if "" in [*parts, *(str(path) if path.name else "" for path in asked.files or ())]:
        raise MeasurementError("a results file without a name.\nWrite a.jsonl b.jsonl, or --results a.jsonl,b.jsonl.")
    return [*(asked.files or ()), *map(Path, parts)]
