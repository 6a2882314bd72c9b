"""`minisequence` and `minisequence.undo`: what they leave alone, what they refuse, and models in other hands."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from mstplan.errors import ModelError, RecipeError
from mstplan.train import minisequence

from .families import FAMILIES, small_batch, small_model
from .test_exact import assert_equal, step

CHUNKS = {"mlp_chunks": 3, "loss_chunks": 4}


def patched(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if any(key.startswith("_mstplan") or key == "forward" for key in vars(module))
    ]


def test_everything_else_stays_as_it_was(tmp_path):
    model = small_model("llama")
    ids, labels = small_batch(2, 13)
    keys, logits = list(model.state_dict()), model(input_ids=ids).logits.detach()
    generated = model.eval().generate(ids, max_new_tokens=4, do_sample=False)
    evaluated = model(input_ids=ids, labels=labels)
    minisequence(model.train(), **CHUNKS)
    assert list(model.state_dict()) == keys
    with pytest.warns(UserWarning, match="without labels"):
        assert torch.allclose(model(input_ids=ids).logits, logits, rtol=1e-12)
    assert torch.allclose(model(input_ids=ids).logits, logits, rtol=1e-12)  # said once is enough
    assert model(input_ids=ids, labels=labels).logits is None
    assert torch.equal(model.eval().generate(ids, max_new_tokens=4, do_sample=False), generated)
    assert torch.allclose(model(input_ids=ids, labels=labels).logits, evaluated.logits)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    minisequence(again, **CHUNKS)


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_leaves_nothing_behind(family):
    model = small_model(family)
    before = [(name, sorted(vars(module)), len(module._forward_hooks)) for name, module in model.named_modules()]
    ids, labels = small_batch(1, 8)
    minisequence(model, **CHUNKS, checkpoint=2, offload=True)
    step(model, ids, labels)
    assert patched(model)
    minisequence.undo(model)
    assert [
        (name, sorted(vars(module)), len(module._forward_hooks)) for name, module in model.named_modules()
    ] == before
    assert minisequence.undo(model) is model  # nothing to undo is fine


def test_undo_restores_checkpointing_as_it_was():
    model = small_model("llama")
    model.activation_checkpointing_enable()
    minisequence.undo(minisequence(model, **CHUNKS, checkpoint="sqrt"))
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    ids, labels = small_batch(1, 8)
    wanted = step(small_model("llama"), ids, labels)
    assert_equal(step(model, ids, labels), wanted)


def test_checkpointing_stays_as_told_when_a_trainer_switches_it_on():
    model = minisequence(small_model("llama"), **CHUNKS, checkpoint=2, offload=True)
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert [layer._gradient_checkpointing_func for layer in model.model.layers] == functions


@pytest.mark.parametrize("settings", [{"offload": True}, {"layer_in_chunks": True, "attention_groups": 1}])
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_a_deep_copy_runs_on_its_own_weights(family, settings):
    model = minisequence(small_model(family), **CHUNKS, **settings)
    ids, labels = small_batch(1, 8)
    wanted = step(model, ids, labels)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert_equal(step(twin, ids, labels), wanted)
    minisequence.undo(twin)
    assert not patched(twin) and patched(model)


def test_an_earlier_forward_of_the_instance_is_kept():
    """accelerate and others put their own forward on a module: it runs inside, and comes back."""
    model = small_model("llama")
    calls, mlp = [], model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = counted = lambda x: (calls.append(x.shape[-2]), plain(x))[1]
    ids, labels = small_batch(1, 8)
    wanted = step(model, ids, labels)
    minisequence(model, **CHUNKS)
    calls.clear()
    assert_equal(step(model, ids, labels), wanted)
    assert max(calls) == 4  # of the tokens tried out first; chunks have 3
    assert minisequence.undo(model).model.layers[0].mlp.forward is counted


def test_labels_by_position_and_outputs_as_a_tuple():
    model = small_model("llama")
    ids, labels = small_batch(1, 8)
    plain = model(ids, labels=labels, return_dict=False)
    minisequence(model, **CHUNKS)
    by_position = model(ids, None, None, None, None, labels)
    assert by_position.logits is None and torch.allclose(by_position.loss, plain[0])
    assert len(model(ids, labels=labels, return_dict=False)) == len(plain) - 1


def test_hidden_states_by_name():
    model = minisequence(small_model("llama"), **CHUNKS, checkpoint="none")
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 8, 32, dtype=torch.float64)
    assert torch.allclose(mlp(x=x) + 0, mlp(x) + 0)


def test_a_failed_forward_does_no_harm():
    model = small_model("llama", num_hidden_layers=3)
    ids, labels = small_batch(1, 8)
    wanted = step(model, ids, labels)
    minisequence(model, **CHUNKS, checkpoint=2, offload=True)
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(ValueError("stop"))
    )
    with pytest.raises(ValueError, match="stop"):
        model(input_ids=ids, labels=labels)
    handle.remove()
    assert_equal(step(model, ids, labels), wanted)


# ---- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[({name: bad}, name) for name in ("mlp_chunks", "loss_chunks") for bad in (0, -1, 1.5, True, "4")],
        *[({"checkpoint": bad}, "checkpoint must be") for bad in (0, -1, 1.5, True, "all", None)],
        ({"offload": 1}, "offload must be"),
        ({"offload": True, "checkpoint": "none"}, "offload needs checkpointing"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    model = small_model("llama")
    with pytest.raises(RecipeError, match=message):
        minisequence(model, **settings)
    assert not patched(model)


@pytest.mark.parametrize(
    ("setting", "near"),
    [("chunks", "mlp_chunks, loss_chunks"), ("offloading", "offload"), ("checkpointing", "checkpoint")],
)
def test_a_setting_that_there_is_not_gets_the_near_names(setting, near):
    with pytest.raises(RecipeError, match=f"no setting '{setting}'. Did you mean {near}") as refused:
        minisequence(small_model("llama"), **{setting: 4})
    assert str(refused.value).endswith(
        "\nKnown: mlp_chunks, loss_chunks, checkpoint, offload, layer_in_chunks, attention_groups, attention_on_host, kernels, plan, "
        "sequence_parallel."
    )


def test_models_that_cannot_be_served_are_left_alone():
    model = small_model("llama")
    with pytest.raises(ModelError, match="no LM head"):
        minisequence(model.model, **CHUNKS)
    with pytest.raises(ModelError, match="no LM head"):
        minisequence(nn.Linear(2, 2), **CHUNKS)
    del model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj
    del model.model.layers[1].mlp
    with pytest.raises(ModelError, match="no MLP found in LlamaDecoderLayer"):
        minisequence(model, **CHUNKS)
    assert not patched(model)


def test_twice_is_refused():
    model = minisequence(small_model("llama"), **CHUNKS)
    with pytest.raises(ModelError, match="already"):
        minisequence(model, **CHUNKS)


def test_an_mlp_that_looks_at_other_tokens_is_refused():
    model = small_model("llama")
    plain = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: plain(x + x.mean(-2, keepdim=True))
    minisequence(model, **CHUNKS)
    ids, labels = small_batch(1, 8)
    with pytest.raises(ModelError, match="tokens beside it"):
        model(input_ids=ids, labels=labels)


def test_what_cannot_be_recorded_between_two_matrices_is_refused():
    model = small_model("opt")
    layer = model.model.decoder.layers[1]
    del layer.activation_fn
    layer.activation_fn = lambda x: torch.cumsum(x, -2)
    minisequence(model, **CHUNKS)
    ids, labels = small_batch(1, 8)
    with pytest.raises(ModelError, match="cumsum on the output of its first Linear"):
        model(input_ids=ids, labels=labels)


def test_router_losses_are_refused():
    model = minisequence(small_model("mixtral"), **CHUNKS)
    ids, labels = small_batch(1, 8)
    with pytest.raises(ModelError, match="output_router_logits"):
        model(input_ids=ids, labels=labels, output_router_logits=True)
    minisequence(minisequence.undo(model), mlp_chunks=1, loss_chunks=4)
    assert model(input_ids=ids, labels=labels, output_router_logits=True).aux_loss is not None


def test_label_smoothing_is_refused():
    model = small_model("llama")
    ids, labels = small_batch(1, 8)

    def smoothed(logits, labels, **_):
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)

    model.loss_function = smoothed
    minisequence(model, **CHUNKS)
    with pytest.raises(ModelError, match=r"label smoothing \(0.1\)"):
        model(input_ids=ids, labels=labels)


def test_a_trainer_that_computes_the_loss_itself_is_refused():
    """Trainer with label smoothing takes the labels out of the batch and leaves the number of tokens in."""
    model = minisequence(small_model("llama"), **CHUNKS)
    ids, _ = small_batch(1, 8)
    with pytest.raises(ModelError, match="label_smoothing_factor"):
        model(input_ids=ids, num_items_in_batch=torch.tensor(7))
    with torch.no_grad():
        assert model(input_ids=ids, num_items_in_batch=torch.tensor(7)).logits.shape == (1, 8, 61)


def test_unknown_use_of_the_logits_is_refused_not_ignored():
    model = minisequence(small_model("llama"), **CHUNKS)
    ids, labels = small_batch(1, 8)
    model.lm_head.register_forward_hook(lambda *args: args[2].argmax(-1))
    with pytest.raises(ModelError, match="argmax"):
        model(input_ids=ids, labels=labels)


def test_a_loss_past_the_head_is_refused():
    model = minisequence(small_model("llama"), **CHUNKS)
    model.get_output_embeddings = lambda: nn.Linear(32, 61)
    ids, labels = small_batch(1, 8)
    with pytest.raises(ModelError, match="past its LM head"):
        model(input_ids=ids, labels=labels)


def test_the_loss_is_backpropagated_once():
    model = minisequence(small_model("llama"), **CHUNKS)
    ids, labels = small_batch(1, 8)
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_without_torch_one_line_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None\ntry: from mstplan import minisequence\nexcept ImportError as e: print(e)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.count("\n") == 1 and "pip install 'mstplan[torch]'" in said


def test_it_says_what_it_did(caplog):
    """In a line for a model, and with each new length the chunks that were chosen."""
    caplog.set_level("INFO", logger="mstplan")
    model = small_model("llama")
    assert minisequence.describe(model) == "LlamaForCausalLM is not wrapped"
    minisequence(model, mlp_chunks=3, loss_chunks=4, checkpoint=2, offload=True)
    said = "MLP in 3 chunks, loss in 4 chunks, checkpoints over 2 layers, layer inputs in CPU RAM"
    assert minisequence.describe(model) == f"LlamaForCausalLM: {said}" and said in caplog.text
    minisequence.undo(model)
    minisequence(model)
    assert "in as many chunks as recommended" in minisequence.describe(model)
    ids, labels = small_batch(1, 16)
    for _ in range(2):
        model(input_ids=ids, labels=labels).loss.backward()
    assert caplog.text.count("1 x 16 tokens in 1 (MLP) and 1 (loss) chunks") == 1
