"""A sweep of measured steps: which points there are, and the measuring of them into a file. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import MeasurementError, RecipeError
from ..plan import solve
from ..showing import Showing, show_nothing
from ..spec.catalog import load_config, load_model
from ..spec.config import read_config
from ..spec.hardware import Card
from ..spec.model import Model
from ..step.kernels import NO_SDPA, SDPA
from ..step.recipe import CHUNK_FIELDS, Recipe
from ..step.runnable import check_measurable, check_trainer
from ..step.steps import attention_kernel
from ..units import SHORTEST, format_gib
from .measurement import OK, OUT_OF_MEMORY, Case, Measurement, appending, key_of, read_results, slice_config
from .processes import Processes, last_line, process_environment
from .running import environment_of, measure_each

FINAL_OUTCOMES = (OK, OUT_OF_MEMORY)
"""Outcomes that a rerun takes for done. Not what was refused: a package more, and it may run."""


class TooLargeError(MeasurementError):
    """A model that does not fit, however short the sequence."""


# ---- which points -------------------------------------------------------------------------------------------------------


def plan_cases(
    model: str,
    lengths: Iterable[int],
    recipes: Mapping[str, Recipe],
    card: Card,
    layers: int | None = None,
    device: str = "cuda",
    limit: int | None = None,
    steps: int = 3,
    assume: str | None = None,
    allocator: str | None = None,
    trainer: str | None = None,
) -> list[Case]:
    """Cases of every recipe of a model at every length, chunks as the recipe says or as recommended for `card`. Raises ModelError;
    RecipeError for a recipe that cannot be run; MeasurementError when no length at all can fit."""
    name, config = load_subject(model, layers, assume)
    planned_model, points = read_config(config, name, assume), []
    recipes = {name: with_attention_at_hand(planned_model, recipe, device) for name, recipe in recipes.items()}
    for (strategy, recipe), length in product(recipes.items(), lengths):
        seq_len = recipe.padded(length)
        chunks = solve.plan_at(planned_model, recipe, card, seq_len).chunks
        fixed_recipe = chunks.put_into(recipe)
        check_measurable(fixed_recipe)
        if trainer is not None:
            check_trainer(fixed_recipe)
        _refuse_fewer_tokens_than_chunks(recipe, fixed_recipe, seq_len)
        points.append(
            Case(
                name,
                strategy,
                config,
                fixed_recipe,
                seq_len,
                layers,
                device,
                limit,
                steps,
                assume,
                allocator,
                trainer,
            )
        )
    for case in points:
        _refuse_hopeless(planned_model, case, card)
    return sorted(points, key=lambda case: case.seq_len)


def with_attention_at_hand(model: Model, recipe: Recipe, device: str) -> Recipe:
    """The recipe, with eager attention where transformers has no sdpa for the model and no package here brings flash attention:
    transformers takes its kernels from `flash_attn` or `kernels`, those that know sinks from `kernels` alone."""
    packages = ("kernels",) if model.attention.sinks else ("flash_attn", "kernels")
    wants_flash = recipe.attention == SDPA and attention_kernel(model, recipe) == NO_SDPA
    if device != "cuda" or not wants_flash or any(find_spec(package) is not None for package in packages):
        return recipe
    return recipe.changed(attention="eager")


def load_subject(spec: str, layers: int | None, assume: str | None = None) -> tuple[str, dict[str, Any]]:
    """The name and the config.json of what is to be measured: a model, or its first layers. Raises ModelError."""
    config, name = dict(load_config(spec)), load_model(spec, assume).name
    return name, config if layers is None else slice_config(config, layers, name, assume)


def _refuse_fewer_tokens_than_chunks(asked: Recipe, fixed: Recipe, seq_len: int) -> None:
    """No result is to stand under another number of chunks than was asked for."""
    for field in CHUNK_FIELDS[:2]:
        if getattr(asked, field) not in ("auto", getattr(fixed, field)):
            raise RecipeError(
                f"{seq_len:,} tokens cannot be run in {getattr(asked, field):,} chunks.\nGive {seq_len:,} at most (--chunks), or auto."
            )


def _refuse_hopeless(model: Model, case: Case, card: Card) -> None:
    """A step whose weights, gradients and optimizer states alone are more than the memory there is."""
    least_bytes = solve.plan_at(model, case.recipe, card, SHORTEST).peak_bytes
    if least_bytes <= card.total_bytes:
        return
    layer_bytes = (least_bytes - solve.plan_at(model.first(1), case.recipe, card, SHORTEST).peak_bytes) / max(
        1, model.layers - 1
    )
    fitting_layers = model.layers - int((least_bytes - card.total_bytes) / max(1.0, layer_bytes)) - 1
    slice_words = f'Measure a slice of it: --layers {fitting_layers} ("layers": {fitting_layers} in a suite).'
    other_words = "Take a smaller model" + (", or give more with --gpu-mem." if case.limit is not None else ".")
    raise TooLargeError(
        f"{model.name}, {case.strategy}: {SHORTEST} tokens take {format_gib(least_bytes)}, most of it weights and optimizer states; there are "
        f"{format_gib(card.total_bytes)}.\n{slice_words if fitting_layers >= 1 else other_words}"
    )


# ---- the device ------------------------------------------------------------------------------------------------------------


def ask_environment(device: str, processes: Processes | None = None) -> dict[str, Any]:
    """Facts that figures on this device depend on: card, bytes, driver, versions; asked of a process, as CUDA must not be touched here.
    Raises MeasurementError where there is none."""
    if processes is None:
        with Processes() as own_processes:
            return ask_environment(device, own_processes)
    process = processes.begin(["describe", device], process_environment(device))
    try:
        process.read_all()
    except BaseException:
        process.stop()
        raise
    answer, _, error_text = process.end()
    try:
        facts: dict[str, Any] = json.loads(answer)
    except ValueError:
        raise MeasurementError(f"cannot look at the device: {last_line(error_text)}") from None
    if "error" in facts:
        raise MeasurementError(facts["error"])
    return facts


# ---- all of it, into a file -----------------------------------------------------------------------------------------------


class Sweep(NamedTuple):
    """Outcome of the points asked for. skipped: how many had been measured before; damaged: lines of the file left out; why_anew: why a
    process was begun anew for each point; empty where they were forked."""

    measurements: list[Measurement]
    skipped: int
    damaged: list[str]
    why_anew: str = ""

    @property
    def complete(self) -> bool:
        """Whether every point has its answer: running out of memory is one, a failure or a refusal is none."""
        return all(m.outcome in FINAL_OUTCOMES for m in self.measurements)


def measure_all(
    cases: Sequence[Case],
    environment: Mapping[str, Any],
    out: Path,
    timeout: float | None = None,
    again: bool = False,
    begins: Callable[[], object] = lambda: None,
    tell: Callable[[Measurement], object] = lambda _m: None,
    showing: Showing = show_nothing,
    processes: Processes | None = None,
    workers: int = 1,
) -> Sweep:
    """Measure each point that the results file `out` has no answer for, or with `again` all, and append what comes of it. `begins` is
    called once the file is found in order, `tell` with each result as it comes. Points are measured one after the other, and then those
    that have no times in the file are measured again; or up to `workers` at a time, which leaves most without times. Raises
    MeasurementError and OutputError about the file."""
    with ExitStack() as stack:
        append = stack.enter_context(appending(out))
        advance = stack.enter_context(showing("measuring", len(cases)))
        processes = processes or stack.enter_context(Processes())
        begins()
        content = read_results(out)
        earlier = {} if again else results_by_key(content.measurements, timed=workers == 1)
        results = {n: earlier.get(key_of(case, environment_of(case, environment))) for n, case in enumerate(cases)}
        missing = [n for n, result in results.items() if result is None]
        for result in filter(None, results.values()):
            advance("", 1)
            tell(result)
        made = measure_each(
            [cases[n] for n in missing], environment, processes, workers, timeout, lambda case: advance(case.words, 0)
        )
        for number, measurement in stack.enter_context(closing(made)):
            append(measurement)
            results[missing[number]] = measurement
            advance("", 1)
            tell(measurement)
    return Sweep(
        [m for m in results.values() if m is not None],
        len(cases) - len(missing),
        content.skipped,
        processes.why_anew if missing else "",
    )


def results_by_key(earlier: Iterable[Measurement], timed: bool = False) -> dict[str, Measurement]:
    """Measurements that a rerun need not make again, by key. timed: of those that ran, only those that have times."""
    return {m.key: m for m in earlier if m.outcome in FINAL_OUTCOMES and not (timed and m.ranks and m.seconds is None)}


def measure_case(
    case: Case, environment: Mapping[str, Any], timeout: float | None = None, processes: Processes | None = None
) -> Measurement:
    """Measure one case in a process of its own, whatever becomes of it."""
    with ExitStack() as stack:
        processes = processes or stack.enter_context(Processes())
        ((_, measurement),) = measure_each([case], environment, processes, timeout=timeout)
    return measurement
