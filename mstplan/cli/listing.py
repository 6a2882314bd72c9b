"""The commands that list what is known: models and cards."""

from __future__ import annotations

from .commands import command, option
from .options import FormatOptions
from .output import emit


class ModelsOptions(FormatOptions):
    names = option(str, "--filter", "Only names that contain this.", metavar="TEXT")


@command(
    "models",
    ModelsOptions,
    help="The models that ship with mstplan.",
    examples=("mstplan models --filter qwen3",),
)
def models(options: ModelsOptions) -> None:
    from ..errors import ModelError, quoted
    from ..show import listing
    from ..spec.catalog import load_model, model_names

    rows = [load_model(name) for name in model_names() if options.names is None or options.names.lower() in name]
    if not rows:
        raise ModelError(f"no model's name contains {quoted(options.names)}.\nmstplan models lists them all.")
    emit(options, listing.models(rows))


class GpusOptions(FormatOptions):
    sources = option(bool, "--sources", "Also where each figure is from.", False)


@command(
    "gpus",
    GpusOptions,
    help="The GPUs that mstplan knows.",
    examples=("mstplan gpus --sources", "mstplan gpus --json"),
)
def gpus(options: GpusOptions) -> None:
    from ..show import listing
    from ..spec.hardware import gpus as all_gpus
    from ..spec.hardware import left_out_notes

    emit(options, listing.gpus(all_gpus(), options.sources, left_out_notes()))
