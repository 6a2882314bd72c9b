from __future__ import annotations

from mstplan.plan.shapes import shapes
from mstplan.spec.catalog import load_model


def test_the_figures_of_the_introduction() -> None:
    """arXiv 2407.15892, section 1: Llama 3.1 8B, one sequence of 131,072 tokens, bf16, decimal GB."""
    rows = {row.name: row for row in shapes(load_model("llama3.1-8b"), 1, 131072)}
    gb = {name: row.bytes / 1e9 for name, row in rows.items()}
    assert int(gb["logits"]) == 33 and rows["logits"].quoted == "33 GB"
    assert round(gb["MLP gate and up"], 1) == 7.5
    assert all(round(gb[name]) == 1 for name in ("X", "Q", "K, without grouped queries", "V, without grouped queries"))
    assert gb["K"] == gb["V"] == gb["Q"] / 4  # 8 key/value heads of 32
    assert round(gb["attention matrix, 16 heads"], -1) == 550


def test_bytes_are_the_product_of_the_sizes() -> None:
    for name in ("llama2-7b", "gemma2-2b", "gpt2", "mixtral-8x7b", "deepseek-v3"):
        for row in shapes(load_model(name), 3, 1000, "float32"):
            product = 4
            for size in row.sizes:
                product *= size
            assert row.bytes == product and not row.quoted
