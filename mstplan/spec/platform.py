"""What a GPU and a build of torch have to do with which kernels run: compute capability, and the version of cuDNN."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import HardwareError, quoted


class Platform(NamedTuple):
    """What torch looks at, beside the call, when it chooses an attention kernel."""

    capability: tuple[int, int] | None  # compute capability; None: a GPU of AMD's
    cudnn: int = 0  # version, as torch.backends.cudnn.version() has it; 0: none, or its attention is switched off
    torch: tuple[int, int] = (2, 13)

    @property
    def prefers_cudnn(self) -> bool:
        """Whether sdpa asks cuDNN first. from source: aten native/transformers/cuda/sdp_utils.cpp, check_prefer_cudnn_attention."""
        return self.capability is not None and self.capability[0] in (9, 10) and self.cudnn > 91500

    @property
    def alike(self) -> Platform:
        """One for all platforms on which torch chooses alike, so that steps and traces are shared."""
        return self if self.prefers_cudnn else AMPERE


AMPERE = Platform((8, 0))
"""Where FlashAttention-2 is the first to be asked, as on most GPUs."""


class TorchBuild(NamedTuple):
    """A build of torch: its release, the CUDA that it was built for, and its cuDNN."""

    torch: tuple[int, int]
    cuda: tuple[int, int]
    cudnn: int  # version, as torch.backends.cudnn.version() has it
    assumed: bool = False  # nobody named it, and none is installed

    @property
    def name(self) -> str:
        """As pip has it."""
        return f"{self.torch[0]}.{self.torch[1]}+cu{self.cuda[0]}{self.cuda[1]}"


def published_build(torch: tuple[int, int], cuda: tuple[int, int]) -> TorchBuild:
    """A build with the cuDNN that its wheel asks for (nvidia-cudnn-cu13 or -cu12 in the wheels' metadata)."""
    if cuda < (13, 0) or torch < (2, 11):
        return TorchBuild(torch, cuda, 91002)
    return TorchBuild(torch, cuda, 91900 if torch == (2, 11) else 92000)


NEWEST_BUILD = published_build((2, 13), (13, 0))._replace(assumed=True)
"""The newest whose wheels were read; what is assumed where nothing is known."""
_BUILD = re.compile(r"(\d+)\.(\d+)[\w.]*?(?:\+cu(\d{2})(\d+))?")


def read_build(text: str) -> TorchBuild:
    """A build as pip names it: 2.13, 2.10.0+cu128; without +cu, the one that PyPI has. Raises HardwareError."""
    parsed = _BUILD.fullmatch(text.strip())
    if parsed is None or int(parsed[1]) < 2:
        raise HardwareError(
            f"{quoted(text)} is no build of torch.\nWrite it like 2.13 or 2.10+cu128 (torch.__version__)."
        )
    release = int(parsed[1]), int(parsed[2])
    if parsed[3] is None:
        return published_build(release, (13, 0) if release >= (2, 11) else (12, 8))
    return published_build(release, (int(parsed[3]), int(parsed[4])))


@lru_cache(maxsize=1)
def installed_build() -> TorchBuild | None:
    """The build of torch that is installed, without importing it; None: none for CUDA."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    version = re.search(r"^__version__ = '(\d+\.\d+)", text, re.MULTILINE)
    cuda = re.search(r"^cuda[^=]*= '(\d+)\.(\d+)'", text, re.MULTILINE)
    if version is None or cuda is None:
        return None
    major, minor = version[1].split(".")
    return published_build((int(major), int(minor)), (int(cuda[1]), int(cuda[2])))


def build_measured(environment: Mapping[str, Any]) -> TorchBuild:
    """The build that a measurement's environment tells of; without cuDNN where its attention was switched off, and on a CPU."""
    torch, cuda = (_first_numbers(environment.get(name)) for name in ("torch", "cuda"))
    ran_cudnn = environment.get("sdpa") == "cudnn_attention"
    cudnn = environment.get("cudnn") if ran_cudnn else 0
    return TorchBuild(torch, cuda, cudnn if isinstance(cudnn, int) else 0)


def _first_numbers(version: object) -> tuple[int, int]:
    """The two that a version begins with; 0 for what is none."""
    first, second, *_ = [*map(int, re.findall(r"\d{1,9}", str(version or ""))), 0, 0]
    return first, second


def build_here() -> TorchBuild:
    """The installed build; where there is none for CUDA, the newest that is known."""
    return installed_build() or NEWEST_BUILD
