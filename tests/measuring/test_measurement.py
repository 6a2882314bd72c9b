"""Results files: what is written is read again, whatever else is in the file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan import InputError, MeasurementError, ModelError, OutputError
from mstplan.checking import validate
from mstplan.checking.validate import CALIBRATED, ERROR_BOUNDS, FORMULA
from mstplan.measuring.measurement import (
    FAILED,
    OK,
    SCHEMA_VERSION,
    Figures,
    MeasuredPeak,
    Measurement,
    appending,
    key_of,
    latest_by_key,
    read_all_results,
    read_results,
    slice_config,
)
from mstplan.show import measuring, validating
from mstplan.show.formats import FORMATS
from mstplan.spec.catalog import load_config, model_names
from mstplan.spec.config import read_config
from mstplan.spec.families import FAMILIES

from .measured import CPU, case, measured

BYTES = st.integers(0, 2**50)
PEAKS = st.fixed_dictionaries(
    {
        name: st.builds(MeasuredPeak, st.integers(1, 2**50), st.none() | BYTES, st.none() | BYTES)
        for name in ("loss", "optimizer step")
    }
)
FIGURES = st.builds(
    Figures,
    BYTES,
    PEAKS,
    PEAKS,
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=4).map(tuple),
    st.floats(0, 100),
    st.none() | BYTES,
    st.none() | BYTES,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def write(path: Path, *measurements: Measurement) -> None:
    with appending(path) as append:
        for m in measurements:
            append(m)


@given(
    ranks=st.lists(FIGURES, max_size=3).map(tuple),
    error=st.text(),
    seq_len=st.integers(1, 2**30),
    limit=st.none() | BYTES,
)
def test_what_is_written_is_read(tmp_path_factory, ranks, error, seq_len, limit):
    path = tmp_path_factory.mktemp("results") / "r.jsonl"
    m = Measurement(
        case(seq_len=seq_len, limit=limit), CPU, OK if ranks else FAILED, error, ranks, "2026-11-24T00:00:00+00:00"
    )
    write(path, m)
    assert read_results(path) == ([m], [])


def test_of_a_step(path):
    m = measured(case(batch=2, seq_len=100, accumulation=3), {"loss": 5, "optimizer step": 7})
    assert (m.peak.allocated, m.peak.reserved, m.seconds) == (7, None, 0.5)
    assert m.tokens_per_second == pytest.approx(2 * 3 * 100 / 0.5)
    other = replace(
        m.ranks[0],
        step_seconds=(1.0,),
        phases={"loss": MeasuredPeak(9, 11)},
        instants={"loss": MeasuredPeak(9), "optimizer step": MeasuredPeak(1)},
    )
    both = replace(m, ranks=(m.ranks[0], other))
    assert both.peak == MeasuredPeak(9, 11) and both.seconds == 1.0  # of the rank that holds most, and of the slowest
    assert both.tokens_per_second == pytest.approx(2 * 2 * 3 * 100 / 1.0)
    assert both.instants == {"loss": 9, "optimizer step": 7}


@pytest.mark.parametrize(
    "damage",
    [
        "not json",
        "{}",
        "[]",
        "7",
        "null",
        '{"schema_version": 1}',
        '{"schema_version": 1, "case": []}',
        '"x"',
        "{" * 100_000,
    ],
    ids=lambda damage: damage[:20],
)
def test_a_damaged_line_is_left_out_and_said(path, damage):
    first, last = measured(case(), {"loss": 1}), measured(case(seq_len=7), {"loss": 2})
    write(path, first)
    with path.open("a") as file:
        file.write(damage + "\n\n")
    write(path, last)
    found = read_results(path)
    assert found.measurements == [first, last]
    assert len(found.skipped) == 1 and "line 2" in found.skipped[0]


WRONG = (
    st.none()
    | st.integers(-1, 1)
    | st.sampled_from([1.5, float("nan"), 10**30, "x", "auto", True])
    | st.just([])
    | st.just({})
    | st.just(["a"])
)


def places(data: object, so_far: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield (*so_far, key)
        yield from places(value, (*so_far, key))


@settings(max_examples=300)
@given(draw=st.data())
def test_a_line_with_one_wrong_value_is_left_out_or_serves_whole(tmp_path_factory, draw):
    """Results pass through other tools: whatever they made of a line, nothing that reads it falls over."""
    config = load_config("smollm2-135m")
    instants = {"loss": 2**30, "optimizer step": 2**29}
    one = measured(
        case("mst", model="smollm2-135m", config=config, mlp_chunks=2, loss_chunks=2), instants, context=7, workspace=9
    )
    data = json.loads(json.dumps(one.as_data()))
    *above, last = draw.draw(st.sampled_from(list(places(data))))
    part = data
    for key in above:
        part = part[key]
    if isinstance(part, dict) and draw.draw(st.booleans()):
        del part[last]
    else:
        part[last] = draw.draw(WRONG)
    path = tmp_path_factory.mktemp("results") / "r.jsonl"
    path.write_text(json.dumps(data) + "\n")
    try:
        found = read_results(path)
    except MeasurementError:  # a newer schema
        return
    assert len(found.measurements) + len(found.skipped) == 1
    compared = validate.validate(found.measurements, [FORMULA, CALIBRATED])
    report = validating.report(compared, [], validate.bound_violations(compared, ERROR_BOUNDS))
    assert all(each.render(report) for each in FORMATS.values())
    assert all(measuring.line(m) and m.key for m in found.measurements)


def test_a_line_that_a_kill_cut_off(path):
    first, last = measured(case(), {"loss": 1}), measured(case(seq_len=7), {"loss": 2})
    write(path, first, last)
    path.write_bytes(path.read_bytes()[:-40])
    write(path, last)
    found = read_results(path)
    assert found.measurements == [first, last] and len(found.skipped) == 1


def test_lines_of_a_newer_schema_are_left_out_and_a_file_of_nothing_else_is_refused(path):
    write(path, measured(case(), {"loss": 1}))
    newer = json.dumps({**json.loads(path.read_text()), "schema_version": SCHEMA_VERSION + 1}) + "\n"
    path.write_text(path.read_text() + newer)
    found = read_results(path)
    assert len(found.measurements) == 1 and f"line 2 is of schema {SCHEMA_VERSION + 1}" in found.skipped[0]
    path.write_text(newer)
    with pytest.raises(MeasurementError, match=rf"schema {SCHEMA_VERSION + 1}.*\n.*[Uu]pdate"):
        read_results(path)


def test_one_writer_at_a_time(path):
    write(path, measured(case(), {"loss": 1}))
    before = path.read_bytes()
    program = f"from pathlib import Path\nfrom mstplan.measuring.measurement import appending\nwith appending(Path({str(path)!r})): pass"
    with appending(path):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode and "another mstplan is writing" in done.stderr
    assert path.read_bytes() == before
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_file_that_nothing_came_of_goes(path):
    with appending(path):
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("name", ["", "missing/results.jsonl"])
def test_no_file_to_write(tmp_path, name):
    with pytest.raises(OutputError), appending(tmp_path / name):
        pass


def test_no_file_to_read(tmp_path):
    with pytest.raises(InputError, match="no file"):
        read_results(tmp_path / "none.jsonl")


def test_files_together(tmp_path):
    old, new, other = (
        measured(case(), {"loss": 1}),
        measured(case(), {"loss": 2}),
        measured(case(seq_len=9), {"loss": 3}),
    )
    write(tmp_path / "a", old, other)
    write(tmp_path / "b", new)
    assert read_all_results([tmp_path / "a", tmp_path / "b"]).measurements == [new, other]
    assert latest_by_key([old, new]) == [new]


def test_what_makes_a_point_the_same():
    one = case()
    same = replace(one, model="other name", strategy="custom", steps=9)
    assert key_of(one, CPU) == key_of(same, {**CPU, "driver": "another", "python": "3.12"})
    for other in (
        case(seq_len=513),
        case(batch=2),
        case("standard"),
        replace(one, limit=1),
        replace(one, device="cuda"),
        replace(one, layers=2),
    ):
        assert key_of(other, CPU) != key_of(one, CPU)
    for changed in ({"torch": "2.14"}, {"card": "other"}, {"allocator": "expandable_segments:True"}):
        assert key_of(one, {**CPU, **changed}) != key_of(one, CPU)


def _first_full(model):
    """Layers up to the first without a window."""
    return 1 + [kind.window for kind in model.layer_kinds].index(None)


@pytest.mark.parametrize("name", model_names())
def test_the_first_layers_of_a_model(name):
    config = load_config(name)
    whole = read_config(config, name)
    count = _first_full(whole) if FAMILIES[whole.model_type].full_last else 2
    first = read_config(slice_config(config, count, name), name)
    experts = (
        whole.experts if any(kind.experts for kind in first.layer_kinds) else None
    )  # deepseek-v3 begins with dense layers
    assert first == whole._replace(layer_kinds=whole.layer_kinds[:count], experts=experts)
    for layers in (0, whole.layers + 1):
        with pytest.raises(ModelError, match=f"has {whole.layers} layers"):
            slice_config(config, layers, name)


def test_what_failed_has_no_figures():
    m = Measurement(case(), CPU, FAILED, "killed")
    assert Measurement.from_data(json.loads(json.dumps(m.as_data()))) == m
