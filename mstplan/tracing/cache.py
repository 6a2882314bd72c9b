"""Traces that were made before: one file each, named by everything that decides what is in it.

A file is written whole or not at all, so that two processes may write the same one; a damaged one is made anew. None of
this needs torch: a trace that is there is read without importing it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import files
from ..errors import InputError, MissingError, OutputError, VersionError, one_line
from ..profiles import user_folder
from ..spec.platform import AMPERE, Platform
from ..spec.releases import parse_release
from ..step.recipe import Recipe
from .trace import Trace

SCHEMA_VERSION = 4
_LARGEST = 100_000_000  # bytes; of the largest models some 100,000
PACKAGES = ("torch", "transformers")


def folder() -> Path:
    return user_folder() / "traces"


def versions() -> dict[str, str]:
    """Versions of what a trace depends on. Raises MissingError when torch or transformers is not installed."""
    try:
        package_versions = {name: metadata.version(name) for name in PACKAGES}
    except metadata.PackageNotFoundError as e:
        raise MissingError(
            f"{e.name} is not installed; tracing and measuring need torch and transformers: pip install 'mstplan[torch]'"
        ) from None
    return {**package_versions, "mstplan": _digest_of_package()}


def check_release(installed: dict[str, str], asked: str | None) -> None:
    """Check that the release of transformers that was asked for is the one whose code a trace runs. Raises VersionError."""
    if asked is not None and parse_release(asked) != parse_release(installed["transformers"]):
        raise VersionError(
            f"a trace runs the installed transformers {installed['transformers']}, not {one_line(asked, 40)}.\n"
            f"pip install transformers=={one_line(asked, 40)}, or leave --transformers out; the formula rung answers for both."
        )


def _digest_of_package() -> str:
    """Digest of the code that makes traces, so that none outlives a change to it."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(
        [
            *root.glob("tracing/**/*.py"),
            *root.glob("train/*.py"),
            *(
                path
                for subfolder in ("optimizers", "losses", "kernels")
                for path in root.glob(f"step/{subfolder}/*.py")
            ),
            *(root / "step" / name for name in ("cuda.py", "workspaces.py", "selection.py", "instants.py")),
            root / "spec" / "platform.py",
        ]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def trace_of(
    config: Mapping[str, Any],
    recipe: Recipe,
    seq_len: int,
    *,
    on: str = "cuda",
    workspace: int = 0,
    platform: Platform = AMPERE,
    keep: bool = True,
    code_from: str | None = None,
    threads: int | None = None,
    towers: bool = True,
) -> Trace:
    """The trace of one step, from the cache or made now. platform: of the GPU, whose attention kernels run. keep: use and fill the
    cache, which knows nothing of a model's own code (code_from). threads: of a CPU, whose kernels hold something for each; as
    many as torch has here by default.

    Raises MissingError without torch, and what `tracer.trace` raises.
    """
    code_versions = versions()
    if on == "cpu" and threads is None:
        import torch

        threads = torch.get_num_threads()
    platform = platform.alike if on == "cuda" else AMPERE
    case = {"config": config, "recipe": recipe.model_dump(), "seq_len": seq_len, "on": on, "threads": threads}
    case["towers"] = towers
    case["platform"] = platform._asdict()
    key = {"schema_version": SCHEMA_VERSION, "versions": code_versions, **case}
    path = _path_of(key) if keep and code_from is None else None
    step_trace = _read_trace(path) if path is not None else None
    if step_trace is None:
        from .cpu import on_threads
        from .tracer import trace

        with on_threads(threads):
            step_trace = trace(config, recipe, seq_len, on=on, platform=platform, code_from=code_from, towers=towers)
        if path is not None:
            _write_trace(path, step_trace)
    return step_trace.with_workspace(workspace)


def _path_of(key: object) -> Path | None:
    """Path of the file in which such a trace is kept; None for a user who has no folder."""
    with suppress(OutputError):
        return folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json.gz"
    return None


def _read_trace(path: Path) -> Trace | None:
    try:
        with gzip.open(io.BytesIO(files.read_bytes(path, "a trace", _LARGEST, InputError))) as file:
            digest, _, text = file.read(10 * _LARGEST).partition(b"\n")
        return Trace.from_json(text) if digest == _digest_of_file(path, text) else None
    except Exception:  # noqa: BLE001  not there, cut off, or something else altogether: it is made anew
        return None


def _write_trace(path: Path, trace: Trace) -> None:
    text = json.dumps(trace.as_data()).encode()
    with suppress(OSError, OutputError):  # a cache that cannot be written is none
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, gzip.compress(_digest_of_file(path, text) + b"\n" + text, 3, mtime=0))


def _digest_of_file(path: Path, text: bytes) -> bytes:
    """So that a file holds what was written to it, and nothing else: what looks like a trace may not be the one that was made."""
    return hashlib.sha256(path.name.encode() + text).hexdigest().encode()
