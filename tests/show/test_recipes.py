"""docs/recipes.md: current, and what its table says holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from mstplan.plan import calibration
from mstplan.plan.solve import plan_at
from mstplan.show import recipes
from mstplan.step.recipe import strategy
from mstplan.step.trainers import TRAINERS, Trainer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


def test_the_page_is_what_the_module_prints() -> None:
    """Else: python -m mstplan.show.recipes > docs/recipes.md."""
    assert PAGE.read_text(encoding="utf-8") == recipes.page()


def test_what_stands_there_fits_and_what_does_not_does_not() -> None:
    """A length with a peak runs on that GPU, and one with a dash does not."""
    with calibration.set_aside():
        rows = [
            row for row in recipes.fits() if row.model.name == recipes.MODELS[0] and row.card.gpu.name == "rtx-4090"
        ]
        assert [row.kind for row in rows] == list(recipes.KINDS)
        for row in rows:
            recipe = strategy(recipes.STRATEGY, **recipes.KINDS[row.kind])
            for tokens, peak in zip(recipes.LENGTHS, row.peaks, strict=True):
                plan = plan_at(row.model, recipe, row.card, tokens)
                assert plan.fits == (peak is not None) and peak in (None, plan.peak_bytes)
    assert rows[0].s_max < rows[1].s_max < rows[2].s_max


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=lambda trainer: trainer.name)
def test_every_starting_point_stands_there_with_its_assumptions(trainer: Trainer) -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"--like {trainer.name}`: {trainer.about}" in text and trainer.options in text
    assert all(f"- {each}" in text for each in trainer.assumptions)


def test_prose_is_no_wider_than_120() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    assert all(len(line) <= 120 for line in lines if not line.startswith(("|", "--")))
