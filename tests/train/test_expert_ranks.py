"""Two processes that share out a model's experts, each with a row, get the loss and gradients of one process with both rows."""

from __future__ import annotations

import pytest

from ..processes import differences_of
from .two_expert_ranks import CASES, FAMILIES

EXACT = 1e-5  # fp32, summed in another order
REFUSED = {"MLPs in chunks": "its weights are sharded by themselves"}
COMPARED = [case for case in CASES if case not in {*REFUSED, "a row lost"}]


@pytest.fixture(scope="module")
def differences(tmp_path_factory) -> dict[str, float | str]:
    return differences_of("tests.train.two_expert_ranks", tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("case", COMPARED)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_train_as_one_process_does(differences, family, case):
    """Also with clipping, which goes over the weights of two meshes, and with whole gradients kept between micro-batches."""
    found = differences[f"{family}, {case}"]
    assert not isinstance(found, str), found
    assert found < EXACT


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(differences, family, case):
    said = str(differences[f"{family}, {case}"])
    assert said.startswith("ModelError") and REFUSED[case] in said


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_notices_a_lost_row(differences, family):
    assert differences[f"{family}, a row lost"] > 1e-3
