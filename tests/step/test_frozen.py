"""Weights that are not trained: the step model against transformers' own code on fake tensors, where they are frozen by hand,
and against what an H100 measured."""

import json
import warnings
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import transformers
from hypothesis import given
from hypothesis import strategies as st

from mstplan import profiles
from mstplan.measuring.measurement import read_results, slice_config
from mstplan.plan.layout import step_sizes
from mstplan.plan.solve import max_seq, plan_at
from mstplan.spec.catalog import load_config
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.recipe import STRATEGIES, Recipe
from mstplan.step.selection import TOWERS, WeightKind
from mstplan.step.steps import Chunks, Layout, Step

from .fake_step import PHASES, SMALL_VOCABULARY, cut, planned, run_step
from .strategies import cards, models, recipes

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", category=UserWarning)

EXACT = 0.0005
LAYERS = 4
FAMILIES = ("llama3.1-8b", "qwen2-7b", "gemma3-1b", "olmo2-7b", "phi3-mini-4k", "gpt2", "pythia-1.4b", "qwen3-30b-a3b")
TIED = ("gemma3-1b", "gpt2")
NO_AUTOCAST = ("qwen3-30b-a3b",)  # fake tensors have no grouped product in fp32


def _layer(name):
    """The number of the layer that a weight is in."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _is_attention(name):
    return "_norm." not in name and any(f".{part}." in name for part in ("self_attn", "attn", "attention"))


def _of_the_head(family, name):
    return any(part in name for part in (("embed_tokens", "wte") if family in TIED else ("lm_head",)))


SELECTIONS = {
    "embeddings frozen": (
        {"freeze": ("embeddings",)},
        lambda family, name: not any(part in name for part in ("embed_tokens", "embed_in", "wte", "wpe")),
    ),
    "all but the head frozen": ({"train": ("head",)}, _of_the_head),
    "MLPs": ({"train": ("mlp",)}, lambda family, name: ".mlp." in name),
    "norms": ({"train": ("norms",)}, lambda family, name: "norm" in name or ".ln_" in name),
    "every second layer": ({"train": ("*.1.*", "*.3.*")}, lambda family, name: _layer(name) in (1, 3)),
    "attention of the last layer": (
        {"train": ("attention",), "freeze": ("*.0.*", "*.1.*", "*.2.*")},
        lambda family, name: _layer(name) == LAYERS - 1 and _is_attention(name),
    ),
}
"""What a recipe says, and the same of a weight's name, found by other means."""

CHUNKS = {"checkpoint": "layer", "mlp_chunks": 4, "mlp_recompute": True, "loss": "chunked", "loss_chunks": 8}
WAYS = {
    "plain": {},
    "checkpoints of transformers": {"checkpoint": "layer", "input_gradients": True},
    "chunks": CHUNKS,
    "offload": {**CHUNKS, "offload_layer_inputs": True},
    "accumulation": {"accumulation": 2},
    "chunks and accumulation": {**CHUNKS, "accumulation": 2},
    "optimizer in backward": {"optimizer_in_backward": True},
    "mixed": {"precision": "mixed"},
    "eager": {"attention": "eager"},
}


def _config(family):
    config = cut(family, LAYERS, **SMALL_VOCABULARY)
    return {**config, "layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma3-1b" else config


FEW = ("llama3.1-8b", "gpt2")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("family", [f if f in FEW else pytest.param(f, marks=pytest.mark.survey) for f in FAMILIES])
def test_every_phase_is_that_of_the_real_step(family, selection, way):
    if way == "mixed" and family in NO_AUTOCAST:
        pytest.skip("fake tensors have no grouped product in fp32")
    chosen, trains = SELECTIONS[selection]
    config, recipe, tokens = _config(family), Recipe(**WAYS[way], **chosen), 2048 if way == "eager" else 16384
    seen = run_step(config, recipe, tokens, trains=lambda name: trains(family, name))
    told = planned(config, recipe, tokens)
    for phase in told:
        assert told[phase] == pytest.approx(seen[phase].bytes, rel=EXACT), phase


def test_a_gradient_too_many_is_noticed():
    """The bound above is far below what frozen weights save."""
    config, recipe = _config("llama3.1-8b"), Recipe(train=("mlp",))
    assert max(planned(config, recipe, 16384).values()) < 0.9 * max(planned(config, Recipe(), 16384).values())


# ---- a card ---------------------------------------------------------------------------------------------------------

H100 = Path(__file__).parents[1] / "data" / "h100-2026-11-27"
CUBLAS = 2 * 33_554_432  # environment.json: of two handles, less the 32 KiB products that brought them in


MEASURED = [
    row
    for row in map(json.loads, (H100 / "recipes.jsonl").read_text().splitlines())
    if row["case"]["name"].startswith("frozen-")
]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row["case"]["name"])
def test_every_phase_is_that_of_an_h100(row):
    """Plain transformers, torch's fused AdamW, weights frozen by requires_grad_: nothing of mstplan."""
    case, config = row["case"], slice_config(load_config("llama3.1-8b"), row["case"]["layers"], "llama3.1-8b")
    recipe = Recipe(
        adamw_kernel="fused",
        checkpoint="layer" if case["checkpoint"] else "none",
        input_gradients=case["checkpoint"],
        train=case.get("train", ()),
        freeze=case.get("freeze", ()),
    )
    step = Step(read_config(config, "llama3.1-8b"), Layout(recipe, False, False, False), CUBLAS)
    told = {}
    for instant in step.instants(step_sizes(recipe, case["seq_len"], Chunks(1, 1))):
        told[instant.name.phase] = max(told.get(instant.name.phase, 0), instant.bytes)
    assert set(told) == set(PHASES) and len(MEASURED) == 12
    for phase, size in told.items():
        assert size == pytest.approx(row["phases"][phase]["allocated"], rel=1e-5), phase


OWN = [
    case
    for case in read_results(profiles.ROOT / "measurements" / f"{H100.name}.jsonl").measurements
    if (case.case.recipe.train or case.case.recipe.freeze)
    and case.case.model != "gemma2-2b"  # whose attention is another there
]


@pytest.mark.parametrize("measured", OWN, ids=lambda one: f"{one.case.words}, {one.case.recipe.train}")
def test_mstplans_own_step_takes_what_is_planned(measured):
    """Chunks, offload, checkpoints of transformers: every instant that both have, on the H100."""
    case = measured.case
    chunks = Chunks(int(case.recipe.mlp_chunks), int(case.recipe.loss_chunks))
    step = Step(
        case.described, Layout(case.recipe, chunks.mlp > 1, chunks.loss > 1, False), measured.ranks[0].workspace
    )
    told = {each.name: each.bytes for each in step.instants(step_sizes(case.recipe, case.seq_len, chunks))}
    assert len(OWN) == 5 and len(set(told) & set(measured.instants)) >= 3
    assert max(told.values()) == pytest.approx(measured.peak.allocated, rel=1e-5)


# ---- properties -----------------------------------------------------------------------------------------------------

KINDS = st.lists(
    st.sampled_from([kind for kind in WeightKind if kind not in TOWERS]), min_size=1, max_size=3, unique=True
)


@given(models(window=False), recipes(), cards(), KINDS, st.integers(2, 20_000))
def test_a_frozen_weight_never_costs_memory(model, recipe, on, kinds, tokens):
    frozen = recipe.changed(freeze=tuple(kinds))
    if WeightKind.HEAD in kinds and WeightKind.EMBEDDINGS in kinds and len(kinds) == 5:
        return
    chunks = Chunks(*(1 if m == "auto" else min(m, tokens) for m in (recipe.mlp_chunks, recipe.loss_chunks)))
    assert (
        plan_at(model, frozen, on, tokens, chunks).peak.bytes <= plan_at(model, recipe, on, tokens, chunks).peak.bytes
    )


@given(models(window=False), recipes(), cards(), st.integers(2, 20_000))
def test_training_everything_by_name_is_training_everything(model, recipe, on, tokens):
    everything = recipe.changed(train=("*",))
    chunks = Chunks(*(1 if m == "auto" else min(m, tokens) for m in (recipe.mlp_chunks, recipe.loss_chunks)))
    whole, same = (plan_at(model, r, on, tokens, chunks) for r in (recipe, everything))
    assert (whole.peak, whole.host_bytes, whole.step_seconds) == (same.peak, same.host_bytes, same.step_seconds)


def test_the_longest_sequence_grows_with_what_is_frozen():
    model, h100 = read_config(load_config("llama3.1-8b"), "llama3.1-8b"), card("h100")
    found = [
        max_seq(model, STRATEGIES["mst"].changed(train=train), h100).s_max
        for train in ((), ("mlp", "attention"), ("attention",), ("norms",))
    ]
    assert found == sorted(found) and found[0] < found[1] < found[2] < found[3]
