"""What leaves the checkout: the wheel's files and metadata, the wheel at work elsewhere, and what the planner imports."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

CHECKOUT = Path(__file__).parents[1]
MAX_SEQ = ["max-seq", "--model", "llama3.1-8b", "--gpu-mem", "80GB", "--json"]
HEAVY = ("torch", "matplotlib", "transformers")


def run(*args, cwd, **environment):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | environment
    done = subprocess.run(args, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build(into, *what):
    run(sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", into, CHECKOUT, cwd=into)
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    run(*pip, "--target", target, wheel, cwd=target)
    return target


@pytest.fixture
def elsewhere(installed, tmp_path):
    """Runs Python in an empty folder with the installed mstplan, its dependencies and nothing of the checkout."""
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # -S leaves .pth files unread: one of them is how an editable install puts the checkout on the path.
    path = os.pathsep.join([str(installed), *dependencies])

    def python(*args):
        done = run(sys.executable, "-S", *args, cwd=tmp_path, PYTHONPATH=path, HOME=str(tmp_path))
        assert list(tmp_path.iterdir()) == []
        return done.stdout

    return python


# --- the wheel --------------------------------------------------------------------------------------------------------


def test_wheel_holds_the_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    data = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "profiles").rglob("*.json")}
    assert {"profiles/gpus.json", "profiles/models/llama3.1-8b.json", "profiles/models/index.json"} <= data
    assert {f"mstplan/{name}" for name in data} <= names
    assert "mstplan/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_holds_the_code_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    code = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "mstplan").rglob("*.py")}
    assert "mstplan/cli/__init__.py" in code
    assert {name for name in names if name.endswith(".py")} == code
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mstplan"}


def test_sdist_builds_the_same_wheel(wheel, tmp_path):
    again = build(tmp_path)  # an sdist, and a wheel from that
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert {file.filename: file.CRC for file in one.infolist()} == {
            file.filename: file.CRC for file in other.infolist()
        }
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "tests/test_package.py", "constraints.txt", "Makefile"} <= names


def test_metadata(metadata):
    from mstplan import __version__

    assert (metadata["Name"], metadata["Version"]) == ("mstplan", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"


def test_no_dependency_is_capped(metadata):
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert "torch" in {need.name for need in needs}
    assert [str(need) for need in needs if {clause.operator for clause in need.specifier} - {">="}] == []


def test_torch_is_only_in_extras(metadata):
    needs = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    plain = {need.name.replace("_", "-") for need in needs if need.marker is None}
    assert plain == {"huggingface-hub", "matplotlib", "pydantic", "rich", "typer"}


# --- the wheel at work ------------------------------------------------------------------------------------------------


def test_installed_package_is_what_runs(elsewhere, installed):
    modules = "import mstplan, mstplan.cli, mstplan.profiles"
    files = "mstplan.__file__, mstplan.cli.__file__, mstplan.profiles.ROOT"
    files = [Path(line) for line in elsewhere("-c", f"{modules}; print({files}, sep='\\n')").splitlines()]
    assert files == [installed / "mstplan" / name for name in ("__init__.py", "cli/__init__.py", "profiles")]
    assert not installed.is_relative_to(CHECKOUT)


def test_installed_package_lists_its_models(elsewhere):
    told = json.dumps(json.loads(elsewhere("-m", "mstplan", "models", "--json")))
    shipped = {path.stem for path in (CHECKOUT / "profiles" / "models").glob("*.json")} - {"index"}
    assert {name for name in shipped if f'"{name}"' in told} == shipped


def test_installed_package_answers(elsewhere):
    assert json.loads(elsewhere("-m", "mstplan", *MAX_SEQ))["results"]


def test_installed_command_is_the_same_program(installed):
    (entry_points,) = installed.glob("mstplan-*.dist-info/entry_points.txt")
    assert "mstplan = mstplan.cli:process" in entry_points.read_text(encoding="utf-8").splitlines()


# --- what the planner imports -----------------------------------------------------------------------------------------

ANSWER_AND_LIST_HEAVY_MODULES = f"""
import sys
from mstplan.cli import main
sys.argv = {["mstplan", *MAX_SEQ]}
try:
    main()
except SystemExit as end:
    if end.code:
        raise
print("imported:", *sorted(sys.modules.keys() & {set(HEAVY)}), file=sys.stderr)
"""


def heavy_modules(tmp_path, before=""):
    """Which of the heavy modules are loaded once `max-seq` has answered."""
    # Stand-ins come first on the path: what matters is whether a module is imported, not what it does.
    for name in HEAVY:
        (tmp_path / f"{name}.py").touch()
    path = os.pathsep.join([str(tmp_path), str(CHECKOUT)])
    done = run(sys.executable, "-c", before + ANSWER_AND_LIST_HEAVY_MODULES, cwd=tmp_path, PYTHONPATH=path)
    assert json.loads(done.stdout)["results"]
    return done.stderr.splitlines()[-1].split()[1:]


def test_planner_imports_nothing_heavy(tmp_path):
    assert heavy_modules(tmp_path) == []


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_import_would_be_noticed(tmp_path, name):
    assert heavy_modules(tmp_path, before=f"import {name}\n") == [name]


# --- the commands around it -------------------------------------------------------------------------------------------


def test_readme_names_only_targets_that_exist():
    targets = set(re.findall(r"^([a-z]+):", (CHECKOUT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b", " ".join(code_of_readme())))
    assert {"plan", "test"} <= named <= targets


def code_of_readme():
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```.*?^```|`[^`\n]+`", readme, re.MULTILINE | re.DOTALL)


def test_constraints_pin_versions_and_nothing_else():
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len({pin.name.lower() for pin in pins}) == len(pins)
    for pin in pins:
        (clause,) = pin.specifier
        assert clause.operator == "=="
        assert "+" not in clause.version  # a local part would name one build of torch
        assert pin.url is None
