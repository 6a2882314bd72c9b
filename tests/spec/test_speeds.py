"""Measured rates: files as they are read, against the measurements that they come from."""

from __future__ import annotations

import gzip
import json
from math import log2
from pathlib import Path
from typing import Any

import pytest

from mstplan.profiles import ROOT
from mstplan.spec.hardware import find_gpu, gpus
from mstplan.spec.speeds import Curve, speeds_of

DATA = Path(__file__).parents[1] / "data"
FILES = sorted((ROOT / "speeds").glob("*.json"))
H100, H200 = speeds_of(find_gpu("h100")), speeds_of(find_gpu("h200"))
assert H100 is not None and H200 is not None


def timing(part: str) -> list[dict[str, Any]]:
    """Rows of what was measured."""
    lines = (DATA / "h100-2026-11-27" / "timing.jsonl").read_text().splitlines()
    return next(row["rows"] for row in map(json.loads, lines) if row["case"]["part"] == part)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_what_was_measured(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["schema"] == 1 and document["gpu"] == find_gpu(path.stem).name and document["source"].strip()
    if "like" in document:
        assert "like" not in json.loads((path.parent / f"{document['like']}.json").read_text())
        return
    assert document["device"] and document["date"] and document["versions"]["torch"] and document["method"]
    sections = [document["products"], document["memory"], document["host"], *document["attention"]]
    for section in sections:
        assert section["points"] and all(len(row) == len(section["columns"]) for row in section["points"])
    for section in document["attention"]:
        assert find_gpu(section["gpu"]) and section["source"].strip()
        assert all(both > (forward or 0) > -1 for *_, forward, both in section["points"])


def test_the_points_are_those_that_were_measured() -> None:
    """Medians, to five digits; each source that a file names is there."""
    document = json.loads((ROOT / "speeds" / "h100.json").read_text())
    products = [
        [
            row["m"],
            row["k"],
            row["n"],
            *(pytest.approx(row[which][1], rel=1e-4) for which in ("forward", "dinput", "dweight")),
        ]
        for row in timing("products")
    ]
    assert document["products"]["points"] == products
    attention = [
        [*(row[size] for size in "bHGse"), *(pytest.approx(row[which][1], rel=1e-4) for which in ("forward", "both"))]
        for row in timing("attention")
    ]
    assert document["attention"][0]["points"] == attention
    seconds = {row["s"][1] for part in ("memory", "host") for row in timing(part) if isinstance(row.get("s"), list)}
    for what, _, measured in (*document["memory"]["points"], *document["host"]["points"]):
        assert any(measured == pytest.approx(each, rel=1e-4) for each in seconds), what


def test_gpus_that_nobody_measured_have_no_rates() -> None:
    names = {path.stem for path in FILES}
    assert {gpu.name for gpu in gpus() if speeds_of(gpu) is not None} == names == {"h100", "h200"}


def test_no_rate_is_above_the_nominal_one() -> None:
    for gpu in map(find_gpu, ("h100", "h200")):
        speeds = speeds_of(gpu)
        assert speeds is not None
        assert 0.5 * gpu.memory_bandwidth < speeds.memory < gpu.memory_bandwidth
        assert 0.5 * gpu.host_link < speeds.host < gpu.host_link
        curves = [speeds.products, *(c for sizes in speeds.attention.values() for pair in sizes.values() for c in pair)]
        assert all(rate < gpu.bf16_flops for curve in curves for _, rate in curve.points)
        assert max(rate for _, rate in speeds.products.points) > 0.7 * gpu.bf16_flops


def test_a_curve_goes_through_what_was_measured() -> None:
    curve = Curve.from_measurements([(1000, 10.0), (1000, 10.0), (4000, 20.0)])
    assert [round(2**size) for size, _ in curve.points] == [1000, 4000] and [rate for _, rate in curve.points] == [
        100,
        200,
    ]
    assert curve.seconds(0) == 0 and curve.seconds(10) == 0.1 and curve.seconds(8000) == 40
    assert curve.seconds(2000) == pytest.approx(2000 / 150)  # half way in the logarithm
    assert Curve.from_measurements([(1000, 10.0)], 2).seconds(500) == 2.5
    assert Curve(((log2(64), 8.0),)).seconds(64) == 8


def test_heads_are_padded_to_a_measured_size() -> None:
    sizes = {size: H100.attention_of("cudnn", size) for size in (64, 80, 96, 128, 192, 256)}
    assert {size: found and found[0] for size, found in sizes.items()} == {
        64: 64,
        80: 128,
        96: 128,
        128: 128,
        192: 256,
        256: 256,
    }
    assert H100.attention_of("cudnn", 512) is None and H100.attention_of("efficient", 64) is None


CALLS = [
    row
    for row in json.loads(gzip.decompress((DATA / "h200-2026-11-26" / "attention.json.gz").read_bytes()))
    if "seconds" in row
    and row["kernel"] == "auto"
    and (row["dtype"], row["mask"], row["drop"], row["layout"]) == ("bfloat16", None, 0.0, "bshd")
    and row["e"] == row["ev"]
    and 8000 < row["s"] < 100_000
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: "-".join(str(call[size]) for size in "bHGse"))
def test_attention_takes_as_long_on_an_h200(call: dict[str, Any]) -> None:
    """cuDNN's attention from 8,191 tokens on, measured there and not in the file; heads of other sizes are padded."""
    found = H200.attention_of("cudnn", call["e"])
    assert found is not None
    size, (forward, backward) = found
    work = call["b"] * call["H"] * call["s"] ** 2 * size * 2
    assert forward.seconds(work) + backward.seconds(2.5 * work) == pytest.approx(call["seconds"], rel=0.15)
