"""The traced step is the step: the same model, recipe and optimizer run for real on the CPU allocate the same, in the same order,
and hold as much at every instant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mstplan.measuring.allocations import Allocations, record_step
from mstplan.step.recipe import STRATEGIES, Recipe, strategy
from mstplan.tracing.allocation_diff import KNOWN_ON_CPU, allocations_of_trace, differences, unexplained
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import attention_of, trace
from mstplan.train.step import TrainingStep, build_model, read_settings

from ..recipes import in_chunks

HIDDEN, LAYERS = 256, 3  # sqrt: a checkpoint over two layers and one over the third
SMALL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 2000,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen3": {"head_dim": 64},
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64},
    "phi3": {},
    "olmo2": {},
    "gpt2": {
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_inner": 512,
        "n_positions": 2048,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "gpt_neox": {},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 192, "head_dim": 64},
    "deepseek_v2": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 192,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "num_key_value_heads": 4,
    },
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
BY_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope, within": ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 2048}),
    "longrope, beyond": ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 512}),
    "dynamic, within": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "dynamic, beyond": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 512},
    ),
    "phimoe": (
        "phimoe",
        {
            "num_local_experts": 4,
            "rope_scaling": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.2},
            "original_max_position_embeddings": 512,
        },
    ),
}
"""Families whose rotary embeddings depend on the length of the sequence, and whose code asks how long it is."""
BY_VALUES: dict[str, dict[str, Any]] = {
    "xlm": {
        "emb_dim": HIDDEN,
        "n_layers": LAYERS,
        "n_heads": 4,
        "causal": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "xmod": {
        "is_decoder": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "languages": ["en_XX", "de_DE"],
        "default_language": "de_DE",
    },
}
"""Families whose code asks how many tokens are padding, or which sequences are in which language."""
SIZES = ((1, 1055), (2, 599))  # sequences, tokens: hidden states in fp32 are just above 1 MiB, and chunks are uneven
ABOVE = 64 * 1024
"""Bytes: every allocation above this is compared. Hidden states in 16 bits are, and all matrices but the smallest."""


def config_of(family: str, **more: Any) -> dict[str, Any]:
    return {"model_type": family, **SMALL, **FAMILIES.get(family, {}), **EXPERTS.get(family, {}), **more}


def recipe_of(name: str, chunks: tuple[int, int] = (2, 3), **fields: Any) -> Recipe:
    return in_chunks(strategy(name, **fields), *chunks)


def really(config: dict[str, Any], recipe: Recipe, seq_len: int) -> Allocations:
    """What the second step allocates. The first, of few tokens, makes the optimizer's states."""
    settings = read_settings(config)
    torch.manual_seed(0)
    step = TrainingStep(build_model(settings, recipe, attention_of(recipe, settings, "cpu"), "cpu"), recipe, seq_len)
    batch = step.tokens, step.labels
    step.tokens, step.labels = (ids[:, :16].clone() for ids in batch)
    step.run()
    step.tokens, step.labels = batch
    return record_step(step)


def both(config: dict[str, Any], recipe: Recipe, seq_len: int) -> tuple[Trace, Allocations]:
    return trace(config, recipe, seq_len, on="cpu", whole=True), really(config, recipe, seq_len)


def assert_same_sequence(traced: Trace, real: Allocations) -> None:
    found = differences(allocations_of_trace(traced), real.sequence(), KNOWN_ON_CPU, ABOVE)
    assert not unexplained(found), "\n".join(map(str, unexplained(found)))


def assert_same_peaks(traced: Trace, real: Allocations) -> None:
    """Within 0.5%, at every instant."""
    assert sum(alive.bytes for alive in traced.resident) == real.resident
    peaks = real.peaks()
    assert {p.instant for p in traced.peaks} == set(peaks)
    off = {p.instant: p.bytes / peaks[p.instant] - 1 for p in traced.peaks}
    assert all(abs(share) < 0.005 for share in off.values()), off


# Every family with every strategy, each at one of two sizes.
ROTATION = [
    (family, name, *SIZES[(m + n) % 2]) for m, family in enumerate(FAMILIES) for n, name in enumerate(STRATEGIES)
]


@pytest.mark.parametrize(("family", "name", "batch", "seq_len"), ROTATION)
def test_the_trace_is_what_happens(family, name, batch, seq_len):
    traced, real = both(config_of(family), recipe_of(name, batch=batch, precision="fp32"), seq_len)
    assert_same_sequence(traced, real)
    assert_same_peaks(traced, real)


@pytest.mark.parametrize(("batch", "seq_len"), SIZES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_attention_from_the_host(family, batch, seq_len):
    recipe = recipe_of("mst-layer-offload", batch=batch, precision="fp32", attention_on_host=True, attention_groups=2)
    traced, real = both(config_of(family), recipe, seq_len)
    assert_same_sequence(traced, real)
    assert_same_peaks(traced, real)


IN_16_BITS = [
    *[(family, "mst", "bf16") for family in ("llama", "gemma2", "olmo2", "gpt2", "gpt_neox", "mixtral", "qwen3_moe")],
    *[(family, "standard", "bf16") for family in ("gpt2", "gpt_neox", "mixtral", "qwen3_moe")],
    ("llama", "standard", "mixed"),
    ("gemma2", "mst", "mixed"),
]


@pytest.mark.parametrize(("family", "name", "precision"), IN_16_BITS)
def test_in_16_bits(family, name, precision):
    """Here kernels have buffers that no trace predicts (KNOWN_ON_CPU); the real peak is taken without them."""
    traced, real = both(config_of(family), recipe_of(name, batch=2, precision=precision), 599)
    assert_same_sequence(traced, real)
    assert_same_peaks(traced, real.without(KNOWN_ON_CPU))


@pytest.mark.parametrize(
    ("family", "name", "dtype"),
    [("mixtral", "standard", "fp32"), ("qwen3_moe", "standard", "bf16"), ("deepseek_v2", "mst", "fp32")],
)
def test_adapters_on_experts(family, name, dtype):
    recipe = recipe_of(name, batch=2, lora_rank=16, adapter_dtype=dtype)
    traced, real = both(config_of(family), recipe, 599)
    assert_same_sequence(traced, real)
    assert_same_peaks(traced, real.without(KNOWN_ON_CPU))


@pytest.mark.parametrize(
    "fields",
    [
        {"adamw_kernel": "foreach"},
        {"adamw_kernel": "for-loop"},
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "adamw_kernel": "for-loop"},
        {"optimizer": "adafactor"},
        {"optimizer_in_backward": True},
        {"optimizer_in_backward": True, "optimizer": "adafactor"},
        {"attention": "eager"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_with_other_settings(fields):
    traced, real = both(config_of("llama"), recipe_of("checkpoint", precision="fp32", **fields), 599)
    assert_same_sequence(traced, real)
    assert_same_peaks(traced, real)


@pytest.mark.parametrize("name", ["standard", "mst"])
@pytest.mark.parametrize("which", BY_LENGTH)
def test_rotary_embeddings_that_depend_on_the_length(which, name):
    family, fields = BY_LENGTH[which]
    traced, real = both(config_of(family, **fields), recipe_of(name, batch=2, precision="fp32"), 599)
    assert_same_sequence(traced, real)
    assert_same_peaks(traced, real)


@pytest.mark.parametrize("family", BY_VALUES)
def test_code_that_asks_what_all_steps_have_in_common(family):
    config = config_of(family, **BY_VALUES[family])
    traced, real = both(config, recipe_of("standard", batch=2, precision="fp32"), 599)
    assert_same_sequence(traced, real)
    assert_same_peaks(traced, real)


@pytest.mark.parametrize("name", ["standard", "checkpoint", "mst"])
def test_few_layers_and_few_chunks_tell_as_much(name):
    """The trace as it is made by default: not every layer is run, nor every chunk."""
    config = config_of("llama", num_hidden_layers=6, hidden_size=128, intermediate_size=384)
    recipe = recipe_of(name, chunks=(5, 6), precision="fp32")
    traced = trace(config, recipe, 1056, on="cpu")
    assert len(traced.kept) < traced.units
    assert_same_peaks(traced, really(config, recipe, 1056))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_attention_has_buffers_for_every_thread():
    traced, real = both(config_of("llama"), recipe_of("standard", precision="fp32"), 1056)
    assert_same_sequence(traced, real)
    assert_same_peaks(traced, real)
    blocks = [storage.bytes for storage in traced.step.storages if "every thread" in storage.operation]
    assert blocks == [2 * (256 * 512 + 2 * 256 + 256 * 64) * 4] * LAYERS + [2 * 2 * 256 * 512 * 4] * LAYERS


def test_differences_are_noticed():
    """A recipe that is nearly the same, and one layer more."""
    config, recipe = config_of("llama"), recipe_of("checkpoint", precision="fp32")
    traced = trace(config, recipe, 600, on="cpu", whole=True)
    for real in (
        really(config, recipe.changed(checkpoint="none"), 600),
        really(config, recipe.changed(adamw_kernel="foreach"), 600),
        really({**config, "num_hidden_layers": LAYERS + 1}, recipe, 600),
    ):
        with pytest.raises(AssertionError):
            assert_same_sequence(traced, real)
        with pytest.raises(AssertionError):
            assert_same_peaks(traced, real)
