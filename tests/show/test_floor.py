"""What lies below the curves: bands of the step model's tensors, no higher than any curve, labelled where there is room."""

import pytest

from mstplan.plan import solve
from mstplan.show import floor, plot
from mstplan.show.floor import Band
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import STRATEGIES
from mstplan.units import GIB

from .test_plot import texts

CASES = {
    "adamw": (
        "llama3.1-8b",
        "h100",
        {},
        ["weights", "optimizer states", "gradients", "AdamW's temporary"],
    ),
    "adafactor": (
        "qwen3-4b",
        "rtx-4090",
        {"optimizer": "adafactor"},
        ["weights", "gradients", "Adafactor's temporary"],
    ),
    "in backward": ("llama3.1-8b", "h100", {"optimizer_in_backward": True}, ["weights", "optimizer states"]),
    "sgd": ("llama3.1-8b", "h100", {"optimizer": "sgd"}, ["weights", "gradients"]),
    "fused": ("gpt2", "rtx-4090", {"adamw_kernel": "fused"}, ["weights", "optimizer states", "gradients"]),
}


def drawn(case):
    name, gpu, changes, _ = CASES[case]
    model, on = load_model(name), card(gpu)
    found = [
        solve.max_seq(model, recipe.changed(**{"adamw_kernel": "foreach", **changes}), on, each)
        for each, recipe in STRATEGIES.items()
    ]
    return model, on, plot.curves(found, None, 20)


@pytest.mark.parametrize("case", CASES)
def test_bands_lie_below_every_curve(case):
    model, on, curves = drawn(case)
    found = floor.bands(curves, model, on)
    names = [band.name for band in found]
    expected = CASES[case][3]
    assert [name for name in names if name in expected] == expected
    assert all("workspaces" in name for name in names if name not in expected)  # of a small model they are seen
    assert sum(band.bytes for band in found) <= min(point.bytes for curve in curves for point in curve.points)


def test_bytes_are_the_step_models():
    model, on, curves = drawn("adamw")
    found = {band.name: band.bytes for band in floor.bands(curves, model, on)}
    first = curves[0]
    plan = solve.plan_at(model, first.recipe, on, first.points[0].seq_len, first.chunks)
    entries = {entry.name: entry.bytes for entry in plan.binding_entries()}
    assert found["weights"] == entries["weights"] and found["gradients"] == entries["gradients"]
    assert found["optimizer states"] == entries["AdamW first moment"] + entries["AdamW second moment"]
    assert found["AdamW's temporary"] == entries["square root of the second moment"]


def test_only_what_all_have_in_common():
    model, on, curves = drawn("adamw")
    away = STRATEGIES["mst"].changed(adamw_kernel="foreach", optimizer_on_host=True)
    host = plot.curves([solve.max_seq(model, away, on, "mst")], None, 20)
    assert [band.name for band in floor.bands([curves[0], *host], model, on)] == ["weights", "gradients"]
    gathered = away.changed(weights_on_host=True)
    nothing = plot.curves([solve.max_seq(model, gathered, on, "mst")], None, 20)
    assert not {"weights", "gradients"} & {band.name for band in floor.bands([curves[0], *nothing], model, on)}


def test_thin_bands_are_joined():
    one, two, three = Band("one", 5), Band("two", 1), Band("three", 7)
    assert floor.merged([one, two, three], 3) == [Band("one, two", 6), three]
    assert floor.merged([two, one, three], 3) == [Band("two, one", 6), three]
    assert floor.merged([one, two, three], 100) == [Band("one, two, three", 13)]
    assert floor.merged([one, two, three], 0) == [one, two, three] and floor.merged([], 3) == []
    assert Band("weights", 3 * GIB).label == "weights 3.00 GiB"


@pytest.mark.parametrize("case", ["adamw", "adafactor", "in backward"])
def test_bands_are_labelled_inside(case):
    model, on, curves = drawn(case)
    figure, written = texts(curves, model, on)
    memory = figure.axes[1]
    low = 0.0
    for band in floor.bands(curves, model, on):
        (label,) = (text for text in written if text.get_text() == band.label)
        box = label.get_window_extent()
        bottom, top = (memory.transData.transform((2048, y))[1] for y in (low, low + band.bytes / GIB))
        assert bottom <= box.y0 and box.y1 <= top, band
        low += band.bytes / GIB


def test_what_has_no_room_for_a_label_is_not_shaded():
    model, on, curves = drawn("fused")  # 0.9 of 23 GiB
    said = "\n".join(text.get_text() for text in texts(curves, model, on)[1])
    assert floor.bands(curves, model, on) and "weights, optimizer states" not in said
