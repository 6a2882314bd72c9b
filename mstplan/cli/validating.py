"""The commands that hold predictions against what was measured before: validate, and published against what others published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .commands import command, option
from .options import FORCE, MARKDOWN, FormatOptions, ResultsOptions, one_of, results_files, shipped_models
from .output import emit

if TYPE_CHECKING:
    from ..checking.validate import ErrorBounds, Validation
    from ..measuring.measurement import Measurement, ResultsContent


def _rungs() -> str:
    from ..checking.validate import RUNGS

    return f"{', '.join(RUNGS)}: some of them, with commas between. Default all."


def _known_rungs() -> list[str]:
    from ..checking.validate import RUNGS

    return [*RUNGS, "all"]


class ValidateOptions(ResultsOptions, FormatOptions):
    model = option(str, "--model -m", "What was measured of this model only.", metavar="MODEL", choices=shipped_models)
    rungs = option(str, "--rung", _rungs, "all", adds_up=True, metavar="NAME[,NAME]", choices=_known_rungs)
    mean = option(str, "--mean", "The mean error that trace and calibrated formula may have.", "1%", metavar="SHARE")
    worst = option(str, "--worst", "The worst error that they may have.", "3%", metavar="SHARE")
    formula_worst = option(str, "--formula-worst", "The worst error of the bare formula.", "5%", metavar="SHARE")
    plot = option(Path, "--plot", "Draw predicted against measured: PNG, SVG or PDF.", metavar="FILE")
    markdown = MARKDOWN
    force = FORCE


@command(
    "validate",
    ValidateOptions,
    help="Hold predictions against measurements: formula, calibrated formula and trace beside every measured step. Exit code 1 when an "
    "error is beyond its bound, or a step that was to fit ran out of memory.",
    examples=(
        "mstplan validate",
        "mstplan validate --rung formula,calibrated --format markdown",
        "mstplan validate h100.jsonl a100.jsonl --plot errors.png",
    ),
)
def validate(options: ValidateOptions) -> None:
    from .. import files
    from ..checking import validate as rungs
    from ..show import timeline, validating

    if options.plot is not None:
        files.check_writable(options.plot, options.force)
        timeline.check_output(options.plot)
    names, missing = _rungs_of(options)
    bounds = _bounds(options)
    chosen, read = _chosen(options)
    validation = _compared(options, chosen, names)
    violations = rungs.bound_violations(validation, bounds)
    if options.plot is not None:
        validating.plot(validation, options.plot)
    written = [options.plot] if options.plot is not None else []
    emit(options, validating.report(validation, read.skipped, violations, missing, written))
    if violations:
        raise typer.Exit(1)


def _rungs_of(options: ValidateOptions) -> tuple[tuple[str, ...], str]:
    """The rungs to ask; and where they are all of them, why the trace is not: it alone needs torch."""
    from ..checking.validate import RUNGS, TRACE
    from ..errors import MissingError
    from ..tracing import cache

    if options.rungs != "all":
        return tuple(one_of("rung", name.strip(), RUNGS) for name in options.rungs.split(",")), ""
    try:
        cache.versions()
    except MissingError as e:
        return tuple(name for name in RUNGS if name != TRACE), f"without the trace: {e}"
    return RUNGS, ""


def _bounds(options: ValidateOptions) -> dict[str, ErrorBounds]:
    from ..checking.validate import CALIBRATED, FORMULA, TRACE, ErrorBounds
    from ..units import parse_share

    bounds = ErrorBounds(parse_share(options.mean, "--mean"), parse_share(options.worst, "--worst"))
    formula = parse_share(options.formula_worst, "--formula-worst")
    return {FORMULA: ErrorBounds(formula, formula), CALIBRATED: bounds, TRACE: bounds}


def _chosen(options: ValidateOptions) -> tuple[list[Measurement], ResultsContent]:
    """The measurements of the model, where one is named; and all that the results files hold."""
    from ..errors import MeasurementError
    from ..measuring import measurement
    from ..spec.catalog import identify_model

    read = measurement.read_all_results(results_files(options) or measurement.shipped_results())
    name = identify_model(options.model)[0] if options.model is not None else None
    chosen = [m for m in read.measurements if name in (None, m.case.model)]
    if not any(m.outcome in (measurement.OK, measurement.OUT_OF_MEMORY) for m in chosen):
        of, damaged = f" of {name}" if name else "", f" ({read.skipped[0]})" if read.skipped else ""
        raise MeasurementError(
            f"no measurement{of} to hold predictions against{damaged}.\nmstplan measure makes some; --results names the file."
        )
    return chosen, read


def _compared(options: ValidateOptions, chosen: list[Measurement], rungs: tuple[str, ...]) -> Validation:
    from ..checking.validate import validate
    from ..errors import MeasurementError
    from ..show.progress import progress

    with progress("comparing", len(chosen)) as advance:
        validation = validate(chosen, rungs, lambda words: advance(words, 1))
    if not validation.rows and not validation.out_of_memory:
        why = f" ({validation.left_out[0]})" if validation.left_out else ""
        raise MeasurementError(
            f"{options.rungs} has no answer for any of these {len(chosen)} measurements{why}.\nName other rungs, or leave --rung out."
        )
    return validation


class PublishedOptions(FormatOptions):
    markdown = MARKDOWN


@command(
    "published",
    PublishedOptions,
    help="Published lengths, peaks and series beside the formula's, with the assumptions that each is read with.",
    examples=("mstplan published", "mstplan published --markdown"),
)
def published(options: PublishedOptions) -> None:
    from ..plan.published import all_series, comparisons
    from ..show import published as shown

    emit(options, shown.report(comparisons(), all_series()))
