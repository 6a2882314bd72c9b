"""The Python interface: names and objects are the same question, and what is neither is said by the argument's name."""

import pytest

import mstplan
from mstplan.units import GIB


def test_names_and_objects_are_the_same_question():
    model, recipe, card = mstplan.load_model("llama3.1-8b"), mstplan.strategy("mst"), mstplan.card("h100")
    by_name = mstplan.max_seq("llama3.1-8b", "mst", "h100")
    assert by_name == mstplan.max_seq(model, recipe, card, "mst") and by_name.strategy == "mst"
    assert mstplan.max_seq(model, recipe, card).strategy == "custom"
    assert mstplan.plan_at("llama3.1-8b", "mst", "80GB", "64k").seq_len == 64 * 1024
    assert (
        mstplan.plan_at(model, recipe, mstplan.card(memory=80 * GIB), 65536).peak
        == mstplan.plan_at("llama3.1-8b", "mst", "80GB", "64k").peak
    )
    assert mstplan.parameter_count("llama3.1-8b") == mstplan.parameter_count(model)
    assert mstplan.shapes("llama3.1-8b", 1, "128k") == mstplan.shapes(model, 1, 131072)
    assert mstplan.plan_at(model, recipe, card, 4096, (2, 3)).chunks == mstplan.Chunks(2, 3)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((1, "mst", "h100"), "model is of type int."),
        (("llama3.1-8b", mstplan.card("h100"), "h100"), "recipe is of type Card."),
        (("llama3.1-8b", "mst", 80), "card is of type int."),
        (("llama3.1-8b", "mst", None), "card is of type NoneType."),
        (("llama3.1-8b", "h100", "mst"), "unknown strategy 'h100'."),
        (("lama3.1-8b", "mst", "h100"), "llama3.1-8b"),
        (("llama3.1-8b", "mst", "h1000"), "h100"),
        (("llama3.1-8b", "mst", "80GiBB"), "80GiBB"),
    ],
)
def test_what_is_neither(asked, said):
    with pytest.raises(mstplan.InputError) as raised:
        mstplan.max_seq(*asked)
    assert said in str(raised.value) and len(str(raised.value).splitlines()) <= 3


def test_reprs_fit_on_a_line():
    model = mstplan.load_model("deepseek-v3")
    assert repr(model) == "<Model deepseek-v3: deepseek_v3, 61 layers of 7168>"
    answer, plan = (
        mstplan.max_seq("llama3.1-8b", "mst", "h100"),
        mstplan.plan_at("llama3.1-8b", "checkpoint", "80GB", "64k"),
    )
    told = {
        answer: [
            "Answer mst",
            "llama3.1-8b",
            "h100",
            f"s_max {answer.s_max:,}",
            "peak ",
            "(backward of the last layer)",
        ],
        plan: ["Plan llama3.1-8b", "80.00 GiB GPU", "65,536 tokens: does not fit", "peak ", "(backward of the loss)"],
        answer.plan: ["fits, peak", "chunks 4 and 16"],
        mstplan.card("h100"): ["Card h100: ", "budget 78.41 GiB"],
        mstplan.find_gpu("h100"): ["Gpu h100: "],
        mstplan.card("h100", host_memory=GIB): ["CPU RAM 1.00 GiB"],
    }
    for value, words in told.items():
        assert len(repr(value)) < 160 and "\n" not in repr(value) and str(value) == repr(value)
        assert all(word in repr(value) for word in words), repr(value)


def test_a_recipe_shows_what_is_not_as_usual():
    assert repr(mstplan.Recipe()) == str(mstplan.Recipe()) == "Recipe()"
    own = mstplan.Recipe(optimizer="sgd", gpus=8, sharding="fsdp")
    assert str(own) == "Recipe(optimizer='sgd', gpus=8, sharding='fsdp')"
    for recipe in (own, *mstplan.STRATEGIES.values()):
        assert eval(repr(recipe), {"Recipe": mstplan.Recipe}) == recipe


def test_where_nothing_fits_there_is_no_time():
    none = mstplan.max_seq("llama3.1-70b", "mst", "rtx-4090")
    assert (none.s_max, none.step_seconds) == (0, None) and "nothing fits" in repr(none)
    some = mstplan.max_seq("llama3.1-8b", "mst", "h100")
    assert some.step_seconds == some.plan.step_seconds > 0


def test_a_trace_and_a_measurement():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    traced = mstplan.trace("smollm2-135m", "mst", "h100", "2k")
    planned = mstplan.plan_at("smollm2-135m", "mst", "h100", "2k")
    assert repr(traced).startswith("<Trace 2,048 tokens on cuda, 30 layers: peak ") and len(repr(traced)) < 100
    assert traced.peak.bytes == pytest.approx(planned.peak_bytes, rel=0.001)
    measured = mstplan.measure("smollm2-135m", "checkpoint", 128, device="cpu", layers=2, steps=1)
    assert measured.outcome == "ok" and measured.peak.allocated > 0
    assert repr(measured).startswith("<Measurement smollm2-135m, 2 layers, checkpoint, 128 tokens: ok, peak ")
    with pytest.raises(mstplan.MeasurementError, match="device is 'tpu'"):
        mstplan.measure("smollm2-135m", "checkpoint", 128, device="tpu")
