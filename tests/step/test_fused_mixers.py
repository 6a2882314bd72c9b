"""Layers that run fused kernels of packages: every instant of the formula is what their own Python code allocates (bench/fused_mixers.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mstplan.errors import RecipeError
from mstplan.plan import solve
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.mixer_packages import PACKAGES
from mstplan.step.mixers.fused_mamba2 import Parts
from mstplan.step.recipe import Recipe, recipe_in_words, strategy
from mstplan.step.runnable import check_runnable
from mstplan.step.workspaces import Span

RECORDED = json.loads((Path(__file__).parent / "fused_mixers.json").read_text())
EXACT = 0.0005
"""What torch rounds sizes up by, of small models."""
CASES: list[dict[str, Any]] = RECORDED["cases"]


def name_of(case: dict[str, Any]) -> str:
    return " ".join(str(value) for key, value in case.items() if key != "peaks")


def peaks_of(case: dict[str, Any], kernels: str) -> dict[str, int]:
    recipe = strategy(case["strategy"]).changed(**case["changes"], kernels=kernels)
    model = read_config(RECORDED["models"][case["model"]], "m")
    plan = solve.plan_at(model, recipe, card(case["card"]), case["seq_len"])
    return {instant.name: instant.bytes for instant in plan.instants()}


def held_longer(case: dict[str, Any], instant: str) -> int:
    """Bytes of cos and sin, which the formula lets go with the first layer, and torch when attention's backward has read them: beside attention, Mamba-2's
    own backward of that layer comes after it."""
    if not (
        case["model"].startswith("falcon_h1")
        and case["strategy"] == "standard"
        and instant == "backward of the first layer"
    ):
        return 0
    return 2 * 2 * case["seq_len"] * int(RECORDED["models"][case["model"]]["head_dim"])


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_instant(case: dict[str, Any]) -> None:
    expected = {
        instant: pytest.approx(peak + held_longer(case, instant), rel=EXACT) for instant, peak in case["peaks"].items()
    }
    assert peaks_of(case, case["kernels"]) == expected


def test_every_choice_is_recorded() -> None:
    assert {case["kernels"] for case in CASES} == set(PACKAGES)


@pytest.mark.parametrize("case", CASES[::17], ids=name_of)
def test_torchs_own_code_holds_more(case: dict[str, Any]) -> None:
    """While layers run; what is largest may be the loss."""
    fused, plain = peaks_of(case, case["kernels"]), peaks_of(case, "torch")
    assert max(fused.values()) <= max(plain.values())
    if case["kernels"] != "causal-conv1d":
        assert any(fused[instant] < plain[instant] for instant in plain)


def refusal(model: str, kernels: str, **sizes: int) -> str:
    config = {**RECORDED["models"][model], **sizes}
    with pytest.raises(RecipeError) as caught:
        solve.plan_at(read_config(config, "m"), strategy("standard").changed(kernels=kernels), card("h100"), 4096)
    assert len(str(caught.value).splitlines()) == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "kernels", "sizes", "why"),
    [
        ("lfm2", "fla", {}, "no layers for flash-linear-attention's kernels"),
        ("mamba2", "fla+causal-conv1d", {}, "--kernels causal-conv1d"),
        ("lfm2", "causal-conv1d", {"conv_L_cache": 5}, "reaches over 2 to 4 tokens"),
        ("qwen3.5", "fla", {"linear_key_head_dim": 512}, "keys of up to 256"),
        ("qwen3.5", "fla", {"linear_num_key_heads": 1, "linear_value_head_dim": 32}, "wider than values"),
    ],
)
def test_what_is_not_counted_is_refused(model: str, kernels: str, sizes: dict[str, int], why: str) -> None:
    assert why in refusal(model, kernels, **sizes)


@pytest.mark.parametrize("fields", [{"lora_rank": 8}, {"lora_rank": 8, "lora_targets": ["in_proj"], "quantize": "nf4"}])
def test_mamba_ssm_goes_past_what_stands_in_place_of_out_proj(fields: dict[str, Any]) -> None:
    model = read_config(RECORDED["models"]["bamba"], "m")
    with pytest.raises(RecipeError, match="takes out_proj's weight"):
        solve.plan_at(model, strategy("standard", kernels="mamba-ssm", **fields), card("h100"), 4096)


@pytest.mark.parametrize(("heads", "groups"), [(16, 1), (128, 1), (16, 8)])
def test_gradients_come_in_fewer_parts_of_more_chunks(heads: int, groups: int) -> None:
    """And `starts` are the numbers of tokens at which that changes."""
    parts = Parts(heads, groups, 256, "z", ((0, 1),), 0)
    of_chunks = [parts.parts(chunks) for chunks in range(1, 2000)]
    assert of_chunks == sorted(of_chunks, reverse=True) and of_chunks[-1] == 1
    changes = [n for n in range(1, len(of_chunks)) if of_chunks[n] != of_chunks[n - 1]]
    assert parts.starts() == tuple(256 * n + 1 for n in changes)
    assert parts.sizes(Span(0, 256))[0].bytes == of_chunks[0] - 1
    assert parts.sizes(Span(256 * 1990, 256 * 1998)) == ()


def test_the_trace_and_the_step_that_is_run_refuse_them() -> None:
    for kernels in PACKAGES:
        with pytest.raises(RecipeError, match="counted by the formula alone"):
            check_runnable(Recipe(kernels=kernels))


def test_a_recipe_names_them() -> None:
    both = recipe_in_words(Recipe(kernels="fla+causal-conv1d"))
    assert both.endswith("flash-linear-attention's and causal-conv1d's kernels")
