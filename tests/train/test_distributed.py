"""A wrapped model in two processes, each with half of the batch, gets the loss and gradients of the whole batch in one."""

from __future__ import annotations

import pytest

from ..processes import differences_of
from .two_processes import cases

EXACT = 1e-10  # float64; two halves are averaged in another order than the whole is summed
REFUSED = {  # and what the message says
    "FSDP, wrapped before, two layers": "Set checkpoint='layer'",  # a segment's recomputation would need several layers' weights at once
    "FSDP, wrapped after, two layers": "Set checkpoint='layer'",
    "FSDP, MLPs by themselves": "Shard whole decoder layers",
    "FSDP 1, False": "FSDP 2",
    "FSDP 1, True": "FSDP 2",
}


@pytest.fixture(scope="module")
def differences(tmp_path_factory) -> dict[str, float | str]:
    return differences_of("tests.train.two_processes", tmp_path_factory.mktemp("processes"), 120)


@pytest.mark.parametrize("case", [case for case in cases() if "lost" not in case and case not in REFUSED])
def test_two_processes(differences, case):
    found = differences[case]
    assert not isinstance(found, str), found
    assert found < EXACT


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(differences, case):
    found = str(differences[case])
    assert found.startswith("ModelError") and REFUSED[case] in found


def test_the_comparison_notices_a_lost_token(differences):
    assert differences["DDP, a token lost"] > 1e-3
