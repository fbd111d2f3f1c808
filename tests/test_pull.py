"""Pulling, the real client and a real HTTP server: every fault at every request ends in the model or in an error.

No fault leaves a file that is not the Hub's, and the same line again completes what one interrupted.
"""

# ruff: noqa: F811 - fixtures that are imported are the arguments of tests
from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_server import PLAIN_HTTP, Hub
from test_hub import WEIGHTS, contents, server, sharded  # noqa: F401

from hardener import hub
from hardener.client import explained
from hardener.errors import HubError

pytestmark = PLAIN_HTTP
FAULTS: dict[str, dict[str, Any]] = {
    "is reset in the middle": {"how": "reset"},
    "is altered": {"how": "altered"},
    "is refused": {"how": "refused"},
    "is sent in circles": {"how": "loop", "times": 99},
    "is unavailable for hours": {"how": 503, "times": 99},
    "is refused for hours": {"how": "refused", "times": 99},
    "needs another token": {"how": 401, "times": 99},
    "is dropped": {"how": None},
    "is dropped for hours": {"how": None, "times": 99},
    "is answered by half": {"how": "cut"},
    "is answered by half for hours": {"how": "cut", "times": 99},
    "is answered slowly": {"how": "slow", "times": 99},
    "is forbidden": {"how": 403},
    "is not found": {"how": 404},
    "conflicts": {"how": 409},
    "has changed": {"how": 412},
    "asks for what is not there": {"how": 416},
    "is put off": {"how": 429},
    "is put off for hours": {"how": 429, "times": 99},
    "fails once": {"how": 500},
    "fails for hours": {"how": 502, "times": 99},
    "is altered for hours": {"how": "altered", "times": 99},
}
QUICK = set(list(FAULTS)[:4])


@pytest.fixture(autouse=True)
def _no_waits(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client backs off without waiting."""
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=server.waited), raising=False)


def fetched(server: Hub) -> dict[str, bytes]:
    """A resolved and pulled model."""
    return contents(hub.pull(hub.resolve("org/model")))


def attempt(server: Hub) -> tuple[dict[str, bytes] | None, str | None]:
    """The model, or what an error of the Hub says; any other is a failure of the test."""
    try:
        return fetched(server), None
    except HubError as error:
        return None, str(error)


def fresh(server: Hub) -> None:
    shutil.rmtree(server.home / "hub", ignore_errors=True)
    server.heal()
    server.requests.clear()


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=() if fault in QUICK else pytest.mark.slow) for fault in FAULTS]
)
def test_a_pull_survives_every_fault_with_the_model_or_an_error_and_the_next_try_completes_it(
    server: Hub, sharded: Path, fault: str
) -> None:
    server.add_model("org/model", sharded, card={"license": "mit"})
    whole = fetched(server)
    lines = [f"{one.method} {one.path}" for one in server.requests]
    failed = 0
    for nth, line in enumerate(lines):
        fresh(server)
        server.fail_at(nth, lines, **FAULTS[fault])
        got, said = attempt(server)
        if said is not None:
            failed += 1
            assert server.token not in said
            server.heal()
            got = fetched(server)
        assert got == whole, line
    print(f"{fault}: {len(lines)} requests, {failed} errors, {len(lines) - failed} survived")
    assert len(lines) > 5


def test_a_session_that_another_thread_took_away_is_no_answer_and_anything_else_a_bug() -> None:
    gone: Any = None
    with pytest.raises(HubError, match=r"org/model: no answer from .*; check the network"), explained("org/model"):
        gone.request("GET")
    with pytest.raises(AttributeError, match="has no attribute 'files'"), explained("org/model"):
        print(gone.files)


def test_weights_of_the_right_size_and_other_bytes_are_refused_and_fetched_anew(server: Hub, sharded: Path) -> None:
    server.add_model("org/model", sharded)
    ref = hub.resolve("org/model")
    name = "model-00001-of-00002.safetensors"
    path = hub.pull(ref) / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.resolve().write_bytes(data)
    with pytest.raises(HubError, match=f"{name} came with other bytes than the Hub names"):
        hub.pull(ref)
    assert (hub.pull(ref) / name).read_bytes() == (sharded / name).read_bytes()
    assert WEIGHTS not in ref.files
