"""The notebooks run without an error, and what they show is what they say now.

python -m tests.test_notebooks        runs them all and writes their outputs
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 300
"""What one cell may take."""


def executed(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """A copy with the outputs of a run in that folder, in which everything lies that the run leaves. Raises CellExecutionError."""
    found = nbformat.from_dict(notebook)
    where = {
        name: str(folder / "home")
        for name in ("MSTPLAN_HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with mock.patch.dict(os.environ, {**where, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}):
        NotebookClient(
            found, timeout=SECONDS, record_timing=False, resources={"metadata": {"path": str(folder)}}
        ).execute()
    found.metadata = notebook.metadata  # the kernel adds its version of Python
    for cell in found.cells:
        cell.get("outputs", [])[:] = list(joined(cell.get("outputs", [])))
    return found


def joined(outputs: list[NotebookNode]) -> Iterator[NotebookNode]:
    """Text that came in several pieces as one: where it is cut differs from run to run."""
    last = None
    for output in outputs:
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            last = output
            yield output


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def texts(notebook: NotebookNode, without: set[str]) -> list[str]:
    """What its cells print, but for those with such a tag; without the build of torch."""
    cells = [
        cell for cell in notebook.cells if cell.cell_type == "code" and not without & set(cell.metadata.get("tags", []))
    ]
    return [re.sub(r"\+(cpu|cu\d+)\b", "", o.text) for cell in cells for o in cell.outputs if o.output_type == "stream"]


def pinned(name: str) -> bool:
    """Is the version there the one of constraints.txt?"""
    return f"\n{name}=={version(name).partition('+')[0]}" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[NotebookNode, NotebookNode]:
    """A notebook as it is kept, and as it is now."""
    kept = read(request.param)
    return kept, executed(kept, tmp_path_factory.mktemp("notebook"))


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["from_shapes_to_measurement"]


@pytest.mark.slow
def test_a_run_says_what_is_kept(both: tuple[NotebookNode, NotebookNode]) -> None:
    """Cells tagged `device` depend on the machine, those tagged `trace` on torch and transformers."""
    kept, now = both
    varying = {"device"} if pinned("torch") and pinned("transformers") else {"device", "trace"}
    assert texts(kept, varying) == texts(now, varying), "stale: python -m tests.test_notebooks runs the notebooks anew"


@pytest.mark.slow
def test_trace_and_measurement_agree(both: tuple[NotebookNode, NotebookNode]) -> None:
    """Both in the run just made and in the one that is kept. The notebook itself stops where they do not."""
    for notebook in both:
        (found,) = re.findall(
            r"largest difference between trace and measurement: ([\d.]+)%", "".join(texts(notebook, set()))
        )
        assert float(found) < 0.5
        assert "tokens: measured on cpu" in "".join(texts(notebook, set()))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_notebooks_are_small_clean_and_complete(path: Path) -> None:
    text, notebook = path.read_text(encoding="utf-8"), read(path)
    assert len(text) < 1_000_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    said = "".join(texts(notebook, set()))
    assert not re.findall(r"(?:^|[\s'\"(])(?:/(?:home|root|tmp|usr|work|Users)\b|[A-Z]:\\)", said)
    assert "nothing in this notebook was measured on one" in said  # else the first cell must say something else


def test_an_error_in_a_cell_is_one_of_the_run(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 > 2")])
    with pytest.raises(CellExecutionError, match="1 > 2"):
        executed(notebook, tmp_path)


def main() -> None:
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            found = executed(read(path), Path(folder))
        path.write_text(nbformat.writes(found) + "\n", encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
