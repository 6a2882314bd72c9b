"""Finds a model: one that ships with mstplan, a config.json, a folder that holds one, or a Hugging Face id.

An existing path wins when the spec has a path separator or ends in .json; otherwise a shipped name wins over a folder
of that name. Only an id of the form org/name that is neither goes to the Hugging Face cache, and then to the network.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from mstplan import profiles
from mstplan.errors import ModelError, did_you_mean, one_line, quoted
from mstplan.files import read_text, repeated_key
from mstplan.spec.config import read_config
from mstplan.spec.families import FAMILIES
from mstplan.spec.model import Model

_INDEX_NAME = "index"
_LARGEST_FILE = 10_000_000  # bytes; a config.json has a few thousand
_ADAPTER_FILE = "adapter_config.json"  # of peft
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def model_names() -> tuple[str, ...]:
    """The models that ship with mstplan."""
    stems = (name[: -len(".json")] for name in os.listdir(profiles.ROOT / "models") if name.endswith(".json"))
    return tuple(sorted(stem for stem in stems if stem != _INDEX_NAME))


class _Source(NamedTuple):
    path: str  # of the config.json
    label: str  # what messages call it
    name: str | None = None  # of the model; None: as it was said
    hub_id: str | None = None


def load_model(spec: str | os.PathLike[str], assume: str | None = None, transformers: str | None = None) -> Model:
    """The model that `spec` names: a shipped name or its Hugging Face id, a config.json, a folder, or any other id.

    assume: "llama-like" counts a model that the formula does not read as a Llama. transformers: the release whose code is planned, such
    as "5.17", where that matters; None: the installed one, else the newest known.
    """
    source = _find_source(spec)
    model = read_config(_read_json(source.path), source.label, assume, transformers)
    return model._replace(name=source.name or model.name, hub_id=source.hub_id)


def identify_model(spec: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The model's name, and its Hugging Face id where that is known, whether or not its config.json can be read."""
    source = _find_source(spec)
    return source.name or source.label, source.hub_id


def load_config(spec: str | os.PathLike[str]) -> Mapping[str, object]:
    """The fields of its config.json, as transformers names them where its own code has the model's layers."""
    config = _read_json(_find_source(spec).path)
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return config
    from mstplan.spec.published import as_transformers_has_it

    return as_transformers_has_it(config)


def _find_source(spec: str | os.PathLike[str]) -> _Source:
    text = os.fspath(spec)
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise ModelError(
            f"{quoted(text)} names no model.\nGive a name such as llama3.1-8b, the path of a config.json, or an id org/name."
        )
    path = os.path.expanduser(text)
    if not isinstance(spec, str):
        return _source_at(path)
    separated = "/" in text or os.sep in text
    if (separated or text.lower().endswith(".json")) and os.path.exists(path):
        return _source_at(path)
    shipped = _shipped_name(text)
    if shipped is not None:
        return _Source(
            str(profiles.ROOT / "models" / f"{shipped}.json"), shipped, None, _read_index()[shipped]["hub_id"]
        )
    if os.path.exists(path):
        return _source_at(path)
    if _HUB_ID.fullmatch(text) and not text.lower().endswith(".json"):
        return _Source(_hub_file(text), text, None, text)
    _refuse_unknown(text, looks_like_a_path=separated or text.lower().endswith(".json"))


def _shipped_name(spec: str) -> str | None:
    # Looked up among the names, never joined to a path: "../secrets" cannot leave the folder.
    wanted = spec.lower()
    if wanted in model_names():
        return wanted
    if "/" not in wanted:
        return None
    return next((name for name, facts in _read_index().items() if facts["hub_id"].lower() == wanted), None)


def _read_index() -> dict[str, dict[str, str]]:
    """Facts of each shipped model: its Hugging Face id, parameters, and a note on its file."""
    with open(profiles.ROOT / "models" / f"{_INDEX_NAME}.json", encoding="utf-8") as file:
        index: dict[str, dict[str, str]] = json.load(file)
    return index


def _source_at(path: str) -> _Source:
    if os.path.isdir(path):
        folder, path = path, os.path.join(path, "config.json")
        if not os.path.isfile(path) and os.path.isfile(os.path.join(folder, _ADAPTER_FILE)):
            path = os.path.join(folder, _ADAPTER_FILE)  # says of which model
        if not os.path.isfile(path):
            raise ModelError(
                f"the folder {quoted(folder)} holds no config.json.\n"
                "Give the folder that the model's weights and config.json lie in, or the path of the file."
            )
    return _Source(path, quoted(path), _short_name(path))


def _short_name(path: str) -> str:
    """The name of a model read from a file: the file's, or its folder's when the file is just called config.json."""
    folder, file = os.path.split(os.path.abspath(path))
    stem = file.removesuffix(".json")
    name = os.path.basename(folder) if stem == "config" and os.path.basename(folder) else stem
    return one_line(name, 200)


def _hub_file(repo: str) -> str:
    """The config.json of a Hugging Face repository: the cached copy if there is one, else downloaded."""
    try:
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    except ImportError:
        _refuse_unreachable(repo, "huggingface_hub, which would fetch it, is not installed")
    try:
        cached = try_to_load_from_cache(repo, "config.json")
        if isinstance(cached, str):
            return cached
        if not constants.HF_HUB_OFFLINE:
            _look_up_host(constants.ENDPOINT)
        return hf_hub_download(repo, "config.json")
    except Exception as error:  # noqa: BLE001  whatever goes wrong on the way there, the answer is: bring the file
        _refuse_unreachable(repo, _hub_reason(error))


def _look_up_host(endpoint: str) -> None:
    """Fails at once where there is no network; huggingface_hub would retry for half a minute."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    if not getproxies():  # a proxy knows hosts that this machine does not
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)


def _hub_reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    missing = "there is no such repository, or it is private"
    if isinstance(error, errors.GatedRepoError):
        return "its owner asks for consent: accept the terms on its page and log in (hf auth login)"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        return _hub_reason(error.__cause__)  # the hub did answer, and then there was no cached copy either
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set and it is not in the cache" if constants.HF_HUB_OFFLINE else "no network"
    if isinstance(error, errors.RepositoryNotFoundError):
        return missing
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository holds no config.json (an adapter's does not: give its base model)"
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", "?")
        return missing if status == 401 else f"the hub answered with status {status}"
    if isinstance(error, errors.HFValidationError):
        return "it is no valid repository id"
    return "no network" if isinstance(error, OSError) else f"the hub could not be asked ({type(error).__name__})"


def _refuse_unreachable(repo: str, reason: str) -> NoReturn:
    suggestion = did_you_mean(repo.rpartition("/")[2], model_names())
    raise ModelError(
        f"{one_line(repo, 200)} does not ship with mstplan and could not be fetched from Hugging Face: {reason}.\n"
        f"Download its config.json and pass the file's path.{suggestion}"
    )


def _refuse_unknown(spec: str, looks_like_a_path: bool) -> NoReturn:
    if looks_like_a_path:
        raise ModelError(f"there is no file or folder {quoted(spec)}.\nGive the path of a model's config.json.")
    suggestion = did_you_mean(spec, model_names())
    raise ModelError(
        f"unknown model {quoted(spec)}.{suggestion}\nGive a shipped name, the path of a config.json, or an id org/name."
    )


def _read_json(path: str) -> Mapping[str, object]:
    name = quoted(path)
    text = read_text(path, "a model's config.json", _LARGEST_FILE, ModelError)
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{name} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.\n"
            "Was it cut off, or edited by hand? Download it again."
        ) from None
    except (RecursionError, ValueError):  # lists in lists in lists; an int of thousands of digits
        raise ModelError(f"{name} is no model's config.json: its values are too deep or too long to read.") from None
    if (key := repeated_key(text)) is not None:
        raise ModelError(f"{name} gives {quoted(key)} twice.\nLeave one of the two out, or download the file again.")
    if not isinstance(config, dict):
        raise ModelError(f"{name} holds a JSON {_JSON_KINDS[type(config)]}, not an object with a model's fields.")
    if "peft_type" in config or os.path.basename(path) == _ADAPTER_FILE:
        _refuse_adapter(config, name)
    return config


def _refuse_adapter(config: Mapping[str, object], name: str) -> NoReturn:
    """Refuses an adapter: its file says little more than which model it is trained on."""
    import shlex

    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    kind_words = f"an adapter ({one_line(kind, 40)})" if isinstance(kind, str) else "an adapter"
    base_words, way_words = "", "-m BASE"
    if isinstance(base, str) and base.strip():
        base_words, way_words = f" of {one_line(base)}", f"-m {one_line(shlex.quote(base))}"
    raise ModelError(
        f"{name} is {kind_words}{base_words}: a model is planned by its base's config.json.\n"
        f"Plan its training: {way_words} {shlex.join(_adapter_options(config))}"
    )


def _adapter_options(config: Mapping[str, object]) -> list[str]:
    """Options for the adapters that peft's file describes."""
    rank, targets, dropout = config.get("r"), config.get("target_modules"), config.get("lora_dropout")
    words = ["--lora", str(rank) if isinstance(rank, int) and 0 < rank < 65_536 else "16"]
    names = [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []
    words += ["--lora-targets", one_line(",".join(sorted(names)), 200)] if names else []
    words += ["--lora-dropout", str(dropout)] if isinstance(dropout, float) and 0 < dropout < 1 else []
    return words + (["--dora"] if config.get("use_dora") is True else [])


_JSON_KINDS = {list: "list", str: "string", int: "number", float: "number", bool: "true or false", type(None): "null"}
