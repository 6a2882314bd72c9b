"""Two processes that share out a model's experts, each with a row, get the loss and gradients of one process with both rows."""

from __future__ import annotations

import json

import pytest

from ..processes import on_two_ranks
from .two_expert_ranks import CASES, FAMILIES

EXACT = 1e-5  # fp32, summed in another order
REFUSED = {"MLPs in chunks": "its weights are sharded by themselves"}
COMPARED = [case for case in CASES if case not in {*REFUSED, "a row lost"}]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, float | str]]:
    folder = tmp_path_factory.mktemp("experts")
    on_two_ranks("tests.train.two_expert_ranks", folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", COMPARED)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_train_as_one_process_does(found, family, case):
    """Also with clipping, which goes over the weights of two meshes, and with whole gradients kept between micro-batches."""
    difference = found[family][case]
    assert not isinstance(difference, str), difference
    assert difference < EXACT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(found, family, case):
    said = str(found[family][case])
    assert said.startswith("ModelError") and REFUSED[case] in said


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_notices_a_lost_row(found, family):
    assert found[family]["a row lost"] > 1e-3
