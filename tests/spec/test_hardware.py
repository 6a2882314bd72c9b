from __future__ import annotations

import pytest

from mstplan.errors import HardwareError
from mstplan.spec.hardware import GRANULARITY, _gpu_key, card, card_that_torch_names, find_gpu, gpus, gpus_of_size

GIB = 2**30


def test_every_card_has_sane_figures_and_sources() -> None:
    for gpu in gpus():
        assert 0.9 * gpu.nominal_gib * GIB <= gpu.usable_bytes <= gpu.nominal_gib * GIB, gpu.name
        assert 1e12 < gpu.bf16_flops < 1e16 and 1e11 < gpu.memory_bandwidth < 1e13 and 1e9 < gpu.host_link < 1e12
        assert gpu.usable_kind in ("reported", "nvidia-smi", "estimated")
        for text in (gpu.usable_source, gpu.rates_source, gpu.context_source, gpu.label, gpu.architecture):
            assert text.strip()


def test_the_context_is_measured_on_hopper_and_assumed_elsewhere() -> None:
    for gpu in gpus():
        measured = gpu.architecture == "hopper"
        assert (gpu.context_kind, gpu.context_bytes) == (
            ("measured", 804061184) if measured else ("assumed", 512 * 2**20)
        )
        assert not measured or "measured on an H100" in gpu.context_source.replace("Measured", "measured")
    assert find_gpu("NVIDIA H100 80GB HBM3").usable_bytes == 85017493504  # what the budget of an H100 is measured to be
    assert find_gpu("h200").usable_bytes == 150109880320


def test_names_and_aliases_are_unique() -> None:
    """As they are compared: no two cards, and no two names of a card, differ in dress alone."""
    names = [_gpu_key(name) for gpu in gpus() for name in (gpu.name, *gpu.aliases)]
    assert len(names) == len(set(names)) and all(names)


def test_cards_that_people_have() -> None:
    names = {gpu.name for gpu in gpus()}
    assert {"t4", "rtx-3090", "rtx-4090", "rtx-5090", "l4", "a100-80gb", "h100", "h200", "b200", "mi300x"} <= names
    assert {"l2", "l20", "b300", "gb200", "gb300", "gb10", "mi300a", "mi350x", "mi355x", "titan-rtx"} <= names
    assert {f"rtx-{n}000-ada" for n in "2456"} <= names
    assert {f"rtx-{n}-laptop" for n in ("5060", "5070", "5070-ti", "5080", "5090")} <= names
    assert {"rtx-4070", "rtx-4070-super", "rtx-4070-ti", "rtx-4070-ti-super", "rtx-3070-ti"} <= names
    assert {"v100-16gb", "v100-pcie-16gb", "v100-32gb", "v100-pcie-32gb", "v100s-32gb"} <= names


@pytest.mark.parametrize("name", ["h100", "H100", " h100 ", "h100-80gb", "A100_80GB", "rtx 4090"])
def test_names_in_any_dress(name: str) -> None:
    assert find_gpu(name).name in ("h100", "a100-80gb", "rtx-4090")


def test_every_name_in_every_dress() -> None:
    """As torch prints it: with the maker before it, in capitals, with blanks."""
    for gpu in gpus():
        for name in (gpu.name, *gpu.aliases):
            for maker in ("", "NVIDIA ", "nvidia-", "Tesla ", "NVIDIA GeForce ", "AMD Instinct "):
                assert {
                    find_gpu(maker + dress)
                    for dress in (name, name.upper(), name.replace("-", " "), name.replace("-", "_"), f"{name}  ")
                } == {gpu}


def test_cards_sold_under_two_names() -> None:
    """A800 and H800 are the A100 and the H100 with a slower link between cards."""
    for card_is, names in {
        "a100-80gb": (
            "A800",
            "A800-80GB",
            "nvidia a800",
            "NVIDIA A800-SXM4-80GB",
            "NVIDIA A800 80GB PCIe",
            "NVIDIA A100 80GB PCIe",
        ),
        "a100-40gb": ("a800-40gb", "NVIDIA A800-SXM4-40GB", "NVIDIA A800 40GB Active", "NVIDIA A100-PCIE-40GB"),
        "h100": ("H800", "nvidia h800", "NVIDIA H800", "h800-80gb", "NVIDIA H100 80GB HBM3"),
        "h100-pcie": ("NVIDIA H800 PCIe", "NVIDIA H100 PCIe"),
    }.items():
        assert {find_gpu(name).name for name in names} == {card_is}
    assert card_that_torch_names("NVIDIA A800-SXM4-80GB", 79 * GIB).gpu.name == "a100-80gb"


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("RTX 4070 Ti Super", "rtx-4070-ti-super"),
        ("rtx4070ti", "rtx-4070-ti"),
        ("4060 Ti 16 GB", "rtx-4060-ti-16gb"),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", "rtx-5090-laptop"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtx-pro-6000-max-q"),
        ("NVIDIA RTX 2000 Ada Generation", "rtx-2000-ada"),
        ("Tesla V100S-PCIE-32GB", "v100s-32gb"),
        ("NVIDIA TITAN RTX", "titan-rtx"),
        ("DGX Spark", "gb10"),
        ("NVIDIA GB10", "gb10"),
        ("Jetson AGX Orin", "jetson-agx-orin-64gb"),
        ("NVIDIA Thor", "jetson-agx-thor"),
        ("AMD Instinct MI350X VF", "mi350x-vf"),
        ("a4000", "rtx-a4000"),
    ],
)
def test_names_as_people_and_torch_write_them(typed: str, name: str) -> None:
    assert find_gpu(typed).name == name


@pytest.mark.parametrize(
    ("typed", "near"),
    [("mi350", "mi350x"), ("rtx 4070 tii", "rtx-4070-ti"), ("gb110", "gb10"), ("RTX PRO 6500", "rtx-pro-6000")],
)
def test_near_misses_suggest(typed: str, near: str) -> None:
    with pytest.raises(HardwareError, match=rf"Did you mean .*\b{near}\b"):
        find_gpu(typed)


def test_cards_that_share_their_memory_with_the_cpu() -> None:
    """Nothing is gained in CPU RAM there, and no amount of memory is taken for one of them."""
    shared = {gpu.name for gpu in gpus() if gpu.shared_memory}
    assert shared == {"gb10", "jetson-agx-orin-64gb", "jetson-agx-thor", "mi300a"}
    for name in shared:
        assert card(name).host_bytes == card_that_torch_names(name, 60 * GIB).host_bytes == 0
        with pytest.raises(HardwareError, match="no CPU RAM beside it"):
            card(name, host_memory=64 * GIB)
    assert card("gh200").host_bytes is None
    for size in (64, 128):
        unnamed = card(memory=size * GIB)
        assert unnamed.gpu.name not in shared and not shared & {gpu.name for gpu in gpus_of_size(unnamed)}


def test_sizes_are_reported_or_say_what_they_are_taken_from() -> None:
    for gpu in gpus():
        assert (gpu.usable_kind == "estimated") == gpu.usable_source.startswith("Estimated: "), gpu.name
        assert any(char.isdigit() for char in gpu.usable_source + gpu.rates_source), gpu.name


def test_the_budget_is_what_is_left() -> None:
    h100 = card("h100", reserve=GIB)
    assert h100.budget_bytes == h100.gpu.usable_bytes - h100.gpu.context_bytes - GRANULARITY - GIB
    nominal = card(memory=80 * GIB)
    assert nominal.budget_bytes == 80 * GIB - nominal.gpu.context_bytes - GRANULARITY
    assert not nominal.named and {"h100", "a100-80gb"} <= {gpu.name for gpu in gpus_of_size(nominal)}


def test_a_named_card_can_be_limited() -> None:
    assert card("h100", memory=40 * GIB).total_bytes == 40 * GIB
    assert card("h100", memory=80 * GIB).total_bytes == find_gpu("h100").usable_bytes  # torch never sees all 80


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "no GPU"),
        ({"gpu": "h10"}, "Did you mean h100"),
        ({"gpu": ""}, "unknown GPU"),
        ({"memory": 1}, "less than any GPU"),
        ({"gpu": "h100", "memory": 200 * GIB}, "more than h100"),
        ({"memory": 8 * GIB, "reserve": 8 * GIB}, "leaves nothing"),
    ],
)
def test_bad_cards(arguments: dict, says: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(HardwareError, match=says) as e:
        card(**arguments)
    assert len(str(e.value).splitlines()) <= 2


@pytest.mark.parametrize(
    "size", [-1, 1.5, float("nan"), True, "80GB", 2**60, 10**5000], ids=lambda size: type(size).__name__
)
@pytest.mark.parametrize("name", ["memory", "reserve", "host_memory"])
def test_amounts_are_whole_numbers(name: str, size: object) -> None:
    with pytest.raises(HardwareError, match=f"{name} is .*whole number of bytes") as e:
        card("h100", **{name: size})  # type: ignore[arg-type]
    assert len(str(e.value).splitlines()) <= 2 and len(str(e.value)) < 250


@pytest.mark.parametrize("name", [3, b"h100", "x" * 100_000, "a\nb"], ids=lambda name: type(name).__name__)
def test_what_is_no_gpu(name: object) -> None:
    with pytest.raises(HardwareError) as e:
        card(name)  # type: ignore[arg-type]
    assert len(str(e.value).splitlines()) <= 2 and len(str(e.value)) < 250


def test_labels() -> None:
    assert card("h100").label == card("h100", memory=40 * GIB).label == "h100"
    assert card(memory=80 * GIB).label == "80.00 GiB GPU"
