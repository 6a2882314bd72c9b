"""The step model against transformers' own code: one training step on fake tensors, every live byte counted.

What is compared is the peak of each phase of a step. Models keep their published sizes but for the number of layers, and
a small vocabulary where the layers should decide rather than the loss.
"""

import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import transformers

from mstplan.step import steps
from mstplan.step.layers import Writer, layer
from mstplan.step.recipe import Recipe

from .fake_step import BACKWARD, FORWARD, PHASES, SMALL_VOCABULARY, STEP, cut, planned, run_step

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", category=UserWarning)

EXACT = 0.0005
"""What separates the two where every tensor is accounted for: single numbers, row sums, rounding."""

# One shipped model of each family.
DENSE = [
    "llama3.1-8b",
    "qwen2-7b",
    "qwen3-4b",
    "mistral-7b-v0.3",
    "gemma2-2b",
    "gemma3-1b",
    "phi3-mini-4k",
    "olmo2-7b",
    "gpt2",
    "pythia-1.4b",
]
EXPERTS = ["mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite", "deepseek-v3"]
FORWARD_BOUND = 0.002
FEW = ("llama3.1-8b", "gpt2")
CHECKPOINTS = ("none", "layer")
OPTIMIZER_BOUND = 0.001


def config_of(name, layers=None, small=True):
    """Layers of every kind the model has: full and sliding attention, dense and expert MLPs."""
    config = cut(name, layers or (4 if name == "deepseek-v3" else 3), **(SMALL_VOCABULARY if small else {}))
    if name.startswith("gemma3"):
        config["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention"]
    return config


def errors(config, recipe, seq_len):
    """The step model's error as a share of the truth: of the step's peak, and of each phase's."""
    seen, told = run_step(config, recipe, seq_len), planned(config, recipe, seq_len)
    assert set(told) <= set(seen)
    found = {phase: told[phase] / seen[phase].bytes - 1 for phase in PHASES if phase in told}
    return {"peak": max(told.values()) / max(peak.bytes for peak in seen.values()) - 1, **found}


def agree(found, bound, phases=(BACKWARD,)):
    assert abs(found["peak"]) <= bound, found
    assert all(abs(found[phase]) <= bound for phase in phases), found
    assert abs(found.get(STEP, 0)) <= OPTIMIZER_BOUND, found


# ---- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("seq_len", [1024, 65536])
@pytest.mark.parametrize("name", DENSE + EXPERTS)
def test_layers_of_every_family(name, seq_len, checkpoint):
    found = errors(config_of(name), Recipe(checkpoint=checkpoint), seq_len)
    agree(found, EXACT if seq_len > 1024 else 0.0015)  # at 1024 tokens what is small counts for more
    assert abs(found[FORWARD]) <= FORWARD_BOUND, found


@pytest.mark.parametrize(
    "name", ["llama3.1-8b", "qwen3-4b", "gemma2-2b", "gemma3-1b", "gpt2", "pythia-1.4b", "mixtral-8x7b"]
)
def test_loss_with_the_published_vocabulary(name):
    agree(errors(config_of(name, small=False), Recipe(checkpoint="layer"), 8192), EXACT, (FORWARD, BACKWARD))


@pytest.mark.parametrize("kv_heads", [8, 32])
def test_attention_decides(kv_heads):
    """Hidden states and MLP made narrow, so that the backward of attention, with its workspace, is the peak."""
    narrow = {"hidden_size": 1024, "intermediate_size": 256, "head_dim": 128, "num_key_value_heads": kv_heads}
    config = config_of("llama3.1-8b") | narrow
    seen = run_step(config, Recipe(checkpoint="layer"), 20001)
    assert seen[BACKWARD].op == "aten.new_empty.default"
    agree(errors(config, Recipe(checkpoint="layer"), 20001), EXACT)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", FEW)
def test_two_sequences(name, checkpoint):
    agree(errors(config_of(name), Recipe(checkpoint=checkpoint, batch=2), 8192), EXACT)


@pytest.mark.parametrize(("layers", "every"), [(5, 2), (5, 3), (6, "sqrt")])
@pytest.mark.parametrize("name", ["llama3.1-8b", "qwen3-4b", "pythia-1.4b"])
def test_several_layers_to_a_checkpoint(name, layers, every):
    found = errors(config_of(name, layers), Recipe(checkpoint=every), 32768)
    agree(found, EXACT, (FORWARD, BACKWARD))


# ---- optimizers -------------------------------------------------------------------------------------------------------

OPTIMIZERS = [
    {"adamw_kernel": "foreach"},
    {"adamw_kernel": "fused"},
    {"adamw_kernel": "for-loop"},
    {"optimizer": "sgd"},
    {"optimizer": "adafactor"},
    {"optimizer": "muon"},
    {"optimizer": "muon", "adamw_kernel": "fused"},
    {"optimizer": "adamw-8bit"},
    {"optimizer": "adamw-8bit-torchao"},
    {"optimizer": "adamw-4bit"},
    {"optimizer": "lion"},
]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("changes", OPTIMIZERS, ids=lambda c: " ".join(c.values()))
@pytest.mark.parametrize("name", ["gpt2", "pythia-1.4b"])  # the embedding is the LM head; it is not
def test_optimizer_step(name, changes, precision):
    """Published vocabulary: the embedding is the largest weight, so what is made for one weight at a time shows."""
    found = errors(config_of(name, small=False), Recipe(checkpoint="layer", precision=precision, **changes), 128)
    assert abs(found[STEP]) <= OPTIMIZER_BOUND, found


@pytest.mark.parametrize("changes", OPTIMIZERS, ids=lambda c: " ".join(c.values()))
def test_optimizer_in_backward(changes):
    """Few tokens: backward's peak is the optimizer's step over the largest weight."""
    recipe = Recipe(checkpoint="layer", optimizer_in_backward=True, **changes)
    agree(errors(config_of("llama3.1-8b", small=False), recipe, 256), EXACT)
    agree(errors(config_of("llama3.1-8b"), recipe, 16384), EXACT)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", [*FEW, "mixtral-8x7b"])
def test_gradients_kept_between_micro_batches(name, checkpoint):
    agree(errors(config_of(name), Recipe(checkpoint=checkpoint, accumulation=2), 8192), EXACT)


# ---- precision and attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", [name for name in DENSE if name != "mistral-7b-v0.3"])
def test_mixed_precision(name, checkpoint):
    found = errors(config_of(name), Recipe(checkpoint=checkpoint, precision="mixed"), 32768)
    agree(found, EXACT)


def test_mixed_precision_with_the_published_vocabulary():
    recipe = Recipe(checkpoint="layer", precision="mixed")
    agree(errors(config_of("qwen3-4b", small=False), recipe, 8192), EXACT, (FORWARD, BACKWARD))
    agree(errors(config_of("llama3.1-8b", small=False), recipe, 2048), EXACT, (FORWARD, BACKWARD))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", ["phi3-mini-4k", "olmo2-7b", "gpt2", "pythia-1.4b"])
def test_fp32(name, checkpoint):
    """Models without grouped queries, which fp32 keeps from the fused kernels."""
    agree(errors(config_of(name), Recipe(checkpoint=checkpoint, precision="fp32"), 32768), EXACT)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", FEW)
def test_eager_attention(name, checkpoint, precision):
    recipe = Recipe(checkpoint=checkpoint, attention="eager", precision=precision)
    agree(errors(config_of(name), recipe, 1024), 0.005)
    agree(errors(config_of(name), recipe, 4096), 0.005)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_eager_attention_with_sinks(checkpoint):
    """Values are mixed by a view of the softmax; where it is kept, the sinks' own column is counted, too."""
    recipe = Recipe(checkpoint=checkpoint, attention="eager")
    agree(errors(config_of("gpt-oss-20b"), recipe, 4096), EXACT)


# ---- the runtime keeps what the planner promises ----------------------------------------------------------------------


@pytest.mark.parametrize(("mlp_chunks", "loss_chunks"), [(2, 2), (4, 16), (8, 24)])
@pytest.mark.parametrize(
    "name",
    [
        "llama3.1-8b",
        "qwen3-4b",
        "mistral-7b-v0.3",
        "gemma3-1b",
        "phi3-mini-4k",
        "olmo2-7b",
        "pythia-1.4b",
        "qwen3-30b-a3b",
    ],
)
def test_mini_sequences(name, mlp_chunks, loss_chunks):
    """`mst` on mstplan.train's own step: the MLP and the loss in chunks, every layer checkpointed."""
    recipe = Recipe(
        checkpoint="layer", mlp_chunks=mlp_chunks, mlp_recompute=True, loss="chunked", loss_chunks=loss_chunks
    )
    # Tied weights' gradients are added out of place under fake tensors, when the layers' backward is over: not the peak.
    phases = (FORWARD,) if name.startswith("gemma") else (FORWARD, BACKWARD)
    agree(errors(config_of(name, small=False), recipe, 16384), 0.0015, phases)


@pytest.mark.parametrize("name", ["llama3.1-8b", "qwen3-4b", "olmo2-7b"])
def test_mini_sequences_under_autocast(name):
    recipe = Recipe(
        precision="mixed", checkpoint="layer", mlp_chunks=4, mlp_recompute=True, loss="chunked", loss_chunks=16
    )
    agree(errors(config_of(name, small=False), recipe, 16384), 0.0015)


@pytest.mark.parametrize("every", ["layer", 2])
@pytest.mark.parametrize("name", ["llama3.1-8b", "pythia-1.4b", "olmo2-7b"])
def test_layer_inputs_on_the_host(name, every):
    """`mst-offload` on mstplan.train's own step: no more layer inputs on the device than the step model says."""
    recipe = Recipe(
        checkpoint=every, mlp_chunks=4, mlp_recompute=True, loss="chunked", loss_chunks=16, offload_layer_inputs=True
    )
    agree(errors(config_of(name, small=False), recipe, 16384), 0.0015)


# ---- the comparison itself --------------------------------------------------------------------------------------------


@pytest.fixture
def forgotten_product(monkeypatch):
    """A step model in which products keep one of their factors only."""
    monkeypatch.setattr(Writer, "multiply", lambda w, name, x, z, y: w.pointwise(name, x, y, x))
    forget_layouts()
    yield
    forget_layouts()


def forget_layouts():
    for each in (layer, steps._tape_without_spans, steps.step):
        each.cache_clear()


@pytest.mark.usefixtures("forgotten_product")
def test_a_tensor_too_few_is_noticed():
    """One (b, s, I) tensor in bf16, of one layer, is some percent of a step; the bounds above are far below that."""
    found = errors(config_of("qwen3-4b"), Recipe(checkpoint="layer"), 32768)
    assert found["peak"] < -20 * EXACT


def test_fused_attention_is_not_replaced_by_a_masked_one():
    """A mask of s x s, or repeated keys and values, would show in the forward pass."""
    seen = run_step(config_of("llama3.1-8b"), Recipe(checkpoint="layer"), 16384, list_alive=True)
    shapes = {shape for peak in seen.values() for _, shape, _ in peak.alive}
    assert not any(shape.count("16384") > 1 for shape in shapes)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["llama3.2-1b", "gpt2", "gemma2-2b"])
def test_tied_embeddings_under_autocast(name, accumulation):
    """Autocast casts the LM head's use of the weight, not the embedding's: their gradients come in two dtypes."""
    recipe = Recipe(precision="mixed", checkpoint="layer", accumulation=accumulation)
    agree(errors(config_of(name, small=False), recipe, 128), 0.002)


# gpt2 in batches is left out: from two sequences on, eager attention's products keep contiguous copies of queries and keys rather
# than the one tensor that holds queries, keys and values, which the step model counts (+1.2% at b=4, s=1024).
@pytest.mark.parametrize(
    ("name", "more"),
    [("llama3.1-8b", {"batch": 4}), ("llama3.1-8b", {"precision": "mixed"}), ("gpt2", {"precision": "mixed"})],
)
def test_eager_attention_in_batches_and_under_autocast(name, more):
    recipe = Recipe(attention="eager", checkpoint="layer", **more)
    agree(errors(config_of(name), recipe, 1024), 0.005)
