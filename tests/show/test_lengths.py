"""The table of lengths in docs/training.md: current, and what it says of the strategies holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from mstplan.plan import calibration
from mstplan.show import lengths

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("model", "gpu"), [("llama3.1-8b", "h100"), ("qwen3-4b", "l40s")])
def test_rows_are_current(model: str, gpu: str) -> None:
    """Else: python -m mstplan.show.lengths docs/training.md."""
    with calibration.set_aside():
        rows = list(lengths.lengths([model], [gpu]))
    assert lengths.table(rows).splitlines()[-1] in PAGE.splitlines()
    reached = dict(zip(lengths.STRATEGIES_SHOWN, rows[0].s_max, strict=True))
    assert reached["mst-layer"] > reached["mst"] > reached["chunked-loss"] > reached["checkpoint"]
    assert reached["mst-layer-offload"] > reached["mst-offload"] > reached["mst"]


def test_models_that_fit_nowhere_have_no_row() -> None:
    row = lengths.Lengths("model", "card", (0,) * len(lengths.STRATEGIES_SHOWN))
    assert len(lengths.table([row]).strip().splitlines()) == 2


def test_the_text_goes_between_its_marks() -> None:
    page = f"before\n{lengths.BEGIN}old\n{lengths.END}after\n"
    found = lengths.replaced(page, "| new |")
    assert found.startswith("before\n") and found.endswith("after\n") and "| new |" in found and "old" not in found
