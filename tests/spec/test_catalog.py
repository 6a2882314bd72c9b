"""Finding a model by name, path, folder or Hugging Face id; and what is said when it cannot be found or read."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mstplan import profiles
from mstplan.errors import ModelError
from mstplan.spec.catalog import load_model, model_names

NAMES = model_names()
INDEX = json.loads((profiles.ROOT / "models" / "index.json").read_text(encoding="utf-8"))
LLAMA = (profiles.ROOT / "models" / "llama3-8b.json").read_text(encoding="utf-8")
CHECKOUT = Path(__file__).parents[2]


def refusal(spec):
    with pytest.raises(ModelError) as caught:
        load_model(spec)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2 and "Traceback" not in message
    return message


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- what ships -------------------------------------------------------------------------------------------------------


def test_index_and_files_agree():
    assert set(NAMES) == set(INDEX) and "index" not in NAMES and len(NAMES) == 136
    assert all(name == name.lower() for name in NAMES)
    assert all(set(facts) == {"hub_id", "parameters", "note"} for facts in INDEX.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_name_loads(name):
    model = load_model(name)
    assert (model.name, model.hub_id) == (name, INDEX[name]["hub_id"])
    assert load_model(name.upper()) == model
    assert load_model(INDEX[name]["hub_id"]) == model
    assert load_model(INDEX[name]["hub_id"].lower()) == model


def test_shipped_model_loads_in_a_millisecond():
    load_model("llama3-8b")
    times = []
    for _ in range(20):
        start = time.perf_counter()
        load_model("llama3-8b")
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


def test_importing_the_catalog_imports_nothing_heavy():
    heavy = ("torch", "transformers", "huggingface_hub", "importlib.metadata", "pydantic", "httpx", "socket")
    code = (
        "import sys; from mstplan.spec.catalog import load_model; load_model('gpt2');"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# --- paths ------------------------------------------------------------------------------------------------------------


def test_a_file_of_any_name(here):
    (here / "mine.txt").write_text(LLAMA)
    (here / "mine.json").write_text(LLAMA)
    for spec in ("mine.txt", "./mine.txt", Path("mine.txt"), here / "mine.txt"):
        assert load_model(spec).name == "mine.txt"
    assert load_model("mine.json").name == "mine"
    assert load_model("mine.json").hub_id is None
    assert load_model("mine.json").attention == load_model("llama3-8b").attention


def test_a_folder_and_its_config(here):
    (here / "my-llama").mkdir()
    assert "the folder 'my-llama' holds no config.json" in refusal("my-llama")
    (here / "my-llama" / "config.json").write_text(LLAMA)
    for spec in ("my-llama", "my-llama/", "./my-llama", "my-llama/config.json", here / "my-llama"):
        assert load_model(spec).name == "my-llama"


ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "meta-llama/Llama-3.1-8B",
    "r": 16,
    "target_modules": ["q_proj"],
}


@pytest.mark.parametrize("spec", ["mine", "mine/adapter_config.json", "renamed.json"])
def test_an_adapter_is_refused_with_its_base(here, spec):
    (here / "mine").mkdir()
    for path in ("mine/adapter_config.json", "renamed.json"):
        (here / path).write_text(json.dumps(ADAPTER))
    said = refusal(spec)
    assert "an adapter (LORA) of meta-llama/Llama-3.1-8B: a model is planned by its base's config.json" in said
    assert "\nPlan its training: -m meta-llama/Llama-3.1-8B --lora " in said
    (here / "mine" / "config.json").write_text(LLAMA)  # the model lies there, too
    assert load_model("mine").name == "mine"


@pytest.mark.parametrize("field", ["peft_type", "base_model_name_or_path"])
@pytest.mark.parametrize(
    "value", [..., None, 3, "", " ", "x" * 1000, "a\nb\x1b[31m", "../my models/llama", [], {"a": 1}]
)
def test_an_adapter_whose_file_says_little(here, field, value):
    kept = {key: one for key, one in {**ADAPTER, field: value}.items() if one is not ...}
    (here / "adapter_config.json").write_text(json.dumps(kept))
    said = refusal(".")
    assert (
        "is an adapter" in said
        and "planned by its base" in said
        and said.isprintable() is False
        and said.replace("\n", "").isprintable()
    )
    assert max(map(len, said.splitlines())) < 300
    if value == "../my models/llama" and field != "peft_type":
        assert "-m '../my models/llama' --lora " in said


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_an_adapters_file_that_is_damaged(here, text):
    (here / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refusal(".")


def test_home_folder(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    (here / "m.json").write_text(LLAMA)
    assert load_model("~/m.json").name == "m"


def test_shipped_name_wins_over_a_folder_but_not_over_a_path(here):
    (here / "gpt2").mkdir()
    (here / "gpt2" / "config.json").write_text(LLAMA)
    assert load_model("gpt2").hidden == 768
    assert load_model("./gpt2").hidden == 4096
    assert load_model(Path("gpt2")).hidden == 4096


def test_existing_path_wins_over_a_hub_id(here):
    folder = here / "openai-community" / "gpt2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(LLAMA)
    assert load_model("openai-community/gpt2").hidden == 4096


def test_bad_byte_order_mark_is_no_obstacle(here):
    (here / "bom.json").write_bytes(b"\xef\xbb\xbf" + LLAMA.encode())
    assert load_model("bom.json").hidden == 4096


# --- names that name nothing ------------------------------------------------------------------------------------------


def test_a_long_name_costs_no_time(here):
    start = time.perf_counter()
    assert len(refusal("llama" * 20_000)) < 300
    assert time.perf_counter() - start < 1


def test_unknown_name_says_which_are_near():
    message = refusal("lama3-8b")
    assert message.startswith("unknown model 'lama3-8b'. Did you mean llama3-8b")


@pytest.mark.parametrize(
    "spec", ["", "  ", "\0", "a\0b", "a\nb", "x" * 5000, "./" + "x" * 5000, "x/y/z", "/nowhere", ".."]
)
def test_odd_names(spec, here):
    message = refusal(spec)
    assert len(message) < 500


@pytest.mark.parametrize("spec", ["nowhere.json", "nowhere/config.json", "./nowhere", Path("nowhere"), "org/x.JSON"])
def test_missing_path(spec, here):
    assert f"there is no file or folder '{os.fspath(spec)}'" in refusal(spec) or "nowhere" in refusal(spec)


def test_no_name_leaves_the_folder_of_shipped_models(tmp_path, monkeypatch):
    root = tmp_path / "profiles"
    shutil.copytree(profiles.ROOT / "models", root / "models")
    (root / "secrets.json").write_text(LLAMA)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(profiles, "ROOT", root)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load_model("gpt2").hidden == 768
    for spec in (
        "../secrets",
        "models/../../secrets",
        "gpt2/../../secrets",
        "..\\secrets",
        "index",
        "./gpt2",
        "gpt2.json",
    ):
        refusal(spec)
    for spec in ("secrets", "*", "gpt?"):
        assert "unknown model" in refusal(spec)


def test_bytes_are_no_spec():
    assert "names no model" in refusal(b"gpt2")


# --- files that are no config.json ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LLAMA.encode()[:200], "is not valid JSON"),
        (b'{\n  "hidden_size": 4096,\n  oops\n}', "at line 3, column 3"),
        (b"", "at line 1, column 1"),
        (b"version https://git-lfs.github.com/spec/v1\n", "at line 1, column 1"),
        (b'{\n "a": "\xff"}', "is not UTF-8 text: byte 0xff at line 2, column 8"),
        (b"\x80\x02ctorch", "is not UTF-8 text: byte 0x80 at line 1, column 1"),
        (b"[1, 2]", "holds a JSON list"),
        (b'"llama"', "holds a JSON string"),
        (b"3", "holds a JSON number"),
        (b"null", "holds a JSON null"),
        (b"[" * 200_000, "too deep or too long"),
        (b'{"hidden_size": ' + b"9" * 10_000 + b"}", "bad.json"),
        (b" " * 10_000_001, "is larger than 10 MB"),
        (b'{"model_type": "llama", "hidden_size": NaN}', "lacks"),
        (LLAMA.replace("4096", "NaN").encode(), "hidden_size is nan"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_file_that_is_no_config(here, content, said):
    (here / "bad.json").write_bytes(content)
    message = refusal("bad.json")
    assert "'bad.json'" in message and said in message


def test_a_pipe_is_no_file(here):
    os.mkfifo(here / "pipe.json")
    assert "is not a file" in refusal("pipe.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(here):
    (here / "m.json").write_text(LLAMA)
    (here / "m.json").chmod(0)
    assert "cannot be read: Permission denied" in refusal("m.json")


def test_errors_in_a_file_name_the_file(here):
    (here / "m.json").write_text(LLAMA.replace("4096", '"4096"'))
    assert refusal("m.json").startswith("'m.json': hidden_size is '4096'")


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def ask_the_hub(repo, home, **environment):
    """load_model in a process of its own: huggingface_hub reads its environment once, when imported."""
    code = (
        "import sys; from mstplan.spec.catalog import load_model; from mstplan.errors import ModelError\n"
        "try: model = load_model(sys.argv[1]); print(model.name, model.hub_id, model.hidden)\n"
        "except ModelError as error: print(error); sys.exit(3)"
    )
    plain = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    ran = subprocess.run(
        [sys.executable, "-c", code, repo],
        cwd=CHECKOUT,
        env={**plain, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode in (0, 3), ran.stderr
    assert len(ran.stdout.splitlines()) <= 2 and "Traceback" not in ran.stdout
    return ran.stdout.strip()


def fill_cache(home, repo, config):
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit / "config.json").write_text(config)


def test_cached_hub_model_needs_no_network(tmp_path):
    fill_cache(tmp_path, "someone/their-llama", LLAMA)
    for offline in ("0", "1"):
        answer = ask_the_hub("someone/their-llama", tmp_path, HF_HUB_OFFLINE=offline, HF_ENDPOINT="http://hub.invalid")
        assert answer == "someone/their-llama someone/their-llama 4096"


def test_cached_hub_model_that_cannot_be_planned(tmp_path):
    fill_cache(tmp_path, "someone/bert", '{"model_type": "bert"}')
    answer = ask_the_hub("someone/bert", tmp_path, HF_HUB_OFFLINE="1")
    assert answer.startswith("someone/bert is an encoder-only model (model_type 'bert')")


def test_offline_and_not_cached(tmp_path):
    answer = ask_the_hub("someone/llama3-8b-mine", tmp_path, HF_HUB_OFFLINE="1")
    assert "could not be fetched from Hugging Face: HF_HUB_OFFLINE is set and it is not in the cache." in answer
    assert "Download its config.json and pass the file's path. Did you mean llama3-8b" in answer


def test_no_network(tmp_path):
    start = time.monotonic()
    answer = ask_the_hub("someone/new", tmp_path, HF_ENDPOINT="http://hub.invalid")
    assert "could not be fetched from Hugging Face: no network." in answer
    assert time.monotonic() - start < 15


def test_an_id_that_hugging_face_does_not_allow(tmp_path):
    answer = ask_the_hub("someone/new--model", tmp_path, HF_HUB_OFFLINE="1")
    assert "could not be fetched from Hugging Face: it is no valid repository id." in answer


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "RepoNotFound", "there is no such repository, or it is private"),
        (401, "", "there is no such repository, or it is private"),
        (403, "GatedRepo", "its owner asks for consent"),
        (404, "EntryNotFound", "the repository holds no config.json"),
        (418, "", "the hub answered with status 418"),
    ],
)
def test_what_a_hub_answers(tmp_path, hub, status, code, said):
    endpoint = hub(status, code)
    answer = ask_the_hub("someone/new", tmp_path, HF_ENDPOINT=endpoint)
    assert f"could not be fetched from Hugging Face: {said}" in answer


@pytest.fixture
def hub():
    """A hub on this machine that answers every request with one status; real huggingface_hub asks it."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    servers = []

    def start(status, code):
        class Answer(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, *_):
                pass

        server = HTTPServer(("127.0.0.1", 0), Answer)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
