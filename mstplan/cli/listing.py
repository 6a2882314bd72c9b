"""The commands that list what is known: models and cards."""

from __future__ import annotations

from .commands import command, option
from .options import JsonOptions
from .output import new_console, print_json


class ModelsOptions(JsonOptions):
    names = option(str, "--filter", "Only names that contain this.", metavar="TEXT")


@command(
    "models",
    ModelsOptions,
    help="The models that ship with mstplan.",
    examples=("mstplan models --filter qwen3",),
)
def models(asked: ModelsOptions) -> None:
    from ..errors import ModelError, quoted
    from ..plan.catalog import load_model, model_names

    rows = [load_model(name) for name in model_names() if asked.names is None or asked.names.lower() in name]
    if not rows:
        raise ModelError(f"no model's name contains {quoted(asked.names)}.\nmstplan models lists them all.")
    if asked.json:
        from ..show import payload

        print_json(payload.document("models", models=[payload.model(m) for m in rows]))
    else:
        from ..show import tables

        tables.models(new_console(), rows)


class GpusOptions(JsonOptions):
    sources = option(bool, "--sources", "Also where each figure is from.", False)


@command(
    "gpus",
    GpusOptions,
    help="The cards that mstplan knows.",
    examples=("mstplan gpus --sources", "mstplan gpus --json"),
)
def gpus(asked: GpusOptions) -> None:
    from ..plan.hardware import gpus as known
    from ..plan.hardware import left_out

    if asked.json:
        from ..show import payload

        print_json(payload.document("gpus", gpus=[payload.gpu(g) for g in known()], notes=left_out()))
    else:
        from ..show import tables

        tables.gpus(new_console(), known(), asked.sources, left_out())
