"""What a selective checkpoint and those of each n-th layer run again, and what a step with saved tensors in CPU RAM asks for."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mstplan.errors import MissingError, ModelError, RecipeError
from mstplan.step.recipe import Recipe
from mstplan.train import minisequence
from mstplan.train.checkpoint import segments_of
from mstplan.train.runtime import RUNTIME, Runtime, is_attention
from mstplan.train.step import TrainingStep

from .families import small_batch, small_model


class Counting(TorchDispatchMode):
    """How often operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def operations(checkpoint: str | int) -> Counter[str]:
    """Of a step of a llama of two layers in fp32, whose attention on a CPU is one operation."""
    model = small_model("llama").float()
    model.set_attn_implementation("sdpa")
    minisequence(model, mlp_chunks=1, loss_chunks=1, checkpoint=checkpoint)
    ids, labels = small_batch(1, 8)
    with Counting() as counting:
        model(input_ids=ids, labels=labels).loss.backward()
    return counting.counts


ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"


def test_attention_runs_once_a_layer_where_it_is_kept() -> None:
    layers = small_model("llama").config.num_hidden_layers
    ran = {how: operations(how)[ATTENTION] for how in ("none", "layer", "selective", "every-2")}
    assert ran == {
        "none": layers,
        "layer": 2 * layers,
        "selective": layers,
        "every-2": layers + -(-layers // 2),
    }
    products = {how: operations(how)["aten.mm"] for how in ("none", "layer", "selective")}
    assert products["none"] < products["selective"] == products["layer"]


def test_children_run_once_more_each_and_give_the_same() -> None:
    """All of a layer but the sums between them runs again, to the same gradients."""
    found = {}
    for how in ("none", "layer", "children"):
        torch.manual_seed(0)
        model = small_model("llama").float()
        model.set_attn_implementation("sdpa")
        step = TrainingStep(model, Recipe(precision="fp32", checkpoint=how), 8)
        with Counting() as counting:
            step.forward().backward()
        found[how] = counting.counts, [weight.grad for weight in model.parameters()]
    layers = model.config.num_hidden_layers
    assert [found[how][0][ATTENTION] for how in found] == [layers, 2 * layers, 2 * layers]
    assert found["none"][0]["aten.mm"] < found["children"][0]["aten.mm"]
    torch.testing.assert_close(found["children"][1], found["none"][1], rtol=0, atol=0)


def test_minisequence_refuses_checkpoints_of_children() -> None:
    with pytest.raises(RecipeError, match="checkpoints of what layers call"):
        minisequence(small_model("llama"), plan=Recipe(checkpoint="children"))


def test_the_flash_attn_packages_operations_are_kept() -> None:
    assert is_attention("_flash_attn2_cuda::varlen_fwd") and is_attention(
        torch.ops.aten._scaled_dot_product_cudnn_attention.default
    )
    assert not is_attention(torch.ops.aten.mm.default)


def test_a_second_backward_is_refused() -> None:
    model = small_model("llama").float()
    model.set_attn_implementation("sdpa")
    minisequence(model, mlp_chunks=1, loss_chunks=1, checkpoint="selective")
    ids, labels = small_batch(1, 8)
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backpropagated once"):
        loss.backward()


def test_where_checkpoints_begin_and_end() -> None:
    assert segments_of(Recipe(checkpoint="every-2"), range(0, 5, 2), 5) == {0: 1, 2: 3, 4: 5}
    assert segments_of(Recipe(checkpoint=2), range(0, 5, 2), 5) == {0: 2, 2: 4, 4: 5}
    assert segments_of(Recipe(checkpoint="selective"), range(3), 3) == {0: 1, 1: 2, 2: 3}


@pytest.mark.parametrize("own", [True, False])
def test_reentrant_checkpoints_run_layers_again_whole(own: bool) -> None:
    """As transformers' own do: each layer's last product, too, which others leave out; and no tensor stays."""
    model = small_model("llama").float()
    layers = len(model.model.layers)
    ids, labels = small_batch(1, 8)
    products = {}
    for reentrant in (False, True):
        if own:
            minisequence(
                model, mlp_chunks=1, loss_chunks=1, checkpoint="reentrant" if reentrant else "layer", kernels="torch"
            )
        else:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with Counting() as counting:
            model(input_ids=ids, labels=labels).loss.backward()
        products[reentrant] = counting.counts["aten.mm"]
        minisequence.undo(model)
    assert products[True] - products[False] == layers


def test_reentrant_checkpoints_that_would_train_nothing_are_refused() -> None:
    """torch would warn, and give no weight of such a layer a gradient."""
    model = small_model("llama")
    model.get_input_embeddings().weight.requires_grad_(False)
    minisequence(model, mlp_chunks=1, loss_chunks=1, checkpoint="reentrant")
    ids, labels = small_batch(1, 8)
    with pytest.raises(ModelError, match="enable_input_require_grads"):
        model(input_ids=ids, labels=labels)


def test_reentrant_checkpoints_with_chunks_leave_nothing_behind() -> None:
    """No graph of a layer outlives its backward, held by a chunked MLP or in a cycle."""
    model = small_model("llama").float()
    minisequence(model, mlp_chunks=2, loss_chunks=2, checkpoint="reentrant")
    ids, labels = small_batch(1, 8)
    gc.collect()
    gc.disable()
    try:
        before = {id(each) for each in gc.get_objects()}
        model(input_ids=ids, labels=labels).loss.backward()
        model.zero_grad()
        left = [each for each in gc.get_objects() if id(each) not in before and isinstance(each, torch.Tensor)]
    finally:
        gc.enable()
    assert not left


@pytest.mark.parametrize("checkpoint", ["every-0", "every-", "every-2x", "selectiv", "every-100000", True])
def test_checkpoints_that_there_are_not(checkpoint: Any) -> None:
    with pytest.raises(RecipeError, match="'selective', 'every-n'"):
        minisequence(small_model("llama"), checkpoint=checkpoint)


def test_saved_tensors_leave_a_gpu_alone() -> None:
    with pytest.raises(RecipeError, match="here is no GPU"):
        TrainingStep(small_model("llama"), Recipe(offload="saved-tensors"), 8)


def test_without_trl_two_lines_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.models.activation_offloading", None)
    model = small_model("llama").to("meta")
    with pytest.raises(MissingError) as e:
        RUNTIME.offload_saved(model)
    assert "pip install trl" in str(e.value) and len(str(e.value).splitlines()) == 2


class Noted(Runtime):
    """Runs a step in a context that is noted."""

    def __init__(self) -> None:
        self.open: list[bool] = []

    def offload_saved(self, _model: Any) -> Any:
        return self

    def __enter__(self) -> None:
        self.open.append(True)

    def __exit__(self, *_: object) -> None:
        self.open.append(False)


def test_forward_and_backward_of_each_micro_batch_run_within() -> None:
    runtime = Noted()
    TrainingStep(small_model("llama"), Recipe(offload="saved-tensors", accumulation=2), 8, runtime).run()
    assert runtime.open == [True, False, True, False]


@pytest.mark.parametrize(
    ("fields", "shape", "positions"),
    [
        ({"packing": 2, "batch": 2}, (2, 7), [0, 1, 2, 3, 0, 1, 2]),
        ({"batch": 2, "padding_free": True, "attention": "flash"}, (1, 14), [0, 1, 2, 3, 4, 5, 6] * 2),
        ({"packing": 1}, (1, 7), None),
    ],
)
def test_rows_of_several_samples(fields: dict[str, Any], shape: tuple[int, int], positions: list[int] | None) -> None:
    step = TrainingStep(small_model("llama"), Recipe(**fields), 7)
    assert step.tokens.shape == shape
    assert (step.positions[0].tolist() if step.positions is not None else None) == positions


def test_packed_samples_do_not_see_each_other() -> None:
    """The second sample's loss is what it is alone."""
    model = small_model("llama")
    model.set_attn_implementation("sdpa")
    ids, _ = small_batch(1, 8)
    positions = torch.arange(8) % 4
    together = model(input_ids=ids, position_ids=positions[None]).logits[:, 4:]
    assert torch.allclose(together, model(input_ids=ids[:, 4:]).logits)
