"""What varies has one place: an optimizer, a loss, an attention kernel, a family that only this file knows work in every command."""

from __future__ import annotations

import json

import pytest

from mstplan.plan import advice
from mstplan.spec.families import FAMILIES
from mstplan.step.kernels import KERNELS
from mstplan.step.kernels.base import Kernel
from mstplan.step.losses import LOSSES
from mstplan.step.losses.base import Loss, cross_entropy, logits_of
from mstplan.step.optimizers import OPTIMIZERS
from mstplan.step.optimizers.base import Held, Optimizer
from mstplan.step.tape import ForGradients

from ..tracing.tiny import TINY
from .conftest import Run


class Signs(Optimizer):
    """Momentum in the weights' dtype, and a step by its sign, for which one weight's is made at a time."""

    name = "signs"
    label = "the tests' optimizer"
    short = "signs alone"
    gives_up = "the sizes of updates"
    host_state_bytes = 4
    no_shards = "nobody asked it to"

    def states(self, recipe, weight):
        return (Held("momentum of signs", recipe.weight_dtype, recipe.weight_bytes * weight.numel, ("momentum",)),)

    def one_step(self, recipe, weight):
        return (Held("signs of one weight", recipe.weight_dtype, recipe.weight_bytes * weight.numel),)

    def make(self, recipe, kinds_of):
        import torch

        class Step(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self, closure=None):
                for group in self.param_groups:
                    for weight in group["params"]:
                        if weight.grad is not None:
                            kept = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                            kept.mul_(0.9).add_(weight.grad, alpha=0.1)
                            weight.add_(kept.sign(), alpha=-1e-5)

        return lambda weights: Step(weights, {})


@pytest.fixture
def signs(monkeypatch, tmp_path):
    monkeypatch.setitem(OPTIMIZERS, "signs", Signs())
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))


MODEL = ("-m", "tiny.json", "--gpu", "rtx-4090", "--optimizer", "signs")


def test_formula_and_trace_agree_on_an_optimizer_from_outside(run: Run, signs):
    """As on any other: its states and its temporaries are counted alike, and compared by their names."""
    for more in ((), ("--optimizer-in-backward",)):
        told = run("trace", *MODEL, "-s", "checkpoint", "--seq-len", "512", "--no-cache", "--json", *more).json
        planned = run("plan", *MODEL, "-s", "checkpoint", "--seq-len", "512", "--json", *more).json
        peaks = {each["name"]: each["bytes"] for each in told["instants"]}
        ours = {each["name"]: each["bytes"] for each in planned["instants"]}
        assert peaks and all(
            ours[name] == pytest.approx(peak, rel=0.002) for name, peak in peaks.items() if name in ours
        )


def test_max_seq_plan_and_plot_know_it(run: Run, signs, tmp_path):
    answers = {name: run("max-seq", *MODEL[:-1], name, "--json").json for name in ("sgd", "signs", "adamw")}
    lengths = [[a["s_max_tensors"] for a in answers[name]["results"]] for name in ("sgd", "signs", "adamw")]
    assert all(few >= some >= many for few, some, many in zip(*lengths, strict=True)) and lengths[0] != lengths[2]
    host = run("plan", *MODEL, "-s", "mst", "--seq-len", "1k", "--optimizer-on-host", "--json").json
    parameters = host["model"]["parameters"]
    assert host["host_bytes"] == parameters * (4 + 4 + 2)
    assert run("plot", *MODEL, "-o", "plot.svg").code == 0 and (tmp_path / "plot.svg").read_text().count("signs")


def test_it_is_refused_by_name_where_it_cannot_step(run: Run, signs):
    said = run("plan", *MODEL, "--seq-len", "1k", "--sharding", "fsdp", "--gpus", "2")
    assert said.code == 2 and "the tests' optimizer cannot step fsdp's shards" in said.err
    assert "signs" in run("plan", *MODEL[:-1], "sings", "--seq-len", "1k").err


def test_it_is_among_the_ways_to_fit(run: Run, signs):
    """A recipe that AdamW's states do not fit with is sent to it as well, as options to paste."""
    said = run("plan", "-m", "qwen3-4b", "--gpu", "rtx-4090", "-s", "mst", "--seq-len", "2k", "--json").json
    tried = [way["options"] for way in said["ways_to_fit"]]
    assert not said["fits"] and any("--optimizer" in options for options in tried)
    assert "signs alone" in advice.changes_do_not_help()
    for options in (o for o in tried if "--optimizer signs" in o):
        assert run("plan", "-m", "qwen3-4b", "--gpu", "rtx-4090", "--seq-len", "2k", *options.split()).code == 0


@pytest.mark.parametrize("typed", ["adamx", "lamb", "soap", "", "ADAMW-9bit", "signs"])
def test_an_unknown_optimizer_is_an_error(run: Run, typed, tmp_path):
    """Nothing falls through to AdamW."""
    for command in (("plan", "--seq-len", "1k"), ("max-seq",), ("trace", "--seq-len", "1k"), ("plot",)):
        said = run(*command, "-m", "gpt2", "--gpu", "h100", "--optimizer", typed)
        assert said.code == 2 and len(said.err.strip().splitlines()) <= 4 and not said.out
        assert all(name in said.err for name in OPTIMIZERS), said.err
    assert [path.name for path in tmp_path.iterdir()] == []


# ---- a loss ---------------------------------------------------------------------------------------------------------


class Doubled(Loss):
    """Cross entropy of twice the logits."""

    name = "doubled"

    def lay_out(self, w, hidden, head, labels, defers):
        logits = logits_of(w, hidden, head, defers)
        wide = w.cast(logits, "float32", "logits, fp32")
        w.hold(hidden)
        twice = w.pointwise("double", wide, w.new("logits, doubled", "V", "float32"))
        w.tape.op("shift labels", [], *labels)
        cross_entropy(w, twice, labels, variables=(logits, wide, hidden))

    def install(self, model):
        import torch.nn.functional as F

        def loss(logits, labels, vocab_size, **_):
            wide = logits.float()
            twice = wide * 2
            targets = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
            return F.cross_entropy(twice.view(-1, vocab_size), targets.view(-1))

        model.loss_function = loss


@pytest.fixture
def doubled(monkeypatch, tmp_path):
    monkeypatch.setitem(LOSSES, "doubled", Doubled())
    (tmp_path / "tiny.json").write_text(json.dumps({**TINY, "vocab_size": 16000}))


def peaks_of(said):
    return {each["name"]: each["bytes"] for each in said.json["instants"]}


def test_formula_and_trace_agree_on_a_loss_from_outside(run: Run, doubled):
    asked = ("-m", "tiny.json", "--gpu", "h100", "--seq-len", "2k", "-s", "checkpoint", "--json")
    ours, usual = (peaks_of(run("plan", *asked, "--loss", name)) for name in ("doubled", "transformers"))
    traced = peaks_of(run("trace", *asked, "--loss", "doubled", "--no-cache"))
    assert ours["loss"] == pytest.approx(usual["loss"] + 4 * 2048 * 16000, rel=0.01)
    assert set(ours) == set(traced)
    for name, size in traced.items():
        assert ours[name] == pytest.approx(size, rel=0.002), name


def test_max_seq_and_plot_know_the_loss(run: Run, doubled, tmp_path):
    asked = ("-m", "tiny.json", "--gpu", "rtx-4090", "-s", "checkpoint", "--json", "--loss")
    ours, usual = (run("max-seq", *asked, name).json["results"][0]["s_max"] for name in ("doubled", "transformers"))
    assert 0 < ours < usual
    assert run("plot", *asked[:-2], "--loss", "doubled", "-o", "plot.svg").code == 0
    assert "doubled" in run("plan", *asked[:-2], "--seq-len", "1k", "--loss", "dubled").err


# ---- a family -------------------------------------------------------------------------------------------------------


@pytest.fixture
def normed(monkeypatch, tmp_path):
    """A family with Qwen3's code under a name of its own, and another name for its norms of queries."""
    pytest.importorskip("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    class NormedConfig(Qwen3Config):
        model_type = "normed"

    class NormedForCausalLM(Qwen3ForCausalLM):
        config_class = NormedConfig

    monkeypatch.setitem(FAMILIES, "normed", FAMILIES["qwen3"]._replace(tiny={"head_dim": 64}))
    AutoConfig.register("normed", NormedConfig, exist_ok=True)
    AutoModelForCausalLM.register(NormedConfig, NormedForCausalLM, exist_ok=True)
    config = {**TINY, "model_type": "normed", "architectures": ["NormedForCausalLM"], "head_dim": 64}
    (tmp_path / "normed.json").write_text(json.dumps(config))


def test_formula_and_trace_agree_on_a_family_from_outside(run: Run, normed):
    asked = ("-m", "normed.json", "--gpu", "h100", "--seq-len", "4k", "-s", "checkpoint", "--json", "--train", "q_norm")
    told, traced = run("plan", *asked), run("trace", *asked, "--no-cache")
    assert told.json["trained_parameters"] == 64 * TINY["num_hidden_layers"]
    ours, theirs = peaks_of(told), peaks_of(traced)
    assert set(ours) == set(theirs)
    for name, size in theirs.items():
        assert ours[name] == pytest.approx(size, rel=0.002), name


def test_every_command_knows_the_family(run: Run, normed, tmp_path):
    asked = ("-m", "normed.json", "--gpu", "rtx-4090")
    found = run("max-seq", *asked, "--json").json
    assert all(row["s_max"] for row in found["results"]) and found["model"]["notes"] == []
    assert run("plot", *asked, "-o", "plot.svg").code == 0 and run("shapes", *asked[:2], "--seq-len", "1k").code == 0


def test_without_it_the_file_is_of_an_unknown_family(run: Run, tmp_path):
    (tmp_path / "normed.json").write_text(json.dumps({**TINY, "model_type": "normed"}))
    assert "not known to mstplan" in run("max-seq", "-m", "normed.json", "--gpu", "rtx-4090").out


# ---- an attention kernel --------------------------------------------------------------------------------------------


class Spare(Kernel):
    """A kernel that keeps 16 numbers a query and head beside q, k, v and its output, and needs dO in fp32 in backward."""

    name = "spare"
    by_sdpa = False

    def serves(self, asked):
        return True

    def lay_out(self, w, q, k, v, kind, masked):
        out = w.tape.new("attention mixed", f"{w.t} H e", q.dtype)
        rows = w.tape.new("row sums", f"{w.t} H 16", "float32")
        wide = w.tape.new("dO in fp32", f"{w.t} H e", "float32")
        w.tape.op(
            "spare attention",
            [q, k, v],
            out,
            rows,
            keeps=(q, k, v, out, rows),
            grads=tuple((x, w.tape.grad(x)) for x in (q, k, v)),
            for_gradients=ForGradients(all=True),
            back_temps=(wide,),
        )
        return out


@pytest.fixture
def spare(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from mstplan.tracing.kernels import STAND_INS
    from mstplan.tracing.kernels.base import StandIn

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
            ctx.save_for_backward(q, k, v, out, q.new_empty(*q.shape[:3], 16, dtype=torch.float32))
            return out

        @staticmethod
        def backward(ctx, incoming):
            made = tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])
            _wide = incoming.new_empty(incoming.shape, dtype=torch.float32)
            return made

    class SpareStandIn(StandIn):
        name = "spare"
        implementation = real = "tests_spare"

    monkeypatch.setitem(KERNELS, "spare", Spare())
    monkeypatch.setitem(STAND_INS, "spare", SpareStandIn())
    ALL_ATTENTION_FUNCTIONS.register(
        "tests_spare", lambda _m, q, k, v, _mask, **_: (Function.apply(q, k, v).transpose(1, 2), None)
    )
    ALL_MASK_ATTENTION_FUNCTIONS.register("tests_spare", lambda *_args, **_kwargs: None)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))


@pytest.mark.parametrize("strategy", ["standard", "mst"])
def test_formula_and_trace_agree_on_a_kernel_from_outside(run: Run, spare, strategy):
    asked = ("-m", "tiny.json", "--gpu", "h100", "--seq-len", "4k", "-s", strategy, "--json")
    ours, usual = (peaks_of(run("plan", *asked, "--attention", name)) for name in ("spare", "sdpa"))
    traced = peaks_of(run("trace", *asked, "--attention", "spare", "--no-cache"))
    assert ours != usual and set(ours) == set(traced)
    for name, size in traced.items():
        assert ours[name] == pytest.approx(size, rel=0.002), name


def test_every_command_knows_the_kernel(run: Run, spare, tmp_path):
    asked = ("-m", "tiny.json", "--gpu", "rtx-4090", "-s", "checkpoint")
    assert run("max-seq", *asked, "--attention", "spare", "--json").json["results"][0]["s_max"]
    assert run("plot", *asked, "--attention", "spare", "-o", "plot.svg").code == 0
    assert "spare" in run("plan", "--help").out.split("--attention")[1].split("--train")[0]
    said = run("plan", *asked, "--seq-len", "1k", "--attention", "spair")
    assert said.code == 2 and "spare" in said.err
