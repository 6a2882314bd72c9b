"""A wrapped model in two processes, each with its part of every sequence, gets the loss and gradients of whole sequences in one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mstplan.errors import ModelError, RecipeError
from mstplan.train import minisequence
from mstplan.train.ulysses import Sharing

from ..processes import differences_of
from .llama import CHUNKS, small_llama
from .two_sharers import cases

EXACT = 1e-10  # float64; sums over two parts are made in another order
REFUSED = {  # by all ranks, and what the message says
    "packed, sdpa": "several samples in a row, over several GPUs, need flash attention",
    "padding on the left": "padding_side='right'",
    "groups that cannot be shared": "Leave attention_groups out",
    "three heads": "3 heads of queries and 3 of keys cannot be shared evenly by 2 GPUs",
    "eager": "attn_implementation='sdpa'",
    "auto": "say which strategy",
    "another recipe": "the recipe shares sequences over 1 GPUs, sequence_parallel over 2",
    "a mesh of two": "such as mesh['sp']",
}


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | str]:
    return differences_of("tests.train.two_sharers", tmp_path_factory.mktemp("sharers"), 200)


@pytest.mark.parametrize("case", [case for case in cases() if "lost" not in case and case not in REFUSED])
def test_parts_train_as_whole_sequences_do(differences, case):
    found = differences[case]
    assert not isinstance(found, str), found
    assert found < EXACT


@pytest.mark.parametrize("case", REFUSED)
def test_what_ranks_cannot_share_is_refused(differences, case):
    found = str(differences[case])
    assert "Error: " in found and REFUSED[case] in found


def test_the_comparison_notices_a_lost_token(differences):
    assert differences["a token lost"] > 1e-3


# ---- what one process shows -----------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Any) -> Any:
    """The group of a single rank."""
    dist.init_process_group("gloo", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def ids() -> torch.Tensor:
    return torch.arange(3, 27).view(2, 12)


def test_a_rank_by_itself_has_all_of_a_batch(alone):
    model = minisequence(small_llama(), **CHUNKS, sequence_parallel=alone)
    part = minisequence.part(model, {"input_ids": ids(), "labels": ids()})
    assert torch.equal(part["input_ids"], ids()) and torch.equal(part["shift_labels"][:, :-1], ids()[:, 1:])
    assert part["position_ids"].tolist() == [list(range(12))] * 2
    assert "sequences over 1 GPUs" in minisequence.describe(model)


@pytest.mark.parametrize("missing", ["position_ids", "shift_labels"])
def test_a_batch_of_whole_sequences_is_refused(alone, missing):
    model = minisequence(small_llama(), **CHUNKS, sequence_parallel=alone)
    part = minisequence.part(model, {"input_ids": ids(), "labels": ids()})
    del part[missing]
    with pytest.raises(ModelError, match=r"minisequence.part\(model, batch\)"):
        model(**part)


def test_generation_is_each_ranks_own(alone):
    model = small_llama()
    wanted = model.eval().generate(ids(), max_new_tokens=4, do_sample=False)
    minisequence(model.train(), **CHUNKS, sequence_parallel=alone)
    assert torch.equal(model.eval().generate(ids(), max_new_tokens=4, do_sample=False), wanted)


def test_a_part_is_evaluated_with_the_others(alone):
    model = minisequence(small_llama(), **CHUNKS, sequence_parallel=alone).eval()
    sharing: Sharing = model._mstplan.sharing
    with torch.no_grad():
        model(**minisequence.part(model, {"input_ids": ids(), "labels": ids()}))
    assert sharing.layers == {0, 1} and not sharing.evaluates


def test_models_that_share_nothing_name_their_arguments_as_before(alone):
    """As the towers of Qwen2-VL, in a process whose models shared attention of this name."""
    model = minisequence(small_llama(), **CHUNKS, sequence_parallel=alone)
    attention = ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind()
    out, _ = attention(nn.Module(), q, k, v, attention_mask=None, scaling=None, dropout=0.0, is_causal=False)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


def test_copies_share_with_the_same_ranks_and_undo_leaves_nothing(alone):
    model = minisequence(small_llama(), **CHUNKS, sequence_parallel=alone)
    copied = copy.deepcopy(model)
    assert copied._mstplan.sharing.group is alone
    minisequence.undo(model)
    assert not any(key.startswith("_mstplan") for module in model.modules() for key in vars(module))
    assert copied.model.layers[0].self_attn._mstplan_sharing.group is alone
    with pytest.raises(ModelError, match="shares no sequences"):
        minisequence.part(model, {"input_ids": ids()})


class _Mean(nn.Module):
    """Mixes tokens, but not by attention."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **_: Any) -> Any:
        return hidden_states.cumsum(1) / hidden_states.shape[1], None


def test_a_layer_without_attention_is_refused(alone):
    model = small_llama()
    model.model.layers[1].self_attn = _Mean()
    minisequence(model, **CHUNKS, sequence_parallel=alone)
    part = minisequence.part(model, {"input_ids": ids(), "labels": ids()})
    with pytest.raises(ModelError, match="mixes tokens elsewhere than in attention"):
        model(**part)


def test_convolutions_are_refused(alone):
    model = small_llama()
    model.model.layers[1].conv = nn.Conv1d(2, 2, 3)
    with pytest.raises(ModelError, match="convolutions over tokens"):
        minisequence(model, **CHUNKS, sequence_parallel=alone)


@pytest.mark.parametrize("asked", [0, True, "two", 3])
def test_what_is_no_group_of_ranks(asked):
    with pytest.raises(RecipeError, match=r"must be a process group|need a multiple of so many ranks"):
        minisequence(small_llama(), **CHUNKS, sequence_parallel=asked)


def test_a_batch_that_is_no_batch_of_tokens(alone):
    model = minisequence(small_llama(), **CHUNKS, sequence_parallel=alone)
    with pytest.raises(ModelError, match="pixel_values is no tensor"):
        minisequence.part(model, {"input_ids": ids(), "pixel_values": torch.zeros(2, 3)})
