"""Adapters on the Hugging Face Hub. The Hub is a small server in this process, asked by `huggingface_hub` as it is."""

import ast
import base64
import contextlib
import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import huggingface_hub
import keras
import keras_hub
import numpy as np
import pytest
from helpers import once, value
from huggingface_hub import constants
from keras import layers
from test_architecture import FILES, imported
from test_progress import Terminal

import keras_lora
from keras_lora import reports
from keras_lora.files import huggingface
from keras_lora.interop import from_peft, to_peft

pytestmark = once

TOKEN = "hf_right"
#: The most requests that one test may need: nothing asks without end.
MOST = 40


class Hub:
    """As much of the Hub as loading and saving need: repositories of one branch, and what the Hub says where it refuses.

    Attributes:
        files: By repository and revision, the bytes of every file.
        private, gated: Repositories that need a token, and one that has asked for access.
        broken: The status of every answer, where it is one of a Hub that does not work.
        asked: Every request, as method and path.
    """

    def __init__(self):
        self.files, self.private, self.gated, self.broken, self.asked = {}, set(), set(), None, []
        self.read_only = False

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):
                self.answer(handler)

            do_HEAD = do_POST = do_GET

            def log_message(handler, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler):
        path = urllib.parse.unquote(urllib.parse.urlsplit(handler.path).path)
        if path != "/api/agent-harnesses":  # `huggingface_hub` asks that once a day, of itself
            self.asked.append(f"{handler.command} {path}")
        sent = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        status, said, body = self.reply(handler.command, path, sent, token)
        if len(self.asked) > MOST:
            status, said, body = 418, {}, b""
        handler.send_response(status)
        for key, text in {"Content-Length": len(body), "Content-Type": "application/json", **said}.items():
            handler.send_header(key, str(text))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    def reply(self, command, path, sent, token):
        """The status, headers and body of an answer."""

        def refuse(status, code="", message=""):
            return status, {"X-Error-Code": code, "X-Error-Message": message}, b""

        if self.broken:
            return refuse(self.broken)
        if token and token != TOKEN:
            return refuse(401, message="Invalid credentials in Authorization header")
        if path == "/api/validate-yaml":
            return 200, {}, b'{"errors": [], "warnings": []}'
        if path == "/api/repos/create":
            given = json.loads(sent)
            return self.create(f"{given['organization']}/{given['name']}", token) or refuse(401 if not token else 403)
        words = path.removeprefix("/api/models").strip("/").split("/")
        repository, words = "/".join(words[:2]), words[2:]
        if repository not in self.files or (repository in self.private and not token):
            return refuse(404 if token else 401, "RepoNotFound")
        if repository in self.gated:
            return refuse(403 if token else 401, "GatedRepo", "Access to this repository is restricted")
        revision = (words or ["", "main"])[1]
        if revision not in self.files[repository]:
            return refuse(404, "RevisionNotFound")
        files = self.files[repository][revision]
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.files[repository][sha] = dict(files)
        if not words or words[0] == "revision":
            return (
                200,
                {},
                json.dumps({"id": repository, "sha": sha, "siblings": [{"rfilename": p} for p in files]}).encode(),
            )
        if words[0] == "tree":
            entries = [{"type": "file", "path": p, "size": len(data), "oid": etag(data)} for p, data in files.items()]
            return 200, {}, json.dumps(entries).encode()
        if words[0] == "preupload":
            names = [each["path"] for each in json.loads(sent)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return (200, {}, json.dumps({"files": modes}).encode()) if self.may_write(token) else refuse(403)
        if words[0] == "commit":
            lines = [json.loads(line) for line in sent.splitlines()]
            for each in (line["value"] for line in lines if line["key"] == "file"):
                files[each["path"]] = base64.b64decode(each["content"])
            said = {"commitUrl": f"{self.url}/{repository}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
            return 200, {}, json.dumps(said).encode()
        assert words[0] == "resolve", path
        data = files.get("/".join(words[2:]))
        if data is None:
            return refuse(404, "EntryNotFound")
        return 200, {"X-Repo-Commit": sha, "ETag": f'"{etag(data)}"'}, data

    def may_write(self, token):
        return bool(token) and not self.read_only

    def create(self, repository, token):
        if not self.may_write(token):
            return None
        status = 409 if repository in self.files else 200
        self.files.setdefault(repository, {"main": {}})
        return status, {}, json.dumps({"url": f"{self.url}/{repository}"}).encode()


def etag(data):
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, and a user who has a right token, an empty cache and a network."""
    hub = Hub()
    settings = {  # what its environment variables become when it is imported
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no token"),
        "HF_HUB_OFFLINE": False,
    }
    for name, setting in settings.items():
        monkeypatch.setattr(constants, name, setting)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield hub
    hub.close()
    assert len(hub.asked) <= MOST


@pytest.fixture
def at_once(monkeypatch):
    """`huggingface_hub` does not wait between its tries."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


def base(units=6):
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input((4,)), layers.Dense(units), layers.Dense(2, name="head")], name="net")


def adapted(seed=5):
    model = keras_lora.apply_lora(base(), rank=2)
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=tuple(variable.shape)).astype("float32"))
    return model


@pytest.fixture
def saved(tmp_path):
    """The bytes of an adapter file."""
    path = tmp_path / "adapter.safetensors"
    keras_lora.save_adapter(adapted(), path)
    return path.read_bytes()


def same(model, other):
    found, wanted = ([value(each) for each in of.variables] for of in (model, other))
    return len(found) == len(wanted) and all(map(np.array_equal, found, wanted))


@contextlib.contextmanager
def unchanged(model):
    """The model is as it was: its classes, its variables, their values, and what trains."""

    def state():
        trained = {id(each) for each in model.trainable_variables}
        return [type(each) for each in model.layers], [(id(v), id(v) in trained, value(v).tolist()) for v in model.variables]

    before = state()
    yield
    assert state() == before


def refused(kind, match, address, model=None, cause=True):
    """The model is as it was, and one error says why."""
    model = base() if model is None else model
    with unchanged(model), pytest.raises(kind, match=match) as raised:
        keras_lora.load_adapter(model, address)
    assert type(raised.value) is kind
    assert (raised.value.__cause__ is not None) == cause
    assert TOKEN not in str(raised.value)


# Addresses.


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("hf://owner/name", ("owner/name", None, "")),
        (
            "hf://Owner-1/my.name_2/sub/file.safetensors",
            ("Owner-1/my.name_2", None, "sub/file.safetensors"),
        ),
        ("hf://owner/name@v1.0", ("owner/name", "v1.0", "")),
        ("hf://owner/name@" + "0a" * 20 + "/french", ("owner/name", "0a" * 20, "french")),
        ("hf://owner/name@refs/pr/3/a.safetensors", ("owner/name", "refs/pr/3", "a.safetensors")),
    ],
)
def test_an_address_has_three_parts(address, parts):
    assert huggingface.parsed(address) == huggingface.Address(*parts)
    assert str(huggingface.parsed(address)) == address


@pytest.mark.parametrize(
    "address",
    [
        "hf://",
        "hf://name",
        "hf://name.safetensors",
        "hf:///name",
        "hf://owner/",
        "hf://owner//name",
        "hf://owner/name/",
        "hf://owner/name//file.safetensors",
        "hf://owner/name@",
        "hf://owner/name@/file.safetensors",
        "hf://owner/name@v1@v2",
        "hf://owner/name@../v1",
        "hf://owner/name@a..b",
        "hf://a/b/../../c",
        "hf://a/b/../c.safetensors",
        "hf://a/b/./c.safetensors",
        "hf://../b/c.safetensors",
        "hf://a/../c.safetensors",
        "hf://a/..",
        "hf://a/b/%2e%2e/c.safetensors",
        "hf://a/b/..\\c.safetensors",
        "hf://a/b/c\\..\\d.safetensors",
        "hf://a/b/*.safetensors",
        "hf://a/b/c?x=y.safetensors",
        "hf://a/b/c#d.safetensors",
        "hf://a/b/c\n.safetensors",
        "hf://a/b/c\0.safetensors",
        "hf://a b/c",
        "hf://a:b@c/d",
        "hf://é/name",
        "hf://owner/.name",
        "hf://owner/name.git",
        "hf://owner/na--me",
        "hf://owner/" + "n" * 97,
        "hf://datasets/owner/name.safetensors",
        "hf://spaces/owner/name.safetensors",
        "hf:/owner/name",
        Path("hf://owner/name.safetensors"),
    ],
    ids=ascii,
)
def test_a_malformed_address_is_refused_before_anything_is_asked(hub, address):
    refused(ValueError, "model repository on the Hugging Face Hub is 'hf://owner/name'", address, cause=False)
    model = adapted()
    with unchanged(model), pytest.raises(ValueError, match=r"Received: .*hf:/"):
        keras_lora.save_adapter(model, address)
    for each in (huggingface.local_folder, huggingface.upload_folder_to):
        with pytest.raises(ValueError, match="is 'hf://owner/name'"):
            each(address, ".")
    assert not hub.asked


def test_only_a_safetensors_file_is_asked_for(hub):
    for file in ("adapter.bin", "adapter.pkl", "folder", "adapter.safetensors.bin"):
        hub.files["owner/name"] = {"main": {file: b"data"}}
        refused(
            ValueError, f"ends in '.safetensors'. Received: 'hf://owner/name/{file}'", f"hf://owner/name/{file}", cause=False
        )
    with pytest.raises(ValueError, match=r"ends in '.safetensors'"):
        keras_lora.save_adapter(adapted(), "hf://owner/name/adapter.bin")
    assert not hub.asked


# Loading.


def test_loading_downloads_once(hub, saved):
    hub.files["owner/name"] = {"main": {"adapter.safetensors": saved, "other.bin": b"never asked for"}}
    model = base()
    assert keras_lora.load_adapter(model, "hf://owner/name") is model
    assert same(model, adapted())
    asked = [f"{command} /owner/name/resolve/main/adapter.safetensors" for command in ("HEAD", "GET")]
    assert hub.asked == asked
    assert same(keras_lora.load_adapter(base(), "hf://owner/name"), adapted())
    assert hub.asked == [*asked, asked[0]]  # whether there is a newer one


@pytest.mark.parametrize("how", ["offline", "no network"])
def test_what_was_loaded_once_is_loaded_without_network(hub, saved, monkeypatch, at_once, how):
    hub.files["owner/name"] = {"main": {"adapter.safetensors": saved}}
    keras_lora.load_adapter(base(), "hf://owner/name")
    asked = len(hub.asked)
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.close()
    assert same(keras_lora.load_adapter(base(), "hf://owner/name"), adapted())
    assert len(hub.asked) == asked
    if how == "offline":
        refused(ConnectionError, "not loaded: it is not in the cache, and HF_HUB_OFFLINE is set", "hf://owner/other")
        assert len(hub.asked) == asked
    else:
        refused(ConnectionError, "not in the cache, and the Hugging Face Hub cannot be reached .*Check", "hf://owner/other")


def test_a_new_file_on_the_hub_is_loaded_and_a_commit_stays(hub, saved, tmp_path):
    hub.files["owner/name"] = {"main": {"adapter.safetensors": saved}}
    keras_lora.load_adapter(base(), "hf://owner/name")
    (commit,) = hub.files["owner/name"].keys() - {"main"}
    keras_lora.save_adapter(adapted(seed=6), tmp_path / "new.safetensors")
    hub.files["owner/name"]["main"]["adapter.safetensors"] = (tmp_path / "new.safetensors").read_bytes()
    assert same(keras_lora.load_adapter(base(), "hf://owner/name"), adapted(seed=6))
    asked = len(hub.asked)
    assert same(keras_lora.load_adapter(base(), f"hf://owner/name@{commit}"), adapted())
    assert len(hub.asked) == asked  # a commit never changes, so nobody is asked


def test_another_file_and_another_revision(hub, saved):
    hub.files["owner/name"] = {"main": {"sub/french.safetensors": saved}, "v1": {"adapter.safetensors": saved}}
    for address in ("hf://owner/name/sub/french.safetensors", "hf://owner/name@v1"):
        assert same(keras_lora.load_adapter(base(), address), adapted())


def test_a_private_repository_is_read_with_a_token(hub, saved):
    hub.files["owner/name"] = {"main": {"adapter.safetensors": saved}}
    hub.private = {"owner/name"}
    assert same(keras_lora.load_adapter(base(), "hf://owner/name"), adapted())


def test_an_adapter_is_loaded_beside_another_and_into_it(hub, saved):
    hub.files["owner/name"] = {"main": {"adapter.safetensors": saved}}
    model = keras_lora.load_adapter(adapted(seed=9), "hf://owner/name")
    assert same(model, adapted())
    keras_lora.load_adapter(model, "hf://owner/name", name="second", trainable=False)
    assert keras_lora.active_adapters(model) == {"second": 1.0}


LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@pytest.mark.parametrize(
    ("address", "token", "kind", "match"),
    [
        ("hf://owner/none", TOKEN, FileNotFoundError, "has no repository owner/none, or it is private.*Check the name"),
        ("hf://owner/none", "", FileNotFoundError, f"no repository owner/none, or it is private and no token.*{LOGIN}"),
        ("hf://owner/private", "", FileNotFoundError, f"or it is private and no token was given.*{LOGIN}"),
        ("hf://owner/private", "hf_wrong", PermissionError, f"refuses it: the token was refused.*{LOGIN}"),
        ("hf://owner/gated", TOKEN, PermissionError, f"granted by its owner. Ask for it on .*/owner/gated, then {LOGIN}"),
        ("hf://owner/gated", "", PermissionError, "access to owner/gated is granted by its owner"),
        ("hf://owner/name/none.safetensors", TOKEN, FileNotFoundError, "owner/name has no file none.safetensors. Name one"),
        ("hf://owner/empty", TOKEN, FileNotFoundError, "owner/empty has no file adapter.safetensors"),
        ("hf://owner/name@v9", TOKEN, FileNotFoundError, "owner/name has no revision v9. Check what is behind the '@'"),
        ("forbidden", TOKEN, PermissionError, "refuses it: the token was refused"),
        ("forbidden", "", PermissionError, f"refuses it: no token was given. Check the name, then {LOGIN}"),
        ("broken", TOKEN, ConnectionError, r"not in the cache, and .* cannot be reached \(status 503\)"),
    ],
)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "adapted"])
def test_where_the_hub_refuses_one_error_says_what_to_do(
    hub, saved, monkeypatch, at_once, address, token, kind, match, plain
):
    for name in ("name", "private", "gated"):
        hub.files[f"owner/{name}"] = {"main": {"adapter.safetensors": saved}}
    hub.files["owner/empty"] = {"main": {"README.md": b""}}
    hub.private, hub.gated = {"owner/private"}, {"owner/gated"}
    hub.broken = {"forbidden": 403, "broken": 503}.get(address)
    monkeypatch.setenv("HF_TOKEN", token)
    address = address if address.startswith("hf:") else "hf://owner/name"
    refused(kind, f"^{address}.* was not loaded: .*{match}", address, None if plain else adapted())


def test_a_file_of_another_kind_is_not_unpickled(hub, tmp_path):
    class Call:
        def __reduce__(self):
            return Path.touch, (tmp_path / "called",)

    hub.files["owner/name"] = {"main": {"adapter.safetensors": pickle.dumps(Call())}}
    refused(ValueError, "is not a whole adapter file", "hf://owner/name")
    assert not (tmp_path / "called").exists()


def test_an_adapter_of_another_model_is_refused_by_its_address(hub, saved):
    hub.files["owner/name"] = {"main": {"adapter.safetensors": saved}}
    refused(
        ValueError, "hf://owner/name does not fit 'net', and nothing was changed", "hf://owner/name", base(7), cause=False
    )


def test_a_download_that_breaks_off_is_no_file(hub, saved, at_once):
    hub.files["owner/name"] = {"main": {"adapter.safetensors": saved}}
    whole = hub.reply

    def cut(command, path, sent, token):
        status, said, body = whole(command, path, sent, token)
        return status, {**said, "Content-Length": len(body)}, body if command == "HEAD" else body[:100]

    hub.reply = cut
    hub.server.RequestHandlerClass.timeout = 5
    refused(ConnectionError, "hf://owner/name was not loaded: the Hugging Face Hub cannot be reached", "hf://owner/name")
    hub.reply = whole
    assert same(keras_lora.load_adapter(base(), "hf://owner/name"), adapted())


@pytest.mark.parametrize("how", ["long", "short", "switched off"])
def test_a_long_download_shows_a_bar_on_a_terminal(hub, saved, monkeypatch, how):
    hub.files["owner/name"] = {"main": {"adapter.safetensors": saved, "a.json": b"{}"}}
    monkeypatch.setattr(reports, "LONG", 60 if how == "short" else 0)
    if how == "switched off":
        monkeypatch.setattr(keras.config, "is_interactive_logging_enabled", lambda: False)
    asking = [huggingface.adapter_file, lambda address: huggingface.local_folder(address, ["*.json"])]
    for ask in asking:
        with Terminal(monkeypatch) as terminal:
            ask("hf://owner/name")
        assert ("100%" in terminal.text) == (how == "long"), terminal.text
        assert how == "long" or terminal.text == ""


# Folders.


def test_of_a_folder_the_named_files_are_downloaded(hub, monkeypatch):
    inside = {f"{folder}{file}": folder.encode() for folder in ("", "sub/") for file in ("a.json", "b.safetensors", "c.bin")}
    hub.files["owner/name"] = {"main": inside}
    for address, name in (("hf://owner/name", b""), ("hf://owner/name/sub", b"sub/")):
        folder = huggingface.local_folder(address, ["a.json", "b.safetensors", "d.json"])
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == {
            "a.json": name,
            "b.safetensors": name,
        }
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert huggingface.local_folder("hf://owner/name/sub", ["a.json"]) == folder
    assert not any("c.bin" in each for each in hub.asked)


def test_a_folder_that_is_not_there(hub, monkeypatch):
    hub.files["owner/name"] = {"main": {"c.bin": b""}}
    for address, match in {
        "hf://owner/name": "has none of the files a.json, b.safetensors. Check the name",
        "hf://owner/name/sub": "has none of the files",
        "hf://owner/none": "has no repository owner/none",
        "hf://owner/name@v9": "has no revision v9",
    }.items():
        with pytest.raises(FileNotFoundError, match=match):
            huggingface.local_folder(address, ["a.json", "b.safetensors"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        huggingface.local_folder("hf://owner/other", ["a.json"])


def test_uploading_a_folder(hub, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.json").write_text("{}")
    (tmp_path / "README.md").write_text("new card")
    huggingface.upload_folder_to("hf://owner/name", tmp_path / "sub")
    assert hub.files["owner/name"]["main"] == {"a.json": b"{}"}
    hub.files["owner/name"]["main"]["README.md"] = b"edited"
    huggingface.upload_folder_to("hf://owner/name", tmp_path)
    huggingface.upload_folder_to("hf://owner/name/french", tmp_path)
    found = hub.files["owner/name"]["main"]
    assert found.keys() == {"README.md", "a.json", "sub/a.json", "french/README.md", "french/sub/a.json"}
    assert (found["README.md"], found["french/README.md"]) == (b"edited", b"new card")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none to upload"):
        huggingface.upload_folder_to("hf://owner/name", tmp_path / "none")


def test_a_peft_adapter_goes_to_the_hub_and_back(hub):
    def bert():
        keras.utils.set_random_seed(3)
        sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 8}
        return keras_hub.models.BertBackbone(vocabulary_size=9, max_sequence_length=5, **sizes)

    model = keras_lora.apply_lora(bert(), rank=2, targets="query")
    to_peft(model, "hf://owner/name/french")
    assert {"french/adapter_config.json", "french/adapter_model.safetensors"} <= hub.files["owner/name"]["main"].keys()
    assert same(from_peft(bert(), "hf://owner/name/french"), model)
    plain = bert()
    with unchanged(plain), pytest.raises(FileNotFoundError, match=r"has none of the files adapter_config.json"):
        from_peft(plain, "hf://owner/name")


# Saving.


def test_saving_and_loading(hub):
    model = adapted()
    keras_lora.save_adapter(model, "hf://owner/name", fingerprint_weights=True)
    found = hub.files["owner/name"]["main"]
    assert found.keys() == {"README.md", "adapter.safetensors"}
    assert same(keras_lora.load_adapter(base(), "hf://owner/name"), model)
    card = huggingface_hub.ModelCard(found["README.md"].decode())
    assert (card.data.library_name, card.data.tags, card.data.base_model) == ("keras_lora", ["keras", "lora"], None)
    assert "the Keras model `net`" in card.text
    assert 'load_adapter(model, "hf://owner/name")' in card.text


def test_saving_again_keeps_the_card_that_was_edited(hub):
    hub.files["owner/name"] = {"main": {"README.md": b"mine", "adapter.safetensors": b"old"}, "v1": {}}
    keras_lora.save_adapter(adapted(seed=6), "hf://owner/name")
    keras_lora.save_adapter(adapted(), "hf://owner/name/sub/french.safetensors")
    keras_lora.save_adapter(adapted(), "hf://owner/name@v1")
    assert hub.files["owner/name"]["main"].keys() == {"README.md", "adapter.safetensors", "sub/french.safetensors"}
    assert hub.files["owner/name"]["main"]["README.md"] == b"mine"
    assert hub.files["owner/name"]["v1"].keys() == {"README.md", "adapter.safetensors"}
    assert same(keras_lora.load_adapter(base(), "hf://owner/name"), adapted(seed=6))
    assert same(keras_lora.load_adapter(base(), "hf://owner/name/sub/french.safetensors"), adapted())


@pytest.mark.parametrize(
    ("token", "address", "kind", "match"),
    [
        ("", "hf://owner/new", PermissionError, f"refuses it: no token was given.*{LOGIN}"),
        ("hf_wrong", "hf://owner/new", PermissionError, "refuses it: the token was refused"),
        (TOKEN, "hf://owner/new", PermissionError, "refuses it: the token was refused"),
        (TOKEN, "hf://owner/name", PermissionError, "refuses it: the token was refused"),
        (TOKEN, "hf://owner/name@v9", FileNotFoundError, "owner/name has no revision v9"),
        ("offline", "hf://owner/name", ConnectionError, "HF_HUB_OFFLINE is set, so the Hugging Face Hub was not asked"),
    ],
)
def test_where_the_hub_refuses_to_save_nothing_is_written(hub, monkeypatch, token, address, kind, match):
    hub.files["owner/name"] = {"main": {"README.md": b"mine"}}
    hub.read_only = "@" not in address
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", token == "offline")
    model = adapted()
    with unchanged(model), pytest.raises(kind, match=f"^{address} was not saved: .*{match}") as raised:
        keras_lora.save_adapter(model, address)
    assert type(raised.value) is kind
    assert raised.value.__cause__ is not None
    assert hub.files.keys() == {"owner/name"}
    assert hub.files["owner/name"]["main"] == {"README.md": b"mine"}


def test_a_plain_model_is_not_uploaded(hub):
    with pytest.raises(ValueError, match="save_adapter"):
        keras_lora.save_adapter(base(), "hf://owner/name")
    assert not hub.asked


def test_the_card_says_the_base_where_it_is_known():
    text = huggingface.model_card("hf://owner/name", "`x`", "peft", 'some/base"\n---\nevil: true')
    card = huggingface_hub.ModelCard(text)
    assert (card.data.library_name, card.data.base_model) == ("peft", 'some/base"\n---\nevil: true')
    assert "from keras_lora.interop import from_peft" in text


# The package.


def test_without_huggingface_hub_an_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(ImportError, r"needs the package huggingface_hub.*`pip install keras_lora\[huggingface\]`", "hf://owner/name")
    with pytest.raises(ImportError, match="huggingface_hub"):
        keras_lora.save_adapter(adapted(), "hf://owner/name")
    keras_lora.save_adapter(adapted(), tmp_path / "a.safetensors")  # needs it not
    assert same(keras_lora.load_adapter(base(), tmp_path / "a.safetensors"), adapted())


def test_one_file_imports_huggingface_hub_and_only_when_asked():
    using = [path for path in FILES if any(name.partition(".")[0] == "huggingface_hub" for name in imported(path))]
    assert [path.stem for path in using] == ["huggingface"]
    outermost = ast.parse(using[0].read_text()).body
    assert not any("huggingface_hub" in ast.unparse(node) for node in outermost if isinstance(node, ast.Import))


SCRIPT = """
import sys
from keras_lora.files import huggingface
for address in sys.argv[1:]:
    try:
        print(huggingface.adapter_file(address))
    except OSError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.full
def test_the_settings_of_huggingface_hub_are_those_of_its_environment(hub, saved, tmp_path):
    """In processes of their own: the address of the Hub, its cache, the token and whether there is a network."""
    hub.files["owner/name"] = {"main": {"adapter.safetensors": saved}}
    hub.private = {"owner/name"}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "KERAS_BACKEND": "jax"}

    def load(*addresses, **settings):
        env = {**{key: each for key, each in os.environ.items() if not key.startswith("HF_")}, **own, **settings}
        command = [sys.executable, "-c", SCRIPT, *addresses]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-len(addresses) :]

    (path,) = load("hf://owner/name")
    assert Path(path).read_bytes() == saved
    assert Path(path).is_relative_to(tmp_path / "home")
    asked = len(hub.asked)
    loaded, said = load("hf://owner/name", "hf://owner/other", HF_HUB_OFFLINE="1")
    assert loaded == path
    assert said.startswith("ConnectionError hf://owner/other was not loaded: it is not in the cache, and HF_HUB_OFFLINE")
    assert len(hub.asked) == asked
