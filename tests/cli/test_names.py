"""Options and values of other trainers on the command line: two lines, exit code 2, and what they recommend is taken."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mstplan import cli
from mstplan.cli.commands import COMMANDS, FLAGS, OPTIONS
from mstplan.step import names

from .conftest import Run

CASE = ("-m", "gpt2", "--gpu", "h100")
USERS_OWN = {
    "--replicas": "2",
    "--reduce-dtype": "bf16",
    "--gpus-per-node": "8",
    "--batch": "2",
    "--accumulation": "2",
    "--attention": "eager",
    "--precision": "bf16",
    "--optimizer": "sgd",
    "--loss": "chunked",
    "--gpus": "1",
    "--sequence-parallel": "2",
    "--context-parallel": "2",
    "--tensor-parallel": "2",
    "--expert-parallel": "8",
    "--expert-imbalance": "2",
    "--rotate-method": "alltoall",
    "--model": "gpt2",
    "--gpu": "h200",
    "--gpu-mem": "80GB",
    "--host-mem": "64GB",
    "--seq-len": "512",
    "--chunks": "4",
    "--packing": "4",
    "--max-grad-norm": "1",
    "--lora": "16",
    "--lora-targets": "all-linear",
    "--lora-modules-to-save": "lm_head",
    "--quantize": "nf4",
    "--quant-storage": "bf16",
}
OF_ADAPTERS = {
    "--quantize",
    "--adapter-dtype",
    "--double-quantize",
    "--quant-storage",
    "--dora",
    "--kbit-preparation",
    "--lora-modules-to-save",
}
cli.declarations(None)


def refused(run: Run, *arguments: str) -> str:
    said = run(*arguments)
    assert said.code == 2 and not said.out and said.err.startswith("mstplan: ")
    assert len(said.err.splitlines()) == 2 and max(map(len, said.err.splitlines())) < 300
    return said.err


def recommended(message: str) -> list[tuple[str, ...]]:
    """The options that a message says to write, with their values; several that belong together in one."""
    found = []
    for together in re.findall(
        r"--[a-z][\w-]*(?: (?!or |and )[\w<.-]*\w)?(?: --[a-z][\w-]*(?: [\w<.-]*\w)?)*", message.partition("\n")[2]
    ):
        words = together.split()
        found.append(
            tuple(
                w
                for at, word in enumerate(words)
                for w in ((word, USERS_OWN[word]) if needs_a_value(words, at) else (word,))
            )
        )
    return found


def needs_a_value(words: list[str], at: int) -> bool:
    return words[at] in USERS_OWN and (at + 1 == len(words) or words[at + 1].startswith("--"))


MODELS_OF_KERNELS = {
    "fla": "qwen3-next-80b-a3b",
    "fla+causal-conv1d": "qwen3-next-80b-a3b",
    "causal-conv1d": "lfm2-1.2b",
    "mamba-ssm": "granite-4.0-h-tiny",
}


def taken(run: Run, options: tuple[str, ...]) -> bool:
    """Does some command answer with these options?"""
    shared = {"--sequence-parallel", "--context-parallel", "--tensor-parallel"}
    several = {"fsdp", "fsdp1", "ddp", "zero1", "zero2", "zero3", *shared} & {*options}
    more = ("--gpus", "8") if several and "--gpus" not in options else ()
    if {"--sequence-parallel-norms", "--loss-parallel"} & {*options} and "--tensor-parallel" not in options:
        more = ("--gpus", "2", "--tensor-parallel", "2", "--sequence-parallel-norms", "-m", "llama3.1-8b")
    elif "--tensor-parallel" in options and "--gpus" not in options:
        more = ("--gpus", "2", "-m", "llama3.1-8b", "--adamw-kernel", "for-loop")
    elif "--tensor-parallel" in options:  # which splits few families
        more = ("-m", "llama3.1-8b")
    if "zero3" in options:  # which knows the modules of few families
        more = (*more, "-m", "llama3.1-8b")
    if fused := MODELS_OF_KERNELS.keys() & {*options}:
        more = ("-m", MODELS_OF_KERNELS[fused.pop()])
    if "--rotate-method" in options:
        more = ("--gpus", "8", "--context-parallel", "8", "-m", "llama3.1-8b")
    if "--context-parallel" in options:  # which knows no windows
        more = (*more, "-m", "llama3.1-8b")
    if "--sequence-parallel" in options:  # which shares no masks
        more = (*more, "--attention", "flash")
    if {"--replicas", "--reduce-dtype"} & {*options} and "fsdp" not in options:
        more = ("--gpus", "8", "--sharding", "fsdp", "--precision", "mixed")
    if {"--backward-prefetch", "--use-orig-params"} & {*options}:
        more = ("--gpus", "8", "--sharding", "fsdp1", "-s", "checkpointing")
    elif "fsdp1" in options:  # which runs all in one piece
        more = (*more, "-s", "checkpointing")
    if {"--expert-parallel", "--expert-imbalance"} & {*options}:  # which are of experts
        more = ("--gpus", "8", "--sharding", "fsdp", "-m", "qwen3-30b-a3b", "-s", "checkpointing")
        more = (*more, *(() if "--expert-parallel" in options else ("--expert-parallel", "8")))
    if {"--double-quantize", "--quant-storage"} & {*options}:
        more = (*more, "--quantize", "nf4")
    if OF_ADAPTERS & {*options} and "--lora" not in options:
        more = (*more, "--lora", "16")
    beside = [
        word
        for flag, word in (("--model", "-m phi3-mini-4k"), ("--gpu", "--gpu h100"), ("--seq-len", "--seq-len 512"))
        if flag not in options and not (flag == "--model" and "-m" in more)
    ]
    return run("plan", *" ".join(beside).split(), *options, *more, "--json").code in (0, 1)


def test_every_option_of_other_trainers(run: Run) -> None:
    ways = set()
    for row in names._OPTIONS:
        typed = "--" + row.names.split()[-1].replace("*", "-of-some-kind")
        said = refused(run, "max-seq", *CASE, typed, "16")
        assert said.startswith(f"mstplan: no option {typed}") and row.statement in said
        assert bool(recommended(said)) == bool(row.write)
        ways.update(recommended(said))
    assert len(ways) > 25
    assert [way for way in ways if not taken(run, way)] == []


def test_every_value_of_other_trainers(run: Run) -> None:
    ways = set()
    for field, rows in names.VALUES.items():
        for row in rows:
            flag, typed = f"--{field.replace('_', '-')}", row.names.split()[0].replace("*", "x")
            if typed in OPTIONS["max-seq"][field].synonyms:
                continue
            said = refused(run, "max-seq", *CASE, flag, typed)
            assert "='" not in said and f"{field}=" not in said  # no Python here
            assert bool(recommended(said)) == bool(row.write)
            ways.update(recommended(said))
    assert len(ways) > 20
    assert [way for way in ways if not taken(run, way)] == []


def test_zero3_is_no_other_name_of_fsdp(run: Run) -> None:
    asked = ("max-seq", "-m", "qwen3-0.6b", "--gpu", "h100", "-s", "checkpointing", "--gpus", "8", "--json")
    assert run(*asked, "--sharding", "zero3").json != run(*asked, "--sharding", "fsdp").json
    assert "which is not known of gpt2" in refused(run, "max-seq", *CASE, "--gpus", "8", "--sharding", "zero3")


SAYS = [
    (("--gpus", "8"), "add --sharding fsdp"),
    (("--sharding", "fsdp"), "--sharding fsdp needs 2 gpus or more: add --gpus 8"),
    (("--gpus", "8", "--sharding", "hsdp"), "--sharding fsdp --replicas 2"),
    (("--gpus", "8", "--sharding", "fsdp_offload"), "--optimizer-on-host --weights-on-host"),
    (("--dp-replicate-size", "2"), "--replicas"),
    (("--gpus", "8", "--sharding", "zero_stage_2"), "Write --sharding zero2."),
    (("--gpus", "8", "--sharding", "stage1"), "Write --sharding zero1."),
    (("--gpus", "8", "--sharding", "zero2-offload"), "Write --sharding zero2 --optimizer-on-host."),
    (("--gpus", "8", "--sharding", "shard_grad_op"), "Nearest: --sharding fsdp"),
    (("--gpus", "8", "--sharding", "zero2", "--reduce-bucket-size", "large"), "--reduce-bucket-size"),
    (("--gpus", "8", "--sharding", "zero2", "--reduce-bucket-size", "0"), "--reduce-bucket-size: must be 'auto' or"),
    (("--gpus", "8", "--sharding", "zero2", "--weights-on-host", "--optimizer-on-host"), "take --sharding fsdp"),
    (("--gpus", "8", "--sharding", "zero1", "--precision", "mixed"), "--precision bf16"),
    (
        ("--gpus", "8", "--sharding", "zero2", "--context-parallel", "8"),
        "accelerate runs rings with FSDP2",
    ),
    (("--gpus", "8", "--sharding", "fsdp", "--overlap-comm"), "--overlap-comm is of ZeRO"),
    (("--gpus", "8", "--sharding", "dp"), "'dp' is all on each GPU"),
    (("--optimizer", "adamw8bit"), "Write --optimizer adamw-8bit."),
    (("--optimizer", "adamw_bnb_8bit"), "Write --optimizer adamw-8bit."),
    (("--optimizer", "paged_adamw_8bit"), "Write --optimizer paged-adamw-8bit."),
    (("--optimizer", "adamw_torch_4bit"), "Write --optimizer adamw-4bit."),
    (("--optimizer", "paged_lion_8bit"), "Nearest: --optimizer lion-8bit, whose"),
    (("--gradient-clipping", "1"), "Write it as --max-grad-norm."),
    (("--optimizer", "adamw_torch_fused"), "Write --optimizer adamw --adamw-kernel fused."),
    (("--optimizer", "adamw_torch"), "Write --optimizer adamw --adamw-kernel foreach."),
    (("--offload", "layer-inputs", "--checkpoint", "none"), "--offload layer-inputs needs checkpointing"),
    (("--offload", "--checkpoint", "none"), "--offload layer-inputs needs checkpointing"),
    (("--offload", "saved"), "Write --offload saved-tensors."),
    (("--checkpoint", "sac"), "Write --checkpoint selective."),
    (("--padding-free",), "--padding-free needs flash attention"),
    (("--packing", "4", "--batch", "2", "--attention", "flash"), "put all in one row, --padding-free"),
    (("--optimizer-in-backward", "--accumulation", "2"), "--optimizer-in-backward uses up each gradient"),
    (("--rung", "simulated"), "Write --rung trace."),
    (("--rung", "estimate"), "Write --rung formula."),
    (("--rung", "measured"), "is a command of its own: mstplan measure."),
]


@pytest.mark.parametrize(("asked", "says"), SAYS)
def test_answers_are_in_the_command_lines_words(run: Run, asked: tuple[str, ...], says: str) -> None:
    said = run("max-seq", *CASE, *asked)
    assert said.code == 2 and says in said.err and "='" not in said.err and len(said.err.splitlines()) <= 2


def test_a_recipe_in_a_file_is_answered_in_its_fields(run: Run, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"sharding": "stage3", "gpus": 8}')
    assert "Write sharding='zero3' (--sharding zero3)." in run("max-seq", *CASE, "--recipe", "r.json").err


@pytest.mark.parametrize(
    ("typed", "says"),
    [("cuda:1", "CUDA_VISIBLE_DEVICES=1"), ("rocm", "Write --device cuda."), ("mps", "is not measured on.")],
)
def test_names_of_devices(run: Run, typed: str, says: str) -> None:
    assert says in refused(run, "measure", "-m", "gpt2", "--seq-len", "64", "--device", typed)


@pytest.mark.parametrize("command", COMMANDS)
def test_in_any_command(run: Run, command: str) -> None:
    """What is recommended is an option of the command, or the message says of which it is one."""
    for typed in ("--load_in_4bit", "--MAX-LENGTH=4096"):
        said = refused(run, command, typed)
        assert typed.partition("=")[0] in said
        for way in recommended(said):
            flags = {word for word in way if word.startswith("--")}
            named = re.findall(r"\(mstplan ([\w, -]+)\)", said)
            commands = named[0].split(", ") if named else [command]
            assert all(flags <= FLAGS[each] for each in commands) and commands


def test_an_option_of_another_command(run: Run) -> None:
    said = refused(run, "max-seq", *CASE, "--seq-len", "64k")
    assert (
        said
        == "mstplan: max-seq has no option --seq-len.\nIt is one of mstplan plan, theorem, shapes, trace, measure, check-throughput, models.\n"
    )
    said = refused(run, "--gpu", "h100", "max-seq", "-m", "gpt2")
    assert "before the name of a command" in said and "max-seq" in said
    said = refused(run, "--lora", "16", "max-seq", "-m", "gpt2")
    assert "before the name of a command" in said and "max-seq" in said


def test_what_is_known_of_a_table_is_not_an_option_of_ours() -> None:
    """No pattern covers an option that only some commands have: those say whose it is."""
    ours = set().union(*FLAGS.values())
    assert [flag for flag in ours if names.find_option(flag) is not None] == [
        "--dtype"
    ]  # of shapes; elsewhere it is --precision


def test_a_slip_in_an_option_is_clicks_to_tell(run: Run) -> None:
    assert "--optimizer" in refused(run, "max-seq", *CASE, "--optimzer", "sgd")
    assert "Try 'mstplan max-seq --help'" in refused(run, "max-seq", *CASE, "--frobnicate")


def test_the_table_is_imported_for_a_slip_only() -> None:
    program = (
        "import sys; from mstplan import cli; sys.argv[1:] = ['max-seq', '-m', 'gpt2', '--gpu', 'h100']\n"
        "try: cli.main()\nexcept SystemExit: print([m for m in sys.modules if m.endswith('plan.names')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
