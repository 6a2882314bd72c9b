"""Recipes that people train with, as a user types them: adapters, a trainer's defaults, models and folders that speak of either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mstplan.spec.catalog import load_config
from mstplan.step.recipe import Recipe
from mstplan.step.trainers import TRAINERS

from .conftest import Run

ON = ("-m", "llama3.2-1b", "--gpu", "h100")


def test_qlora_answers_for_all_strategies(run: Run) -> None:
    code, out, _ = run(
        "max-seq", "-m", "llama3.1-8b", "--gpu", "rtx-4090", "--lora", "16", "--quantize", "nf4", "--json"
    )
    answer = json.loads(out)
    rows = {row["strategy"]: row["s_max"] for row in answer["results"]}
    assert code == 0 and list(rows) == ["standard", "checkpoint", "chunked-loss", "mst", "mst-offload"]
    assert 1000 < rows["standard"] < rows["checkpoint"] < rows["chunked-loss"] < rows["mst"] < rows["mst-offload"]


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainers_defaults_are_a_recipe_and_said(run: Run, name: str) -> None:
    code, out, _ = run("plan", *ON, "--seq-len", "1k", "--like", name, "--json")
    answer = json.loads(out)
    assert code in (0, 1) and all(any(each in note for note in answer["notes"]) for each in TRAINERS[name].assumptions)
    assert Recipe(**answer["recipe"]) == TRAINERS[name].recipe.changed(
        **{field: answer["recipe"][field] for field in ("mlp_chunks", "loss_chunks")}
    )


def test_options_go_on_top(run: Run) -> None:
    _, out, _ = run("plan", *ON, "--seq-len", "1k", "--like", "trl", "--batch", "2", "--lora", "8", "--json")
    recipe = json.loads(out)["recipe"]
    assert (recipe["loss"], recipe["batch"], recipe["lora_rank"]) == ("trl", 2, 8)


@pytest.mark.parametrize(("name", "loss"), [("axolotl", ()), ("trl", ("--loss", "chunked"))])
def test_a_trainer_under_deepspeed_has_its_precision(run: Run, name: str, loss: tuple[str, ...]) -> None:
    several = ("--gpus", "8", "--sharding", "zero3")
    _, out, _ = run("plan", *ON, "--seq-len", "1k", "--like", name, *several, *loss, "--json")
    answer = json.loads(out)
    assert (answer["recipe"]["precision"], answer["recipe"]["autocast"]) == ("bf16", False)
    assert any("under DeepSpeed with bf16 enabled" in note for note in answer["notes"])


def test_a_norm_of_zero_is_none(run: Run) -> None:
    several = ("--gpus", "8", "--sharding", "fsdp1")
    code, out, _ = run("plan", *ON, "--seq-len", "1k", "--like", "trl", *several, "--max-grad-norm", "0", "--json")
    assert code in (0, 1) and json.loads(out)["recipe"]["max_grad_norm"] is None


def test_all_strategies_are_those_that_go_with_options_and_model(run: Run, tmp_path: Path) -> None:
    def names(*arguments: str) -> list[str]:
        code, out, err = run("max-seq", *arguments, "-s", "all", "--json")
        assert code == 0, err
        return [row["strategy"] for row in json.loads(out)["results"]]

    every = names(*ON)
    assert {"mst-layer", "mst-layer-offload", "checkpoint-sqrt"} < {*every}
    assert names(*ON, "--gpus", "8", "--sharding", "zero3") == [
        n for n in every if n[:9] != "mst-layer" and n[-4:] != "sqrt"
    ]
    streams = {
        "model_type": "gemma3n_text",
        "vocab_size": 1000,
        "vocab_size_per_layer_input": 1000,
        "hidden_size": 128,
        "hidden_size_per_layer_input": 32,
        "intermediate_size": [256] * 4,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 512,
        "num_kv_shared_layers": 2,
        "laurel_rank": 16,
        "altup_num_inputs": 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(streams))
    assert "mst-layer" not in names("-m", str(tmp_path / "config.json"), "--gpu-mem", "24GB")
    # a note on what adapters cost leaves out what is not planned
    code, _, err = run("max-seq", "-m", str(tmp_path / "config.json"), "--gpu-mem", "24GB", "-s", "mst", "--lora", "16")
    assert code == 0, err


def test_recipes_are_listed_with_what_they_assume(run: Run) -> None:
    code, out, _ = run("recipes", "--json")
    listed = {row["name"]: row for row in json.loads(out)["recipes"]}
    assert code == 0 and listed.keys() == TRAINERS.keys()
    for name, row in listed.items():
        assert Recipe(**row["recipe"]) == TRAINERS[name].recipe and row["assumptions"]
        code, _, err = run("plan", *ON, "--seq-len", "1k", *row["options"].split())
        assert code in (0, 1), err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--like", "tlr"), "Did you mean trl"),
        (("--like", "trl", "-s", "mst"), "exclude each other"),
        (("--dora",), "--lora 16"),
        (("--quantize", "nf4"), "--lora 16"),
        (("--lora", "8", "--double-quantize"), "--quantize nf4"),
        (("--lora", "8", "--lora-targets", "qproj"), "Did you mean q_proj"),
        (("--lora", "8", "--lora-targets", "lm_head"), "--lora-modules-to-save"),
        (("--lora", "8", "--lora-targets", "lm_head", "--loss", "chunked"), "never makes its logits"),
        (("--lora", "8", "--dora", "--gpus", "8", "--sharding", "zero3"), "leave --dora out"),
        (("--lora-targets", "q_proj"), "--lora-targets is of adapters: add --lora 16"),
        (("--adapter-dtype", "bf16"), "--adapter-dtype is of adapters: add --lora 16"),
        (("--lora", "8", "--lora-targets", "q_proj,v_prj"), "'v_prj' matches no linear layer"),
        (("--lora", "8", "--lora-targets", "attention,embed_tokens"), "--lora-modules-to-save embed_tokens"),
        (("--lora", "8", "--lora-targets", "mlp"), "names of modules: q_proj,k_proj,v_proj,o_proj,gate_proj"),
        (("--lora", "8", "--train", "norms"), "--lora-modules-to-save"),
        (("--optimizer", "lion", "--fp32-embedding-states"), "--fp32-embedding-states needs states in 8 bits"),
        (("--loss", "cce", "--precision", "fp32"), "cut cross-entropy"),
        (("--optimizer", "adamw-8bit", "--gpus", "8", "--sharding", "fsdp"), "adamw"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_way_out(run: Run, asked: tuple[str, ...], said: str) -> None:
    code, out, err = run("max-seq", *ON, *asked)
    assert code == 2 and out == "" and said in err and len(err.splitlines()) <= 2


def test_adapters_on_experts_are_planned_and_refused_as_peft_does(run: Run) -> None:
    asked = ("max-seq", "-m", "qwen3-30b-a3b", "--gpu", "h100", "--lora", "8")
    code, _, err = run(*asked)
    assert code == 0, err
    code, _, err = run(*asked, "--dora")
    assert code == 2 and "--lora-targets attention" in err
    code, _, err = run(*asked, "--quantize", "nf4", "--lora-targets", "attention")
    assert code == 0, err


def published(folder: Path, settings: dict[str, object]) -> str:
    """A model whose published weights are quantised."""
    (folder / "quantised").mkdir()
    config = {**load_config("llama3.2-1b"), "quantization_config": settings}
    (folder / "quantised" / "config.json").write_text(json.dumps(config))
    return str(folder / "quantised")


def test_a_model_that_is_published_quantised_is_planned_as_qlora(run: Run, tmp_path: Path) -> None:
    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    model = published(tmp_path, settings)
    code, out, _ = run("plan", "-m", model, "--gpu", "t4", "--seq-len", "1k", "--json")
    answer = json.loads(out)
    recipe = Recipe(**answer["recipe"])
    assert code == 0 and (recipe.lora_rank, recipe.quantize, recipe.double_quantize) == (16, "nf4", True)
    assert any("published in nf4" in note for note in answer["notes"])


@pytest.mark.parametrize(
    ("asked", "rank", "quantize", "double"),
    [
        (("--lora", "64"), 64, "nf4", True),
        (("--dora", "--lora-dropout", "0.1"), 16, "nf4", True),
        (("--quantize", "nf4"), 16, "nf4", True),
        (("--quantize", "int8"), 16, "int8", False),
        (("--quantize", "none"), 0, "none", False),
        (("--quantize", "none", "--lora", "64"), 64, "none", False),
        (("--lora", "0"), 0, "none", False),
        (("--like", "llama-factory"), 8, "nf4", True),
        (("--like", "trl"), 16, "nf4", True),
    ],
)
def test_options_say_what_becomes_of_weights_that_are_published_quantised(
    run: Run, tmp_path: Path, asked: tuple[str, ...], rank: int, quantize: str, double: bool
) -> None:
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model = published(tmp_path, {"quant_method": "bitsandbytes", **settings})
    code, out, err = run("plan", "-m", model, "--gpu", "h200", "--seq-len", "1k", *asked, "--json")
    assert code == 0, err
    recipe = Recipe(**json.loads(out)["recipe"])
    assert (recipe.lora_rank, recipe.quantize, recipe.double_quantize) == (rank, quantize, double)


def test_another_quantisation_is_said_to_be_another(run: Run, tmp_path: Path) -> None:
    model = published(tmp_path, {"quant_method": "gptq", "bits": 4})
    _, out, _ = run("plan", "-m", model, "--gpu", "h100", "--seq-len", "1k", "--json")
    answer = json.loads(out)
    assert answer["recipe"]["quantize"] == "none" and any(
        "gptq" in note and "--quantize nf4" in note for note in answer["notes"]
    )


def test_an_adapters_folder_says_how_to_plan_its_base(run: Run, tmp_path: Path) -> None:
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "llama3.2-1b",
        "r": 32,
        "target_modules": ["v_proj", "q_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    code, _, err = run("max-seq", "-m", str(tmp_path / "adapter_config.json"), "--gpu", "h100")
    way_out = err.splitlines()[1].partition(": ")[2]
    assert code == 2 and way_out == "-m llama3.2-1b --lora 32 --lora-targets q_proj,v_proj"
    code, _, err = run("max-seq", "--gpu", "h100", *way_out.split())
    assert code == 0, err
