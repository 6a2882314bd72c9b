"""Traces are kept by what they depend on, read without torch, and made anew when damaged."""

from __future__ import annotations

import gzip
import json
import os
import stat
import subprocess
import sys
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import pytest

from mstplan.errors import MissingError
from mstplan.step.recipe import strategy
from mstplan.tracing import cache, tracer
from mstplan.tracing.simulation import all_events, frame_names, simulate
from mstplan.tracing.snapshot import snapshot
from mstplan.tracing.trace import Trace

from ..damage import damages
from .tiny import TINY

CHECKPOINT = strategy("checkpoint")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MSTPLAN_HOME", str(tmp_path))
    return tmp_path / "traces"


@pytest.fixture
def made(monkeypatch):
    """Counts the traces that are made."""
    times = []
    real = tracer.trace

    def counted(*args, **kwargs):
        times.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(tracer, "trace", counted)
    return times


def test_a_trace_is_made_once(made):
    first, second = (cache.trace_of(TINY, CHECKPOINT, 512, workspace=1024) for _ in range(2))
    assert len(made) == 1
    assert first == second and first.live == second.live and first.workspace == 1024


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"num_hidden_layers": 7}])
def test_another_model_is_another_trace(made, change):
    cache.trace_of(TINY, CHECKPOINT, 512)
    cache.trace_of({**TINY, **change}, CHECKPOINT, 512)
    cache.trace_of(TINY, CHECKPOINT.changed(batch=2), 512)
    cache.trace_of(TINY, CHECKPOINT, 513)
    assert len(made) == 4


def test_other_versions_are_another_trace(made, monkeypatch):
    cache.trace_of(TINY, CHECKPOINT, 512)
    monkeypatch.setattr(cache.metadata, "version", lambda name: "99")
    cache.trace_of(TINY, CHECKPOINT, 512)
    assert len(made) == 2


@pytest.mark.parametrize("damage", [b"", b"not gzip", b"\x1f\x8b\x08\x00"])
def test_a_damaged_file_is_made_anew(made, own_folder, damage):
    kept = cache.trace_of(TINY, CHECKPOINT, 512)
    (file,) = own_folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert cache.trace_of(TINY, CHECKPOINT, 512) == kept
    assert len(made) == 2 and file.read_bytes() == whole


def test_half_a_file_is_made_anew(made, own_folder):
    cache.trace_of(TINY, CHECKPOINT, 512)
    (file,) = own_folder.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    cache.trace_of(TINY, CHECKPOINT, 512)
    assert len(made) == 2


def _kept(path: Path, text: bytes, digest: bytes | None = None) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(gzip.compress((digest or cache._digest_of_file(path, text)) + b"\n" + text))


def test_another_text_is_made_anew(made, own_folder):
    """Also one that could be a trace: of other bytes, or of another step."""
    kept, other = cache.trace_of(TINY, CHECKPOINT, 512), cache.trace_of(TINY, CHECKPOINT, 1024)
    file, others = sorted(own_folder.iterdir(), key=lambda path: cache._read_trace(path) == other)
    whole, digest = file.read_bytes(), gzip.decompress(file.read_bytes()).split(b"\n")[0]
    for damage in (lambda text: text.replace(b"512", b"513", 1), lambda text: text + b" ", lambda text: text[:-1]):
        _kept(file, damage(gzip.decompress(whole).split(b"\n")[1]), digest)
        assert cache.trace_of(TINY, CHECKPOINT, 512) == kept and file.read_bytes() == whole
    file.write_bytes(others.read_bytes())
    assert cache.trace_of(TINY, CHECKPOINT, 512) == kept and file.read_bytes() == whole
    assert len(made) == 6


def _use(trace: Trace) -> None:
    """All that commands read off a trace."""
    assert trace.peak.bytes >= 0 and trace.requested and trace.host_peak >= 0 and trace.alive(trace.peak.event)
    simulate(trace, expandable=True, limit=2**40)
    snapshot(all_events(trace), lambda key: frame_names(trace, key), expandable=True)
    json.dumps([trace.as_data(), [a._asdict() for a in trace.alive(trace.peak.event)]], allow_nan=False)


def test_what_is_read_can_be_used(own_folder):
    """Damage at every place, signed as if it was written so: no trace, or one that nothing fails on."""
    path = own_folder / "some.json.gz"
    own_folder.mkdir()
    document = json.loads(json.dumps(tracer.trace(TINY, CHECKPOINT, 512).as_data()))
    seen = {True: 0, False: 0}
    _kept(path, json.dumps(document).encode())
    _use(cache._read_trace(path))
    for what, text in damages(document, seed=3, per_place=3):
        _kept(path, text.encode())
        found = cache._read_trace(path)
        seen[found is None] += 1
        try:
            if found is not None:
                _use(found)
        except Exception as e:
            raise AssertionError(what) from e
    assert seen[True] > 150 and seen[False] > 5, seen


EVENTS = (
    [],
    [[0, 1]] * 2,
    [[0, -1]],
    [[0, 1], [0, -1], [0, -1]],
    [[99999, 1]],
    [[-1, 1]],
    [[0, 2]],
    [[0, 1, 1]],
    [[0]],
)


@pytest.mark.parametrize("events", EVENTS, ids=str)
@pytest.mark.parametrize("part", ["short", "update"])
def test_events_that_contradict_themselves(own_folder, events, part):
    path = own_folder / "some.json.gz"
    own_folder.mkdir()
    recipe = CHECKPOINT.changed(adamw_kernel="foreach")  # its step has events
    document = json.loads(json.dumps(tracer.trace(TINY, recipe, 512).as_data()))
    document[part]["events"][: len(events) or None] = events
    _kept(path, json.dumps(document).encode())
    assert cache._read_trace(path) is None


def test_no_pipe_and_no_bomb(made, own_folder, tmp_path):
    """What is no file is neither read nor replaced, above all no device behind a link. A bomb is a file."""
    kept = cache.trace_of(TINY, CHECKPOINT, 512)
    (file,) = own_folder.iterdir()
    whole, device = file.read_bytes(), tmp_path / "device"
    os.mkfifo(device)
    for make in (
        lambda: os.mkfifo(file),
        lambda: file.symlink_to(device),
        lambda: file.write_bytes(gzip.compress(bytes(10**7))),
    ):
        file.unlink()
        make()
        assert cache._read_trace(file) is None
        pipes = [stat.S_ISFIFO(os.stat(path).st_mode) for path in (file, device)]
        assert cache.trace_of(TINY, CHECKPOINT, 512) == kept
        assert pipes == [stat.S_ISFIFO(os.stat(path).st_mode) for path in (file, device)]
    assert file.read_bytes() == whole


def test_a_user_without_a_home(made, monkeypatch):
    for name in ("MSTPLAN_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", _no_home)
    for _ in range(2):
        cache.trace_of(TINY, CHECKPOINT, 512)
    assert len(made) == 2


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_folder_that_cannot_be_written_is_no_cache(tmp_path, monkeypatch, made):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MSTPLAN_HOME", str(tmp_path / "file"))
    for _ in range(2):
        cache.trace_of(TINY, CHECKPOINT, 512)
    assert len(made) == 2


def _write(folder: str, times: int) -> None:
    import os

    os.environ["MSTPLAN_HOME"] = folder
    trace = tracer.trace(TINY, CHECKPOINT, 512)
    for _ in range(times):
        cache._write_trace(cache.folder() / "same.json.gz", trace)


def test_two_processes_may_write_the_same(tmp_path):
    context = get_context("spawn")
    writers = [context.Process(target=_write, args=(str(tmp_path), 30)) for _ in range(2)]
    for writer in writers:
        writer.start()
    path, seen = tmp_path / "traces" / "same.json.gz", 0
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert cache._read_trace(path) is not None
            seen += 1
    assert seen and [writer.exitcode for writer in writers] == [0, 0]
    assert [file.name for file in path.parent.iterdir()] == ["same.json.gz"]


def test_reading_takes_no_torch(tmp_path):
    cache.trace_of(TINY, CHECKPOINT, 512)
    code = (
        "import json, sys\nfrom mstplan.tracing import cache\nfrom mstplan.step.recipe import strategy\n"
        f"trace = cache.trace_of({TINY!r}, strategy('checkpoint'), 512)\n"
        "print(trace.peak.bytes, 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert said == [str(cache.trace_of(TINY, CHECKPOINT, 512).peak.bytes), "False"]


def test_no_torch_is_one_line(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cache.metadata, "version", absent)
    with pytest.raises(MissingError, match=r"pip install 'mstplan\[torch\]'") as e:
        cache.trace_of(TINY, CHECKPOINT, 512)
    assert "\n" not in str(e.value)
