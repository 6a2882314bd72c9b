"""Files are written whole or not at all; what a killed writer left goes; modes and links stay; nothing that is read can hold up or mislead."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest

from mstplan import card, files, load_model
from mstplan.errors import InputError, OutputError
from mstplan.measuring import suites
from mstplan.spec.catalog import load_config
from mstplan.step.recipe import STRATEGIES, Recipe

from .damage import at, places

LEFT = ".mstplan-0123456789abcdef.part"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o444, 0o755, 0o666])
@pytest.mark.parametrize(
    "write", [lambda path: files.write(path, b"new"), lambda path: files.replace_json(path, {"a": 1})]
)
def test_a_file_that_is_there_keeps_its_mode(tmp_path, bits, write):
    path = tmp_path / "file.json"
    path.write_text("old")
    path.chmod(bits)
    write(path)
    assert path.read_text() != "old" and {mode(p) for p in tmp_path.iterdir()} == {
        bits
    }  # the one that is kept beside it, too


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_obeys_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        files.write(tmp_path / "new", b"")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == 0o666 & ~mask


def test_a_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    files.write(link, b"new")
    assert link.is_symlink() and target.read_text() == "new" and mode(target) == 0o600
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "elsewhere" / "later")
    files.write(dangling, b"new")
    assert dangling.is_symlink() and (tmp_path / "elsewhere" / "later").read_text() == "new"


def test_what_a_killed_writer_left_goes(tmp_path):
    """But not what somebody may be writing just now, nor anything of another name or kind."""
    hours = {LEFT: 2, LEFT.replace("0", "f"): 0.1, ".mstplan-xyz.part": 2, "my.part": 2, LEFT + ".txt": 2}
    for name, ago in hours.items():
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - 3600 * ago,) * 2)
    folder = tmp_path / LEFT.replace("0", "e")
    folder.mkdir()
    os.utime(folder, (0, 0))
    files.write(tmp_path / "out", b"data")
    assert {path.name for path in tmp_path.iterdir()} == {*hours, folder.name, "out"} - {LEFT}


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_fails_leaves_all_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_text("old")
    for broken in ("os.replace", "os.chmod"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, _no_space)
            with pytest.raises(OutputError, match="No space") as e:
                files.write(path, b"new")
        assert (
            len(str(e.value).splitlines()) == 2
            and [p.name for p in tmp_path.iterdir()] == ["file.json"]
            and path.read_text() == "old"
        )


def test_old_content_is_kept_beside_the_new(tmp_path):
    path = tmp_path / "deep" / "er" / "file.json"
    for n in (1, 2, 2, 3):
        files.replace_json(path, {"n": n})
    assert {p.name: p.read_text().strip() for p in path.parent.iterdir()} == {
        "file.json": '{"n":3}',
        "file.json.1": '{"n":1}',
        "file.json.2": '{"n":2}',
    }


def _fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    "make",
    [_fifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir(), lambda path: path.symlink_to(path)],
)
def test_what_is_no_file_is_not_replaced(tmp_path, make):
    make(tmp_path / "file.json")
    with pytest.raises(OutputError) as e:
        files.replace_json(tmp_path / "file.json", {"n": 1})
    assert len(str(e.value).splitlines()) == 2 and [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_no_number_is_not_written(tmp_path):
    with pytest.raises(OutputError):
        files.replace_json(tmp_path / "file.json", {"n": float("nan")})
    assert not any(tmp_path.iterdir())


# ---- JSON that users write ----------------------------------------------------------------------------------------------

SUITE = {
    "about": "a few",
    "cases": [{"model": "gpt2", "seq_len": ["8", "16"], "strategy": ["mst"], "layers": 2, "recipe": {"batch": 2}}],
}
READERS = {
    "recipe": (json.loads(STRATEGIES["mst"].model_dump_json()), Recipe.read),
    "suite": (SUITE, lambda path: suites.read_cases(path, card("h100"))),
    "config.json": ({**load_config("gemma3-4b"), "nested": {"deep": [{"er": 1}]}}, load_model),
}


def with_twice(document: object, path: tuple[object, ...], again: object) -> str:
    """JSON text with the key at the end of a path given again, with another value."""
    if not path:
        return json.dumps(document)
    if isinstance(document, list):
        return (
            "["
            + ",".join(
                with_twice(v, path[1:], again) if n == path[0] else json.dumps(v) for n, v in enumerate(document)
            )
            + "]"
        )
    assert isinstance(document, dict)
    rows = [
        f"{json.dumps(k)}:{with_twice(v, path[1:], again) if k == path[0] else json.dumps(v)}"
        for k, v in document.items()
    ]
    return "{" + ",".join([*rows, *([f"{json.dumps(path[0])}:{json.dumps(again)}"] if len(path) == 1 else [])]) + "}"


@pytest.mark.parametrize("kind", READERS)
def test_a_key_given_twice_is_refused_by_name(tmp_path, kind):
    document, read = READERS[kind]
    path = tmp_path / "some.json"
    path.write_text(json.dumps(document))
    read(path)
    keys = [where for where in places(document) if where and isinstance(where[-1], str)]
    assert len(keys) > 5
    for where in keys:
        for again in (at(document, where), 7):
            path.write_text(with_twice(document, where, again))
            with pytest.raises(InputError, match=f"'{where[-1]}'.* twice") as e:
                read(path)
            assert "some.json" in str(e.value) and len(str(e.value).splitlines()) == 2


def test_keys_of_any_form():
    assert files.repeated_key('{"a": 1, "\\u0061": 2}') == "a" and files.repeated_key('[{"a": 1}, {"a": 1}]') is None
    assert files.repeated_key("[" * 100_000) is files.repeated_key("{") is files.repeated_key("9" * 5000) is None
    long = files.repeated_key('{"' + "k" * 10**6 + '": 1, "' + "k" * 10**6 + '": 1}')
    with pytest.raises(InputError) as e:
        Recipe.from_json(json.dumps({str(long): 1})[:-1] + f', "{long}": 2}}')
    assert len(str(e.value)) < 300
