"""The theorem view is the paper's, symbol for symbol; its coefficients are the step model's tensors."""

from __future__ import annotations

import pytest
import sympy as sp

from mstplan.errors import RecipeError
from mstplan.plan import theorem
from mstplan.plan.layout import step_of_no_length
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe
from mstplan.step.steps import Chunks
from mstplan.step.tape import BASIS, forward

M_max, W, I, A, L, M, S = sp.symbols("M_max W_mem I_mem A_mem L M S", positive=True)  # noqa: E741
PUBLISHED = {
    "standard": (M_max - W) / (I + L * A),
    "checkpoint (sqrt)": (M_max - W) / (I + sp.sqrt(L) * A),
    "MsT": (M_max - W) / (I / M + sp.sqrt(L) * A),
    "MsT + CPU offload": (M_max - W) / (I / M + A),
}


@pytest.mark.parametrize("formula", PUBLISHED)
def test_the_published_formulas(formula: str) -> None:
    assert sp.simplify(theorem.s_max(formula, M_max, W, I, A, L, M) - PUBLISHED[formula]) == 0


def test_the_published_memory_with_mst() -> None:
    assert sp.simplify(theorem.memory("MsT", S, W, I, A, L, M) - (W + S * (I / M + sp.sqrt(L) * A))) == 0


@pytest.mark.parametrize("formula", PUBLISHED)
def test_memory_at_s_max_is_the_card(formula: str) -> None:
    longest = theorem.s_max(formula, M_max, W, I, A, L, M)
    assert sp.simplify(theorem.memory(formula, longest, W, I, A, L, M) - M_max) == 0


def coefficients() -> theorem.Coefficients:
    return theorem.coefficients(load_model("llama3-8b"), Recipe(), card("a100-80gb"), Chunks(4, 32))


def test_coefficients_are_sums_of_their_tensors() -> None:
    c = coefficients()
    for value, rows in ((c.w_mem, c.w_from), (c.i_mem, c.i_from), (c.a_mem, c.a_from)):
        assert value == sum(entry.bytes for entry in rows) > 0
    assert (
        c.w_mem == 8_030_261_248 * 2 * 4 + 291 * 4
    )  # weights, gradients, two moments in bf16; fused AdamW counts steps
    assert c.i_mem == 128_256 * 12  # log-softmax and two gradients of the logits, fp32
    assert c.layers == 32 and c.chunks == 32


def test_a_mem_by_hand() -> None:
    """Llama-3-8B, bytes per token kept of one layer: two norms (fp32 input, normed, output, 1/rms), q, k, v, attention's
    output and log-sum-exp, and four MLP intermediates."""
    d, kv, heads, width = 4096, 1024, 32, 14336
    norms = 2 * (4 * d + 2 * d + 2 * d + 4)
    attention = 2 * d + 2 * 2 * kv + 2 * d + 4 * heads
    assert coefficients().a_mem == norms + attention + 4 * 2 * width


def test_rows_follow_the_formulas() -> None:
    c = coefficients()
    for row in theorem.rows(c, 65536):
        exact = float(
            PUBLISHED[row.formula].subs({M_max: c.m_max, W: c.w_mem, I: c.i_mem, A: c.a_mem, L: c.layers, M: c.chunks})
        )
        assert row.s_max == int(exact)


def test_coefficients_can_be_overridden() -> None:
    c = coefficients().replaced(w_mem=10, chunks=5, i_mem=None)
    assert c.w_mem == 10 and c.chunks == 5 and c.i_mem == coefficients().i_mem
    for bad in ({"layers": 0}, {"chunks": 0}, {"w_mem": -1}):
        with pytest.raises(RecipeError, match="at least"):
            coefficients().replaced(**bad)


def test_too_little_memory_is_zero_not_negative() -> None:
    assert {row.s_max for row in theorem.rows(coefficients().replaced(m_max=1))} == {0}


def test_batches_count_in_every_coefficient_of_tokens() -> None:
    one, four = (
        theorem.coefficients(load_model("llama3-8b"), Recipe(batch=b), card("a100-80gb"), Chunks(4, 32)) for b in (1, 4)
    )
    assert (four.i_mem, four.a_mem, four.w_mem) == (4 * one.i_mem, 4 * one.a_mem, one.w_mem)


def test_what_is_given_no_longer_names_tensors() -> None:
    c = coefficients().replaced(i_mem=5)
    assert c.i_from == () and c.a_from == coefficients().a_from
    with pytest.raises(RecipeError, match="both be 0"):
        coefficients().replaced(i_mem=0, a_mem=0)


@pytest.mark.parametrize("name", ["llama2-7b", "gpt2", "olmo2-7b", "gemma2-2b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("precision", ["bf16", "mixed", "fp32"])
def test_a_mem_is_what_one_more_layer_keeps(name: str, precision: str) -> None:
    """Against the step model: the end of forward grows by A_mem per token with every layer."""
    recipe, model = Recipe(precision=precision, optimizer="sgd"), load_model(name)
    model = model._replace(layer_kinds=(model.layer_kinds[-1],) * 4)
    kept = []
    for layers in (3, 4):
        fewer = model._replace(layer_kinds=model.layer_kinds[:layers])
        built = step_of_no_length(fewer, recipe, card("h100"))
        kept.append(forward(built.tape, built.rules(), keep=True, prune=False).net[BASIS.index("bs")])
    assert theorem.coefficients(model, recipe, card("h100"), Chunks(1, 1)).a_mem == kept[1] - kept[0]
