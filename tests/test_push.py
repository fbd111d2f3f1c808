"""Pushing, the real client and a real HTTP server: one commit or nothing, whatever goes wrong on the way."""

# ruff: noqa: F811 - fixtures that are imported are the arguments of tests
from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
from cryptography.hazmat.primitives.asymmetric import ec
from hub_server import PLAIN_HTTP, Discussion, Hub, Repo
from huggingface_hub import constants
from sample_report import language_model
from test_hub import WEIGHTS, contents, made, parent, plain, release, server, sharded  # noqa: F401
from test_signing import write_keys

import hardener
from hardener import hub, push, recipe_file, signing
from hardener import release as releases
from hardener.console import Narrator
from hardener.errors import DivergedError, HubError, ResourceError, UsageError
from hardener.metadata import ModelRef
from hardener.push import Pushed
from hardener.run import RunFolder
from hardener.target import Target, prepare, withdraw

pytestmark = PLAIN_HTTP


def remote(server: Hub, repo: str) -> dict[str, bytes]:
    return {path: data for path, data in server.repos[repo].files.items() if path != ".gitattributes"}


# --- push ------------------------------------------------------------------------------


def test_a_release_goes_up_in_one_commit_and_becomes_public(server: Hub, parent: ModelRef, made: Path) -> None:
    target = prepare("me/hardened", replace(parent, gated="manual"), tag="v1")
    pushed = push.push(made, target, message="Harden org/model")
    repo = server.repos["me/hardened"]
    assert [one.title for one in repo.commits] == ["initial commit", "Harden org/model"]
    assert remote(server, "me/hardened") == contents(made)
    assert (repo.private, repo.gated, repo.tags) == (False, "manual", {"v1": repo.head.oid})
    assert pushed == Pushed("me/hardened", repo.head.oid, f"{server.url}/me/hardened", None)
    lines = [f"{one.method} {one.path}" for one in server.requests]
    checked = max(i for i, line in enumerate(lines) if line.startswith("GET /api/models/me/hardened/tree/"))
    public = max(i for i, line in enumerate(lines) if line.startswith("PUT /api/models/me/hardened/settings"))
    assert checked < public


def test_a_private_target_stays_private(server: Hub, parent: ModelRef, made: Path) -> None:
    push.push(made, prepare("me/hardened", parent, private=True), message="m")
    assert server.repos["me/hardened"].private


def test_an_older_release_leaves_nothing_behind(server: Hub, parent: ModelRef, sharded: Path, made: Path) -> None:
    server.add_model("me/hardened", sharded)
    push.push(made, prepare("me/hardened", parent), message="m")
    assert remote(server, "me/hardened") == contents(made)
    assert ".gitattributes" in server.repos["me/hardened"].files


def test_pushing_the_same_release_twice_changes_nothing(server: Hub, parent: ModelRef, made: Path) -> None:
    push.push(made, prepare("me/hardened", parent), message="m")
    pushed = push.push(made, prepare("me/hardened", parent), message="m")
    assert remote(server, "me/hardened") == contents(made)
    assert pushed.commit == server.repos["me/hardened"].head.oid


def test_a_pull_request_leaves_main_alone(server: Hub, parent: ModelRef, made: Path) -> None:
    server.writable.remove("org")
    before = server.repos["org/model"].head.oid
    pushed = push.push(made, prepare("org/model", parent, create_pr=True), message="m")
    repo = server.repos["org/model"]
    assert repo.head.oid == before
    assert repo.refs["refs/pr/1"] == pushed.commit
    assert pushed.pr_url == f"{server.url}/org/model/discussions/1"


def test_a_server_without_pull_requests_is_told_apart(server: Hub, parent: ModelRef, made: Path) -> None:
    server.pull_requests = False
    with pytest.raises(HubError, match="push to a branch"):
        push.push(made, prepare("org/model", parent, create_pr=True), message="m")


def test_a_branch_is_made_filled_and_leaves_main_alone(server: Hub, parent: ModelRef, made: Path) -> None:
    for title in ("first", "second"):
        pushed = push.push(made, prepare("org/model", parent, branch="hardened"), message=title)
    repo = server.repos["org/model"]
    assert repo.head.oid == parent.commit
    assert repo.refs["hardened"] == pushed.commit
    assert pushed.url.endswith("/org/model/tree/hardened")


@pytest.mark.parametrize("branch", [None, "hardened"])
@pytest.mark.parametrize("status", [500, None])
def test_a_commit_that_fails_leaves_the_target_as_it_was(
    server: Hub, parent: ModelRef, made: Path, branch: str | None, status: int | None
) -> None:
    server.add_model("me/hardened", made / "hardener")
    before = dict(server.repos["me/hardened"].refs)
    target = prepare("me/hardened", parent, branch=branch)
    server.fail("POST .*/commit/", status)
    with pytest.raises(HubError):
        push.push(made, target, message="m")
    assert server.repos["me/hardened"].refs == before


@pytest.mark.parametrize("status", [504, None])
def test_a_commit_whose_answer_is_lost_is_found_and_checked(
    server: Hub, parent: ModelRef, made: Path, status: int | None
) -> None:
    target = prepare("me/hardened", parent)
    server.fail("POST .*/commit/", status, after=True)
    pushed = push.push(made, target, message="m")
    assert pushed.commit == server.repos["me/hardened"].head.oid
    assert remote(server, "me/hardened") == contents(made)
    assert not server.repos["me/hardened"].private


def test_a_new_target_whose_commit_fails_is_empty_private_and_can_be_withdrawn(
    server: Hub, parent: ModelRef, made: Path
) -> None:
    target = prepare("me/hardened", parent)
    server.fail("POST .*/commit/", 502)
    with pytest.raises(HubError, match="status 502"):
        push.push(made, target, message="m")
    assert server.repos["me/hardened"].private
    assert remote(server, "me/hardened") == {}
    assert withdraw(target)


def test_a_target_that_moved_meanwhile_is_not_overwritten(server: Hub, parent: ModelRef, made: Path) -> None:
    target = prepare("me/hardened", parent)
    theirs = server.repos["me/hardened"].add("main", "somebody", dict(server.repos["me/hardened"].files))
    with pytest.raises(HubError, match="changed in the meantime"):
        push.push(made, target, message="m")
    assert server.repos["me/hardened"].head is theirs


def test_a_card_with_wrong_metadata_is_refused_before_any_weight_is_sent(
    server: Hub, parent: ModelRef, tmp_path: Path
) -> None:
    folder = release(tmp_path / "bad", **{"README.md": "---\nlicense: My Own\n---\n"})
    target = prepare("me/hardened", parent)
    with pytest.raises(HubError, match='"license" must be one of'):
        push.push(folder, target, message="m")
    assert server.objects == {}


@pytest.mark.parametrize("path", [WEIGHTS, "hardener/report.json"])
def test_what_arrived_damaged_stays_private(server: Hub, parent: ModelRef, made: Path, path: str) -> None:
    server.corrupt.add(path)
    with pytest.raises(HubError, match=f"not what was sent: {path}; it stays private"):
        push.push(made, prepare("me/hardened", parent), message="m")
    assert server.repos["me/hardened"].private


def test_a_folder_and_its_sums_must_agree(parent: ModelRef, made: Path) -> None:
    target = prepare("me/hardened", parent)
    (made / "note.txt").write_text("forgotten")
    with pytest.raises(UsageError, match=r"differ in note\.txt"):
        push.push(made, target, message="m")
    (made / "SHA256SUMS").unlink()
    with pytest.raises(UsageError, match="not a release"):
        push.push(made, target, message="m")


def test_a_taken_tag_is_refused_before_the_commit(server: Hub, parent: ModelRef, made: Path) -> None:
    target = prepare("me/hardened", parent, tag="v1")
    server.repos["me/hardened"].tags["v1"] = server.repos["me/hardened"].head.oid
    with pytest.raises(UsageError, match="tag v1 already"):
        prepare("me/hardened", parent, tag="v1")
    with pytest.raises(UsageError, match="tag v1 already"):  # taken during the compute
        push.push(made, target, message="m")
    assert len(server.repos["me/hardened"].commits) == 1


def test_a_server_without_xet_gets_the_weights_by_plain_http(
    server: Hub,
    parent: ModelRef,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    pytest.importorskip("hf_xet")
    push.push(made, prepare("me/hardened", parent), message="m")
    assert server.asked("GET .*/xet-write-token/")
    assert remote(server, "me/hardened") == contents(made)
    assert caplog.text.count("going on by plain HTTP") == 1


def test_a_server_with_xet_gets_the_weights_through_it(
    server: Hub, parent: ModelRef, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    server.xet_store = tmp_path / "xet"
    weights = (made / WEIGHTS).read_bytes()
    server.objects[hashlib.sha256(weights).hexdigest()] = weights  # the Hub sees into its store
    push.push(made, prepare("me/hardened", parent), message="m")
    assert sum(path.stat().st_size for path in server.xet_store.rglob("*") if path.is_file()) > len(weights) / 2
    assert remote(server, "me/hardened") == contents(made)
    assert server.asked("/lfs/") == []


# --- a second try ------------------------------------------------------------------------------


@dataclass
class Journal:
    """What a run notes of its push; every `attempt` goes on from there, as `--resume` does."""

    parent: ModelRef
    release: Path
    repo: str = "me/hardened"
    how: dict[str, Any] = field(default_factory=dict)
    notes: list[Target] = field(default_factory=list)

    def attempt(self, message: str = "m") -> Pushed:
        known = self.notes[-1] if self.notes else None
        target = prepare(self.repo, self.parent, **self.how, known=known, note=self.notes.append)
        return push.push(self.release, target, message=message, note=self.notes.append)


@pytest.fixture
def journal(parent: ModelRef, made: Path) -> Journal:
    return Journal(parent, made)


@pytest.fixture
def waits(server: Hub, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client backs off without waiting; returns the seconds that it would have waited."""
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        server.waited(seconds)

    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=sleep))
    return waited


def requested(server: Hub, journal: Journal) -> Repo:
    """A request to the parent, which somebody else owns."""
    server.writable.discard("org")
    journal.repo, journal.how = "org/model", {"create_pr": True}
    return server.repos["org/model"]


def test_a_second_try_continues_the_pull_request_of_the_first(server: Hub, journal: Journal, made: Path) -> None:
    repo = requested(server, journal)
    server.corrupt.add(WEIGHTS)
    with pytest.raises(HubError, match="not what was sent"):
        journal.attempt()
    assert journal.notes[-1].request == 1
    server.corrupt.clear()
    again = journal.attempt()
    assert again.pr_url == f"{server.url}/org/model/discussions/1"
    assert [one.title for one in repo.discussions] == ["m"]
    assert repo.at("refs/pr/1").files.items() >= contents(made).items()
    assert journal.attempt() == again
    assert len(repo.commits) == 4  # the parent's two, the damaged one and the good one


def test_a_request_whose_answer_was_lost_is_found_by_its_title_among_others(server: Hub, journal: Journal) -> None:
    repo = requested(server, journal)
    repo.discussions += [
        Discussion("m", "me"),
        Discussion("m", "me", "closed"),
        Discussion("talk", "me", "open", False),
    ]
    for number in (1, 2, 3):
        repo.refs[f"refs/pr/{number}"] = repo.head.oid
    server.fail("POST .*/commit/", None, after=True)
    server.fail("GET .*/discussions", None, skip=2, times=9)  # nor can the client ask at once
    with pytest.raises(HubError):
        journal.attempt()
    repo.discussions += [Discussion("m", "somebody"), Discussion("other", "me")]
    repo.refs["refs/pr/5"] = repo.refs["refs/pr/6"] = repo.head.oid
    server.faults.clear()
    assert journal.attempt().pr_url.endswith("/discussions/4")
    assert len(repo.discussions) == 6
    assert journal.notes[-1].request == 4


@pytest.mark.parametrize("status", ["closed", "merged"])
def test_a_request_that_was_settled_meanwhile_is_not_continued(server: Hub, journal: Journal, status: str) -> None:
    repo = requested(server, journal)
    assert journal.attempt().pr_url.endswith("/discussions/1")
    settled = repo.refs["refs/pr/1"]
    repo.discussions[0].status = status
    (journal.release / "README.md").write_text("---\nlicense: mit\n---\n")
    sums = [line for line in (journal.release / "SHA256SUMS").read_text().splitlines() if "README" not in line]
    readme = hashlib.sha256((journal.release / "README.md").read_bytes()).hexdigest()
    (journal.release / "SHA256SUMS").write_text("\n".join([*sums, f"{readme}  README.md"]) + "\n")
    assert journal.attempt().pr_url.endswith("/discussions/2")
    assert repo.refs["refs/pr/1"] == settled
    assert journal.notes[-1].request == 2


def test_a_draft_is_continued(server: Hub, journal: Journal) -> None:
    repo = requested(server, journal)
    first = journal.attempt()
    repo.discussions[0].status = "draft"
    assert journal.attempt() == first


def test_a_tag_that_could_not_be_made_is_made_by_the_next_try(server: Hub, journal: Journal) -> None:
    journal.how = {"tag": "v1"}
    server.fail("POST .*/tag/", 503)
    with pytest.raises(HubError, match="status 503"):
        journal.attempt()
    repo = server.repos["me/hardened"]
    assert (len(repo.commits), repo.tags, repo.private) == (2, {}, True)
    pushed = journal.attempt()
    assert (len(repo.commits), repo.tags, repo.private) == (2, {"v1": pushed.commit}, False)
    assert journal.attempt() == pushed  # its own tag does not stand in its way


def test_a_tag_of_this_run_does_not_move_to_another_release(server: Hub, journal: Journal, tmp_path: Path) -> None:
    journal.how = {"tag": "v1"}
    first = journal.attempt()
    journal.release = release(tmp_path / "other", note=b"changed")
    with pytest.raises(UsageError, match="tag v1 already"):
        journal.attempt()
    assert server.repos["me/hardened"].head.oid == first.commit


def test_a_signature_travels_beside_the_sums(server: Hub, journal: Journal, made: Path) -> None:
    (made / "model.sig").write_text("{}")
    journal.attempt()
    assert server.repos["me/hardened"].files["model.sig"] == b"{}"
    (made / "hardener" / "model.sig").write_text("{}")
    with pytest.raises(UsageError, match=r"differ in hardener/model\.sig"):
        journal.attempt()


def test_a_branch_that_somebody_made_meanwhile_is_left_alone(server: Hub, parent: ModelRef, made: Path) -> None:
    target = prepare("org/model", parent, branch="hardened")
    server.repos["org/model"].refs["hardened"] = parent.commit
    with pytest.raises(HubError, match="exists already"):
        push.push(made, target, message="m")
    assert server.repos["org/model"].refs["hardened"] == parent.commit


def test_a_branch_that_cannot_be_taken_back_is_named(server: Hub, journal: Journal) -> None:
    journal.repo, journal.how = "org/model", {"branch": "hardened"}
    server.fail("POST .*/commit/", 500)
    server.fail("DELETE .*/branch/", None)
    with pytest.raises(HubError, match="new branch hardened of org/model stays as a copy of main"):
        journal.attempt()
    assert journal.attempt().commit == server.repos["org/model"].refs["hardened"]


def test_a_repository_whose_creation_was_not_answered_is_still_this_runs(server: Hub, journal: Journal) -> None:
    server.fail("POST /api/repos/create", None, after=True)
    with pytest.raises(HubError):
        journal.attempt()
    assert server.repos["me/hardened"].private
    assert withdraw(journal.notes[-1])
    assert server.repos.keys() == {"org/model"}
    server.fail("POST /api/repos/create", None, after=True)
    with pytest.raises(HubError):
        journal.attempt()
    journal.attempt()
    assert not server.repos["me/hardened"].private


def test_a_private_repository_that_others_filled_is_not_taken_for_this_runs(
    server: Hub, journal: Journal, plain: Path
) -> None:
    server.fail("POST /api/repos/create", 500)
    with pytest.raises(HubError):
        journal.attempt()
    server.add_model("me/hardened", plain, private=True)
    assert not withdraw(journal.notes[-1])
    journal.attempt()
    assert server.repos["me/hardened"].private


def test_a_creation_that_was_refused_is_not_held_against_what_a_person_makes(server: Hub, journal: Journal) -> None:
    server.fail("POST /api/repos/create", 403)
    with pytest.raises(HubError, match="lacks the right"):
        journal.attempt()
    server.create("me/hardened", private=True)
    assert not withdraw(journal.notes[-1])
    journal.attempt()
    assert server.repos["me/hardened"].private


def test_a_token_that_ended_does_not_make_a_repository_gone(server: Hub, journal: Journal) -> None:
    target = prepare("me/hardened", journal.parent)
    server.token = "hf_" + "another" * 5
    with pytest.raises(HubError):
        withdraw(target)
    assert "me/hardened" in server.repos


# --- every fault at every request ------------------------------------------------------------------------------


def new(server: Hub, journal: Journal) -> None:
    journal.parent, journal.how = replace(journal.parent, gated="manual"), {"tag": "v1"}


def new_and_private(server: Hub, journal: Journal) -> None:
    journal.how = {"private": True}


def over_an_older_release(server: Hub, journal: Journal) -> None:
    repo = server.create("me/hardened")
    repo.add("main", "older", {**repo.files, "README.md": b"old", "model-00001-of-00002.safetensors": b"old"})


def to_a_new_branch(server: Hub, journal: Journal) -> None:
    journal.how, journal.repo = {"branch": "hardened"}, "org/model"


def as_a_request(server: Hub, journal: Journal) -> None:
    requested(server, journal)


PUSHES: list[Callable[[Hub, Journal], None]] = [
    new,
    new_and_private,
    over_an_older_release,
    to_a_new_branch,
    as_a_request,
]
FAULTS: dict[str, dict[str, Any]] = {
    "is forbidden": {"how": 403},
    "is put off": {"how": 429},
    "fails for hours": {"how": 502, "times": 99},
    "is done and lost for hours": {"how": None, "after": True, "times": 99},
    "is refused": {"how": "refused"},
    "is answered by half": {"how": "cut"},
    "needs another token": {"how": 401},
    "conflicts": {"how": 412},
    "fails once": {"how": 500},
    "is dropped": {"how": None},
    "is dropped for hours": {"how": None, "times": 99},
    "is done and fails": {"how": 504, "after": True},
    "is done and lost": {"how": None, "after": True},
    "is answered slowly": {"how": "slow", "times": 99},
    "is not found": {"how": 404},
    "exists already": {"how": 409},
    "asks for what is not there": {"how": 416},
    "is unavailable for hours": {"how": 503, "times": 99},
    "is refused for hours": {"how": "refused", "times": 99},
    "needs another token from then on": {"how": 401, "times": 99},
    "is reset in the middle": {"how": "reset"},
    "is sent in circles": {"how": "loop", "times": 99},
}
QUICK = ({"new", "to_a_new_branch", "as_a_request"}, set(list(FAULTS)[:5]))
CASES = [
    pytest.param(
        kind,
        fault,
        id=f"{kind.__name__}, a request {fault}",
        marks=() if kind.__name__ in QUICK[0] and fault in QUICK[1] else pytest.mark.slow,
    )
    for kind in PUSHES
    for fault in FAULTS
]


def state(server: Hub) -> dict[str, object]:
    """All that a visitor sees, but the hashes of commits."""
    return {
        name: {
            "private": repo.private,
            "gated": repo.gated,
            "refs": {ref: repo.at(ref).files for ref in repo.refs},
            "tags": {tag: repo.at(tag).files for tag in repo.tags},
            "commits": [one.title for one in repo.commits],
            "discussions": [(one.title, one.author, one.status) for one in repo.discussions],
        }
        for name, repo in server.repos.items()
    }


def set_up(server: Hub, parent: ModelRef, made: Path, kind: Callable[[Hub, Journal], None]) -> Journal:
    """The same beginning each time."""
    server.heal()
    for store in (server.requests, server.objects):
        store.clear()
    model = server.repos["org/model"]
    model.discussions.clear()
    model.commits[:] = [one for one in model.commits if one.title != "m"]
    model.refs = {"main": model.refs["main"]}
    server.repos = {"org/model": model}
    server.writable = {"me", "org"}
    journal = Journal(parent, made)
    kind(server, journal)
    return journal


def nothing_half(server: Hub, journal: Journal, before: dict[str, Any], after: dict[str, Any], said: str) -> bool:
    """Whether each reference is as before or whole, and what this run made is private and known to it, or whole.

    A new branch without the release is there only if the error says so.
    """
    repo = state(server).get(journal.repo)
    if repo is None:
        return True
    if journal.repo not in before:
        mine = repo["private"] and journal.notes[-1].created
        return mine or repo["refs"] == after[journal.repo]["refs"]
    whole = after[journal.repo]["refs"]
    was = before[journal.repo]["refs"]
    copy = was["main"] if "stays as a copy of main" in said else None
    return all(files in (was.get(ref, copy), whole[ref]) for ref, files in repo["refs"].items())


def failure(journal: Journal) -> str | None:
    """What a failed attempt says."""
    try:
        journal.attempt()
    except HubError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("kind", "fault"), CASES)
def test_the_client_survives_every_fault_with_nothing_lost_and_nothing_half_pushed(
    server: Hub, parent: ModelRef, made: Path, waits: list[float], kind: Callable[[Hub, Journal], None], fault: str
) -> None:
    journal = set_up(server, parent, made, kind)
    before = state(server)
    journal.attempt()
    after = state(server)
    lines = [f"{one.method} {one.path}" for one in server.requests]
    failed = 0
    for nth, line in enumerate(lines):
        journal = set_up(server, parent, made, kind)
        server.fail_at(nth, lines, **FAULTS[fault])
        if (said := failure(journal)) is not None:
            failed += 1
            assert nothing_half(server, journal, before, after, said), line
            server.heal()
            journal.attempt()
        assert state(server) == after, line
    print(f"{kind.__name__}, a request {fault}: {len(lines)} requests, {failed} errors")
    assert len(lines) > 10
    assert failed > 2 or fault in ("is answered slowly", "fails once", "is put off", "is done and fails")
    assert failed == 0 or fault != "is answered slowly"
    assert waits or fault != "is put off"


# --- the run ------------------------------------------------------------------------------

ASKED = {"push_to": "me/hardened", "private": False, "create_pr": False, "branch": None, "tag": "v1"}
JUDGED: Any = SimpleNamespace(recipe={"name": "tiny"}, evidence=SimpleNamespace(word="protected"))
"""What of a report the push is told by."""


@pytest.fixture
def run(tmp_path: Path, made: Path) -> RunFolder:
    """A run that is about to push."""
    folder = RunFolder.create(tmp_path / "run", {"model": "org/model", **ASKED}, "")
    made.rename(folder.release)
    return folder


def end_with(error: BaseException, run: RunFolder, parent: ModelRef) -> None:
    with releases.accounted_for(run, "me/hardened"):
        releases.target(run, ASKED, parent)
        raise error


ENDS = {
    "wrong request": (UsageError("wrong"), False, False),
    "diverged": (DivergedError("nan"), True, False),
    "bug before anything was done": (ZeroDivisionError(), False, False),
    "bug": (ZeroDivisionError(), True, True),
    "hub": (HubError("down"), False, True),
    "disk": (ResourceError("full"), False, True),
    "Ctrl-C": (KeyboardInterrupt(), False, True),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_unused_repository_goes_with_a_run_that_is_over_and_is_named_by_one_that_can_go_on(
    server: Hub, parent: ModelRef, run: RunFolder, end: str
) -> None:
    error, begun, stays = ENDS[end]
    if begun:
        (run.state / "step-1").mkdir(parents=True)
    with pytest.raises(type(error)) as caught:
        end_with(error, run, parent)
    said = f"{caught.value}{vars(caught.value).get('staying')}"
    assert ("me/hardened" in server.repos) is stays
    assert ("stays private until the push is repeated; to delete it: hf repos delete me/hardened" in said) is stays
    assert ("me/hardened was removed again" in said) is not stays
    again = RunFolder.reopen(run.path)
    releases.target(again, ASKED, parent)
    releases.publish(again, "me/hardened", JUDGED)
    assert not server.repos["me/hardened"].private


def test_a_repository_that_cannot_be_removed_is_named(server: Hub, parent: ModelRef, run: RunFolder) -> None:
    server.fail("DELETE /api/repos/delete", 502)
    with pytest.raises(UsageError, match=r"wrong\n.*hf repos delete me/hardened \(it could not be removed: .*502"):
        end_with(UsageError("wrong"), run, parent)
    assert releases.withdraw_target(run, "me/hardened") == "the empty repository me/hardened was removed again"
    assert releases.withdraw_target(run, "me/hardened") is None


def test_a_repository_of_somebody_else_is_neither_removed_nor_spoken_of(
    server: Hub, parent: ModelRef, run: RunFolder, plain: Path
) -> None:
    server.add_model("me/hardened", plain)
    with pytest.raises(UsageError) as caught:
        end_with(UsageError("wrong"), run, parent)
    assert str(caught.value) == "wrong"
    assert "me/hardened" in server.repos


def test_the_journal_knows_tag_and_request_of_a_run(server: Hub, parent: ModelRef, run: RunFolder) -> None:
    releases.target(run, ASKED, parent)
    pushed = releases.publish(run, "me/hardened", JUDGED)
    assert server.repos["me/hardened"].tags == {"v1": pushed.commit}
    asked = {**ASKED, "push_to": "org/model", "create_pr": True, "tag": None}
    for _ in range(2):
        releases.target(RunFolder.reopen(run.path), asked, parent)
        assert releases.publish(RunFolder.reopen(run.path), "org/model", JUDGED).pr_url.endswith("/discussions/1")
    assert RunFolder.reopen(run.path).result("target org/model")["request"] == 1


def test_a_signed_commit_whose_tag_failed_is_tagged_by_the_next_try_and_not_made_again(
    server: Hub, parent: ModelRef, run: RunFolder, tmp_path: Path
) -> None:
    key, public = write_keys(tmp_path, "ours", ec.generate_private_key(ec.SECP256R1()))
    run.ask(sign=str(key))

    def attempt() -> Pushed:
        again = RunFolder.reopen(run.path)
        report = language_model()
        releases.write(again, recipe_file.load("tiny-ctrap"), report, tmp_path)
        releases.target(again, ASKED, parent)
        return releases.publish(again, "me/hardened", report)

    server.fail("POST .*/tag/", 503)
    with pytest.raises(HubError, match="status 503"):
        attempt()
    pushed, repo = attempt(), server.repos["me/hardened"]
    assert (len(repo.commits), repo.tags) == (2, {"v1": pushed.commit})  # the Hub's own first, and ours
    assert signing.check(hub.verify_remote("me/hardened", pushed.commit), public).startswith("ok (")


def test_a_run_of_before_there_were_tags_can_be_pushed(server: Hub, parent: ModelRef, run: RunFolder) -> None:
    asked = {key: value for key, value in ASKED.items() if key != "tag"}
    assert releases.target(run, asked, parent).tag is None


CHILD = """
import sys
from pathlib import Path
from types import SimpleNamespace as Judged
from hardener import hub, release
from hardener.run import RunFolder

run = RunFolder.reopen(Path(sys.argv[1]))
release.target(run, run.request, hub.resolve("org/model"))
release.publish(run, "me/hardened", Judged(recipe={"name": "tiny"}, evidence=Judged(word="protected")))
"""


@pytest.mark.parametrize("at", ["POST /api/repos/create", "POST .*/commit/", "POST .*/tag/"])
def test_a_process_that_is_killed_while_it_waits_for_an_answer_is_resumed_to_the_same_end(
    server: Hub, parent: ModelRef, run: RunFolder, at: str
) -> None:
    releases.target(run, ASKED, parent)
    releases.publish(run, "me/hardened", JUDGED)
    after = state(server)
    del server.repos["me/hardened"]
    run.forget("target me/hardened")
    server.requests.clear()
    server.fail(at, "held")
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(run.path)], env={**os.environ, **server.environment})
    while not server.asked(at) and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert server.repos["me/hardened"].private
    again = RunFolder.reopen(run.path)
    releases.target(again, again.request, parent)
    releases.publish(again, "me/hardened", JUDGED)
    assert state(server) == after


class Stopping(Narrator):
    """A person who presses Ctrl-C once the target is there."""

    def stage(self, name: str) -> None:
        if name == "Fetching the parent":
            raise KeyboardInterrupt


def test_every_end_between_creation_and_compute_names_the_repository_and_the_resumed_run_takes_it_over(
    server: Hub, letters: Path, paths: dict[str, Path], tmp_path: Path, waits: list[float]
) -> None:
    server.add_model("org/letters", letters, card={"license": "mit"})
    place = tmp_path / "run"
    how = {"recipe": "tiny-ctrap", "overrides": small.overrides(paths), "device": "cpu", "output": place}
    with pytest.raises(KeyboardInterrupt) as stopped:
        hardener.harden("org/letters", **how, push_to="me/made", narrator=Stopping(silent=True))
    assert "hf repos delete me/made" in vars(stopped.value)["staying"]
    first = server.repos["me/made"].head
    server.fail("GET /org/letters/resolve/.*safetensors", 502, skip=1, times=99)  # the first reads a header
    with pytest.raises(HubError, match=r"stays private until .* hf repos delete me/made"):
        hardener.harden(resume=place)
    assert (server.repos["me/made"].head, server.repos["me/made"].private) == (first, True)
    assert RunFolder.reopen(place).result("target me/made")["first"] == first.oid


def test_a_release_is_read_back_through_redirects(server: Hub, journal: Journal, made: Path) -> None:
    pushed = journal.attempt()
    server.redirects = True
    assert contents(hub.verify_remote("me/hardened", pushed.commit)) == contents(made)
    assert server.asked("GET /cdn/")
