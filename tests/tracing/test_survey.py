"""Every causal-LM class of transformers is traced rightly or refused by name; README gives the count."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from mstplan.tracing.trace import Trace
from tests.train.survey import causal_lm_classes

from .survey import PLAIN, Record, difference, for_real, line, settings_of, survey, trace_settings

README = Path(__file__).parents[2] / "README.md"
CLAIM = "Of transformers X's N causal-LM classes, N are traced, N are refused by name"
SHARE = 0.9  # of all classes must be traced
EVERY = 60  # so many classes one goes through checkpoints and chunks as well

pytestmark = [pytest.mark.slow, pytest.mark.survey]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(survey(every=EVERY))


def test_no_trace_is_wrong(records):
    assert not [line(record) for record in records if record.outcome in ("wrong", "crash", "unbuildable")]


def test_nearly_all_classes_are_traced(records):
    others = [line(record) for record in records if record.outcome != "traced"]
    assert len(others) <= (1 - SHARE) * len(records), "\n".join(others)


def test_most_are_traced_from_few_layers(records):
    """Or the survey would compare whole steps with themselves."""
    traced = [record for record in records if record.outcome == "traced"]
    assert sum(record.units[0] < record.units[1] for record in traced) > len(traced) / 2


def test_refusals_name_the_class_or_say_what_to_set(records):
    said = [
        (r, text)
        for r in records
        for text in (r.reason, r.checkpoint, r.chunks)
        if text not in ("", "traced", "loss alone")
    ]
    assert any(record.reason for record in records)
    named = re.compile(r"transformers cannot build \w+ ")  # by its model type: there is no class yet
    assert not [line(r) for r, text in said if r.name not in text and "Set " not in text and not named.match(text)]


def test_a_sample_is_traced_in_chunks(records):
    tried = [record for record in records if record.checkpoint]
    assert len(tried) > len(records) / EVERY / 2
    assert sum(record.chunks == "traced" for record in tried) > SHARE * len(tried) - 1, [
        line(record) for record in tried
    ]


def test_the_comparison_notices():
    """A tensor of another size, one that lives on, and an instant that is not there."""
    settings = settings_of(next(cls for cls in causal_lm_classes() if cls.__name__ == "LlamaForCausalLM"))
    short = trace_settings(settings, PLAIN, 13)
    real = for_real(settings, PLAIN, short)
    assert short.units > len(short.kept) and difference(short, real) == ""
    assert "bytes, not" in difference(_with_larger_logits(short), real)
    assert "bytes, not" in difference(replace(short, short=short.short.without(_largest(short))), real)
    assert "are alive" in difference(_miscounted(short), _miscounted(real))


def _largest(trace: Trace) -> set[int]:
    return {max(range(len(trace.short.storages)), key=lambda i: trace.short.storages[i].bytes)}


def _with_larger_logits(trace: Trace) -> Trace:
    storages = [replace(m, bytes=m.bytes + 512) if m.shape[-1:] == (61,) else m for m in trace.short.storages]
    return replace(trace, short=replace(trace.short, storages=storages))


def _miscounted(trace: Trace) -> Trace:
    wrong = replace(trace)
    wrong.__dict__["live"] = [total + 512 for total in trace.live]
    return wrong


def test_readme_gives_the_count(records):
    pattern = r"\s+".join(re.escape(word) for word in CLAIM.split()).replace("X's", r"(\S+)'s").replace("N", r"(\d+)")
    claim = re.search(pattern, README.read_text(encoding="utf-8"))
    assert claim is not None, "README does not give the count"
    if not transformers.__version__.startswith(claim[1] + "."):
        pytest.skip(f"README gives the count of transformers {claim[1]}, here is {transformers.__version__}")
    outcomes = Counter(record.outcome for record in records)
    assert [int(n) for n in claim.groups()[1:]] == [len(records), outcomes["traced"], outcomes["refused"]]
