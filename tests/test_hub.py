"""The Hub layer, the real client and a real HTTP server: what moves, what is refused, what is left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hub_server import PLAIN_HTTP, Hub, hub_server
from huggingface_hub import CommitOperationAdd, constants
from safetensors.numpy import save_file

from hardener import client, hub, push
from hardener.errors import HardenerError, HubError, ResourceError, UnsupportedModelError, UsageError
from hardener.metadata import ModelRef
from hardener.target import Target, prepare, withdraw

pytestmark = PLAIN_HTTP
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ELEMENTS = 50_000
RANGE = 100_001
"""Bytes that the client asks for to read one header."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server(tmp_path / "home") as running:
        running.connect(monkeypatch)
        yield running


@pytest.fixture
def offline(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def switch() -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        server.requests.clear()

    return switch


def write(folder: Path, files: dict[str, object]) -> Path:
    """Write texts, bytes, JSON values and, for safetensors, dictionaries of arrays."""
    for name, value in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors") and isinstance(value, dict):
            save_file(value, path)
        else:
            data = value if isinstance(value, (str, bytes)) else json.dumps(value)
            path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def floats(*names: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(ELEMENTS).astype(np.float32) for name in names}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """One file of weights, and companions of every sort."""
    return write(
        tmp_path / "plain",
        {
            WEIGHTS: floats("a.weight", "b.weight"),
            "config.json": CONFIG,
            "tokenizer.json": {},
            "chat_template.jinja": "{{ messages }}",
            "additional_chat_templates/tool.jinja": "{{ tools }}",
            "generation_config.json": {},
            "LICENSE": "terms",
            "pytorch_model.bin": b"pickle",
            "pytorch_model.bin.index.json": {},
            "model.Q4.gguf": b"GGUF",
            "onnx/model.onnx": b"onnx",
            "training_args.bin": b"pickle",
            "eval_results.json": {},
            "hardener/report.json": {},
        },
    )


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    shards = {file: floats(tensor) for tensor, file in names.items()}
    return write(tmp_path / "sharded", {**shards, INDEX: {"weight_map": names}, "config.json": CONFIG})


def release(folder: Path, **extra: object) -> Path:
    """A release folder with its SHA256SUMS."""
    card = "---\nlicense: mit\nbase_model: org/model\n---\n\n# hardened\n"
    files = {"config.json": CONFIG, WEIGHTS: floats("a.weight", seed=1), "README.md": card}
    write(folder, {**files, "hardener/report.json": {"schema_version": 1}, **extra})
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}" for p in paths]
    write(folder, {"SHA256SUMS": "\n".join(sums) + "\n"})
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return release(tmp_path / "release")


@pytest.fixture
def parent(server: Hub, plain: Path) -> ModelRef:
    server.add_model("org/model", plain, card={"license": "mit"})
    return hub.resolve("org/model")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- resolve ------------------------------------------------------------------------------


def test_resolve_pins_the_commit_and_reads_headers_only(server: Hub, plain: Path) -> None:
    card = {"license": "other", "license_name": "house", "license_link": "LICENSE", "tags": ["x"]}
    commit = server.add_model("org/model", plain, gated="manual", card=card).head.oid
    server.repos["org/model"].granted = True
    ref = hub.resolve("org/model")
    assert (ref.id, ref.commit, ref.folder, ref.gated, ref.private) == (
        "org/model",
        commit,
        None,
        "manual",
        False,
    )
    assert (ref.parameters, ref.dtype) == (2 * ELEMENTS, "float32")
    assert ref.tensors == {"a.weight": "F32", "b.weight": "F32"}
    assert ref.license == {key: card[key] for key in ("license", "license_name", "license_link")}
    assert ref.config == CONFIG
    read = server.asked(rf"GET .*{WEIGHTS}")
    assert [one.range for one in read] == ["bytes=0-100000"]
    assert sum(one.sent for one in read) == RANGE < ref.files[WEIGHTS]
    assert all("hardener/" in one.user_agent for one in server.requests)


def test_a_release_needs_weights_companions_and_licence_but_no_other_formats(server: Hub, plain: Path) -> None:
    server.add_model("org/model", plain, card={"license": "mit"})
    expected = {
        *(WEIGHTS, "config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"),
        *("additional_chat_templates/tool.jinja", "LICENSE", "README.md"),
    }
    ref = hub.resolve("org/model")
    assert set(ref.files) == expected
    assert ref.files[WEIGHTS] == (plain / WEIGHTS).stat().st_size
    assert ref.bytes == sum(ref.files.values())


def test_shards_are_read_through_their_index(server: Hub, sharded: Path) -> None:
    server.add_model("org/model", sharded)
    ref = hub.resolve("org/model")
    assert ref.tensors == {"a": "F32", "b": "F32"}
    assert {INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= set(ref.files)
    assert all(one.range for one in server.asked(r"GET .*\.safetensors$"))


def test_a_folder_is_known_by_its_name_and_never_by_its_path(sharded: Path) -> None:
    ref = hub.resolve(str(sharded))
    assert (ref.id, ref.commit, ref.folder) == ("sharded", None, sharded)
    assert ref.parameters == 2 * ELEMENTS
    assert hub.pull(ref) == sharded


def test_the_dtype_is_the_one_that_most_elements_have(tmp_path: Path) -> None:
    tensors = {"big": np.zeros(1000, np.float16), **{f"norm{i}": np.zeros(8, np.float32) for i in range(20)}}
    folder = write(tmp_path / "mixed", {WEIGHTS: tensors, "config.json": CONFIG})
    assert hub.resolve(str(folder)).dtype == "float16"


def test_a_broken_card_is_noted_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {WEIGHTS: floats("a"), "config.json": CONFIG, "README.md": "---\nlicense: [mit\n---\n"}
    assert hub.resolve(str(write(tmp_path / "m", files))).card == {}
    assert "README.md" in caplog.text


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "~/absent"])
def test_a_path_that_does_not_exist_is_said_to_be_one(name: str) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        hub.resolve(name)


def test_an_impossible_id_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="not a Hub repository id"):
        hub.resolve("org/--model--")


def test_a_revision_of_a_folder_is_a_usage_error(sharded: Path) -> None:
    with pytest.raises(UsageError, match="no revision v1"):
        hub.resolve(str(sharded), "v1")


REFUSED = {
    "pickle": ({"pytorch_model.bin": b"p", "config.json": CONFIG}, "convert the model"),
    "gguf": ({"model.Q4_K_M.gguf": b"GGUF"}, "GGUF"),
    "no config": ({WEIGHTS: floats("a")}, "no config.json"),
    "adapter": ({"adapter_config.json": {}, "adapter_model.safetensors": floats("a")}, "merge_and_unload"),
    "adapter beside a model": (
        {"adapter_config.json": {}, WEIGHTS: floats("a"), "config.json": CONFIG},
        "merge_and_unload",
    ),
    "pipeline": ({"model_index.json": {}, "unet/config.json": {}}, "pipeline"),
    "remote code": ({WEIGHTS: floats("a"), "config.json": {"auto_map": {}}}, "never runs code"),
    "integer weights": ({WEIGHTS: {"q": np.zeros(99, np.int8)}, "config.json": CONFIG}, "I8"),
    "config is no JSON": ({WEIGHTS: floats("a"), "config.json": "{"}, "not JSON"),
    "index points outside": (
        {"config.json": CONFIG, INDEX: {"weight_map": {"a": "../other/model.safetensors"}}},
        "foreign file",
    ),
    "index without its shard": (
        {"config.json": CONFIG, INDEX: {"weight_map": {"a": "x.safetensors"}}},
        "not there",
    ),
    "index without a map": ({"config.json": CONFIG, INDEX: {}}, "weight_map"),
    "index that lies": (
        {"config.json": CONFIG, "x.safetensors": floats("b"), INDEX: {"weight_map": {"a": "x.safetensors"}}},
        "does not hold it",
    ),
    **{
        method: ({WEIGHTS: floats("a"), "config.json": {**CONFIG, "quantization_config": settings}}, method)
        for method, settings in {
            **{name: {"quant_method": name} for name in ("gptq", "awq", "fp8", "compressed-tensors")},
            "bitsandbytes": {"load_in_4bit": True},
        }.items()
    },
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_hardened_is_refused_before_any_weight_moves(server: Hub, tmp_path: Path, kind: str) -> None:
    files, said = REFUSED[kind]
    folder = write(tmp_path / "folder", files)
    server.add_model("org/model", folder)
    for model in (str(folder), "org/model"):
        with pytest.raises(UnsupportedModelError, match=said) as caught:
            hub.resolve(model)
        assert caught.value.exit_code == 2
        assert str(tmp_path) not in str(caught.value)
    assert all(one.range for one in server.asked(r"GET .*\.(safetensors|bin|gguf)$"))


@pytest.mark.parametrize("cut", [4, 60, 4000])
def test_a_truncated_file_is_refused_here_and_there(server: Hub, tmp_path: Path, cut: int) -> None:
    folder = write(tmp_path / "cut", {WEIGHTS: floats("a"), "config.json": CONFIG})
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:cut])
    server.add_model("org/model", folder)
    for model in (str(folder), "org/model"):
        with pytest.raises(UnsupportedModelError, match="truncated"):
            hub.resolve(model)


# --- what the Hub says ------------------------------------------------------------------------------


def committed(server: Hub, plain: Path, **how: object) -> None:
    """One commit by the plain client, on a repository that is there."""
    server.add_model("me/model", plain)
    files = how.pop("files", {"note.txt": b"text"})
    adds = [CommitOperationAdd(path, data) for path, data in files.items()]
    with client.explained("the push"):
        client.client().create_commit("me/model", adds, commit_message="m", **how)


def gated(server: Hub, plain: Path, patch: pytest.MonkeyPatch) -> None:
    server.add_model("org/model", plain, gated="auto")
    hub.resolve("org/model")


def unknown_revision(server: Hub, plain: Path, patch: pytest.MonkeyPatch) -> None:
    server.add_model("org/model", plain).tags["v1.0"] = "0" * 40
    hub.resolve("org/model", "v1.1")


def unknown_file(server: Hub, plain: Path, patch: pytest.MonkeyPatch) -> None:
    server.add_model("org/model", plain)
    with client.explained("org/model"):
        client.client().hf_hub_download("org/model", "absent.json")


def refused(status: int) -> Callable[..., None]:
    def cause(server: Hub, plain: Path, patch: pytest.MonkeyPatch) -> None:
        server.fail("GET /api/models", status, times=99)
        hub.resolve("org/model")

    return cause


def stale(server: Hub, plain: Path, patch: pytest.MonkeyPatch) -> None:
    committed(server, plain, parent_commit="0" * 40)


def no_requests(server: Hub, plain: Path, patch: pytest.MonkeyPatch) -> None:
    server.pull_requests = False
    committed(server, plain, create_pr=True)


def no_xet(server: Hub, plain: Path, patch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    patch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    committed(server, plain, files={WEIGHTS: b"weights"})


def no_server(server: Hub, plain: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")
    with client.explained("org/model"):
        client.client().model_info("org/model")


def offline_question(server: Hub, plain: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    with client.explained("org/model"):
        client.client().model_info("org/model")


def offline_and_half_there(server: Hub, plain: Path, patch: pytest.MonkeyPatch) -> None:
    commit = server.add_model("org/model", plain).head.oid
    (hub.verify_remote("org/model") / WEIGHTS).unlink()
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.verify_remote("org/model", commit)


def offline_and_never_seen(server: Hub, plain: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.verify_remote("org/model", "0" * 40)


def no_token(server: Hub, plain: Path, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN")
    with client.explained("the push"):
        client.client().whoami()


def no_publisher(server: Hub, plain: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_OIDC_RESOURCE", "org/model")
    hub.resolve("org/model")


def bad_card(server: Hub, plain: Path, patch: pytest.MonkeyPatch) -> None:
    committed(server, plain, files={"README.md": b"---\nlicense: My Own\n---\n", WEIGHTS: b"weights"})


TOLD: dict[str, tuple[str, Callable[..., None], str]] = {
    "gated": ("GatedRepoError", gated, r"org/model: access is gated; ask for it at URL/org/model .* read gated"),
    "missing, or private": (
        "RepositoryNotFoundError",
        lambda *_: hub.resolve("org/nothing"),
        "org/nothing: no such repository, or it is private and the token in HF_TOKEN cannot see it",
    ),
    "revision": ("RevisionNotFoundError", unknown_revision, r"org/model has no revision v1\.1; it has v1\.0"),
    "file": ("RemoteEntryNotFoundError", unknown_file, r"the repository has no file absent\.json"),
    "403": ("HfHubHTTPError", refused(403), "the token in HF_TOKEN lacks the right to do this; it needs write access"),
    "412": ("HfHubHTTPError", stale, "changed in the meantime and nothing was pushed; push again, or as a pull"),
    "429": ("HfHubHTTPError", refused(429), "asks to slow down; wait a few minutes and run the same line again"),
    "501": ("HfHubHTTPError", no_requests, "this server has no pull requests; push to a branch instead"),
    "503": ("HfHubHTTPError", refused(503), "failed with status 503; nothing is lost, run the same line again later"),
    "no Xet": ("ConnectionError", no_xet, "the connection broke; run the same line again.*HF_HUB_DISABLE_XET=1"),
    "no server": (
        "ConnectError",
        no_server,
        r"no answer from http://127\.0\.0\.1:9; check the network and HF_ENDPOINT",
    ),
    "offline": ("OfflineModeIsEnabled", offline_question, "HF_HUB_OFFLINE is set.*fetch it online with `hf download`"),
    "half there": (
        "IncompleteSnapshotError",
        offline_and_half_there,
        rf"HF_HUB_OFFLINE is set.*`hf download`.*1 file\(s\) are missing \({WEIGHTS}\)",
    ),
    "never seen": ("LocalEntryNotFoundError", offline_and_never_seen, "HF_HUB_OFFLINE is set.*`hf download`"),
    "no token": ("LocalTokenNotFoundError", no_token, "no token is set; run `hf auth login`, or set HF_TOKEN"),
    "publisher": ("OIDCError", no_publisher, "check `id-token: write` and the repository's trusted publisher entry"),
    "card": ("ValueError", bad_card, '"license" must be one of.*nothing was sent: correct the `card` section'),
}
"""Case → the client's exception, what causes it, and the sentence that it becomes."""


@pytest.mark.parametrize("case", TOLD)
def test_every_failure_of_the_client_becomes_a_sentence_that_says_what_to_do(
    server: Hub, plain: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    name, cause, said = TOLD[case]
    with pytest.raises(HubError, match=said.replace("URL", server.url)) as caught:
        cause(server, plain, monkeypatch)
    assert caught.value.exit_code == 3
    assert type(caught.value.__cause__ or caught.value.__context__).__name__ == name
    assert server.asked("PUT /lfs/") == []


def test_a_gated_or_private_parent_is_pulled_where_the_token_may(server: Hub, plain: Path) -> None:
    server.add_model("org/gated", plain, gated="manual").granted = True
    server.add_model("me/private", plain, private=True)
    for name, gate, private in (("org/gated", "manual", False), ("me/private", False, True)):
        ref = hub.resolve(name)
        assert (ref.gated, ref.private) == (gate, private)
        assert (hub.pull(ref) / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()


@pytest.mark.parametrize("how", [{"gated": "manual"}, {"private": True}])
def test_a_parent_that_was_closed_before_the_pull_is_refused_in_words(
    server: Hub, plain: Path, how: dict[str, object]
) -> None:
    repo = server.add_model("other/model", plain)
    ref = hub.resolve("other/model")
    repo.private, repo.gated = bool(how.get("private")), how.get("gated", False)
    with pytest.raises(HubError, match=r"access is gated|no such repository, or it is private"):
        hub.pull(ref)


def test_a_full_disk_is_no_fault_of_the_hub() -> None:
    with pytest.raises(ResourceError, match="set HF_HOME"), hub.explained("org/model"):
        raise OSError(errno.ENOSPC, "No space left on device")


def attempts(parent: ModelRef, made: Path) -> list[Callable[[], object]]:
    target = Target("me/hardened", None, False, None, False, parent.commit)
    return [
        lambda: hub.resolve("org/model"),
        lambda: hub.pull(parent),
        lambda: prepare("me/hardened", parent),
        lambda: push.push(made, target, message="m"),
        lambda: withdraw(replace(target, first=parent.commit)),
    ]


@pytest.mark.parametrize("token", ["hf_" + "secret" * 6, "not-like-a-token-at-all", "hf_with\x01control" * 3])
@pytest.mark.parametrize("server_accepts", [True, False])
def test_no_error_shows_the_token(
    server: Hub,
    parent: ModelRef,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    server_accepts: bool,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    if server_accepts:
        server.token = token
        server.fail(".", 400, times=1000)
    for attempt in attempts(parent, made):
        with pytest.raises(HardenerError) as caught:
            attempt()
        shown = "".join(traceback.format_exception(caught.value)) + str(caught.value)
        assert token not in shown
        assert repr(token)[1:-1] not in shown


def test_texts_are_cleared_of_the_token_in_use_and_of_what_looks_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-an-odd-form")
    assert client.scrub("of-an-odd-form expired") == "hf_*** expired"
    assert client.scrub("sent 'Bearer something\\x01else' and hf_abcdefghij") == "sent 'Bearer ***' and hf_***"


# --- pull ------------------------------------------------------------------------------


def test_pull_brings_exactly_the_files_of_the_commit(server: Hub, plain: Path) -> None:
    server.add_model("org/model", plain)
    ref = hub.resolve("org/model")
    server.repos["org/model"].add("main", "later", {"config.json": b"{}"})
    said: list[str] = []
    folder = hub.pull(ref, said.append)
    assert contents(folder) == {name: (plain / name).read_bytes() for name in ref.files}
    assert "7 files" in said[0]


def test_pull_refuses_a_cache_with_a_damaged_file(server: Hub, plain: Path) -> None:
    server.add_model("org/model", plain)
    ref = hub.resolve("org/model")
    weights = hub.pull(ref) / WEIGHTS
    weights.resolve().write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(
        HubError, match=f"wrong size of {WEIGHTS}.*hf download org/model {WEIGHTS} --revision {ref.commit} --force"
    ):
        hub.pull(ref)


def test_a_server_whose_xet_store_fails_is_read_by_plain_http(
    server: Hub, plain: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    server.announces_xet = True
    server.add_model("org/model", plain)
    folder = hub.pull(hub.resolve("org/model"))
    assert server.asked("GET .*/xet-read-token/")
    assert (folder / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert caplog.text.count("going on by plain HTTP") == 1


def test_what_was_pulled_works_offline(server: Hub, sharded: Path, offline: Callable[[], None]) -> None:
    server.add_model("org/model", sharded, card={"license": "mit"})
    ref = hub.resolve("org/model")
    folder = hub.pull(ref)
    offline()
    assert hub.resolve("org/model") == ref
    assert hub.resolve("org/model", ref.commit) == ref
    assert hub.pull(ref) == folder
    assert server.requests == []


def test_offline_lists_every_file_that_the_cache_lacks(server: Hub, sharded: Path, offline: Callable[[], None]) -> None:
    server.add_model("org/model", sharded)
    folder = hub.pull(hub.resolve("org/model"))
    for shard in folder.glob("model-*"):
        shard.unlink()
    offline()
    with pytest.raises(HubError, match=r"missing model-00001.*missing model-00002.*hf download"):
        hub.resolve("org/model")


def test_offline_lists_every_shard_of_an_index_although_nobody_listed_the_repository(
    server: Hub, sharded: Path, offline: Callable[[], None]
) -> None:
    commit = server.add_model("org/model", sharded).head.oid
    for name in (INDEX, "config.json"):  # one by one, as an inference engine may have done
        client.client().hf_hub_download("org/model", name)
    offline()
    with pytest.raises(
        HubError, match=rf"model-00001\S+, model-00002.*\n.*`hf download org/model --revision {commit}`"
    ):
        hub.resolve("org/model")


@pytest.mark.parametrize("listed", [True, False])
def test_the_command_of_the_message_completes_the_cache(
    server: Hub, sharded: Path, offline: Callable[[], None], listed: bool
) -> None:
    ref = hub.resolve(server.add_model("org/model", sharded).id)
    if listed:
        (hub.pull(ref) / "model-00001-of-00002.safetensors").unlink()
    offline()
    with pytest.raises(HubError) as caught:
        hub.resolve("org/model")
    words = re.findall("`hf ([^`]+)`", str(caught.value))[0].split()
    program = Path(sys.executable).with_name("hf")
    subprocess.run([program, *words], env={**os.environ, **server.environment}, check=True, capture_output=True)
    server.requests.clear()
    assert hub.resolve("org/model") == ref
    assert contents(hub.pull(ref)).keys() >= ref.files.keys()
    assert server.requests == []


def test_the_last_note_of_the_cache_is_not_taken_for_the_answer_of_a_hub_that_fails(server: Hub, made: Path) -> None:
    server.add_model("me/hardened", made)
    hub.verify_remote("me/hardened")
    server.repos["me/hardened"].add("main", "later", {**server.repos["me/hardened"].files, "x": b"x"})
    for ask in (hub.resolve, hub.verify_remote, hub.evidence):
        server.fail("GET /api/models/me/hardened$", None, times=99)
        with pytest.raises(HubError, match=f"no answer from {server.url}"):
            ask("me/hardened")
        server.faults.clear()
    assert hub.resolve("me/hardened").commit == server.repos["me/hardened"].head.oid


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_a_hub_that_fails_for_one_question_of_several_does_not_bring_back_an_old_commit(
    server: Hub, plain: Path, answered: int
) -> None:
    repo = server.add_model("org/model", plain)
    hub.resolve("org/model")
    repo.add("main", "later", {**repo.files, "x": b"x"})
    server.fail("GET /api/models/org/model$", 502, skip=answered)
    with pytest.raises(HubError, match=r"run the same line again"):
        hub.resolve("org/model")
    assert hub.resolve("org/model").commit == repo.head.oid


@pytest.mark.parametrize("listed", [True, False])
def test_a_hub_that_goes_away_before_the_pull_is_named(
    server: Hub, plain: Path, monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    server.add_model("org/model", plain)
    ref = hub.resolve("org/model")
    if listed:
        (hub.pull(ref) / WEIGHTS).unlink()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's tries
    with pytest.raises(HubError, match=r"no answer from http://127\.0\.0\.1:9; check the network"):
        hub.pull(ref)


def test_a_cache_that_holds_only_the_config_is_not_taken_for_a_model(
    server: Hub, plain: Path, offline: Callable[[], None]
) -> None:
    server.add_model("org/model", plain)
    hub.resolve("org/model")
    offline()
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set.*hf download"):
        hub.resolve("org/model")


def test_offline_and_never_seen_is_a_hub_error(offline: Callable[[], None]) -> None:
    offline()
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        hub.resolve("org/model")


def test_a_release_comes_back_whole(server: Hub, made: Path) -> None:
    commit = server.add_model("me/hardened", made).head.oid
    server.repos["me/hardened"].add("main", "later", {"x": b""})
    assert contents(hub.verify_remote("me/hardened", commit)) == contents(made)
