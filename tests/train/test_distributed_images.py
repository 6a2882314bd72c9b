"""A wrapped model of text and images in two processes under FSDP2, each with half of the batch, gets the loss and gradients of the whole batch in
one."""

from __future__ import annotations

import json

import pytest

from ..processes import on_two_ranks
from .two_processes_with_images import cases

EXACT = {
    "llava": 1e-10,
    "gemma3": 1e-6,
}  # float64, and Gemma-3's norms in fp32; halves are averaged in another order than the whole is summed
WRONG = "llava, pixels of another"


@pytest.fixture(scope="module")
def differences(tmp_path_factory) -> dict[str, float | str]:
    folder = tmp_path_factory.mktemp("processes")
    on_two_ranks("tests.train.two_processes_with_images", folder, 180)
    return json.loads((folder / "differences.json").read_text())


@pytest.mark.parametrize("case", [case for case in cases() if case != WRONG])
def test_two_processes(differences, case):
    found = differences[case]
    assert not isinstance(found, str), found
    assert found < EXACT[case.split(", ")[0]]


def test_the_comparison_notices_images_in_another_order(differences):
    assert differences[WRONG] > 1e-3
