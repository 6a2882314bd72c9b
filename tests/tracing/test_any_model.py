"""What models of all kinds need of a trace, and how those that cannot be traced are refused."""

from __future__ import annotations

import gc
import json
import logging
import logging.handlers
from pathlib import Path

import pytest
import transformers
from transformers import GPT2Config, PreTrainedConfig, dynamic_module_utils

from mstplan.errors import ModelError
from mstplan.step.instants import Pass
from mstplan.step.recipe import Recipe
from mstplan.tracing.recorder import Recorder
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import _shorten_settings, trace, trace_settings
from mstplan.train.step import build_model, read_settings, vocabulary_of

from .survey import PLAIN, compare, settings_of
from .tiny import TINY

OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(__file__).with_suffix(".ran").touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def settings(name: str) -> PreTrainedConfig:
    return settings_of(getattr(transformers, name))


def shapes(traced: Trace) -> set[tuple[int, ...]]:
    return {storage.shape for storage in traced.step.storages}


@pytest.mark.parametrize(
    ("name", "asker"),
    [
        ("DbrxForCausalLM", r"aten\.nonzero\.default of DbrxExperts \(transformer\.blocks\.0\.ffn\.experts\)"),
        (
            "JetMoeForCausalLM",
            r"aten\._local_scalar_dense\.default of JetMoeTopKGating \(model\.layers\.0\.self_attention",
        ),
        # Whichever asks first: once torch.compile has run in this process, distributions no longer look at their logits.
        ("BltForCausalLM", r"aten\.(_local_scalar_dense|nonzero)\.default of BltPatcher \(model\.patcher\)"),
    ],
)
def test_what_depends_on_values_is_named_with_what_asks_for_them(name, asker):
    with pytest.raises(
        ModelError, match=rf"^{name} needs the values of tensors in {asker}.*weights.*\n.*formula rung.*mstplan measure"
    ):
        trace_settings(settings(name), Recipe(), 13)


@pytest.mark.parametrize("name", ["XLMWithLMHeadModel", "XmodForCausalLM", "Qwen4ExpForCausalLM"])
def test_values_that_all_steps_have_in_common_are_no_hindrance(name):
    """No token is padding, every sequence is in the configured language, a token sees those before it."""
    finding = compare(settings(name), PLAIN, 13)
    assert finding.outcome == "traced", finding.reason


@pytest.mark.parametrize(("name", "kind"), [("GitForCausalLM", ValueError), ("XLNetLMHeadModel", RuntimeError)])
def test_a_failure_of_the_models_own_code_is_told_with_its_name(name, kind):
    log, said = logging.getLogger("torch._subclasses.fake_tensor"), logging.handlers.BufferingHandler(99)
    log.addHandler(said)
    try:
        with pytest.raises(
            ModelError, match=f"^{name} makes no training step of token ids and labels alone: {kind.__name__}: "
        ) as raised:
            trace_settings(settings(name), Recipe(), 13)
    finally:
        log.removeHandler(said)
    assert isinstance(raised.value.__cause__, kind)
    assert not said.buffer  # torch would write whole stacks


def test_a_mask_of_ones_is_no_mask():
    """Bart makes one for itself; on a card the model looks at it and leaves it out."""
    traced = trace_settings(settings("BartForCausalLM"), Recipe(), 47)
    assert not [shape for shape in shapes(traced) if shape[-2:] == (47, 47)]
    assert any(storage.operation == "flash: log-sum-exp" for storage in traced.step.storages)


@pytest.mark.parametrize("precision", ["mixed", "fp32"])
def test_experts_in_other_precisions(precision):
    traced = trace_settings(settings("MixtralForCausalLM"), Recipe(precision=precision), 16)
    assert any(storage.operation == "_grouped_mm" and storage.dtype == "float32" for storage in traced.step.storages)


@pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe(accumulation=2), Recipe(optimizer_in_backward=True)],
    ids=["plain", "accumulated", "in backward"],
)
def test_weights_that_are_not_trained_have_no_gradients_and_no_states(recipe):
    """Ernie's routers have a correction that its loss does not move."""
    traced = trace_settings(settings("Ernie4_5_MoeForCausalLM"), recipe, 16)
    frozen = [weight for weight in traced.weights if not weight.trained and "e_score_correction" in weight.name]
    trained = sum(weight.trained for weight in traced.weights)
    assert frozen and sum(state.name == "exp_avg" for state in traced.states) == trained


def test_a_module_that_all_layers_share_is_of_the_layer_that_runs_it():
    traced = trace_settings(settings("OpenAIGPTLMHeadModel"), Recipe(), 13)
    assert traced.units > len(traced.kept)
    for run in (Pass.FORWARD, Pass.BACKWARD):
        units = {
            place.unit
            for place, span in traced.short.blocks()
            for event in span
            if place.run == run and "act" in traced.short.storages[traced.short.events[event][0]].module.split(".")
        }
        assert units == set(range(len(traced.kept))), run


def test_a_reversible_model_is_run_whole():
    """Reformer goes forward and backward through all its layers in one node of autograd's graph."""
    traced = trace_settings(settings("ReformerModelWithLMHead"), Recipe(precision="fp32"), 12)
    assert len(traced.kept) == traced.units == 6


def test_a_buffer_that_a_model_replaces_leaves_no_gap():
    """CTRL lets go of one on its way; what is made at the same address later is seen all the same."""
    sizes = {tuple(trace_settings(settings("CTRLLMHeadModel"), Recipe(), 13, whole=True).live) for _ in range(4)}
    assert len(sizes) == 1


def test_settings_of_single_layers_move_with_them():
    """Gemma 4 gives some layers a head size of their own, by their number."""
    gemma = settings("Gemma4UnifiedForCausalLM")
    assert [layer.head_dim for layer in gemma.per_layer_config] == [8, 8, 8, 8, 8, 16]
    _shorten_settings(gemma, 6, [0, 1, 5])
    assert [layer.head_dim for layer in gemma.per_layer_config] == [8, 8, 16]
    assert gemma.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]


def test_flash_attention_of_its_own():
    gptj = settings("GPTJForCausalLM")
    with pytest.raises(ModelError, match="GPTJForCausalLM has flash attention of its own"):
        trace_settings(gptj, Recipe(attention="flash"), 13)
    assert (1, 4, 13, 13) in shapes(trace_settings(gptj, Recipe(), 13))  # no sdpa either: scores are made


def test_nothing_is_kept_of_a_model():
    def kept() -> int:
        gc.collect()
        return sum(type(thing) is Recorder for thing in gc.get_objects())

    before = kept()
    traced = trace(TINY, Recipe(), 16)
    assert kept() == before and traced.peaks


def test_settings_stay_as_they_are():
    made = GPT2Config(n_layer=6, n_embd=32, n_head=4, vocab_size=61, bos_token_id=1, eos_token_id=2)
    before = made.to_dict()
    trace_settings(made, Recipe(), 13)
    assert made.to_dict() == before


def test_tokens_are_those_that_are_read_and_told_apart():
    assert vocabulary_of(build_model(settings("MllamaForCausalLM"), Recipe(), "eager", "meta")) == 61  # it reads 8 more
    assert (
        vocabulary_of(build_model(settings("InklingForCausalLM"), Recipe(), "eager", "meta")) == 61
    )  # its head has 3 more


@pytest.mark.parametrize("kind", ["own", None, ["llama"], {}])
def test_code_that_is_not_in_transformers(kind):
    with pytest.raises(ModelError, match="has no code for this model"):
        read_settings({**TINY, "model_type": kind})


def test_code_of_its_own_runs_when_asked_only(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = _with_own_code(tmp_path / "own_model")
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"\n--trust-remote-code"):
        trace(config, Recipe(), 16)
    with pytest.raises(
        ModelError, match="cannot build"
    ):  # transformers knows the type, but no causal language model of it
        trace({**config, "model_type": "clip", "_name_or_path": str(folder)}, Recipe(), 16)
    assert not list(tmp_path.rglob("*.ran"))
    own = trace(config, Recipe(), 16, code_from=str(folder))
    assert list(tmp_path.rglob("*.ran"))
    assert own.peaks == trace({**config, "model_type": "llama", "auto_map": {}}, Recipe(), 16).peaks


def _with_own_code(folder: Path) -> Path:
    folder.mkdir()
    (folder / "own.py").write_text(OWN_CODE)
    own = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps({**TINY, "architectures": ["OwnForCausalLM"], **own}))
    return folder
