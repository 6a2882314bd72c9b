"""A model that the formula does not know, as a user meets it: answered by the trace where torch is there, refused in two lines elsewhere."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BioGptConfig, BioGptForCausalLM

from mstplan.errors import UnreadError
from mstplan.measuring import sweep
from mstplan.measuring.measurement import Case
from mstplan.spec.hardware import card
from mstplan.spec.unread import WAY_OUT
from mstplan.step.recipe import Recipe
from mstplan.tracing import cache

from ..tracing.test_any_model import _with_own_code
from ..tracing.tiny import write_tiny
from .conftest import Run

BIOGPT = {
    "model_type": "biogpt",
    "architectures": ["BioGptForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 256,
    "scale_embedding": True,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
PHIMOE = {
    "model_type": "phimoe",
    "architectures": ["PhimoeForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "pad_token_id": 0,
}
PARAMETERS = sum(weight.numel() for weight in BioGptForCausalLM(BioGptConfig(**BIOGPT)).parameters())
WHY = "mstplan does not read configs of this family yet (model_type 'biogpt'); it has scale_embedding."
ON = ("--gpu-mem", "1GB")
PLAN = ("plan", "-m", "biogpt.json", *ON, "--seq-len", "1k", "-s", "checkpoint")
TRACE = ("trace", *PLAN[1:])
MAX_SEQ = ("max-seq", "-m", "biogpt.json", *ON, "--checkpoint", "layer")
FORMULA = (("plot", "-m", "biogpt.json", *ON), ("theorem", "-m", "biogpt.json", *ON), ("shapes", "-m", "biogpt.json"))


@pytest.fixture(autouse=True)
def model(tmp_path: Path) -> Path:
    path = tmp_path / "biogpt.json"
    path.write_text(json.dumps(BIOGPT))
    return path


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cache.metadata, "version", absent)


def test_max_seq_is_traced(run: Run) -> None:
    told = run(*MAX_SEQ, "--json").json
    (row,) = told["results"]
    assert (
        told["rung"] == "trace"
        and told["model"]["parameters"] == PARAMETERS
        and told["model"]["active_parameters"] is None
    )
    assert f"answered by the trace: {WHY}" in told["notes"]
    assert row["s_max"] > 512 and row["peak_bytes"] <= told["budget_bytes"] and row["step_seconds"] is None
    said = run(*MAX_SEQ)
    lines = said.out.splitlines()
    assert said.code == 0 and f"{row['s_max']:,}" in said.out and "the formula" not in said.out.replace(WHY, "")
    assert lines[1].startswith("simulated:") and f"answered by the trace: {WHY}" in " ".join(
        " ".join(lines[2:5]).split()
    )
    assert "made for 512 positions" in " ".join(said.out.split())
    assert all(len(line) <= 80 for line in lines)
    assert told == run(*MAX_SEQ, "--json", "--rung", "trace").json


@pytest.mark.parametrize("asked", [PLAN, TRACE], ids=["plan", "trace"])
def test_a_step_is_traced(run: Run, asked: tuple[str, ...]) -> None:
    told = run(*asked, "--json").json
    assert (told["command"], told["rung"], told["fits"]) == (asked[0], "trace", True)
    assert told["peak_bytes"] == sum(a["bytes"] for a in told["alive"]) and not told["differences"]
    assert all(i["formula_bytes"] is None for i in told["instants"])
    said = run(*asked)
    assert (
        said.code == 0
        and WHY in " ".join(said.out.split())
        and "differs" not in said.out
        and "formula counts" not in said.out
    )


def test_plan_exits_with_1_where_it_does_not_fit_and_writes_the_recipe(run: Run, tmp_path: Path) -> None:
    said = run(*PLAN[:-4], "--seq-len", "1M", "-s", "checkpoint", "--write-recipe", "recipe.json")
    assert (
        said.code == 1
        and "does not fit" in said.out
        and json.loads((tmp_path / "recipe.json").read_text())["checkpoint"] == "layer"
    )


@pytest.mark.parametrize("asked", [MAX_SEQ, PLAN, TRACE, *FORMULA], ids=lambda asked: asked[0])
def test_without_torch_two_lines_say_what_to_install(
    run: Run, without_torch: None, asked: tuple[str, ...], tmp_path: Path
) -> None:
    said = run(*asked)
    assert said.code == 2 and not said.out and said.err == f"mstplan: 'biogpt.json': {WHY}\n{WAY_OUT}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["biogpt.json"]


@pytest.mark.parametrize("asked", FORMULA, ids=lambda asked: asked[0])
def test_what_only_the_formula_answers_is_refused(run: Run, asked: tuple[str, ...]) -> None:
    said = run(*asked)
    assert said.code == 2 and said.err == f"mstplan: 'biogpt.json': {WHY}\n{WAY_OUT}\n" and not said.out


def test_where_the_trace_fails_too_both_reasons_are_said(run: Run, tmp_path: Path) -> None:
    path = write_tiny(tmp_path, "other", model_type="nobody_knows", moe_num_experts=4)
    for command in (("max-seq",), ("plan", "--seq-len", "1k"), ("trace", "--seq-len", "1k")):
        said = run(*command, "-m", str(path), *ON)
        first, second = said.err.strip().splitlines()
        assert said.code == 2 and "moe_num_experts is a field that mstplan does not read" in first
        assert "has no code for this model (model_type nobody_knows)" in second and second.endswith(
            "--assume llama-like counts it as a Llama all the same."
        )


def test_a_models_own_code_is_traced_when_asked(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = _with_own_code(tmp_path / "traced_of_its_own")  # another name: transformers imports code of a name once
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "moe_num_experts": 3}))
    asked = ("plan", "-m", str(folder), *ON, "--seq-len", "64", "-s", "standard")
    refused = run(*asked)
    assert refused.code == 2 and "--trust-remote-code" in refused.err and not list(tmp_path.rglob("*.ran"))
    assert run(*asked, "--trust-remote-code", "--json").json["rung"] == "trace" and list(tmp_path.rglob("*.ran"))


def test_what_no_trace_can_follow_is_not_sent_back_to_the_formula(run: Run, tmp_path: Path) -> None:
    """Its code decides by the values of tensors."""
    parts = {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    }
    dbrx = {"model_type": "dbrx", "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 99, **parts}
    (tmp_path / "dbrx.json").write_text(json.dumps(dbrx))
    said = run("max-seq", "-m", "dbrx.json", *ON, "-s", "standard")
    first, second = said.err.strip().splitlines()
    assert said.code == 2 and "(model_type 'dbrx')" in first and "needs the values of tensors" in second
    assert "formula rung" not in second and second.endswith("--assume llama-like counts it as a Llama all the same.")


@pytest.mark.parametrize("command", [("max-seq",), ("plan", "--seq-len", "1k")], ids=["max-seq", "plan"])
def test_options_of_the_trace_are_refused_where_the_formula_answers(run: Run, command: tuple[str, ...]) -> None:
    said = run(*command, "-m", "llama3.2-1b", "--gpu", "h100", "--trust-remote-code")
    assert said.code == 2 and "--trust-remote-code: nothing to do with the formula" in said.err


# --- --assume ---------------------------------------------------------------------------------------------------------------


def test_assumed_to_be_a_llama_every_command_answers_by_the_formula(run: Run, tmp_path: Path) -> None:
    write_tiny(tmp_path, "other", model_type="nobody_knows", moe_expert_total=4)
    write_tiny(tmp_path, "llama")
    for asked in (("max-seq", *ON), ("plan", "--seq-len", "1k", *ON), ("theorem", *ON), ("shapes",)):
        told = run(*asked, "-m", "other.json", "--assume", "llama-like", "--json").json
        assert (
            told["rung"] == "formula"
            and told["model"]["parameters"] == run(*asked, "-m", "llama.json", "--json").json["model"]["parameters"]
        )
        assert told["model"]["notes"][0].endswith("for --assume llama-like was given; not read: moe_expert_total")
    assert run("plot", "-m", "other.json", *ON, "--assume", "llama-like", "-o", "points.csv").code == 0


def test_an_assumed_model_is_traced_as_what_it_is(run: Run, tmp_path: Path) -> None:
    write_tiny(tmp_path, "granite", model_type="granite_swa")
    asked = ("-m", "granite.json", "--seq-len", "64", "-s", "standard", "--assume", "llama-like")
    told = run("trace", *asked, *ON, "--json").json
    assert told["instants"][0]["formula_bytes"] > 0 and "--assume llama-like" in told["model"]["notes"][0]


def test_what_is_measured_is_read_as_assumed(tmp_path: Path) -> None:
    path, on = str(write_tiny(tmp_path, "granite", model_type="granite_swa")), card(memory=2**33)
    with pytest.raises(UnreadError):
        sweep.plan_cases(path, [64], {"standard": Recipe()}, on, device="cpu")
    (case,) = sweep.plan_cases(path, [64], {"standard": Recipe()}, on, layers=2, device="cpu", assume="llama-like")
    assert Case.from_data(json.loads(json.dumps(case.as_data()))) == case and case.described.layers == 2
    (known,) = sweep.plan_cases(str(write_tiny(tmp_path)), [64], {"standard": Recipe()}, on, device="cpu")
    assert "assume" not in known.as_data()  # results of before stay what they are


def test_unknown_assumptions_are_refused_with_the_known_ones(run: Run) -> None:
    said = run(*MAX_SEQ, "--assume", "gpt-like")
    assert (
        said.code == 2
        and said.err == "mstplan: cannot assume that a model is 'gpt-like'.\nKnown: llama-like, no-towers.\n"
    )


def parameters(name: str) -> int:
    """Of transformers' own module."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(f"{name}.json"))
    model.tie_weights()
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(("name", "config"), [("biogpt", BIOGPT), ("phimoe", PHIMOE)])
def test_max_seq_and_plan_agree(run: Run, tmp_path: Path, name: str, config: dict[str, object]) -> None:
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    asked = ("-m", f"{name}.json", *ON)
    told = run("max-seq", *asked, "-s", "checkpoint", "--json").json
    (row,) = told["results"]
    assert told["rung"] == "trace" and told["model"]["parameters"] == parameters(name) and row["calibration"] is None
    assert any(
        note.startswith("answered by the trace: ") and f"'{config['model_type']}'" in note for note in told["notes"]
    )
    s_max = row["s_max"]
    assert s_max > 64 and row["peak_bytes"] <= told["budget_bytes"]
    fits, too_long = (
        run("plan", *asked, "-s", "checkpoint", "--seq-len", str(n), "--json") for n in (s_max, s_max + 1)
    )
    assert (fits.code, too_long.code) == (0, 1) and fits.json["rung"] == too_long.json["rung"] == "trace"
    assert fits.json["peak_bytes"] == row["peak_bytes"] and all(
        i["formula_bytes"] is None for i in fits.json["instants"]
    )
    said = run("plan", *asked, "-s", "checkpoint", "--seq-len", str(s_max))
    assert "answered by the trace" in said.out and "formula" not in said.out.split("answered", 1)[1].split("\n\n")[0]
    assert max(map(len, said.out.splitlines())) <= 80


def test_strategies_are_traced_until_one_fits(run: Run) -> None:
    told = run("plan", "-m", "biogpt.json", *ON, "--seq-len", "8", "--json").json
    assert told["strategy"] == "standard" and [s["strategy"] for s in told["strategies"]] == ["standard"]
    told = run(
        "plan", "-m", "biogpt.json", *ON, "-s", "standard,checkpoint", "--seq-len", "4000", "--batch", "64", "--json"
    ).json
    assert [s["strategy"] for s in told["strategies"]] == ["standard", "checkpoint"] or told["fits"]
