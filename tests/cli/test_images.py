"""Images as a user asks for them: by the formula where it knows the tower, without torch, else by the trace."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from mstplan.tracing import cache

from ..tracing.test_towers import CONFIGS, changed
from .conftest import Run

IMAGES = ("--images", "2", "--gpu", "h100")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for family, config in CONFIGS.items():
        Path(f"{family}.json").write_text(json.dumps(config))
    Path("with_head.json").write_text(json.dumps(changed("gemma3", vision_use_head=True)))


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cache.metadata, "version", absent)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_the_formula_answers_without_torch(run: Run, models: None, without_torch: None, family: str) -> None:
    answer = run("max-seq", "-m", f"{family}.json", *IMAGES, "-s", "mst", "--format", "json")
    facts = json.loads(answer.out)
    tokens = {"gemma3": 64, "llava": 576}[family]
    assert answer.code == 0 and facts["provenance"].startswith("estimated")
    assert f"of each sequence's tokens {2 * tokens:,} are 2 images'" in answer.out
    assert "Not in: what cuDNN takes for convolutions" in answer.out and "wait, with weights" not in answer.out
    alone = json.loads(run("max-seq", "-m", f"{family}.json", "--gpu", "h100", "-s", "mst", "--format", "json").out)
    assert facts["results"][0]["s_max"] < alone["results"][0]["s_max"]


def test_lengths_that_images_leave_no_room_in(run: Run, models: None, without_torch: None) -> None:
    answer = run("plan", "-m", "llava.json", *IMAGES, "--seq-len", "1k")
    assert answer.code == 2 and "take 1,152 of a sequence's tokens, and leave none of 1,024 for text" in answer.err
    assert run("plan", "-m", "llava.json", *IMAGES, "--seq-len", "2k", "--freeze", "vision").code == 0


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("with_head.json", (), "images with this model's tower are counted by the trace alone"),
        ("llava.json", ("--attention", "eager"), "images with --attention eager are counted by the trace alone"),
        ("llava.json", ("--rung", "trace"), "images with --rung trace are counted by the trace alone"),
    ],
)
def test_what_the_trace_alone_answers_is_refused_without_torch(
    run: Run, models: None, without_torch: None, model: str, options: tuple[str, ...], said: str
) -> None:
    answer = run("max-seq", "-m", model, *IMAGES, *options)
    assert answer.code == 2 and said in answer.err and "pip install 'mstplan[torch]'" in answer.err


def test_and_answered_with_it(run: Run, models: None) -> None:
    answer = run("plan", "-m", "with_head.json", *IMAGES, "--seq-len", "1k", "-s", "checkpoint")
    assert answer.code == 0 and "simulated" in answer.out


def test_images_of_another_size_than_the_towers(run: Run, models: None) -> None:
    answer = run("max-seq", "-m", "llava.json", *IMAGES, "--image-tokens", "100")
    assert answer.code == 2 and "every image is 576 tokens in llava" in answer.err
    assert run("max-seq", "-m", "llava.json", *IMAGES, "--image-size", "900x400", "-s", "mst").code == 0


def test_a_model_that_ships_as_its_text_says_where_its_tower_is(run: Run) -> None:
    part, plain = (run("max-seq", "-m", name, *IMAGES) for name in ("gemma3-4b", "llama3.1-8b"))
    assert part.code == plain.code == 2
    assert (
        part.err.endswith("download that of google/gemma-3-4b-it, and pass its path.\n")
        and len(part.err.splitlines()) == 2
    )
    assert plain.err.endswith("Leave --images out.\n")


def test_all_ways_to_use_several_gpus(run: Run, models: None, without_torch: None) -> None:
    options = ("max-seq", "-m", "gemma3.json", *IMAGES, "-s", "mst", "--gpus", "8")
    answer = run(*options, "--sharding", "all", "--format", "json")
    facts = json.loads(answer.out)
    reached = {row["way"] for row in facts["ways"]}
    assert answer.code == 0 and reached == {"fsdp", "ddp", "zero1", "zero2"}
    refused = run(*options, "--sharding", "zero3")
    assert refused.code == 2 and "take --sharding fsdp" in refused.err and len(refused.err.splitlines()) == 1
