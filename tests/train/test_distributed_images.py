"""A wrapped model of text and images in two processes under FSDP2, each with half of the batch, gets the loss and gradients of the whole batch in
one."""

from __future__ import annotations

import pytest

from ..processes import differences_of
from .two_processes_with_images import cases

EXACT = {
    "llava": 1e-10,
    "gemma3": 1e-6,
}  # float64, and Gemma-3's norms in fp32; halves are averaged in another order than the whole is summed
WRONG = "llava, pixels of another"


@pytest.fixture(scope="module")
def differences(tmp_path_factory) -> dict[str, float | str]:
    return differences_of("tests.train.two_processes_with_images", tmp_path_factory.mktemp("processes"), 180)


@pytest.mark.parametrize("case", [case for case in cases() if case != WRONG])
def test_two_processes(differences, case):
    found = differences[case]
    assert not isinstance(found, str), found
    assert found < EXACT[case.split(", ")[0]]


def test_the_comparison_notices_images_in_another_order(differences):
    assert differences[WRONG] > 1e-3
