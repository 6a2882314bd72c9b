"""`mstplan calibrate` at work: a progress bar, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ..errors import MeasurementError
from ..observe import cache, fit, measurement
from ..observe.calibrate import Family, calibrate, families
from ..observe.trace import Trace
from ..plan import calibration
from ..plan.calibration import Calibration
from ..plan.catalog import load_config, load_model
from ..plan.hardware import write_measured
from ..plan.recipe import Recipe
from . import tables
from .progress import progress


class Row(NamedTuple):
    model: str
    strategy: str
    mlp_in_chunks: bool
    loss_in_chunks: bool
    masked: bool  # sliding windows with explicit masks
    vectors: int
    residual: float
    file: str


def run(models: Sequence[str], strategies: Sequence[str], folder: Path, keep: bool) -> list[Row]:
    """Calibrate each model and write its file as soon as it is done. Raises what the trace refuses."""
    cache.versions()  # no torch: said at once
    work = [(spec, load_model(spec)) for spec in models]
    rows: list[Row] = []
    solved: dict[tuple[str, Family], Calibration] = {}
    with progress("calibrating", sum(len(families(model, strategies)) for _, model in work)) as advance:
        for spec, model in work:
            config, found = load_config(spec), []

            def trace_at(recipe: Recipe, seq_len: int) -> Trace:
                return cache.trace_of(config, recipe, seq_len, keep=keep)  # noqa: B023  used within this turn only

            for family in families(model, strategies):
                advance(f"{model.name}, {family.strategy}", 0)
                same = (calibration.fingerprint(model), family)  # models of other names and the same sizes
                if same not in solved:
                    solved[same] = calibrate(model, family, trace_at)
                found.append((family, solved[same]))
                advance("", 1)
            path = calibration.write(model, [c for _, c in found], folder)
            rows += [
                Row(model.name, f.strategy, f.several_mlp, f.several_loss, f.masked, sum(map(len, c.moments.values())), c.residual, str(path)) for f, c in found
            ]  # fmt: skip
    return rows


def from_measurements(
    models: Sequence[str], strategies: Sequence[str], folder: Path, results: Sequence[Path], elsewhere: bool
) -> tuple[list[Row], list[str]]:  # fmt: skip
    """Fit each model's families to measurements and write them; of CUDA measurements also the cards' constants. elsewhere: is `folder`
    one that the planner does not read? Gives the rows, and what else is to be said. Raises MeasurementError."""
    named = [load_model(spec) for spec in models]
    read = measurement.read_all(results)
    chosen = [m for m in read.measurements if m.case.strategy in (*strategies, "custom")]
    if not elsewhere:
        cpu = [m for m in chosen if m.case.device == "cpu"]
        if len(cpu) == len(chosen) and cpu:
            raise MeasurementError("these were measured on a CPU, and the planner plans for cards.\n--out FOLDER writes calibrations that it does not use.")
        chosen = [m for m in chosen if m.case.device != "cpu"]
    rows, said = [], list(read.skipped)
    for model in named:
        try:
            found = fit.fit(model, chosen)
        except MeasurementError as e:
            if len(named) == 1:
                raise
            said.append(str(e).splitlines()[0])
            continue
        path = calibration.write(model, found.calibrations, folder)
        said += found.left_out
        rows += [
            Row(model.name, c.provenance["strategy"], c.several_mlp, c.several_loss, c.masked, sum(map(len, c.moments.values())), c.residual, str(path))
            for c in found.calibrations
        ]  # fmt: skip
    if not rows:
        raise MeasurementError("none of these models has measurements enough.\nmstplan calibrate with one --model says what it lacks.")
    constants = fit.devices(chosen)
    if constants:
        path = write_measured(constants)
        said += [f"{card}: {about['context_bytes'] / 2**20:,.0f} MiB of CUDA context, measured; wrote {path}" for card, about in constants.items()]
    return rows, said


def report(console: Console, rows: Sequence[Row]) -> None:
    table = tables.new_table(("model", "left"), ("strategy", "left"), ("in chunks", "left"), ("vectors", "right"), ("residual", "right"))
    for row in rows:
        chunked = " and ".join(part for part, several in (("MLP", row.mlp_in_chunks), ("loss", row.loss_in_chunks)) if several)
        how = (chunked or "nothing") + (", masks" if row.masked else "")
        table.add_row(row.model, row.strategy, how, str(row.vectors), f"{row.residual:.1e}")
    console.print(table)
    for path in dict.fromkeys(row.file for row in rows):
        console.print(f"wrote {path}", soft_wrap=True)
