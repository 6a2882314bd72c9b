"""A sweep of measured steps: which points there are, and the measuring of one in a process of its own. No torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import MeasurementError, RecipeError, one_line
from ..plan import solve
from ..showing import Showing, show_nothing
from ..spec.catalog import load_config, load_model
from ..spec.config import read_config
from ..spec.hardware import Card, card_that_torch_names
from ..spec.model import Model
from ..spec.platform import build_measured
from ..step.recipe import Recipe
from ..step.runnable import check_runnable
from ..units import SHORTEST, format_gib
from .measurement import (
    FAILED,
    OK,
    OUT_OF_MEMORY,
    Case,
    Figures,
    Measurement,
    appending,
    key_of,
    read_results,
    slice_config,
)

_PACKAGE = Path(__file__).parents[1]
_PROGRAM = f"""
import sys
sys.path = [folder for folder in sys.path if folder]  # not the current one, and whatever random.py lies there
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("mstplan", {str(_PACKAGE / "__init__.py")!r}, submodule_search_locations=[{str(_PACKAGE)!r}])
sys.modules["mstplan"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["mstplan"])
from mstplan.measuring.worker import main
main()
"""
WORKER_COMMAND = (sys.executable, "-c", _PROGRAM)
"""How a process starts that measures: with this very mstplan, wherever it was found. `python -m` would take the current folder for a place
to look for modules."""
FINAL_OUTCOMES = (OK, OUT_OF_MEMORY)
"""Outcomes that a rerun takes for done. Not what was refused: a package more, and it may run."""


# ---- which points -------------------------------------------------------------------------------------------------------


def card_of(environment: Mapping[str, Any], limit: int | None = None) -> Card:
    """The card to plan for: the device of that environment (for a CPU any card with as much memory), or `limit` bytes of it."""
    named = card_that_torch_names(environment["card"], environment["total_bytes"])
    whole = named._replace(build=build_measured(environment))
    return whole if limit is None else whole._replace(total_bytes=min(limit, whole.total_bytes))


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
) -> list[Case]:
    """Cases of every recipe of a model at every length, chunks as the recipe says or as recommended for `card`. Raises ModelError;
    RecipeError for a recipe that cannot be run; MeasurementError when no length at all can fit."""
    name, config = load_subject(model, layers, assume)
    planned_model, points = read_config(config, name, assume), []
    for (strategy, recipe), length in product(recipes.items(), lengths):
        seq_len = recipe.padded(length)
        chunks = solve.plan_at(planned_model, recipe, card, seq_len).chunks
        fixed_recipe = recipe.changed(mlp_chunks=chunks.mlp, loss_chunks=chunks.loss)
        check_runnable(fixed_recipe)
        _refuse_fewer_tokens_than_chunks(recipe, fixed_recipe, seq_len)
        points.append(Case(name, strategy, config, fixed_recipe, seq_len, layers, device, limit, steps, assume))
    for case in points:
        _refuse_hopeless(planned_model, case, card)
    return sorted(points, key=lambda case: case.seq_len)


def load_subject(spec: str, layers: int | None, assume: str | None = None) -> tuple[str, dict[str, Any]]:
    """The name and the config.json of what is to be measured: a model, or its first layers. Raises ModelError."""
    config, name = dict(load_config(spec)), load_model(spec, assume).name
    return name, config if layers is None else slice_config(config, layers, name, assume)


def _refuse_fewer_tokens_than_chunks(asked: Recipe, fixed: Recipe, seq_len: int) -> None:
    """No result is to stand under another number of chunks than was asked for."""
    for field in ("mlp_chunks", "loss_chunks"):
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
    raise MeasurementError(
        f"{model.name}, {case.strategy}: {SHORTEST} tokens take {format_gib(least_bytes)}, most of it weights and optimizer states; there are "
        f"{format_gib(card.total_bytes)}.\n{slice_words if fitting_layers >= 1 else other_words}"
    )


# ---- each in a process of its own ------------------------------------------------------------------------------------------


def ask_environment(device: str) -> dict[str, Any]:
    """Facts that figures on this device depend on: card, bytes, driver, versions. Raises MeasurementError where there is none."""
    completed = subprocess.run(
        [*WORKER_COMMAND, "describe", device],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=process_environment(device),
    )
    try:
        facts: dict[str, Any] = json.loads(completed.stdout)
    except ValueError:
        raise MeasurementError(f"cannot look at the device: {_last_line(completed.stderr)}") from None
    if "error" in facts:
        raise MeasurementError(facts["error"])
    return facts


def process_environment(device: str) -> dict[str, str]:
    """Environment variables of a process that measures. On CUDA with expandable segments, as predictions assume and most long runs want,
    unless the user has set the allocator up. A place without a name in PYTHONPATH would be the current folder."""
    variables = dict(os.environ)
    if "PYTHONPATH" in variables:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, variables["PYTHONPATH"].split(os.pathsep)))
    if device == "cuda" and "PYTORCH_ALLOC_CONF" not in variables:
        variables.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return variables


class Sweep(NamedTuple):
    """Outcome of the points asked for. skipped: how many had been measured before; damaged: lines of the file left out."""

    measurements: list[Measurement]
    skipped: int
    damaged: list[str]

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
) -> Sweep:
    """Measure each point that the results file `out` has no answer for, or with `again` all, and append what comes of it. `begins` is
    called once the file is found in order, `tell` with each result as it comes. Raises MeasurementError and OutputError about the file."""
    with appending(out) as append, showing("measuring", len(cases)) as advance:
        begins()
        content = read_results(out)
        final_results = {} if again else results_by_key(content.measurements)
        measurements, skipped = [], 0
        for case in cases:
            if (earlier := final_results.get(key_of(case, environment))) is not None:
                skipped += 1
                measurements.append(earlier)
            else:
                advance(case.words, 0)
                measurements.append(measure_case(case, environment, timeout))
                append(measurements[-1])
            advance("", 1)
            tell(measurements[-1])
    return Sweep(measurements, skipped, content.skipped)


def results_by_key(earlier: Iterable[Measurement]) -> dict[str, Measurement]:
    """Measurements that a rerun need not make again, by key."""
    return {m.key: m for m in earlier if m.outcome in FINAL_OUTCOMES}


def measure_case(case: Case, environment: Mapping[str, Any], timeout: float | None = None) -> Measurement:
    """Measure in a new process. Whatever becomes of that is an outcome: running out of memory, an error, a crash, a kill, or
    too little time (seconds). `environment`: what to record for a process that dies before it can tell."""
    timed_out = threading.Event()
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            WORKER_COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=process_environment(case.device),
        )

        def stop() -> None:
            timed_out.set()
            child.kill()

        timer = threading.Timer(timeout, stop) if timeout is not None else None
        try:
            if timer is not None:
                timer.start()
            line = _converse(child, case)
        finally:  # also Ctrl-C
            if timer is not None:
                timer.cancel()
            child.kill()
            child.wait()
        errors.seek(0)
        error_text = errors.read().decode(errors="replace")
    if line:
        reply = json.loads(line)
    else:
        reply = {
            "outcome": FAILED,
            "error": f"took more than {timeout:g} s"
            if timed_out.is_set()
            else _describe_death(child.returncode, error_text),
            "figures": None,
        }
    ranks = (Figures.from_data(reply["figures"]),) if reply["figures"] is not None else ()
    return Measurement(
        case, reply.get("environment", dict(environment)), reply["outcome"], reply["error"], ranks, utc_now()
    )


def _converse(child: subprocess.Popen[bytes], case: Case) -> bytes:
    """Tell the process its case and read what it writes; nothing when it dies before that. It lives while its input is open."""
    assert child.stdin is not None and child.stdout is not None
    line = b""
    try:
        child.stdin.write((json.dumps(case.as_data()) + "\n").encode())
        child.stdin.flush()
        line = child.stdout.read()
        child.wait(10)
    except (BrokenPipeError, subprocess.TimeoutExpired):
        pass
    finally:
        child.stdout.close()
        with suppress(OSError):  # what it did not read
            child.stdin.close()
    return line


def _describe_death(code: int, error_text: str) -> str:
    """Reason why a process ended without an answer."""
    if code == -signal.SIGKILL:
        return "killed (SIGKILL): by hand, or by the system for want of CPU RAM"
    if code < 0:
        return f"crashed: {signal.Signals(-code).name}. {_last_line(error_text)}".rstrip()
    return f"ended with code {code}. {_last_line(error_text)}".rstrip()


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return one_line(lines[-1], 300) if lines else ""


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
