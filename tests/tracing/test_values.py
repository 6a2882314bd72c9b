"""Values that every step of S tokens has are known beside fake tensors; others are not, and asking for them is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mstplan.step.instants import Pass
from mstplan.tracing import values
from mstplan.tracing.recorder import Recorder
from mstplan.tracing.values import UnknownValues, note_tokens

S = 13


@pytest.fixture(autouse=True)
def recorder() -> Iterator[Recorder]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        recorder = Recorder({}, 0)
        with recorder:
            recorder.begin_pass(Pass.FORWARD)
            yield recorder


def tokens() -> torch.Tensor:
    ids = torch.randint(0, 99, (2, S))
    note_tokens(ids)
    return ids


def unknown() -> pytest.RaisesContext[UnknownValues]:
    return pytest.raises(UnknownValues, match="aten")


def test_the_length_of_a_sequence_is_known():
    positions = torch.arange(S).unsqueeze(0).expand(2, -1)
    length = torch.max(positions) + 1
    assert isinstance(length, FakeTensor)
    assert length.item() == S and length > S - 1 and not length > S


def test_what_comes_of_numbers_alone_is_known():
    assert (torch.ones(3) * 2).tolist() == [2.0, 2.0, 2.0]
    assert torch.tensor([4, 5])[1].item() == 5
    assert torch.cat([torch.zeros(2), torch.full((1,), 7.0)]).sum().item() == 7
    assert [part.sum().item() for part in torch.arange(4).split(2)] == [1, 5]
    assert torch.equal(torch.arange(3), torch.tensor([0, 1, 2]))


def test_results_have_the_size_of_their_values_and_are_known_too():
    causal = torch.arange(S)[:, None] >= torch.arange(S)
    rows, columns = torch.nonzero(causal, as_tuple=True)
    assert isinstance(rows, FakeTensor) and rows.shape == (S * (S + 1) // 2,)
    assert columns.max().item() == S - 1 and columns[:3].tolist() == [0, 0, 1]


def test_a_mask_that_is_known_picks_from_what_is_not(recorder):
    hidden = torch.randn(4, S, 8)
    mask = torch.tensor([True, False, True, True])
    assert hidden[mask].shape == (3, S, 8)
    assert hidden[:, torch.arange(S) > 9].shape == (4, 3, 8)
    hidden[mask] = torch.zeros(3, S, 8)
    with unknown():
        hidden.sum().item()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3),
        lambda: torch.randint(0, 9, (3,)),
        lambda: torch.empty(3),
        lambda: torch.empty_like(torch.ones(3)),
        lambda: torch.ones(3) * torch.randn(3),
        lambda: torch.cat([torch.ones(2), torch.randn(2)]),
        lambda: torch.arange(3).to("meta"),
    ],
)
def test_chance_and_weights_are_unknown(make):
    with unknown():
        make().sum().to("cpu").item()


def test_a_mask_that_is_unknown_is_told_by_what_asks():
    with pytest.raises(UnknownValues, match=r"aten\.nonzero"):
        torch.randn(4, 3)[torch.randn(4) > 0]


def test_what_was_changed_is_not_known_any_more():
    base = torch.zeros(4, dtype=torch.long)
    view, total = base[:2], base.sum()
    view += 1
    for tensor in (base, view, base[2:]):
        with unknown():
            tensor.sum().item()
    assert total.item() == 0  # it was made before


def test_no_token_is_special_but_which_they_are_is_unknown():
    ids = tokens()
    assert (ids != 0).sum(1).tolist() == [S, S] and not (ids == 98).any()
    assert (ids.view(-1)[3:] != 0).all()
    with unknown():
        ids.max().item()
    with unknown():
        (ids > 3).any().item()
    with unknown():
        (ids + 1 != 0).all().item()
    ids[0, 0] = 5
    with unknown():
        (ids != 0).all().item()


def test_tensors_too_large_to_work_out_are_unknown(monkeypatch):
    monkeypatch.setattr(values, "MOST_NUMBERS", 10)
    assert torch.arange(10).sum().item() == 45
    with unknown():
        torch.arange(11).sum().item()


def test_long_ways_are_not_gone_back(monkeypatch):
    monkeypatch.setattr(values, "MOST_STEPS", 5)
    count = torch.zeros(())
    for _ in range(3):
        count = count + 1
    assert count.item() == 3
    with unknown():
        (count + 1).item()


def test_nothing_is_allocated_for_values(recorder):
    before = len(recorder.recording.storages)
    positions = torch.arange(S)
    assert (torch.max(positions) + 1).item() == S
    made = [(storage.operation, storage.shape) for storage in recorder.recording.storages[before:]]
    assert made == [("arange", (S,)), ("max", ()), ("add.Tensor", ())]
