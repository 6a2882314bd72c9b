"""Python files in the folder that mstplan is run in change nothing: none of them is ever imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mstplan.measuring import measurement, processes, sweep

from .processes import ROOT
from .tracing.tiny import TINY

# What Python itself imports on the way to `python -m NAME`, before anything of NAME runs, is not ours to keep away.
BEFORE_US = {
    "contextlib",
    "types",
    "functools",
    "warnings",
    "collections",
    "keyword",
    "operator",
    "reprlib",
    "runpy",
    "pkgutil",
    "importlib",
    "abc",
}
NAMES = {
    "__future__",
    "typing",
    "typing_extensions",
    "torch",
    "numpy",
    "transformers",
    "huggingface_hub",
    "typer",
    "click",
    "rich",
    "pydantic",
    "random",
    "token",
    "tokenize",
    "sitecustomize",
    "usercustomize",
    "json",
    "dataclasses",
    "inspect",
    "enum",
    "re",
    "copy",
    "ast",
    "dis",
    "secrets",
    "tempfile",
    "subprocess",
    "signal",
    "selectors",
    "threading",
    "statistics",
    "hashlib",
    "datetime",
    "pathlib",
    "platform",
    "ctypes",
    "gzip",
    "struct",
    "string",
    "logging",
    "inductor",
    "triton",
    "configuration_llama",
    "modeling_llama",
    "matplotlib",
}


def shadow(folder: Path, names: set[str]) -> Path:
    """Of each name a file that tells when it is imported, and fails; and a tiny model."""
    for name in names:
        (folder / f"{name}.py").write_text(
            f"open({str(folder / 'imported')!r}, 'a').write({name + ' '!r})\nraise ImportError({name!r} + ' of the folder')\n"
        )
    (folder / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 2}))
    return folder


def imported(folder: Path) -> str:
    return (folder / "imported").read_text() if (folder / "imported").exists() else ""


def called(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**plain, **more},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("module", ["-m mstplan", "-mmstplan", "-um mstplan"])
def test_a_command_takes_nothing_from_the_folder(tmp_path: Path, module: str) -> None:
    shadow(tmp_path, NAMES - BEFORE_US)
    done = called(tmp_path, *module.split(), "max-seq", "-m", ".", "--gpu", "h100", PYTHONPATH=str(ROOT))
    assert (done.returncode, imported(tmp_path)) == (0, ""), done.stderr


def test_measuring_takes_nothing_from_the_folder(tmp_path: Path) -> None:
    """Two processes: one describes the device, one measures. What a job scheduler may have left in the environment changes nothing either."""
    left = {"WORLD_SIZE": "abc", "RANK": "", "LOCAL_RANK": "x", "MASTER_PORT": "y", "GROUP_RANK": "-1"}
    shadow(tmp_path, NAMES - BEFORE_US)
    point = ("--seq-len", "16", "-s", "checkpoint", "--steps", "1", "--device", "cpu", "-o", "r.jsonl")
    done = called(tmp_path, "-m", "mstplan", "measure", "-m", ".", *point, PYTHONPATH=str(ROOT), **left)
    assert (done.returncode, imported(tmp_path)) == (0, ""), done.stdout + done.stderr
    assert [m.outcome for m in measurement.read_results(tmp_path / "r.jsonl").measurements] == ["ok"]


def test_a_process_that_measures_takes_nothing_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even another mstplan, nor where a place without a name on the path stands for the folder."""
    monkeypatch.chdir(shadow(tmp_path, NAMES | BEFORE_US | {"mstplan"}))
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path / 'none'}::")
    assert sweep.ask_environment("cpu")["card"] == "cpu" and imported(tmp_path) == ""


@pytest.mark.parametrize(
    ("path", "handed_on"),
    [("", ""), (":", ""), (":a", "a"), ("a:", "a"), ("a::b", "a:b"), ("a:b", "a:b"), (None, None)],
)
def test_what_is_handed_to_a_process(monkeypatch: pytest.MonkeyPatch, path: str | None, handed_on: str | None) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path.replace(":", os.pathsep))
    assert processes.process_environment("cpu").get("PYTHONPATH") == (
        handed_on.replace(":", os.pathsep) if handed_on is not None else None
    )


def test_a_checkout_that_only_the_current_folder_leads_to(tmp_path: Path) -> None:
    """Its commands run, and so do its processes: with the checkout's own code."""
    for name in ("mstplan", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    said = json.dumps({"error": "of the checkout"})
    (tmp_path / "mstplan" / "measuring" / "worker.py").write_text(f"def main():\n    print({said!r})\n")
    done = called(tmp_path, "-m", "mstplan", "measure", "-m", "gpt2", "--seq-len", "16", "--device", "cpu")
    assert (done.returncode, done.stderr) == (2, "mstplan: of the checkout\n")


def test_who_imports_the_library_keeps_the_path() -> None:
    program = "import sys; before = list(sys.path); import mstplan; assert sys.path == before and before[0] == ''"
    assert called(ROOT, "-c", program).returncode == 0
