"""Curves of memory against length: the points themselves, the CSV file, the picture, and what is refused."""

import csv
import io
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mstplan.errors import OutputError
from mstplan.plan import solve
from mstplan.show import plot
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import STRATEGIES, strategy_label
from mstplan.step.steps import Chunks
from mstplan.units import GIB

CHECKOUT = Path(__file__).parents[2]
CASES = {
    "fits": ("llama3.1-8b", "h100", {"optimizer_in_backward": True}),
    "windows": ("gemma3-1b", "rtx-4090", {}),
    "nothing fits": ("llama3.1-70b", "h100", {}),
}


def solved(case):
    name, gpu, changes = CASES[case]
    model, on = load_model(name), card(gpu)
    recipes = {name: recipe.changed(**changes) for name, recipe in STRATEGIES.items()}
    return model, on, [solve.max_seq(model, recipe, on, strategy) for strategy, recipe in recipes.items()]


@pytest.fixture(scope="module", params=CASES)
def drawn(request):
    model, on, found = solved(request.param)
    return model, on, found, plot.curves(found, None, 60)


@pytest.fixture(scope="module")
def fits():
    model, on, found = solved("fits")
    return model, on, found, plot.curves(found, None, 60)


def everything_in(folder):
    return sorted((p.relative_to(folder), p.read_bytes() if p.is_file() else None) for p in folder.rglob("*"))


# ---- the points --------------------------------------------------------------------------------------------------------


def test_every_point_is_the_step_models(drawn):
    model, on, found, curves = drawn
    assert [c.strategy for c in curves] == list(STRATEGIES)
    for answer, curve in zip(found, curves, strict=True):
        assert curve.s_max == answer.s_max
        assert curve.chunks == answer.plan.chunks or answer.s_max == 0
        for point in curve.points:
            peak = solve.plan_at(model, answer.plan.recipe, on, point.seq_len, curve.chunks).peak
            assert (point.instant, point.bytes) == (peak.instant, peak.bytes)


def test_lengths_and_bytes_rise(drawn):
    for curve in drawn[3]:
        for before, after in pairwise(curve.points):
            assert before.seq_len < after.seq_len and before.bytes <= after.bytes


def test_s_max_is_a_point_that_fits_and_the_next_does_not(fits):
    _, on, found, curves = fits
    for curve in curves:
        size = {p.seq_len: p.bytes for p in curve.points}
        assert size[curve.s_max] <= on.budget_bytes and curve.s_max + 1 in size
        assert {a.s_max for a in found} <= set(size)  # comparable with the others


def test_an_instant_changes_between_neighbouring_lengths(drawn):
    lengths = []
    for curve in drawn[3]:
        for before, after in pairwise(curve.points):
            if before.instant != after.instant:
                assert after.seq_len == before.seq_len + 1
                lengths.append(before.seq_len)
    assert lengths


@pytest.mark.parametrize("points", [2, 3, 700])
def test_changes_are_found_however_few_points_are_asked_for(fits, points):
    found = fits[2]
    for coarse, fine in zip(plot.curves(found, None, points), fits[3], strict=True):
        assert coarse.points[0].seq_len == fine.points[0].seq_len == 1024
        assert changes(coarse).keys() == changes(fine).keys()
        for pair, lengths in changes(
            coarse
        ).items():  # as a chunk is rounded up, and a sum's workspace grows by 64 tokens, two instants may take turns
            assert abs(lengths[0] - changes(fine)[pair][0]) <= max(64, 2 * max(coarse.chunks))


def changes(curve):
    found = {}
    for a, b in pairwise(curve.points):
        if a.instant != b.instant:
            found.setdefault(frozenset((a.instant, b.instant)), []).append(a.seq_len)
    return found


def test_reach_of_the_curves(fits):
    model, _, found, curves = fits
    top = max(a.s_max for a in found)
    assert {c.points[-1].seq_len for c in curves} == {top + top // 4}
    assert {c.points[-1].seq_len for c in plot.curves(found[:1], None, 10)} == {
        found[0].s_max * 5 // 4
    }  # its context is far off
    near = [a for a in solved("fits")[2] if a.strategy == "mst"]
    assert top > model.context > near[0].s_max * 1.25
    assert plot.curves(near, None, 10)[0].points[-1].seq_len == model.context
    nothing, _, answers = solved("nothing fits")
    assert {c.points[-1].seq_len for c in plot.curves(answers, None, 10)} == {nothing.context}


@pytest.mark.parametrize("longest", [1, 2, 3, 5, 1000, 1024, 1025, 3000])
def test_short_reaches(fits, longest):
    for curve in plot.curves(fits[2], longest, 50):
        assert 1 <= curve.points[0].seq_len <= min(1024, longest) and curve.points[-1].seq_len == longest


def test_s_max_below_the_usual_start_is_drawn():
    model = load_model("llama3.1-8b")
    most = solve.peak_at(model, STRATEGIES["standard"], card("h100"), 1, Chunks(1, 1))[1]
    small = card(None, most + card("h100").gpu.context_bytes + 200 * 2**20)
    answer = solve.max_seq(model, STRATEGIES["standard"].changed(optimizer_in_backward=True), small, "standard")
    while answer.s_max >= 1024:
        small = card(None, small.total_bytes - GIB)
        answer = solve.max_seq(model, answer.plan.recipe, small, "standard")
    assert 0 < answer.s_max < 1024
    (curve,) = plot.curves([answer], None, 50)
    assert curve.points[0].seq_len <= answer.s_max and answer.s_max in {p.seq_len for p in curve.points}


def test_no_answers_no_curves():
    assert plot.curves([], None, 10) == []


def test_data(fits):
    for curve in fits[3]:
        data = json.loads(json.dumps(curve.as_data()))
        assert list(data) == ["strategy", "s_max", "mlp_chunks", "loss_chunks", "points"]
        assert data["points"][0] == dict(zip(("seq_len", "bytes", "instant"), curve.points[0], strict=True))
        assert (data["mlp_chunks"], data["loss_chunks"]) == curve.chunks[:2]


def test_progress_only_for_many_points_on_a_terminal(fits, monkeypatch, capsys):
    plot.curves(fits[2][:1], None, 2100)
    assert capsys.readouterr() == ("", "")
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    plot.curves(fits[2][:1], None, 50)
    assert shown.getvalue() == ""
    plot.curves(fits[2][:1], None, 2100)
    assert "memory at each length" in shown.getvalue() and capsys.readouterr().out == ""


# ---- CSV ---------------------------------------------------------------------------------------------------------------


def test_csv(drawn, tmp_path):
    model, on, _, curves = drawn
    path = tmp_path / "points.csv"
    plot.write(curves, model, on, path)
    raw = path.read_bytes()
    assert raw.count(b"\r\n") == raw.count(b"\n") == 1 + sum(len(c.points) for c in curves)
    rows = list(csv.DictReader(io.StringIO(raw.decode(), newline="")))
    assert list(rows[0]) == [
        "strategy",
        "seq_len",
        "bytes",
        "gib",
        "instant",
        "budget_bytes",
        "fits",
        "calibrated_from",
    ]
    points = [(c, p) for c in curves for p in c.points]
    for row, (curve, point) in zip(rows, points, strict=True):
        assert row["strategy"] == curve.strategy and row["instant"] == point.instant
        assert (int(row["seq_len"]), int(row["bytes"])) == (point.seq_len, point.bytes)
        assert float(row["gib"]) == pytest.approx(point.bytes / GIB, abs=1e-6)
        assert int(row["budget_bytes"]) == on.budget_bytes
        assert row["fits"] == ("true" if point.seq_len <= curve.s_max else "false")
        assert row["calibrated_from"] == (curve.calibration.source if curve.calibration is not None else "")


# ---- pictures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG\r\n\x1a\n"), ("svg", b"<?xml"), ("pdf", b"%PDF-")])
def test_pictures_are_valid_and_the_same_every_time(fits, tmp_path, suffix, start):
    model, on, _, curves = fits
    files = [tmp_path / f"{n}.{suffix}" for n in "ab"]
    for path in files:
        plot.write(curves, model, on, path)
    first, second = (path.read_bytes() for path in files)
    assert first == second and first.startswith(start) and b"Date" not in first
    if suffix == "svg":
        assert ElementTree.fromstring(first).tag.endswith("svg")
    if suffix == "png":
        assert first[16:24] == (1400).to_bytes(4, "big") + (1200).to_bytes(4, "big") and first.endswith(
            b"IEND\xaeB`\x82"
        )


def texts(curves, model, on):
    """The figure's texts, before they become pixels."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    def drawn(axes, label):  # matplotlib keeps labels for ticks beyond the axis, and does not draw them
        low, high = sorted(axes.get_ylim())
        return label not in axes.get_yticklabels() or low <= label.get_position()[1] <= high

    with matplotlib.rc_context({"font.size": plot.FONT, "text.parse_math": False}):
        figure = Figure(figsize=(plot.WIDTH, plot.HEIGHT), dpi=100)
        FigureCanvasAgg(figure).draw()
        plot._draw(figure, curves, model, on, "title")
        figure.canvas.draw()
        found = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
        found = [t for t in found if all(drawn(axes, t) for axes in figure.axes)]
    return figure, found


@pytest.mark.parametrize("case", CASES)
def test_texts_are_large_enough_inside_and_apart(case):
    model, on, found = solved(case)
    figure, written = texts(plot.curves(found), model, on)
    boxes = []
    for text in written:
        assert text.get_fontsize() >= 8
        box = text.get_window_extent()
        if box.width and box.height:
            boxes.append((text.get_text(), box))
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    for i, (one, a) in enumerate(boxes):
        for other, b in boxes[:i]:
            apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
            assert apart, (one, other)


def test_what_the_picture_says(fits):
    model, on, found, curves = fits
    said = "\n".join(t.get_text() for t in texts(curves, model, on)[1])
    for answer in found:
        assert f"{answer.s_max:,}\n{strategy_label(answer.strategy)}" in said  # both at the strip
    assert f"h100: budget {on.budget_bytes / GIB:.2f} GiB" in said
    assert (
        "AdamW (fused, bf16 states, in backward), batch 1, sdpa" in said
        and "Estimated" in said
        and "mstplan 0." in said
    )
    assert "as recommended at S_max: chunked-loss 1, 8; mst 4, 16; mst-offload 4, 16" in said
    assert all(f"{n}" in said.split("\n") for n in ("1k", "4k", "16k", "64k"))
    binding = {p.instant for c in curves for p in c.points}
    assert binding <= set(said.split("\n"))


def test_what_does_not_fit_is_said():
    model, on, found = solved("nothing fits")
    said = "\n".join(t.get_text() for t in texts(plot.curves(found), model, on)[1])
    assert "No strategy fits. Even 1,024 tokens need" in said and "as recommended at the longest" in said
    model, on, found = solved("fits")
    mixed = [solve.max_seq(model, STRATEGIES["standard"].changed(precision="fp32"), on, "standard"), found[3]]
    assert mixed[0].s_max == 0
    said = " ".join(t.get_text() for t in texts(plot.curves(mixed), model, on)[1])
    assert "Does not fit: no-checkpointing." in said and "Above what is drawn: no-checkpointing." in said
    said = " ".join(t.get_text() for t in texts(plot.curves(found, 16384), model, on)[1])
    assert f"S_max beyond the lengths drawn: checkpointing {found[1].s_max:,}" in said


@pytest.mark.filterwarnings("error")
def test_any_model_name_can_be_drawn(fits, tmp_path):
    model, on, _, curves = fits
    for name in ("m$o$del_{x", "\u6a21\u578b", "x" * 300, "a & b <c>"):
        plot.write(curves, model._replace(name=name), on, tmp_path / "m.svg")
        ElementTree.parse(tmp_path / "m.svg")


@pytest.mark.parametrize("longest", [1, 2, 7, 1500, 2**40])
def test_any_reach_can_be_drawn(fits, tmp_path, longest):
    model, on, found, _ = fits
    plot.write(plot.curves(found, longest, 20), model, on, tmp_path / "m.png")


def test_no_display_no_pyplot_and_own_settings(tmp_path):
    """In a fresh process without a display, under a strange matplotlibrc: the same bytes as here."""
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\naxes.grid: True\nsavefig.bbox: tight\n")
    code = """
import sys
from pathlib import Path
from mstplan.plan import solve
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import STRATEGIES
from mstplan.show import plot
assert "matplotlib" not in sys.modules
model, on = load_model("qwen3-0.6b"), card("rtx-4090")
found = [solve.max_seq(model, STRATEGIES[s], on, s) for s in ("checkpoint", "mst")]
plot.write(plot.curves(found, None, 40), model, on, Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
"""
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND", "MATPLOTLIBRC")
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {"PYTHONPATH": str(CHECKOUT)}
    results = []
    for name, more in (("a.svg", {}), ("b.svg", {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")})):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name)],
            env=env | more,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results.append((tmp_path / name).read_bytes())
    assert results[0] == results[1]


# ---- the file ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x.jpg", "what to write"),
        ("x", "what to write"),
        ("png", "what to write"),
        (".png", "what to write"),
        ("none/x.png", "does not exist"),
        ("file/x.png", "is not a folder"),
        ("folder.png", "is a folder"),
        ("folder", "is a folder"),
        ("old.png", "exists already"),
        ("pipe.svg", "not a regular file"),
        ("n" * 300 + ".png", "cannot write"),
        ("astray.png", "does not exist"),
        ("file/y/x.csv", "does not exist"),
    ],
)
def test_bad_outputs(tmp_path, name, says):
    (tmp_path / "file").write_text("f")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "old.png").write_bytes(b"old")
    os.mkfifo(tmp_path / "pipe.svg")
    (tmp_path / "astray.png").symlink_to(tmp_path / "gone" / "x.png")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=says) as caught:
        plot.check_output(tmp_path / name, False)
    assert len(str(caught.value).splitlines()) <= 2 and "Traceback" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before and (tmp_path / "old.png").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["x" * 100_000 + ".png", "a\nb/x.png", "a\nb.gif", "a\0b.png", "x" * 100_000])
def test_messages_about_odd_names_are_short(tmp_path, name):
    with pytest.raises(OutputError) as caught:
        plot.check_output(tmp_path / name, False)
    assert len(str(caught.value).splitlines()) <= 2 and len(str(caught.value)) < 400 and str(caught.value).isascii()


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="no permission"):
        plot.check_output(tmp_path / "x.png", True)


def test_good_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x.png", "x.SVG", "a b.pdf", "x.y.csv"):
        plot.check_output(Path(name), False)
        plot.check_output(tmp_path / name, False)
    Path("old.png").write_bytes(b"old")
    plot.check_output(Path("old.png"), True)
    assert everything_in(tmp_path) == [(Path("old.png"), b"old")]


@pytest.mark.parametrize("kind", ["png", "svg", "csv"])
@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["draw", "replace"])
def test_nothing_is_left_when_writing_fails(fits, tmp_path, monkeypatch, kind, problem, where):
    from matplotlib.figure import Figure

    model, on, _, curves = fits
    path = tmp_path / f"x.{kind}"
    path.write_bytes(b"before")

    def fail(*_, **__):
        raise problem

    if where == "replace":
        monkeypatch.setattr(os, "replace", fail)
    elif kind == "csv":
        monkeypatch.setattr(plot, "_csv", fail)
    else:
        monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OutputError if isinstance(problem, OSError) else KeyboardInterrupt) as caught:
        plot.write(curves, model, on, path)
    assert everything_in(tmp_path) == [(Path(path.name), b"before")]
    if isinstance(problem, OSError):
        assert "No space left on device" in str(caught.value)


def test_a_link_is_followed_and_permissions_are_the_users(fits, tmp_path):
    model, on, _, curves = fits
    (tmp_path / "there").mkdir()
    (tmp_path / "link.csv").symlink_to(tmp_path / "there" / "real.csv")
    plot.check_output(tmp_path / "link.csv", False)
    plot.write(curves, model, on, tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    (tmp_path / "plain").write_text("")
    real = tmp_path / "there" / "real.csv"
    assert real.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["real.csv"]


def test_a_suffix_nobody_knows_is_refused_when_writing(fits, tmp_path):
    with pytest.raises(OutputError):
        plot.write(fits[3], fits[0], fits[1], tmp_path / "x.gif")
    assert not list(tmp_path.iterdir())
