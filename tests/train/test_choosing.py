"""`minisequence(model, plan=...)`: a recipe's strategy, or the fastest that fits the batches that come."""

from __future__ import annotations

import logging

import pytest
import torch

from mstplan import card, strategy
from mstplan.errors import ModelError, RecipeError
from mstplan.plan.solve import plan_at
from mstplan.spec.config import read_config
from mstplan.step.recipe import STRATEGIES, Recipe, strategy_of
from mstplan.train import choosing, minisequence

from .families import small_batch, small_model
from .test_exact import assert_equal, step

LONG = 4096


def long_model() -> torch.nn.Module:
    return small_model("llama", num_hidden_layers=4, vocab_size=4096).bfloat16()


def with_memory(monkeypatch: pytest.MonkeyPatch, size: int, host: int | None = None) -> None:
    monkeypatch.setattr(choosing, "card_of", lambda _device: card(memory=size))
    monkeypatch.setattr(choosing, "free_host_memory", lambda: host)


def plans(size: int, tokens: int) -> dict[str, int]:
    """Peaks of the strategies, in bytes."""
    model = long_model()
    described = read_config(model.config.to_dict(), "llama")
    recipes = {name: recipe.changed(attention="eager") for name, recipe in STRATEGIES.items()}
    return {name: plan_at(described, recipe, card(memory=size), tokens).peak_bytes for name, recipe in recipes.items()}


@pytest.mark.parametrize("memory", [1 << 30, 3 << 30, 40 << 30])
def test_the_fastest_that_fits_is_chosen(memory, monkeypatch, caplog):
    """Little memory asks for more than much memory does, and nothing that is chosen needs more than there is."""
    with_memory(monkeypatch, memory)
    try:
        chosen = choosing.choose(long_model(), 1, LONG, autocast=False)
    except RecipeError:
        assert min(plans(memory, LONG).values()) > card(memory=memory).budget_bytes
        return
    fitting = [name for name, peak in plans(memory, LONG).items() if peak <= card(memory=memory).budget_bytes]
    name = strategy_of(chosen)
    assert name in fitting
    if "standard" in fitting:
        assert name == "standard"
    assert f"for 1 x {LONG:,} tokens" in caplog.text


def test_attention_goes_to_the_host_where_nothing_else_fits(monkeypatch, caplog):
    """In the least memory with which it fits, and not where a strategy fits without."""
    monkeypatch.setattr(choosing, "attention_of", lambda _config: "sdpa")
    model = small_model("llama", num_hidden_layers=4, hidden_size=512, intermediate_size=1024, head_dim=128).bfloat16()
    chosen = {}
    for size in range(2 << 30, 6 << 30, 1 << 28):
        with_memory(monkeypatch, size)
        try:
            chosen[size] = choosing.choose(model, 1, 1 << 18, autocast=False).attention_on_host
        except RecipeError:
            assert not chosen
    sizes = [size for size, on_host in chosen.items() if on_host]
    assert sizes and max(sizes) < min(size for size, on_host in chosen.items() if not on_host)
    assert "chose mst-layer-offload with attention_on_host for" in caplog.text


def test_a_length_that_nothing_trains_is_refused(monkeypatch):
    with_memory(monkeypatch, 1 << 30)
    model = long_model()
    minisequence(model, plan="auto")
    ids = torch.zeros(1, 1 << 20, dtype=torch.int64)
    with pytest.raises(RecipeError, match=r"no strategy trains 1 x 1,048,576 tokens of LlamaForCausalLM.*\nShorten"):
        model(input_ids=ids, labels=ids)


def test_it_waits_for_the_first_training_step_and_for_longer_ones(caplog):
    caplog.set_level(logging.WARNING, "mstplan")
    model = small_model("llama")
    wanted = [step(model, *small_batch(*size)) for size in ((2, 13), (2, 9), (1, 20))]
    assert minisequence(model, plan="auto") is model
    assert "will be chosen in the first training step" in minisequence.describe(model)
    model.eval()(input_ids=small_batch(3, 40)[0])
    model.train()
    for size, each in zip(((2, 13), (2, 9), (1, 20)), wanted, strict=True):
        assert_equal(step(model, *small_batch(*size)), each)
    lines = [r.getMessage() for r in caplog.records if "chose" in r.getMessage()]
    assert ["2 x 13" in lines[0], "2 x 20" in lines[1]] == [True, True] and len(lines) == 2
    minisequence.undo(model)
    assert_equal(step(model, *small_batch(1, 20)), wanted[2])
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_recipe_is_followed(name):
    model, (ids, labels) = small_model("llama"), small_batch(2, 13)
    wanted = step(model, ids, labels)
    minisequence(model, plan=strategy(name))
    assert_equal(step(model, ids, labels), wanted)


def test_what_a_recipe_asks_of_others_is_refused():
    model = small_model("llama")
    for recipe, what in (
        (Recipe(loss="liger", checkpoint="layer"), "the loss liger"),
        (Recipe(offload="saved-tensors"), "saved tensors in CPU RAM"),
        (Recipe(mlp_chunks=4), "MLP chunks that are not recomputed"),
    ):
        with pytest.raises(RecipeError, match=f"does not see to {what}"):
            minisequence(model, plan=recipe)
    with pytest.raises(RecipeError, match="plan must be 'auto' or a Recipe, not 'fast'"):
        minisequence(model, plan="fast")
    with pytest.raises(RecipeError, match="plan says all that the other settings say"):
        minisequence(model, plan="auto", offload=True)
    minisequence(model, plan="auto")
    with pytest.raises(ModelError, match="runs in mini-sequences already"):
        minisequence(model)


def test_adapters_are_seen():
    peft = pytest.importorskip("peft")
    model = small_model("llama").bfloat16()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).base_model.model
    recipe = choosing._recipe_of(adapted, 2, autocast=False)
    assert (recipe.lora_rank, recipe.lora_targets, recipe.adapter_dtype) == (4, ("down_proj", "q_proj"), "fp32")
    assert (recipe.batch, recipe.precision, recipe.attention) == (2, "bf16", "eager")
    assert choosing._recipe_of(small_model("llama").float(), 1, autocast=True).precision == "mixed"
