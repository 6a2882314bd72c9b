"""Adapters on mixtures of experts: which parameters get one is what peft does; what each of them makes, and what is refused."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan.errors import RecipeError
from mstplan.plan.layout import layout_of, step_sizes
from mstplan.spec.catalog import load_config, load_model
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.spec.model import Model
from mstplan.step.expert_adapters import has_adapted_experts
from mstplan.step.instants import Instant
from mstplan.step.recipe import STRATEGIES, Recipe, strategy
from mstplan.step.steps import Chunks, Step, step

H100 = card("h100")
WRAPPED = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite", "deepseek-v3")
LAYERS = 4  # of DeepSeek-V3 the first three are dense
LENGTHS = st.integers(1, 32).map(lambda n: 256 * n)
STRATEGY = st.sampled_from(sorted(STRATEGIES))


def small_config(name: str) -> dict[str, object]:
    config = {**load_config(name), "num_hidden_layers": LAYERS}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:LAYERS]
    return config


def small(name: str) -> Model:
    return read_config(small_config(name), name)


def step_of(model: Model, recipe: Recipe, seq_len: int = 512) -> tuple[Step, Chunks]:
    chunks = Chunks(*(4 if count == "auto" else count for count in (recipe.mlp_chunks, recipe.loss_chunks)))
    fixed = chunks.put_into(recipe)
    return step(model, layout_of(model, fixed, chunks, seq_len, H100.platform), H100.gpu.workspaces_bytes), chunks


def instants(model: Model, recipe: Recipe, seq_len: int) -> dict[Instant, int]:
    whole, chunks = step_of(model, recipe, seq_len)
    return {each.name: each.bytes for each in whole.instants(step_sizes(recipe, seq_len, chunks))}


# ---- as peft does ---------------------------------------------------------------------------------------------------------


def of_peft(name: str, recipe: Recipe) -> Counter[tuple[str, tuple[int, ...], str]]:
    """(name within its layer, shape, dtype) of adapters' weights, and how often there are such."""
    pytest.importorskip("peft")
    from mstplan.train.step import build_model, read_settings

    model = build_model(read_settings(small_config(name)), recipe, "eager", "meta")
    found = [
        (n.split(".", 3)[-1], tuple(w.shape), str(w.dtype)[6:]) for n, w in model.named_parameters() if "lora_" in n
    ]
    return Counter(found)


def of_formula(name: str, recipe: Recipe) -> Counter[tuple[str, tuple[int, ...], str]]:
    weights = step_of(small(name), recipe)[0].weights
    found: Counter[tuple[str, tuple[int, ...], str]] = Counter()
    for weight, times in weights:
        if "lora_" in weight.name:
            found[weight.name, weight.shape, weight.dtype] += times
    return found


TARGETS = (
    "all-linear",
    "attention",
    "gate",
    "gate,o_proj",
    "down_proj",
    "gate_proj,up_proj",
    "up_proj,o_proj,gate_proj",
)
OF_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
CASES = [
    *((name, targets) for name in WRAPPED for targets in TARGETS),
    *(("gpt-oss-20b", targets) for targets in ("all-linear", "attention")),
]


@pytest.mark.filterwarnings("ignore:::(peft|transformers)")
@pytest.mark.parametrize(("name", "targets"), CASES)
def test_pefts_own_names_and_shapes(name, targets):
    """DeepSeek's shared experts and first layers' MLPs are linear layers, but go by the experts' names: peft takes them for those."""
    words = targets.split(",")
    if name == "mixtral-8x7b":
        words = [OF_MIXTRAL.get(word, word) for word in words]
    recipe = Recipe(lora_rank=8, lora_targets=tuple(words))
    ours = of_formula(name, recipe)
    assert ours and ours == of_peft(name, recipe)


def test_gate_and_up_share_an_adapter_of_twice_the_rank():
    model = small("mixtral-8x7b")
    rows = of_formula("mixtral-8x7b", Recipe(lora_rank=16))
    experts, d, width = model.experts.number, model.hidden, model.experts.width
    inner = "mlp.experts.base_layer"
    assert rows[f"{inner}.lora_A.default.weight", (32 * experts, d), "float32"] == LAYERS
    assert rows[f"{inner}.lora_B.default.weight", (2 * width, 32 * experts), "float32"] == LAYERS
    assert rows["mlp.experts.lora_A.default.weight", (16 * experts, width), "float32"] == LAYERS
    assert rows["mlp.gate.lora_B.default.weight", (experts, 16), "float32"] == LAYERS


# ---- bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_every_layer_keeps_new_weights_and_gets_gradients_as_large(name):
    """Without checkpoints those of all layers are there when backward begins; and one gradient, of the last product, beside them."""
    model = small(name)
    down = 2 * model.experts.number * model.hidden * model.experts.width  # bytes
    sums = {"mlp.experts.gate_up_proj + B A": 2 * down, "mlp.experts.down_proj + B A": down}
    recipe = strategy("standard", lora_rank=1)
    whole, chunks = step_of(model, recipe)
    found = {each.name: each.entries for each in whole.instants(step_sizes(recipe, 512, chunks))}
    at_loss = {entry.name: entry.bytes for entry in found[Instant.LOSS]}
    assert {key: at_loss[key] for key in sums} == {key: LAYERS * size for key, size in sums.items()}
    (gradient,) = (e for e in found[Instant.LAST_LAYER] if e.name.startswith("grad") and e.name.endswith("+ B A"))
    assert gradient.bytes == next(size for key, size in sums.items() if gradient.name.endswith(key))


@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(WRAPPED), chosen=STRATEGY, rank=st.integers(1, 64), length=LENGTHS)
def test_experts_adapters_never_need_more_than_full_fine_tuning_where_layers_are_checkpointed(
    name, chosen, rank, length
):
    if STRATEGIES[chosen].checkpoint == "none":
        chosen = "checkpoint"
    model = small(name)
    lora = strategy(chosen, lora_rank=rank, adapter_dtype="bf16")
    assert max(instants(model, lora, length).values()) <= max(instants(model, strategy(chosen), length).values())


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(WRAPPED),
    chosen=STRATEGY,
    ranks=st.tuples(st.integers(1, 256), st.integers(1, 256)).map(sorted),
    dtype=st.sampled_from(["fp32", "bf16"]),
    length=LENGTHS,
)
def test_no_instant_needs_less_with_a_larger_rank(name, chosen, ranks, dtype, length):
    fewer, more = (
        instants(small(name), strategy(chosen, lora_rank=rank, adapter_dtype=dtype), length) for rank in ranks
    )
    assert fewer.keys() == more.keys() and all(fewer[i] <= more[i] for i in fewer)


@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(WRAPPED), chosen=STRATEGY, rank=st.integers(1, 64), length=LENGTHS)
def test_training_the_adapters_by_their_names_is_the_same(name, chosen, rank, length):
    recipe = strategy(chosen, lora_rank=rank)
    by_name = recipe.changed(train=("lora_A", "lora_B"))
    assert instants(small(name), recipe, length) == instants(small(name), by_name, length)


@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(WRAPPED), chosen=STRATEGY, rank=st.integers(1, 64), length=LENGTHS)
def test_fewer_targets_need_no_more(name, chosen, rank, length):
    model = small(name)
    whole, attention = (
        max(instants(model, strategy(chosen, lora_rank=rank, lora_targets=(target,)), length).values())
        for target in ("all-linear", "attention")
    )
    assert attention < whole


# ---- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said", "way_out"),
    [
        ({"dora": True}, "refuses --dora for those", "Leave --dora out, or use --lora-targets attention."),
        ({"lora_dropout": 0.1}, "refuses --lora-dropout for those", "Leave --lora-dropout out"),
        ({"lora_targets": ("gate",), "dora": True}, "refuses --dora for those", "--lora-targets attention"),
        ({"lora_targets": ("w1", "q_proj")}, "w1 and w3 together only", "Name both in --lora-targets, or neither."),
        ({"lora_targets": ("down_proj",)}, "matches no linear layer", "q_proj,k_proj,v_proj,o_proj,w1,w3,w2,gate."),
        ({"offload": "saved-tensors"}, "only where every layer is checkpointed", "Add --checkpoint layer"),
        ({"mlp_chunks": 4}, "each MLP chunk would keep weights of its own", "Leave --no-recompute out"),
    ],
    ids=str,
)
def test_what_is_refused(fields, said, way_out):
    with pytest.raises(RecipeError) as e:
        step_of(small("mixtral-8x7b"), Recipe(lora_rank=16, **fields))
    first, second = str(e.value).splitlines()
    assert said in first and way_out in second


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_targets": ("attention",), "dora": True, "lora_dropout": 0.1},
        {"lora_targets": ("attention",), "offload": "saved-tensors"},
        {"lora_targets": ("attention",), "mlp_chunks": 4},
        {"offload": "saved-tensors", "checkpoint": "layer"},
    ],
    ids=str,
)
def test_the_ways_out_are_planned(fields):
    assert step_of(small("mixtral-8x7b"), Recipe(lora_rank=16, **fields))[0].trained > 0


def test_peft_refuses_the_same():
    pytest.importorskip("peft")
    from mstplan.train.step import build_model, read_settings

    with pytest.raises(RecipeError, match="refuses --lora-dropout and --dora for those"):
        build_model(read_settings(small_config("mixtral-8x7b")), Recipe(lora_rank=16, dora=True), "eager", "meta")
    recipe = Recipe(lora_rank=16, lora_targets=("w1",))
    with pytest.raises(RecipeError, match="w1 without also targeting w3"):
        build_model(read_settings(small_config("mixtral-8x7b")), recipe, "eager", "meta")


def test_of_a_family_that_is_not_known_nothing_is_guessed():
    config = {**small_config("qwen3-30b-a3b"), "model_type": "novel_moe"}
    model = read_config(config, "novel", assume="llama-like")
    assert has_adapted_experts(model)
    with pytest.raises(RecipeError, match="does not know whether peft adapts the experts of novel") as e:
        step_of(model, Recipe(lora_rank=16))
    assert "--lora-targets attention" in str(e.value)
    assert step_of(model, Recipe(lora_rank=16, lora_targets=("attention",)))[0].trained > 0


def test_whose_experts_are_adapted():
    assert all(has_adapted_experts(load_model(name)) for name in WRAPPED)
    assert not any(has_adapted_experts(load_model(name)) for name in ("gpt-oss-20b", "llama3.1-8b"))
