"""The command line as a user meets it: real output, exit codes, bad input."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mstplan.step.recipe import LABELS, STRATEGIES, USUAL_STRATEGIES, Recipe, strategy_label

from ..processes import ROOT
from .conftest import Run, Said

CASE = ("--model", "llama3.1-8b", "--gpu-mem", "80GB")


# ---- answers ----------------------------------------------------------------------------------------------------------


def test_max_seq_answers_for_every_strategy(run: Run) -> None:
    said = run("max-seq", *CASE)
    assert said.code == 0 and not said.err
    for name in USUAL_STRATEGIES:
        assert any(line.startswith(strategy_label(name) + " ") for line in said.out.splitlines())
    assert "budget 79.23 GiB" in said.out
    assert "80 GiB nominal" in said.out or "80.00 GiB nominal" in said.out


def test_all_ways_to_use_several_gpus_are_compared(run: Run) -> None:
    asked = (
        "max-seq",
        "--model",
        "qwen3-0.6b",
        "--gpu",
        "rtx-4090",
        "--sharding",
        "all",
        "--strategy",
        "checkpoint,mst",
    )
    said = run(*asked, "--gpus", "2")
    assert (
        said.code == 0 and "The first: --strategy mst" in said.out and "Left out, ddp, weights in CPU RAM" in said.out
    )
    answer = run(*asked, "--gpus", "2", "--sequence-parallel", "2", "--json").json
    assert answer["ways"][0]["way"] == "sequences over 2, weights in CPU RAM"
    for way in answer["ways"]:
        assert way["recipe"]["sequence_parallel"] == 2 and "--sequence-parallel 2" in way["options"]
    for more, missing in (((), "--gpus 8"), (("--gpus", "2", "--rung", "trace"), "Name one")):
        refused = run(*asked, *more)
        assert refused.code == 2 and missing in refused.err


def test_max_seq_json_has_the_promised_fields(run: Run) -> None:
    answer = run("max-seq", *CASE, "--json").json
    assert answer["schema_version"] == 1 and answer["rung"] == "formula"
    assert {"name", "parameters", "active_parameters", "layers"} <= answer["model"].keys()
    assert answer["model"]["parameters"] == 8_030_261_248
    assert answer["budget_bytes"] == answer["card"]["budget_bytes"] < 80 * 2**30
    fields = {
        "strategy",
        "s_max",
        "peak_bytes",
        "instant",
        "mlp_chunks",
        "loss_chunks",
        "chunk_tokens",
        "host_bytes",
        "step_seconds",
    }
    assert [r["strategy"] for r in answer["results"]] == list(USUAL_STRATEGIES)
    for result in answer["results"]:
        assert fields <= result.keys()
        assert 0 < result["peak_bytes"] <= answer["budget_bytes"]
        assert result["chunk_tokens"]["mlp"] == -(-result["s_max"] // result["mlp_chunks"])
    binding = answer["binding"]
    assert [e["bytes"] for e in binding] == sorted((e["bytes"] for e in binding), reverse=True)


def test_the_table_says_what_json_says(run: Run) -> None:
    table, answer = run("max-seq", *CASE).out, run("max-seq", *CASE, "--json").json
    for result in answer["results"]:
        line = next(line for line in table.splitlines() if line.startswith(result["label"] + " "))
        assert f"{result['s_max']:,}" in line and result["instant"] in line


def test_plan_fits_and_exit_codes(run: Run) -> None:
    fits = run("plan", *CASE, "--seq-len", "64k", "--strategy", "mst")
    assert fits.code == 0 and "fits" in fits.out
    too_long = run("plan", *CASE, "--seq-len", "128k", "--strategy", "checkpoint")
    assert too_long.code == 1 and "does not fit" in too_long.out and "cheapest first" in too_long.out


def test_plan_json_is_one_ledger(run: Run) -> None:
    answer = run("plan", *CASE, "--seq-len", "65536", "--strategy", "mst", "--json").json
    assert answer["fits"] is True
    by_name = {instant["name"]: instant for instant in answer["instants"]}
    assert by_name[answer["instant"]]["bytes"] == answer["peak_bytes"] == max(i["bytes"] for i in answer["instants"])
    for instant in answer["instants"]:
        assert sum(entry["bytes"] for entry in instant["entries"]) == instant["bytes"]
        assert {"name", "shape", "dtype", "bytes"} <= instant["entries"][0].keys()
    assert Recipe.from_json(json.dumps(answer["recipe"])) == STRATEGIES["mst"]


def test_plan_says_what_would_make_it_fit(run: Run) -> None:
    asked = ("plan", *CASE, "--seq-len", "64k")
    answer = run(*asked, "--strategy", "checkpoint", "--json").json
    assert answer["fits"] is False and answer["furthest"] is None
    table = run(*asked, "--strategy", "checkpoint").out
    for way in answer["ways_to_fit"]:
        pasted = run(*asked, *shlex.split(way["options"]), "--json")
        assert pasted.code == 0 and pasted.json["fits"] is way["fits"] is True
        assert (pasted.json["peak_bytes"], pasted.json["host_bytes"]) == (way["peak_bytes"], way["host_bytes"])
        (there,) = run("max-seq", *CASE, *shlex.split(way["options"]), "--json").json["results"]
        assert there["s_max"] == way["s_max"] >= 65536
        assert way["options"] in table and f"{way['s_max']:,}" in table and way["gives_up"] in table
    assert answer["ways_to_fit"]


@pytest.mark.parametrize("asked", [("max-seq",), ("plan", "--seq-len", "8k")])
def test_adapters_are_the_first_advice(run: Run, asked: tuple[str, ...]) -> None:
    """Where full fine-tuning does not fit: in JSON, in text, and pasted."""
    case = ("--model", "llama3.1-8b", "--gpu", "rtx-4090")
    answer, text = run(*asked, *case, "--json"), run(*asked, *case)
    first = answer.json["ways_to_fit"][0]
    assert answer.code == text.code == 1 and first["gives_up"] == "trains adapters instead of all weights"
    pasted = run("max-seq", *case, *shlex.split(first["options"]), "--json")
    assert pasted.code == 0 and pasted.json["results"][0]["s_max"] == first["s_max"]
    line = f"LoRA of rank 16 (--lora 16): {first['s_max']:,} tokens with {pasted.json['best']}."
    assert line in answer.json["notes" if asked == ("max-seq",) else "advice"]
    assert line in " ".join(text.out.split()) and text.out.index(first["options"]) < text.out.index(
        "--optimizer-on-host"
    )


def test_plan_without_a_way_says_how_far_changes_reach(run: Run) -> None:
    asked = ("plan", *CASE, "--seq-len", "4M")
    answer = run(*asked, "--json").json
    assert not answer["fits"] and answer["ways_to_fit"] == []
    (there,) = run("max-seq", *CASE, *shlex.split(answer["furthest"]["options"]), "--json").json["results"]
    assert max(s["s_max"] for s in answer["strategies"]) < there["s_max"] == answer["furthest"]["s_max"] < 4 * 2**20
    said = run(*asked).out
    assert f"{there['s_max']:,}" in said and answer["furthest"]["options"] in said and "No change" in said


def test_plan_answers_for_every_strategy_and_details_the_first_that_fits(run: Run) -> None:
    asked = ("plan", *CASE, "--seq-len", "64k")
    answer, table = run(*asked, "--json").json, run(*asked).out
    reached = {r["strategy"]: r["s_max"] for r in run("max-seq", *CASE, "--json").json["results"]}
    assert {s["strategy"]: s["s_max"] for s in answer["strategies"]} == reached and tuple(reached) == USUAL_STRATEGIES
    for line in answer["strategies"]:
        assert line["fits"] == (line["s_max"] >= 65536)
        (alone,) = run(*asked, "-s", line["strategy"], "--json").json["strategies"]
        assert alone == line
        assert any(
            row.split()[:1] == [strategy_label(line["strategy"])] and f"{line['s_max']:,}" in row
            for row in table.splitlines()
        )
    assert answer["strategy"] == next(name for name in USUAL_STRATEGIES if reached[name] >= 65536)


DESCRIBED = [
    (),
    ("--batch", "2"),
    ("--optimizer", "adafactor"),
    ("--checkpoint", "layer"),
    ("--checkpoint", "layer", "--attention", "flash"),
    ("--chunks", "8,32"),
    ("--chunks", "4", "--checkpoint", "layer", "--no-recompute"),
    ("--loss", "chunked"),
    ("--checkpoint", "sqrt", "--offload", "layer-inputs"),
    ("-s", "mst"),
    ("-s", "mst", "--chunks", "4,8"),
    ("-s", "checkpoint", "--chunks", "4"),
    ("-s", "mst", "--checkpoint", "2"),
    ("-s", "standard,mst", "--chunks", "2,4"),
    ("-s", "mst,checkpoint", "--checkpoint", "3"),
    ("--recipe", "mine.json"),
    ("--recipe", "mine.json", "--precision", "mixed"),
    ("--pad-to", "64"),
    ("--loss", "transformers<4.45", "--checkpoint", "layer"),
    ("-s", "all", "--loss", "transformers<4.45"),
]


@pytest.mark.parametrize("options", DESCRIBED, ids=" ".join)
def test_the_same_options_are_the_same_recipe_in_every_command(
    run: Run, tmp_path: Path, options: tuple[str, ...]
) -> None:
    Recipe(checkpoint=2, optimizer="sgd").write(tmp_path / "mine.json")
    asked = ("-m", "llama3.2-1b", "--gpu", "rtx-4090", *options)
    told = {r["strategy"]: r["recipe"] for r in run("max-seq", *asked, "--json").json["results"]}
    planned = {s["strategy"]: s["recipe"] for s in run("plan", *asked, "--seq-len", "2k", "--json").json["strategies"]}
    drawn = [c["strategy"] for c in run("plot", *asked, "-o", "m.csv", "--json").json["curves"]]
    assert told == planned and list(told) == list(planned) == drawn
    if "--recipe" not in options and "-s" not in options and len(told) == 1:
        usual = Recipe().model_dump()
        changed = {name for name, value in told["custom"].items() if value != usual[name]}
        assert "checkpoint" not in changed or "--checkpoint" in options  # that is, it starts from the standard strategy
        assert "loss" not in changed or {"--loss", "--chunks"} & set(options)


def test_a_recipe_goes_out_and_comes_back(run: Run) -> None:
    first = run("plan", *CASE, "--seq-len", "32k", "--batch", "2", "--write-recipe", "mine.json", "--json").json
    assert run("plan", *CASE, "--seq-len", "32k", "--batch", "2", "--write-recipe", "mine.json", "--force").code == 0
    again = run("plan", *CASE, "--seq-len", "32k", "--recipe", "mine.json", "--json").json
    assert Recipe.read("mine.json").batch == 2
    assert (first["strategy"], again["strategy"]) == ("chunked-loss", "custom")
    assert first["peak_bytes"] == again["peak_bytes"] and first["recipe"] == again["recipe"]


def test_chunks_are_fixed_by_the_user(run: Run) -> None:
    results = run("max-seq", *CASE, "-s", "all", "--chunks", "8,32", "--json").json["results"]
    chunked = {r["strategy"]: (r["mlp_chunks"], r["loss_chunks"]) for r in results}
    assert chunked["mst"] == chunked["mst-offload"] == (8, 32)
    assert chunked["standard"] == chunked["checkpoint"] == (1, 1)
    (custom,) = run("max-seq", *CASE, "--checkpoint", "4", "--chunks", "16", "--json").json["results"]
    assert custom["strategy"] == "custom" and custom["recipe"]["checkpoint"] == 4
    assert (custom["mlp_chunks"], custom["loss_chunks"]) == (16, 16) and custom["recipe"]["mlp_recompute"] is True


def test_theorem_shows_coefficients_and_both_answers(run: Run) -> None:
    said = run("theorem", "-m", "llama3.1-8b", "--gpu", "a100-80gb", "--seq-len", "64k")
    assert said.code == 0
    for word in ("W_mem", "I_mem", "A_mem", "MsT + CPU offload", "step model", "Why they differ"):
        assert word in said.out
    overridden = run(
        "theorem",
        *CASE,
        "--torch",
        "2.10",  # whose attention kernel the calibrations that ship are of
        "--w-mem",
        "60GiB",
        "--i-mem",
        "1000000",
        "--a-mem",
        "200000",
        "--layers",
        "4",
        "--m",
        "10",
        "--m-max",
        "70GiB",
        "--seq-len",
        "1000",
        "--json",
    ).json
    mst = next(f for f in overridden["formulas"] if f["formula"] == "MsT")
    assert mst["s_max"] == 10 * 2**30 // 500_000 and mst["memory_bytes"] == 60 * 2**30 + 1000 * 500_000
    assert [beside["calibration"]["rung"] for beside in overridden["step_model"]] == ["trace"] * 4


def test_shapes_shows_what_the_introduction_quotes(run: Run) -> None:
    said = run("shapes", "--model", "llama3.1-8b", "--seq-len", "131072")
    for figure in ("33 GB", "7.5 GB", "550 GB", "about 1 GB", "33.62", "7.52", "549.76", "1.07", "0.27"):
        assert figure in said.out


def test_models_shows_the_published_sizes(run: Run) -> None:
    rows = {m["name"]: m for m in run("models", "--json").json["models"]}
    published = {
        "llama2-7b": (32, 4096, 4096, 11008, 32000),
        "llama3-8b": (32, 4096, 8192, 14336, 128256),
        "llama3.1-8b": (32, 4096, 131072, 14336, 128256),
    }
    for name, sizes in published.items():
        row = rows[name]
        assert (row["layers"], row["hidden_size"], row["context"], row["intermediate_size"], row["vocab_size"]) == sizes
    table = run("models").out
    assert len(rows) >= 50 and all(name in table for name in rows)


def test_models_are_told_apart(run: Run) -> None:
    rows = {m["name"]: m for m in run("models", "--json").json["models"]}
    assert rows["qwen3-30b-a3b"]["experts"] == {"number": 128, "per_token": 8, "shared_width": 0}
    assert rows["qwen3-32b"]["experts"] is None and not rows["qwen3-32b"]["towers_left_out"]
    table = run("models", "qwen3").out
    assert "qwen3_moe" in table and "8 of 128" in table and "llama" not in table
    named = [
        m["name"] for m in run("models", "Qwen/", "a3b", "--json").json["models"]
    ]  # a part of the id, and of the name
    assert named == ["qwen3-30b-a3b", "qwen3-30b-a3b-2507", "qwen3-next-80b-a3b", "qwen3.5-35b-a3b"]


def test_models_that_fit_are_those_that_plan_says_fit(run: Run) -> None:
    said = run("models", "qwen3", "--fits", "rtx-4090", "--lora", "16", "--seq-len", "8k", "--json").json
    fit = {m["name"]: m["fits_with"] for m in said["models"]}
    assert fit == {
        "qwen3-0.6b": "checkpointing",
        "qwen3-1.7b": "checkpointing",
        "qwen3-4b": "chunked-loss",
        "qwen3-8b": "chunked-loss",
        "qwen3.5-9b": "mst-offload",
    }
    for name in ("qwen3-0.6b", "qwen3-8b", "qwen3-14b", "qwen3.5-9b"):
        planned = run("plan", "-m", name, "--gpu", "rtx-4090", "--lora", "16", "--seq-len", "8k")
        assert planned.code == (name not in fit)
    assert "qwen3-32b" in run("models", "qwen3", "--fits", "rtx-4090", "--lora", "16", "--quantize", "nf4").out
    none = run("models", "qwen3", "--fits", "t4", "--seq-len", "1M", "-s", "standard")
    assert none.code == 1 and "0 of 15 train on t4 at 1,048,576 tokens" in " ".join(none.out.split())


def test_what_cannot_be_planned_is_left_out_of_the_models_that_fit_and_named(run: Run) -> None:
    said = run(
        "models", "mi", "--fits", "h200", "--lora", "16", "--lora-targets", "gate_proj", "-s", "mst", "--json"
    ).json
    assert "mistral-7b-v0.3" in [m["name"] for m in said["models"]]
    assert any(
        note.startswith("left out: mixtral-8x7b: --lora-targets 'gate_proj' matches no linear layer")
        for note in said["notes"]
    )


def test_gpus_lists_cards_with_sources(run: Run) -> None:
    cards = {g["name"]: g for g in run("gpus", "--json").json["gpus"]}
    assert {"t4", "rtx-3090", "rtx-4090", "a100-40gb", "a100-80gb", "h100", "h200", "b200", "mi300x"} <= cards.keys()
    assert all(
        g["usable_source"] and g["rates_source"] and g["usable_bytes"] <= g["nominal_gib"] * 2**30
        for g in cards.values()
    )
    assert "h100" in run("gpus").out and "datasheet" in run("gpus", "--sources").out


@pytest.mark.parametrize("command", ["max-seq", "plan", "theorem", "shapes", "plot", "models", "gpus"])
def test_help_has_an_example_and_fits_80_columns(run: Run, command: str) -> None:
    said = run(command, "--help")
    assert said.code == 0 and "mstplan " + command in said.out
    assert max(map(len, said.out.splitlines())) <= 80


@pytest.mark.parametrize(
    "arguments",
    [
        ("max-seq", *CASE),
        ("max-seq", "-m", "deepseek-v3", "--gpu", "h200"),
        ("plan", *CASE, "--seq-len", "1M", "-s", "standard"),
        ("theorem", *CASE, "--seq-len", "64k"),
        ("shapes", "-m", "mixtral-8x7b"),
        ("models",),
        ("gpus", "--sources"),
    ],
)
def test_output_fits_80_columns_and_carries_no_colour_into_pipes(run: Run, arguments: tuple[str, ...]) -> None:
    said = run(*arguments)
    assert max(map(len, said.out.splitlines())) <= 80
    assert "\x1b" not in said.out


def test_reserve_host_memory_and_positions_are_noted(run: Run) -> None:
    free, held = (run("max-seq", *CASE, *more, "--json").json for more in ((), ("--reserve", "4GB")))
    assert free["budget_bytes"] - held["budget_bytes"] == 4 * 2**30
    notes = " ".join(run("max-seq", *CASE, "--host-mem", "16GB", "--json").json["notes"])
    assert "CPU RAM is short" in notes and "allows" in notes
    notes = " ".join(run("max-seq", "-m", "llama2-7b", "--gpu", "h100", "--json").json["notes"])
    assert "4,096 positions" in notes


def test_bytes_that_would_print_as_none_are_not_listed(run: Run) -> None:
    said = run("theorem", "-m", "llama3.1-8b", "--gpu", "h100", "--lora", "16").out
    assert "gradients 0.16 GiB" in " ".join(said.split()) and "0.00" not in said
    said = run("plan", "-m", "gpt2", "--gpu", "h100", "--seq-len", "128", "-s", "mst", "--tensors").out
    rows = said[said.index(" tensor ") :].splitlines()
    assert any(" smaller " in row for row in rows) and not any("0.00" in row for row in rows if "smaller" not in row)


def test_ways_say_of_which_length_their_times_are(run: Run) -> None:
    said = run("max-seq", "-m", "qwen3-4b", "--gpu", "rtx-4090", "-s", "checkpoint")
    assert "Ways to train qwen3-4b on rtx-4090; CPU GiB and step at 2,048 tokens" in said.out


@pytest.mark.parametrize(
    "more", [("max-seq",), ("max-seq", "-s", "mst"), ("plan", "--seq-len", "4k"), ("theorem",)], ids=" ".join
)
@pytest.mark.parametrize("card", ["rtx-4090", "h200"])
def test_a_quantised_model_is_told_first_that_it_is_planned_as_qlora(
    run: Run, tmp_path: Path, more: tuple[str, ...], card: str
) -> None:
    config = json.loads((ROOT / "profiles" / "models" / "llama3.1-8b.json").read_text())
    (tmp_path / "q.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    said = run(more[0], "-m", "q.json", "--gpu", card, *more[1:])
    lines = said.out.splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("- "))
    assert first <= 4 and lines[first].startswith("- published in fp4 (bitsandbytes): planned as QLoRA")
    assert "QLoRA of rank 16" in said.out and said.code == 0


# ---- bad input -----------------------------------------------------------------------------------------------------------


def test_some_strategies_only(run: Run) -> None:
    answer = run("max-seq", *CASE, "-s", "mst, checkpoint", "--json").json
    every = {r["strategy"]: r["s_max"] for r in run("max-seq", *CASE, "--json").json["results"]}
    assert {r["strategy"]: r["s_max"] for r in answer["results"]} == {
        name: every[name] for name in ("mst", "checkpoint")
    }
    assert {c["strategy"] for c in run("plot", *CASE, "-s", "mst", "-o", "m.csv", "--json").json["curves"]} == {"mst"}


def test_a_recipe_is_called_a_strategy_only_while_it_is_one(run: Run) -> None:
    def named(*options: str) -> str:
        return run("plan", *CASE, "--seq-len", "4k", *options, "--json").json["strategy"]

    assert named("-s", "mst", "--chunks", "8,32", "--batch", "2") == "mst" and named() == "standard"
    for other in (
        ("-s", "standard", "--chunks", "8"),
        ("-s", "standard", "--checkpoint", "layer"),
        ("-s", "mst", "--loss", "transformers"),
    ):
        assert named(*other) == "custom"
    assert "with this recipe" in " ".join(
        run("plan", *CASE, "--seq-len", "4k", "-s", "standard", "--checkpoint", "2").out.split()
    )


def test_the_papers_formulas_know_one_card(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sharded.json").write_text('{"sharding": "fsdp", "gpus": 8}')
    said = run("theorem", *CASE, "--recipe", "sharded.json")
    assert said.code == 2 and "one GPU" in said.err and "max-seq" in said.err
    assert run("theorem", *CASE, "--gpus", "8").code == 2


def test_a_defect_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    program = "from mstplan import cli\ncli.main = lambda: 1 / 0\ncli.process()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 70 and "ZeroDivisionError" in done.stderr


BAD = [
    (("max-seq", *CASE, "-s", "fast"), "unknown strategy 'fast'"),
    (("max-seq", *CASE, "-s", ""), "unknown strategy ''"),
    (("max-seq", *CASE, "-s", "mst", "--recipe", "unknown-field.json"), "exclude each other"),
    (("max-seq", *CASE, "--no-cache"), "--no-cache: nothing to do with the formula"),
    (("plan", *CASE, "--seq-len"), "Try 'mstplan plan --help'"),
    (("max-seq", "--model", "llama3.1-8b"), "no GPU given"),
    (("max-seq", "--model", "llama31-8b", "--gpu", "h100"), "Did you mean llama3.1-8b"),
    (("max-seq", "--model", "llama3.1-8b", "--gpu", "h10"), "Did you mean h100"),
    (("max-seq", "--model", "llama3.1-8b", "--gpu-mem", "80"), "79.15GiB"),
    (("max-seq", "--model", "llama3.1-8b", "--gpu-mem", "-3GB"), "cannot read"),
    (("max-seq", "--model", "llama3.1-8b", "--gpu-mem", "1MB"), "less than any GPU"),
    (("max-seq", "--model", "llama3.1-8b", "--gpu", "h100", "--gpu-mem", "90GB"), "more than h100 has"),
    (("max-seq", *CASE, "--reserve", "80GB"), "leaves nothing"),
    (("max-seq", *CASE, "--batch", "0"), "batch"),
    (("max-seq", *CASE, "--batch", "-1"), "batch"),
    (("max-seq", *CASE, "--chunks", "0"), "--chunks"),
    (("max-seq", *CASE, "--chunks", "1,2,3"), "--chunks"),
    (("max-seq", *CASE, "--optimizer", "adam"), "adamw"),
    (("max-seq", *CASE, "--precision", "fp8"), "bf16"),
    (("max-seq", *CASE, "--checkpoint", "lots"), "none, layer, reentrant, sqrt"),
    (("max-seq", *CASE, "--offload", "layer-inputs"), "needs checkpointing"),
    (("max-seq", *CASE, "--optimizer-in-backward", "--accumulation", "4"), "cannot accumulate"),
    (("max-seq", *CASE, "--weights-on-host"), "needs --optimizer-on-host"),
    (("max-seq", *CASE, "--recipe", "nowhere.json"), "there is no file 'nowhere.json'"),
    (("max-seq", *CASE, "--recipe", "pipe"), "is not a file"),
    (("max-seq", *CASE, "--checkpoint", "²"), "none, layer, reentrant, sqrt"),
    (("max-seq", *CASE, "--checkpoint", "9" * 5000), "whole number"),
    (("max-seq", *CASE, "--chunks", "9" * 5000), "--chunks"),
    (("max-seq", *CASE, "--chunks", "²"), "--chunks"),
    (("max-seq", *CASE, "--chunks", "," * 100_000), "--chunks"),
    (("max-seq", "--model", "llama3.1-8b", "--gpu-mem", "9" * 5000 + "GB"), "cannot read"),
    (("max-seq", "--model", "llama3.1-8b", "--gpu-mem", "9" * 400 + ".0GB"), "cannot read"),
    (("max-seq", "--model", "llama3.1-8b", "--gpu", "x" * 100_000), "unknown GPU"),
    (("max-seq", "--model", "x" * 100_000, "--gpu", "h100"), "unknown model"),
    (("max-seq", *CASE, "--precision", "fp32", "--attention", "flash"), "attention flash computes in"),
    (("max-seq", *CASE, "--batch", "9" * 5000), "--batch"),
    (("max-seq", "--gpu", "h100"), "Missing option '--model' / '-m'.\nTry 'mstplan max-seq --help'."),
    (("max-seq", *CASE, "--frob"), "--frob"),
    (("max-seq", *CASE, "more"), ""),
    (("frobnicate",), "No such command 'frobnicate'.\nTry 'mstplan --help'."),
    (("a\nb\x1b[31m" + "c" * 100_000,), "No such command"),
    (("plan", *CASE), "Missing option '--seq-len'."),
    (("plan", *CASE, "--seq-len", "9" * 5000), "64k"),
    (("plan", *CASE, "--seq-len", "64k,,1k"), "64k"),
    (("plan", *CASE, "--seq-len", "1,,,_"), "between 2 and"),
    (("plan", *CASE, "--seq-len", "64k", "--write-recipe", "broken.json"), "exists already"),
    (("plan", *CASE, "--seq-len", "64k", "--write-recipe", "folder"), "is a folder"),
    (("plan", *CASE, "--seq-len", "64k", "--strategy", "mst", "--recipe", "unknown-field.json"), "exclude each other"),
    (("plan", *CASE, "--seq-len", "64k", "--strategy", "x" * 100_000), "unknown strategy"),
    *((("theorem", *CASE, option, "9" * 5000), "whole number") for option in ("--i-mem", "--a-mem", "--layers", "--m")),
    *(
        (("theorem", *CASE, *option), option[0])
        for option in (
            ("--checkpoint", "layer"),
            ("--chunks", "8"),
            ("--loss", "chunked"),
            ("--offload", "layer-inputs"),
        )
    ),
    (("theorem", *CASE, "--no-recompute"), "--no-recompute"),
    (("models", "--lora", "16"), "--lora: nothing to do with what ships"),
    (("models", "--fits", "h1000"), "unknown GPU 'h1000'"),
    (("models", "zzz"), "no model's name, family or id contains 'zzz'"),
    (("max-seq", "--model", "folder", "--gpu", "h100"), "config.json"),
    (("max-seq", "--model", "broken.json", "--gpu", "h100"), "not valid JSON"),
    (("max-seq", "--model", "bert.json", "--gpu", "h100"), "encoder"),
    (("max-seq", "--model", "../../secrets", "--gpu", "h100"), "secrets"),
    (("plan", *CASE, "--seq-len", "0"), "whole number of tokens"),
    (("plan", *CASE, "--seq-len", "-5"), ""),
    (("plan", *CASE, "--seq-len", "many"), "64k"),
    (("plan", *CASE, "--seq-len", "64k", "--strategy", "mts"), "Did you mean mst"),
    (("plan", *CASE, "--seq-len", "64k", "--write-recipe", "no/such/folder/r.json"), "cannot write"),
    (
        ("plan", *CASE, "--seq-len", "64k", "--recipe", "unknown-field.json"),
        "no field 'optimiser'. Did you mean optimizer",
    ),
    (("theorem", *CASE, "--i-mem", "x"), "whole number"),
    (("theorem", *CASE, "--layers", "0"), "at least 1"),
    (("shapes", "--model", "llama3.1-8b", "--dtype", "int4"), "bfloat16"),
    (("plot", *CASE, "--out", "picture.gif"), ".png"),
]


@pytest.mark.parametrize(
    ("arguments", "says"), BAD, ids=lambda x: " ".join(x[1:])[-40:] if isinstance(x, tuple) else None
)
def test_bad_input_gets_one_or_two_clear_lines(run: Run, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.json").write_text('{"model_type": "llama", ')
    (tmp_path / "bert.json").write_text('{"model_type": "bert", "hidden_size": 768}')
    (tmp_path / "unknown-field.json").write_text('{"optimiser": "sgd"}')
    os.mkfifo(tmp_path / "pipe")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    said = run(*arguments)
    assert said.code == 2
    assert "Traceback" not in said.err and not said.out
    if says:
        assert says in said.err
    assert len(said.err.strip().splitlines()) <= 2 and said.err.startswith("mstplan: ")
    assert max(map(len, said.err.splitlines())) < 300
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_memory_smaller_than_the_weights_says_how_much_is_needed(run: Run) -> None:
    said = run("max-seq", "--model", "llama3.1-70b", "--gpu", "h100")
    assert said.code == 1 and "525.73 GiB" in said.out
    assert all(
        r["s_max"] == 0 for r in run("max-seq", "--model", "llama3.1-70b", "--gpu", "h100", "--json").json["results"]
    )


def test_unknown_commands_and_missing_options_exit_2(run: Run) -> None:
    assert run("frobnicate").code == 2
    assert run("max-seq").code == 2
    assert run("plan", *CASE).code == 2


def test_help_says_when_one_recipe_is_planned(run: Run) -> None:
    assert 'one recipe ("custom")' in " ".join(run("max-seq", "--help").out.split())


def test_theorem_leaves_out_what_the_formulas_vary(run: Run, tmp_path: Path) -> None:
    STRATEGIES["mst"].changed(batch=2).write(tmp_path / "r.json")
    assert (
        run("theorem", *CASE, "--recipe", "r.json", "--json").json
        == run("theorem", *CASE, "--batch", "2", "--json").json
    )


def test_ctrl_c_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mstplan.spec.catalog.load_model", stop)
    said = run("max-seq", *CASE)
    assert said.code == 130 and not said.out and "Traceback" not in said.err


# ---- as a process ----------------------------------------------------------------------------------------------------

EVERY = {
    "max-seq": ("max-seq", *CASE),
    "plan": ("plan", *CASE, "--seq-len", "64k"),
    "theorem": ("theorem", *CASE),
    "shapes": ("shapes", "-m", "llama3.1-8b"),
    "models": ("models", "--json"),
    "gpus": ("gpus", "--sources"),
    "help": ("--help",),
    "version": ("--version",),
}


def shell(arguments: tuple[str, ...], redirected: str, folder: Path) -> Said:
    command = f'"$0" -m mstplan "$@" {redirected}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = ["bash", "-c", command, sys.executable, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=60)
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("command", EVERY)
def test_a_reader_that_goes_away_is_no_traceback(command: str, tmp_path: Path) -> None:
    said = shell(EVERY[command], "| true; exit ${PIPESTATUS[0]}", tmp_path)
    assert (said.code, said.err) == (141, "")


def test_a_reader_that_leaves_after_a_line(tmp_path: Path) -> None:
    said = shell(("models", "--json"), "| head -n 1", tmp_path)
    assert (said.out, said.err) == ("{\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("command", EVERY)
def test_a_full_disk_is_one_line(command: str, tmp_path: Path) -> None:
    said = shell(EVERY[command], "> /dev/full", tmp_path)
    assert (said.code, said.err) == (2, "mstplan: cannot write the answer: No space left on device\n")
    assert shell(("frobnicate",), "2> /dev/full", tmp_path) == (2, "", "")


@pytest.mark.parametrize("command", EVERY)
def test_closed_streams_are_no_crash(command: str, tmp_path: Path) -> None:
    assert shell(EVERY[command], ">&-", tmp_path) == (0, "", "")
    said = shell(EVERY[command], "2>&-", tmp_path)
    assert said.code == 0 and said.out
    assert shell(("frobnicate",), "2>&-", tmp_path) == (2, "", "")


def test_any_name_can_be_printed_anywhere(tmp_path: Path) -> None:
    (tmp_path / "模型.json").write_text((ROOT / "profiles" / "models" / "gpt2.json").read_text())
    said = shell(("shapes", "-m", "模型.json"), "2>&1", tmp_path)
    assert said.code == 0
    command = ["env", "PYTHONIOENCODING=ascii", sys.executable, "-m", "mstplan", "shapes", "-m", "模型.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr


# ---- several lengths ----------------------------------------------------------------------------------------------------


def test_plan_of_several_lengths_is_each_of_them(run: Run) -> None:
    asked = ("plan", "-m", "llama3.1-8b", "--gpu", "h100")
    told = run(*asked, "--seq-len", "16k,64k,100k", "--json")
    assert told.code == 0 and told.json["fits"] and told.json["notes"]
    for each, length in zip(told.json["lengths"], ("16k", "64k", "100k"), strict=True):
        alone = run(*asked, "--seq-len", length, "--json").json
        assert (each["seq_len"], each["strategy"], each["fits"]) == (alone["seq_len"], alone["strategy"], alone["fits"])
        assert each["strategies"] == alone["strategies"]
    said = run(*asked, "--seq-len", "16k,64k")
    assert said.out.count("mst-offload") == 2 and "16,384" in said.out and "65,536" in said.out
    rows = run(*asked, "--seq-len", "16k,64k", "--format", "csv").out.splitlines()
    assert len(rows) == 11 and rows[0].startswith("strategy,fits,peak_bytes")


def test_one_length_that_does_not_fit_is_told_by_the_exit_code(run: Run) -> None:
    assert run("plan", "-m", "llama3.1-8b", "--gpu", "h100", "--seq-len", "4k,1M").code == 1
    for bad in ("16k,,64k", "16k,many", ",", "16k,"):
        said = run("plan", "-m", "llama3.1-8b", "--gpu", "h100", "--seq-len", bad)
        assert said.code == 2 and not said.out and len(said.err.splitlines()) <= 2, bad
    said = run("plan", "-m", "gpt2", "--gpu", "h100", "--seq-len", "16,32", "--write-recipe", "r.json")
    assert said.code == 2 and "Give one length" in said.err


def test_strategies_answer_to_both_their_names(run: Run) -> None:
    """The field's word, which tables and help have, and the name that JSON and results files have."""
    for name, label in LABELS.items():
        answers = [run("max-seq", *CASE, "-s", called, "--json").json["results"] for called in (name, label)]
        assert answers[0] == answers[1] and answers[0][0]["strategy"] == name and answers[0][0]["label"] == label
    assert "--strategy checkpointing" in run("max-seq", *CASE, "-s", "CHECKPOINTING").err


@pytest.mark.parametrize("asked", [("max-seq", *CASE), ("plan", *CASE, "--seq-len", "64k")], ids=["max-seq", "plan"])
def test_tensors_are_shown_on_demand(run: Run, asked: tuple[str, ...]) -> None:
    short, long = run(*asked).out, run(*asked, "--tensors").out
    assert "smaller" in short and "d=4,096" not in short
    assert "d=4,096" in long and len(long.splitlines()) > len(short.splitlines()) + 5
    assert run(*asked, "--json").json == run(*asked, "--tensors", "--json").json


def test_json_has_the_words_of_the_screen_beside_the_older_ones(run: Run) -> None:
    (answer,) = run("max-seq", *CASE, "-s", "mst-offload", "--json").json["results"]
    assert answer["peak_at"] == answer["instant"] and answer["cpu_ram_bytes"] == answer["host_bytes"] > 0


def test_several_gpus_leave_room_for_nccl(run: Run) -> None:
    sharded = ("max-seq", *CASE, "--gpus", "8", "--sharding", "fsdp", "--strategy", "checkpoint", "--json")
    alone = run("max-seq", *CASE, "--strategy", "checkpoint", "--json").json["card"]["reserve_bytes"]
    found = run(*sharded).json["card"]["reserve_bytes"]
    own = run(*sharded, "--reserve", "512MiB").json["card"]["reserve_bytes"]
    assert (alone, found, own) == (0, 2 * 2**30, 2**29)


def test_a_recipe_file_of_several_gpus_leaves_room_for_nccl(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sharded.json").write_text('{"sharding": "ddp", "gpus": 8}')
    said = run("max-seq", *CASE, "--recipe", "sharded.json", "--json").json
    assert said["card"]["reserve_bytes"] == 2 * 2**30


def test_from_how_many_gpus_a_length_fits(run: Run) -> None:
    case = ("plan", "-m", "llama3.1-8b", "--gpu", "rtx-4090", "--seq-len", "4k", "--strategy", "checkpoint")
    said = run(*case, "--gpus", "2", "--sharding", "fsdp", "--json")
    fewest = said.json["fits_from_gpus"]
    assert said.code == 1 and fewest > 2
    assert f"--gpus {fewest}" in " ".join(said.json["advice"])
    more = run(*case, "--gpus", str(fewest), "--sharding", "fsdp", "--json")
    assert more.code == 0 and more.json["fits_from_gpus"] is None
    assert any("--precision mixed --reduce-dtype bf16" in note for note in more.json["notes"])


def test_ranks_that_divide_no_gpus_are_told_those_that_do_of_this_model(run: Run) -> None:
    asked = ("max-seq", "-m", "llama3.1-8b", "--gpu", "h100", "--gpus", "24")
    said = run(*asked, "--sequence-parallel", "5").err
    assert "24 gpus, nor the heads of llama3.1-8b (32 of queries, 8 of keys): use --sequence-parallel 2, 4, 8\n" in said
    said = run(*asked, "--sequence-parallel", "16").err
    assert "does not divide 24 gpus: use --gpus 32 or --sequence-parallel 2, 4, 8\n" in said
    said = run(*asked, "--sharding", "fsdp", "--tensor-parallel", "5").err
    assert "nor the matrices of llama3.1-8b: use --tensor-parallel 2, 4, 8\n" in said


def test_what_deepspeed_calls_a_bucket_goes_to_its_ways_alone(run: Run) -> None:
    """And is written as its files write it."""
    asked = (
        "max-seq",
        "-m",
        "llama3.2-1b",
        "--gpu",
        "rtx-4090",
        "--gpus",
        "2",
        "-s",
        "checkpoint",
        "--sharding",
        "all",
    )
    more = ("--sequence-parallel", "1", "--prefetch-bucket-size", "auto", "--sub-group-size", "1e8", "--json")
    ways = {way["recipe"]["sharding"]: way["recipe"] for way in run(*asked, *more).json["ways"]}
    assert {ways[name]["sub_group_size"] for name in ("zero2", "fsdp")} == {10**9}
    assert (ways["zero3"]["sub_group_size"], ways["zero3"]["prefetch_bucket_size"]) == (10**8, "auto")
