"""PyTorch's own MemTracker on the same fake step: equal totals."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from mstplan.step.instants import Pass
from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing.cuda_stand_ins import as_on_cuda
from mstplan.tracing.fake_runtime import FakeCardRuntime
from mstplan.tracing.recorder import Recorder
from mstplan.tracing.recording import largest
from mstplan.tracing.tracer import _label_modules as labels_of
from mstplan.train.step import TrainingStep, build_model, read_settings

from .tiny import TINY

# Not `mst`: MemTracker's hooks fail on modules that run inside of another autograd function, as an MLP's chunks do.
RECIPES = [Recipe(), strategy("checkpoint"), Recipe(checkpoint=2, batch=2), Recipe(precision="mixed")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_equal_totals(recipe):
    """Both run under a dispatch mode, so gradients are added out of place for both; MemTracker counts bytes as requested."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(read_settings(TINY), recipe, "sdpa", "cpu")
        recorder = Recorder(labels_of(model), TINY["num_hidden_layers"], in_place=False)
        with as_on_cuda(recorder):
            step = TrainingStep(model, recipe, 1024, FakeCardRuntime(recorder))
            recorder.add_residents([*model.parameters(), *model.buffers(), step.tokens, step.labels])
            with recorder, recorder.watch_modules(model):
                recorder.begin_pass(Pass.FORWARD)
                loss = step.forward()
                recorder.begin_pass(Pass.BACKWARD)
                loss.backward()
        ours = largest(recorder.close().live())[0]
    unused = Recorder({}, 0)
    with FakeTensorMode(allow_non_fake_inputs=True), as_on_cuda(unused):
        model = build_model(read_settings(TINY), recipe, "sdpa", "cpu")
        step = TrainingStep(model, recipe, 1024, FakeCardRuntime(unused))
        tracker = MemTracker()
        tracker.track_external(model, step.tokens, step.labels)
        with tracker:
            before = tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"]
            step.forward().backward()
        theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert ours == theirs - before
