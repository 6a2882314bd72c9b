"""A model that the formula does not know, as a user meets it: answered by the trace where torch is there, else refused with a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mstplan.errors import MissingError
from mstplan.observe import cache

from ..observe.tiny import TINY
from .conftest import Run

OPT: dict[str, Any] = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 128, "ffn_dim": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "vocab_size": 512, "max_position_embeddings": 4096, "word_embed_proj_dim": 128, "dropout": 0.0, "torch_dtype": "bfloat16",
}  # fmt: skip
ERNIE: dict[str, Any] = {
    "model_type": "ernie4_5_moe", "architectures": ["Ernie4_5_MoeForCausalLM"], "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64,
    "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "pad_token_id": 0,
}  # fmt: skip
MODELS = {"opt": OPT, "ernie": ERNIE}
ON = ("--gpu-mem", "1GB")


@pytest.fixture(autouse=True)
def models(run: Run, tmp_path: Path) -> None:
    """opt.json and ernie.json in the folder that commands run in."""
    for name, config in MODELS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))


def parameters(name: str) -> int:
    """Of transformers' own module."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(f"{name}.json"))
    model.tie_weights()
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_trace_answers_and_says_so(run: Run, name: str) -> None:
    asked = ("-m", f"{name}.json", *ON)
    told = run("max-seq", *asked, "-s", "checkpoint", "--json").json
    (row,) = told["results"]
    assert told["rung"] == "trace" and told["model"]["parameters"] == parameters(name) and row["calibration"] is None
    assert any(note.startswith("answered by the trace: ") and f"'{MODELS[name]['model_type']}'" in note for note in told["notes"])
    s_max = row["s_max"]
    assert s_max > 64 and row["peak_bytes"] <= told["budget_bytes"]
    fits, too_long = (run("plan", *asked, "-s", "checkpoint", "--seq-len", str(n), "--json") for n in (s_max, s_max + 1))
    assert (fits.code, too_long.code) == (0, 1) and fits.json["rung"] == too_long.json["rung"] == "trace"
    assert fits.json["peak_bytes"] == row["peak_bytes"] and all(i["formula_bytes"] is None for i in fits.json["instants"])
    said = run("plan", *asked, "-s", "checkpoint", "--seq-len", str(s_max))
    assert "answered by the trace" in said.out and "formula" not in said.out.split("answered", 1)[1].split("\n\n")[0]
    assert max(map(len, said.out.splitlines())) <= 80


def test_strategies_are_traced_until_one_fits(run: Run) -> None:
    told = run("plan", "-m", "opt.json", *ON, "--seq-len", "8", "--json").json
    assert told["strategy"] == "standard" and [s["strategy"] for s in told["strategies"]] == ["standard"]
    told = run("plan", "-m", "opt.json", *ON, "-s", "standard,checkpoint", "--seq-len", "4000", "--batch", "64", "--json").json
    assert [s["strategy"] for s in told["strategies"]] == ["standard", "checkpoint"] or told["fits"]


@pytest.mark.parametrize("command", [("theorem",), ("shapes",), ("plot", "-o", "m.csv")])
def test_what_has_no_trace_refuses(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    said = run(command[0], "-m", "ernie.json", *(ON if command[0] != "shapes" else ()), *command[1:])
    assert said.code == 2 and not said.out and len(said.err.splitlines()) == 2
    assert "moe_num_experts" in said.err and "--assume llama-like" in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ernie.json", "opt.json"]


@pytest.mark.parametrize("command", ["max-seq", "plan", "trace"])
def test_without_torch_two_lines_say_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    def missing() -> dict[str, str]:
        raise MissingError("torch is not installed")

    monkeypatch.setattr(cache, "versions", missing)
    said = run(command, "-m", "opt.json", *ON, *(() if command == "max-seq" else ("--seq-len", "64")))
    assert said.code == 2 and not said.out and len(said.err.splitlines()) == 2
    assert "'opt'" in said.err and "ffn_dim" in said.err and "pip install 'mstplan[torch]'" in said.err


def test_the_old_guess_is_there_for_who_asks(run: Run) -> None:
    told = run("max-seq", "-m", "ernie.json", *ON, "--assume", "llama-like", "--json").json
    assert told["rung"] == "formula" and any("moe_num_experts" in note for note in told["notes"])
    refused = run("max-seq", "-m", "ernie.json", *ON, "--assume", "gpt-like")
    assert refused.code == 2 and "llama-like" in refused.err


def test_what_is_known_is_not_traced(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    monkeypatch.setattr(cache, "versions", lambda: pytest.fail("asked for torch"))
    assert run("max-seq", "-m", "tiny.json", *ON, "--json").json["rung"] == "formula"
