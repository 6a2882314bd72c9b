"""A wrapped model whose layers are compiled gives what the plain one gives, not compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from mstplan.train import minisequence

from .llama import CHUNKS, difference, head_rows, small_llama, step, tokens

EXACT = 1e-10  # float64; aot_eager runs the same operations
INDUCTOR = 1e-6  # it orders sums anew, and llama's norms are in float32 always
LENGTH = 13
pytestmark = [pytest.mark.filterwarnings("ignore:::torch"), pytest.mark.usefixtures("_fresh")]


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(backend: str | Callable[..., Any], order: str = "after", layers: int = 1, **settings: Any) -> nn.Module:
    """A model whose layers are compiled before or after it is wrapped."""
    model = small_llama(num_hidden_layers=layers)
    if order == "after":
        minisequence(model, **CHUNKS, **settings)
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model if order == "after" else minisequence(model, **CHUNKS, **settings)


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        ({"checkpoint": "none"}, "before"),
        ({"checkpoint": "none"}, "after"),
        ({"checkpoint": "layer"}, "before"),
        ({"checkpoint": "layer"}, "after"),
        ({"checkpoint": 2}, "after"),
        ({"offload": True}, "after"),
        ({"layer_in_chunks": True, "attention_groups": 1}, "before"),
        ({"layer_in_chunks": True, "attention_groups": 1}, "after"),
        ({"layer_in_chunks": True, "attention_groups": 1, "attention_on_host": True}, "after"),
    ],
)
def test_compiled_layers(settings, order):
    model, plain = compiled("aot_eager", order, layers=2, **settings), small_llama()
    for ids in (tokens(2, LENGTH), tokens(2, LENGTH, seed=2), tokens(1, LENGTH + 4)):
        assert difference(step(model, ids), step(plain, ids)) < EXACT


def test_it_is_compiled_and_in_chunks():
    """Else the tests above would show nothing."""
    graphs = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph.graph)
        return graph.forward

    model, together = compiled(backend, checkpoint="none"), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda _m, inputs, _o: together.append(inputs[0].shape[:-1].numel())
    )
    with head_rows() as head:
        step(model, tokens(2, LENGTH))
    assert sum("linear" in str(node.target) for graph in graphs for node in graph.nodes) >= 4  # attention's matrices
    assert max(together) == 2 * -(-LENGTH // CHUNKS["mlp_chunks"])
    assert max(head) == 2 * -(-LENGTH // CHUNKS["loss_chunks"])


def test_compiled_layers_evaluate_and_train_again():
    model, plain = compiled("aot_eager", checkpoint="none"), small_llama(num_hidden_layers=1)
    ids = tokens(2, LENGTH)
    wanted = step(plain, ids)
    assert difference(step(model, ids), wanted) < EXACT
    with torch.no_grad():
        assert torch.allclose(model.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits, rtol=1e-6)
    assert difference(step(model.train(), ids), wanted) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["none", "layer"])
def test_inductor(checkpoint):
    ids = tokens(2, LENGTH)
    model, wanted = compiled("inductor", checkpoint=checkpoint), step(small_llama(num_hidden_layers=1), ids)
    for _ in range(2):
        assert difference(step(model, ids), wanted) < INDUCTOR
