"""A wrapped model under DeepSpeed's ZeRO-3 in two processes trains as one process without it. Skipped where deepspeed is not installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from mstplan.train import minisequence
from mstplan.train.zero import _LEAF

from ..processes import differences_of
from .llama import CHUNKS, small_llama

REFUSED = {
    "two layers to a checkpoint": "Set checkpoint='layer'",
    "wrapped after": "Call minisequence before deepspeed.initialize",
}
CASES = (
    *("none", "layer", "offload", "layers in chunks", "attention from the host"),
    *("as it is", "tied", "a frozen head", "frozen MLPs"),
)
with_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | str]:
    return differences_of("tests.train.two_shards", tmp_path_factory.mktemp("shards"), 300)


@with_deepspeed
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_one_process(differences, case):
    found = differences[case]
    assert not isinstance(found, str), found
    assert found < 1e-6  # fp32: ZeRO-3 knows no float64


@with_deepspeed
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(differences, case):
    found = str(differences[case])
    assert found.startswith("ModelError") and REFUSED[case] in found


@with_deepspeed
def test_the_comparison_notices_a_lost_token(differences):
    assert differences["a token lost"] > 1e-3


def leaves(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if vars(module).get(_LEAF)}


@pytest.mark.parametrize(
    ("settings", "marked"),
    [({}, "model.layers.{}.mlp"), ({"layer_in_chunks": True, "attention_groups": 1}, "model.layers.{}")],
)
def test_what_runs_in_pieces_is_one_module_to_deepspeed(settings, marked):
    model = minisequence(small_llama(), **CHUNKS, **settings)
    assert leaves(model) == {marked.format(n) for n in range(2)}
    assert not leaves(minisequence.undo(model))
