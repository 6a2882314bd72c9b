from __future__ import annotations

from collections.abc import Sequence

import pytest

from mstplan.plan import advice
from mstplan.plan.solve import max_seq, plan_at
from mstplan.plan.ways import ways_to_fit
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import USUAL_STRATEGIES, Recipe, strategy
from mstplan.units import format_gib

GIB = 2**30
MODEL = load_model("llama3.1-8b")


def test_host_memory_is_named() -> None:
    answer = max_seq(MODEL, strategy("mst-offload"), card("h100", host_memory=16 * GIB), "mst-offload")
    assert any("CPU RAM is short" in note and f"{answer.s_max:,}" in note for note in advice.answer_notes(answer))


def test_cpu_ram_that_is_the_memory_of_the_gpu_is_said() -> None:
    model, on = load_model("qwen3-0.6b"), card("dgx spark")
    plan = plan_at(model, Recipe(checkpoint="layer", offload="layer-inputs"), on, 4096)
    assert not plan.fits and plan.tensors_fit
    assert advice.host_notes(plan) == [
        "layer inputs in CPU RAM would stay in the memory of gb10, which is the CPU's, too"
    ]
    assert any("shares its memory with the CPU" in note for note in advice.card_notes(on))
    assert not any("shares its memory" in note for note in advice.card_notes(card("gh200")))


@pytest.mark.parametrize(
    ("on", "changes", "said"),
    [
        ("h100", {}, True),
        ("b200", {}, True),
        ("a100", {}, False),
        ("rtx-5090", {}, False),
        ("h100", {"attention": "flash"}, False),
        ("h100", {"precision": "fp32"}, False),
        ("h100", {"precision": "mixed"}, True),
    ],
)
def test_where_the_kernel_depends_on_torch_it_is_said(on: str, changes: dict[str, object], said: bool) -> None:
    model = load_model("llama3.1-8b")
    notes = advice.kernel_notes(model, strategy("mst", **changes), card(on, torch="2.13"))
    assert ["cuDNN's attention" in note and "2.13+cu130" in note for note in notes] == [True] * said
    notes = advice.kernel_notes(model, strategy("mst", **changes), card(on, torch="2.10+cu128"))
    assert ["FlashAttention-2" in note and "2.10+cu128" in note for note in notes] == [True] * said
    assert advice.kernel_notes(load_model("gpt-oss-20b"), strategy("mst"), card("h100")) == []  # which has no sdpa


def test_notes_are_said_when_they_hold_and_only_then() -> None:
    long = max_seq(load_model("llama2-7b"), strategy("mst"), card("h100"), "mst")
    assert any("4,096 positions" in note and "RoPE" in note for note in advice.answer_notes(long))
    table = max_seq(load_model("gpt2"), strategy("mst"), card("h100"), "mst")
    assert any("1,024 positions" in note and "position table" in note for note in advice.answer_notes(table))
    short = max_seq(MODEL, strategy("checkpoint"), card("h100"), "checkpoint")
    assert advice.answer_notes(short) == []
    assert any("no sdpa for gemma2" in note for note in advice.recipe_notes(load_model("gemma2-2b"), strategy("mst")))
    for changes, said in (({}, True), ({"precision": "fp32"}, False), ({"attention": "eager"}, False)):
        notes = advice.recipe_notes(load_model("gpt-oss-20b"), strategy("mst", **changes))
        assert any("package kernels" in note and "--attention eager" in note for note in notes) == said
    assert not any("kernels" in note for note in advice.recipe_notes(load_model("gemma2-2b"), strategy("mst")))
    assert any("explicit S x S mask" in note for note in advice.recipe_notes(load_model("gemma3-1b"), strategy("mst")))
    assert advice.recipe_notes(MODEL, strategy("mst")) == []


@pytest.mark.parametrize(
    ("name", "kernels"), [("lfm2-350m", "causal-conv1d"), ("granite-4.0-h-tiny", "mamba-ssm")], ids=str
)
def test_which_code_of_what_mixes_tokens_is_counted_and_how_far_the_other_reaches(name: str, kernels: str) -> None:
    """Each answer says what the other one is. What limits LFM2 holds as much with both."""
    model, on = load_model(name), card("h100")
    reaches = {}
    for chosen, other in (("torch", kernels), (kernels, "torch")):
        recipe = strategy("mst", kernels=chosen, lora_rank=8, lora_targets=["in_proj"])
        answer = max_seq(model, recipe, on, "mst")
        (note,) = [note for note in advice.recipe_notes(model, recipe) if "(--kernels torch)" in note]
        assert ("hold less" if chosen == "torch" else "holds more") in note
        assert ("256 MiB" in note) == (chosen == "mamba-ssm")
        (further,) = advice.kernels_note(answer)
        reaches[chosen] = answer.s_max
        assert f"(--kernels {other})" in further
        if other in reaches:
            assert f"{reaches[other]:,} tokens" in further
    assert reaches["torch"] <= reaches[kernels] and (reaches["torch"] < reaches[kernels]) == (kernels == "mamba-ssm")
    refused = strategy("mst", lora_rank=8)  # adapters that mamba-ssm goes past
    notes = advice.kernels_note(max_seq(model, refused, on, "mst"))
    assert bool(notes) == (kernels != "mamba-ssm")
    assert advice.kernels_note(max_seq(MODEL, strategy("mst"), on, "mst")) == []


@pytest.mark.parametrize("options", [{"optimizer_on_host": True}, {"optimizer_on_host": True, "weights_on_host": True}])
def test_what_is_short_is_named(options: dict[str, object]) -> None:
    """Host memory where that is short, the card where that is; never an amount below nothing."""
    for host in (GIB, None):
        for memory in (80, 8):
            found = [
                max_seq(MODEL, strategy(name, **options), card(memory=memory * GIB, host_memory=host), name)
                for name in ("standard", "mst")
            ]
            if any(answer.s_max for answer in found):
                continue
            said = " ".join(
                [
                    *advice.nothing_fits_notes(found, (), None),
                    *(line for answer in found for line in advice.answer_notes(answer)),
                ]
            )
            assert ("CPU RAM is short" in said) == (host is not None)
            assert ("more than the budget" in said) == (found[1].plan.peak_bytes > found[1].plan.budget_bytes)
            assert "-" not in said.replace("not-", "").split("GiB")[0]


def test_padded_batches_are_a_note_with_their_number() -> None:
    model, on = load_model("mistral-7b-v0.1"), card("a100-80gb")
    answer = max_seq(model, strategy("mst"), on, "mst")
    longer = max_seq(model, strategy("mst", pad_to=8), on, "mst")
    (note,) = [note for note in advice.answer_notes(answer) if "--pad-to 8" in note]
    assert f"{answer.s_max:,}" in note and f"{longer.s_max:,}" in note and answer.s_max < longer.s_max
    assert not any("--pad-to" in note for note in advice.answer_notes(longer))


def test_the_adapter_is_said_with_its_reach_and_what_to_add() -> None:
    said = advice.adapter_lines(ways_to_fit(plan_at(MODEL, strategy("mst"), card("rtx-4090"), 4096)))
    s_max = max_seq(MODEL, strategy("mst", lora_rank=16), card("rtx-4090")).s_max
    assert said == [f"LoRA of rank 16 (--lora 16): {s_max:,} tokens with mst."]
    own = Recipe(precision="mixed", checkpoint="layer", optimizer="lion")
    (line,) = advice.adapter_lines(ways_to_fit(plan_at(MODEL, own, card("rtx-4090"), 2048)))
    assert line.startswith("LoRA of rank 16 (--lora 16 --precision bf16 --autocast): ") and "checkpointing" in line


def test_kbit_preparation_says_what_it_takes() -> None:
    """The bytes that are said are those between two plans of the same length."""
    on, recipe = card("h100"), strategy("checkpoint", lora_rank=16, quantize="nf4", kbit_preparation=True)
    plan = plan_at(MODEL, recipe, on, 8192)
    (note,) = advice.adapter_notes(plan)
    for words, fields in (("--autocast", {"autocast": True}), ("--kbit-preparation out", {"kbit_preparation": False})):
        less = plan.peak_bytes - plan_at(MODEL, recipe.changed(**fields), on, 8192).peak_bytes
        assert f"{words} saves {format_gib(less)}" in note and less > GIB
    assert "attention and logits" in note and "8,192 tokens" in note
    (note,) = advice.adapter_notes(plan_at(MODEL, recipe.changed(autocast=True), on, 8192))
    assert "--autocast" not in note and "attention" not in note and "--kbit-preparation out saves" in note
    assert advice.adapter_notes(plan_at(MODEL, recipe.changed(kbit_preparation=False), on, 8192)) == []


def test_fp32_adapters_that_need_more_than_full_fine_tuning_say_so() -> None:
    """By as much as two plans of the same length differ; and only where they do."""
    on, recipe = card("h200"), strategy("standard", lora_rank=16)
    plan, full = plan_at(MODEL, recipe, on, 65536), plan_at(MODEL, strategy("standard"), on, 65536)
    (note,) = advice.adapter_notes(plan)
    assert f"needs {format_gib(plan.peak_bytes - full.peak_bytes)} more than full fine-tuning" in note
    for words, fields in (("--adapter-dtype bf16", {"adapter_dtype": "bf16"}), ("--autocast", {"autocast": True})):
        less = plan.peak_bytes - plan_at(MODEL, recipe.changed(**fields), on, 65536).peak_bytes
        assert f"{words} saves {format_gib(less)}" in note and less > GIB
    for quiet in ({"checkpoint": "layer"}, {"adapter_dtype": "bf16"}, {"quantize": "nf4"}, {"lora_rank": 0}):
        assert advice.adapter_notes(plan_at(MODEL, recipe.changed(**quiet), on, 65536)) == []
    assert advice.adapter_notes(plan_at(MODEL, recipe, on, 1024)) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "cuDNN"),
        ({"precision": "fp32"}, "the math kernel"),
        ({"precision": "fp32", "autocast": True}, "cuDNN"),
        ({"lora_rank": 8, "kbit_preparation": True}, "the math kernel"),
        ({"lora_rank": 8, "kbit_preparation": True, "autocast": True}, "cuDNN"),
    ],
)
def test_the_kernel_that_is_said_is_of_the_dtype_that_attention_computes_in(
    fields: dict[str, object], words: str
) -> None:
    recipe = Recipe(**fields)
    assert advice.kernel_words(MODEL, recipe, card("h100")) == words
    noted = any("sdpa has no fast kernel" in note for note in advice.recipe_notes(MODEL, recipe))
    assert noted == (words == "the math kernel")
    assert plan_at(MODEL, recipe, card("h100"), 2048).kernels[0].label == words


def test_a_strategy_that_reaches_further_is_named_where_it_is_none_of_the_answers() -> None:
    def said(name: str, strategies: Sequence[str] = USUAL_STRATEGIES, **fields: object) -> str:
        on = card("b200")
        answers = [max_seq(load_model(name), strategy(each, **fields), on, each) for each in strategies]
        return " ".join(advice.layer_note(answers))

    assert "mst-layer-offload" in said("llama3.1-8b") and "--attention-on-host" in said("llama3.1-8b")
    assert "mst-layer-offload" in said("llama3.1-8b", gpus=8, sharding="fsdp")
    assert "mst-layer-offload" in said("gpt-oss-20b") and "--attention-on-host" not in said("gpt-oss-20b")
    assert not said("llama3.1-8b", ["mst-offload", "mst-layer"]) and not said("llama3.1-8b", ["checkpoint"])
    assert "--attention-on-host" in said("llama3.1-8b", gpus=8, sequence_parallel=8)
    ring = said("llama3.1-8b", gpus=8, context_parallel=8)
    assert "mst-layer-offload" in ring and "--attention-on-host" not in ring
    assert not said("llama3.1-8b", gpus=8, sharding="zero3")
