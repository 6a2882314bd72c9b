"""Every causal-LM class of transformers, small: is a training step of it traced, and is the trace right?

    python -m tests.tracing.survey [part of a class name ...]

Each class is traced without checkpoints, with every layer checkpointed, and in chunks. Traced means: few layers and few
chunks on fake tensors give the peaks of all of them, instant by instant; so does a step of all of them on tensors that have
values, by which the model's code decides; and each peak is the sum of what is alive then.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from mstplan.errors import InputError
from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing import cuda_stand_ins
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import OWN_FAILURE, record_passes, trace_settings, whole_model
from mstplan.train.locate import find_parts
from mstplan.train.step import TrainingStep, build_model
from tests.train.survey import causal_lm_classes, one_line
from tests.train.tiny import WIDTH, tiny_config

MOST_LAYERS = 12  # some count layers in another way
MORE_LAYERS = 4  # than tiny configs have, of the first one's kind: so many that one repeats
PLAIN, CHECKPOINT = strategy("standard"), strategy("checkpoint")
CHUNKS = strategy("mst", mlp_chunks=4, loss_chunks=6)  # more than a trace runs
OUTCOMES = ("traced", "refused", "wrong", "crash", "unbuildable")


class Finding(NamedTuple):
    outcome: str
    reason: str = ""  # in one line, where it is not "traced"
    units: tuple[int, int] = (0, 0)  # layers run, and layers


class Record(NamedTuple):
    """What the survey found of one class. precision: in which it can make a step. checkpoint, chunks: "traced", "loss alone",
    "" (not tried), or refused by name."""

    name: str
    outcome: str
    reason: str = ""
    precision: str = ""
    checkpoint: str = ""
    chunks: str = ""
    units: tuple[int, int] = (0, 0)
    seconds: float = 0.0


def survey(only: Sequence[str] = (), every: int = 1) -> Iterator[Record]:
    """One record a class; `only` those with one of these strings in their name. `every` so many classes one is traced with
    checkpoints and in chunks, too."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    classes = [
        cls for cls in causal_lm_classes() if not only or any(part.lower() in cls.__name__.lower() for part in only)
    ]
    for n, cls in enumerate(classes):
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record = examine(cls, n % every == 0)
        yield record._replace(seconds=time.process_time() - start)
    logging.set_verbosity(verbosity)


def examine(cls: type[PreTrainedModel], thoroughly: bool = True) -> Record:
    """The class through the recipes. Checkpoints and chunks may be refused by name, and the class is traced still."""
    name = cls.__name__
    try:
        settings = settings_of(cls)
    except Exception as problem:  # noqa: BLE001 - whatever a class raises is its finding
        return Record(name, "unbuildable", one_line(problem))
    tokens = 12 if settings.model_type == "reformer" else 13  # Reformer takes whole attention chunks only
    plain = compare(settings, PLAIN, tokens)
    precision: Any = "fp32" if OWN_FAILURE in plain.reason and plain.outcome == "refused" else "bf16"
    if precision == "fp32":  # the code of some does not run in bf16
        plain = compare(settings, PLAIN.changed(precision=precision), tokens)
    record = Record(name, plain.outcome, plain.reason, precision, units=plain.units)
    if plain.outcome != "traced" or not thoroughly:
        return record
    checkpoint = compare(settings, CHECKPOINT.changed(precision=precision), tokens)
    recipe = CHUNKS.changed(precision=precision, checkpoint="layer" if checkpoint.outcome == "traced" else "none")
    chunks = compare(settings, recipe, tokens)
    alone = compare(settings, recipe.changed(mlp_chunks=1), tokens) if chunks.outcome == "refused" else chunks
    for found in (checkpoint, chunks, alone):
        if found.outcome not in ("traced", "refused"):
            return record._replace(outcome=found.outcome, reason=found.reason)
    how = chunks.outcome if chunks is alone else "loss alone" if alone.outcome == "traced" else alone.reason
    return record._replace(checkpoint=checkpoint.reason or "traced", chunks=how)


# ---- small models -----------------------------------------------------------------------------------------------------


def settings_of(cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """A configuration that AutoModelForCausalLM makes a small model of the class of, with several layers alike where it can."""
    entries = {kind: entry for kind in MODEL_FOR_CAUSAL_LM_MAPPING for entry in [MODEL_FOR_CAUSAL_LM_MAPPING[kind]]}
    config_classes = [
        kind for kind, entry in entries.items() if cls in (entry if isinstance(entry, tuple) else (entry,))
    ]
    config_cls = cls.config_class if cls.config_class in config_classes else config_classes[0]
    for make in (deep_config, partial(deep_config, per_layer=str)):
        try:
            settings = make(config_cls)
            if len(find_parts(build_model(settings, PLAIN, "eager", "meta")).layers) <= MOST_LAYERS:
                return settings
        except Exception:  # noqa: BLE001, PERF203 - layers that cannot be more
            continue
    return widened(tiny_config(config_cls))


def deep_config(config_cls: type[PreTrainedConfig], per_layer: type = object) -> PreTrainedConfig:
    """`tiny_config` with more layers: the first one's kind comes first several times. per_layer: what lists for layers hold."""
    small = tiny_config(config_cls)
    for name in small.sub_configs:
        if getattr(small, name) is small.get_text_config(decoder=True):
            return widened(tiny_config(config_cls, **{name: deep_config(type(getattr(small, name)))}))
    count = getattr(small, "num_hidden_layers", None)
    declared = {field.name for field in fields(config_cls)}
    more: dict[str, Any] = {}
    for name, value in vars(small).items():
        if (
            isinstance(value, int)
            and re.fullmatch(r"num_(hidden_)?layers|n_layers?|(num_)?decoder_layers|num_blocks", name)
            and name in declared
        ):
            more[name] = value + MORE_LAYERS
        elif isinstance(value, list) and len(value) == count and name in declared and isinstance(value[0], per_layer):
            more[name] = value[:1] * MORE_LAYERS + value
    if "attention_types" in declared:  # GPT-Neo's: kinds, and how often they follow each other
        more["attention_types"] = [[["global", "local"], 1 + MORE_LAYERS // 2]]
    return widened(tiny_config(config_cls, **more))


def widened(settings: PreTrainedConfig) -> PreTrainedConfig:
    """MLPs a multiple of 16 bytes wide, as grouped matrix products want it."""
    for name, value in list(vars(settings).items()):
        if isinstance(value, PreTrainedConfig):
            widened(value)
        elif isinstance(value, list) and WIDTH in value:
            setattr(settings, name, [_wide(v) for v in value])
        elif isinstance(value, int) and _wide(value) != value:
            setattr(settings, name, _wide(value))
    return settings


def _wide(value: Any) -> Any:
    return value // WIDTH * (WIDTH + 4) if value in (WIDTH, 2 * WIDTH) else value


# ---- traces -----------------------------------------------------------------------------------------------------------


def compare(settings: PreTrainedConfig, recipe: Recipe, tokens: int) -> Finding:
    """The trace of few layers and few chunks against that of all of them, and against a step on tensors that have values."""
    try:
        short = trace_settings(settings, recipe, tokens)
        units = (len(short.kept), short.units)
        if recipe.loss != "chunked":
            problem = difference(short, for_real(settings, recipe, short))
        else:  # sums of products, as a card makes them, have no kernel on the CPU
            problem = difference(short, trace_settings(settings, recipe, tokens, whole=True))
            there = trace_settings(settings, recipe, tokens, on="cpu")
            problem = problem or difference(there, for_real(settings, recipe, there))
    except InputError as e:
        if OWN_FAILURE in str(e) and runs(settings, recipe, tokens):
            return Finding("crash", f"{one_line(e)} (it does, for real)")
        return Finding("refused", one_line(e))
    except Exception as e:  # noqa: BLE001 - the tracer's
        return Finding("crash", one_line(e))
    return Finding("wrong", problem, units) if problem else Finding("traced", "", units)


def for_real(settings: PreTrainedConfig, recipe: Recipe, short: Trace) -> Trace:
    """`short` with a step of all layers and chunks in it, made on tensors that have values."""
    attention = whole_model(settings, recipe, short.on, remote_code=False).config._attn_implementation
    model = build_model(settings, recipe, attention, "cpu")
    with patch.object(cuda_stand_ins, "on_fake_tensors", nullcontext):
        recording = record_passes(model, recipe, short.seq_len, list(range(short.units)), short.on)
    return replace(short, kept=tuple(range(short.units)), short=recording)


def difference(found: Trace, wanted: Trace) -> str:
    """What differs between two traces of one step, or in what one of them says itself; '' if nothing."""
    here, there = found.peaks, wanted.peaks
    if [p.instant for p in here] != [p.instant for p in there]:
        return f"instants {', '.join(p.instant for p in here)}, not {', '.join(p.instant for p in there)}"
    for one, other in zip(here, there, strict=True):
        if one.bytes != other.bytes:
            return f"{one.instant}: {one.bytes} bytes, not {other.bytes}"
        if (total := sum(alive.bytes for alive in found.alive(one.event))) != one.bytes:
            return f"{one.instant}: {one.bytes} bytes, of which {total} are alive"
    return ""


def runs(settings: PreTrainedConfig, recipe: Recipe, tokens: int) -> bool:
    """Does the step run on the CPU?"""
    try:
        TrainingStep(build_model(settings, recipe, "eager", "cpu"), recipe, tokens).run()
    except Exception:  # noqa: BLE001 - the class's own failure
        return False
    return True


# ---- shown ------------------------------------------------------------------------------------------------------------


def main(only: Sequence[str]) -> None:
    torch.set_num_threads(1)
    start = time.process_time()
    records = []
    for found in survey(only):
        records.append(found)
        if found.outcome != "traced" or found.units[0] == found.units[1] or only:
            print(line(found), flush=True)
    print(
        f"transformers {transformers.__version__}: {len(records)} classes in {time.process_time() - start:.0f} s of the CPU"
    )
    counts = Counter(record.outcome for record in records)
    for outcome in OUTCOMES:
        print(f"  {outcome:12} {counts[outcome]:4} {counts[outcome] / max(len(records), 1):7.1%}")
    traced = [record for record in records if record.outcome == "traced"]
    print("  in fp32", ", ".join(record.name for record in traced if record.precision == "fp32"))
    print("  checkpoints", sum(record.checkpoint == "traced" for record in traced))
    print("  chunks", {how: sum(r.chunks == how for r in traced) for how in ("traced", "loss alone")})
    print("  from few layers", sum(record.units[0] < record.units[1] for record in traced))


def line(record: Record) -> str:
    """What is to be said of a class, in one line."""
    of = f" {record.units[0]} of {record.units[1]} layers, {record.precision}" if record.outcome == "traced" else ""
    more = "".join(
        f" | {what}: {how}"
        for what, how in (("checkpoint", record.checkpoint), ("chunks", record.chunks))
        if how not in ("", "traced")
    )
    return f"{record.outcome} | {record.name} |{of} {record.reason}{more} | {record.seconds:.1f} s"


if __name__ == "__main__":
    main(sys.argv[1:])
