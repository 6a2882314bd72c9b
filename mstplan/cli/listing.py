"""The commands that list what is known: models and cards."""

from __future__ import annotations

from .commands import Asked, command, option
from .options import FORMAT
from .output import emit


@command(
    "models",
    {"names": option(str | None, "--filter", "Only names that contain this.", metavar="TEXT")},
    FORMAT,
    help="The models that ship with mstplan.",
    epilog="mstplan models --filter qwen3",
)
def models(asked: Asked) -> None:
    from ..errors import ModelError, quoted
    from ..plan.catalog import load_model, model_names
    from ..show import listing

    rows = [load_model(name) for name in model_names() if asked.names is None or asked.names.lower() in name]
    if not rows:
        raise ModelError(f"no model's name contains {quoted(asked.names)}.\nmstplan models lists them all.")
    emit(asked, listing.models(rows))


@command(
    "gpus",
    {"sources": option(bool, "--sources", "Also where each figure is from.", False)},
    FORMAT,
    help="The cards that mstplan knows.",
    epilog="mstplan gpus --json",
)
def gpus(asked: Asked) -> None:
    from ..plan.hardware import gpus as known
    from ..plan.hardware import left_out
    from ..show import listing

    emit(asked, listing.gpus(known(), asked.sources, left_out()))
