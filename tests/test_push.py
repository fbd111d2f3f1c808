"""Pushing, the real client and a real HTTP server: one commit or nothing, whatever goes wrong on the way."""

# ruff: noqa: F811 - fixtures that are imported are the arguments of tests
from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import PLAIN_HTTP, Hub
from huggingface_hub import constants
from test_hub import WEIGHTS, contents, made, parent, plain, release, server, sharded  # noqa: F401

from hardener import push
from hardener.errors import HubError, UsageError
from hardener.metadata import ModelRef
from hardener.push import Pushed, Target

pytestmark = PLAIN_HTTP


def remote(server: Hub, repo: str) -> dict[str, bytes]:
    return {path: data for path, data in server.repos[repo].files.items() if path != ".gitattributes"}


# --- prepare ------------------------------------------------------------------------------


def test_a_new_target_is_private_and_gated_like_the_parent_until_the_push(server: Hub, parent: ModelRef) -> None:
    target = push.prepare("me/hardened", replace(parent, gated="manual"))
    repo = server.repos["me/hardened"]
    assert (repo.private, repo.gated) == (True, "manual")
    assert (target.created, target.private, target.head) == (True, False, repo.head.oid)


def test_a_target_without_namespace_belongs_to_the_user(parent: ModelRef) -> None:
    assert push.prepare("hardened", parent).repo == "me/hardened"


PREPARATIONS = {
    "illegal name": ({"repo": "a/b/c"}, UsageError, "not a Hub repository id"),
    "the parent": ({"repo": "org/Model"}, UsageError, "is the parent itself"),
    "request to nothing": ({"create_pr": True}, UsageError, "leave out --create-pr"),
    "branch of nothing": ({"branch": "v2"}, UsageError, "leave out --create-pr or --branch"),
    "tagged request": ({"create_pr": True, "tag": "v1"}, UsageError, "leave out --tag"),
    "request and branch": ({"create_pr": True, "branch": "v2"}, UsageError, "leave out"),
    "foreign namespace": ({"repo": "other/hardened"}, HubError, "HF_TOKEN lacks the right"),
}


@pytest.mark.parametrize("case", PREPARATIONS)
def test_a_push_that_cannot_work_is_refused_before_the_compute(server: Hub, parent: ModelRef, case: str) -> None:
    arguments, error, said = PREPARATIONS[case]
    with pytest.raises(error, match=said):
        push.prepare(**{"repo": "me/hardened", "parent": parent, **arguments})
    assert set(server.repos) == {"org/model"}


def test_the_parent_can_take_a_request_or_a_branch(server: Hub, parent: ModelRef) -> None:
    assert push.prepare("org/model", parent, create_pr=True).head == parent.commit
    assert push.prepare("org/model", parent, branch="hardened").head is None


def test_a_read_only_token_is_refused_before_anything_is_created(server: Hub, parent: ModelRef) -> None:
    server.role = "read"
    with pytest.raises(HubError, match="'laptop' can only read"):
        push.prepare("me/hardened", parent)
    assert server.writes() == []


def test_no_token_says_how_to_log_in(server: Hub, parent: ModelRef, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        push.prepare("me/hardened", parent)


def test_an_existing_target_without_write_access_is_refused(server: Hub, plain: Path, parent: ModelRef) -> None:
    server.add_model("other/hardened", plain)
    with pytest.raises(HubError, match="lacks the right"):
        push.prepare("other/hardened", parent)
    assert push.prepare("other/hardened", parent, create_pr=True).create_pr
    assert server.writes() == []


def test_a_public_push_needs_a_licence(server: Hub, plain: Path, parent: ModelRef) -> None:
    unlicensed = replace(parent, card={})
    with pytest.raises(UsageError, match=r"set card\.license"):
        push.prepare("me/hardened", unlicensed)
    assert "me/hardened" not in server.repos
    assert push.prepare("me/hardened", unlicensed, private=True).private
    server.add_model("me/public", plain)
    with pytest.raises(UsageError, match=r"set card\.license"):
        push.prepare("me/public", unlicensed)


def test_gated_weights_do_not_go_to_an_open_repository(server: Hub, plain: Path, parent: ModelRef) -> None:
    server.add_model("me/open", plain)
    with pytest.raises(UsageError, match="gate it in its settings"):
        push.prepare("me/open", replace(parent, gated="auto"))
    with pytest.raises(UsageError, match="public; leave out --private"):
        push.prepare("me/open", parent, private=True)


def test_a_target_that_cannot_be_gated_stays_private_and_is_gated_by_the_next_try(
    server: Hub, parent: ModelRef
) -> None:
    noted: list[Target] = []
    server.fail("PUT .*/settings", 400)
    with pytest.raises(HubError, match="status 400"):
        push.prepare("me/hardened", replace(parent, gated="manual"), note=noted.append)
    assert (server.repos["me/hardened"].private, noted[-1].created) == (True, True)
    push.prepare("me/hardened", replace(parent, gated="manual"), known=noted[-1])
    assert server.repos["me/hardened"].gated == "manual"


def test_withdraw_removes_only_what_this_run_made_and_nobody_used(server: Hub, parent: ModelRef) -> None:
    target = push.prepare("me/hardened", parent)
    again = push.prepare("me/hardened", parent)
    assert push.withdraw(again) is False
    assert push.withdraw(target) is True
    assert push.withdraw(target) is True  # it is gone
    assert "me/hardened" not in server.repos
    used = push.prepare("me/used", parent)
    server.repos["me/used"].add("main", "somebody", {})
    assert push.withdraw(used) is False
    assert "me/used" in server.repos


# --- push ------------------------------------------------------------------------------


def test_a_release_goes_up_in_one_commit_and_becomes_public(server: Hub, parent: ModelRef, made: Path) -> None:
    target = push.prepare("me/hardened", replace(parent, gated="manual"), tag="v1")
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
    push.push(made, push.prepare("me/hardened", parent, private=True), message="m")
    assert server.repos["me/hardened"].private


def test_an_older_release_leaves_nothing_behind(server: Hub, parent: ModelRef, sharded: Path, made: Path) -> None:
    server.add_model("me/hardened", sharded)
    push.push(made, push.prepare("me/hardened", parent), message="m")
    assert remote(server, "me/hardened") == contents(made)
    assert ".gitattributes" in server.repos["me/hardened"].files


def test_pushing_the_same_release_twice_changes_nothing(server: Hub, parent: ModelRef, made: Path) -> None:
    push.push(made, push.prepare("me/hardened", parent), message="m")
    pushed = push.push(made, push.prepare("me/hardened", parent), message="m")
    assert remote(server, "me/hardened") == contents(made)
    assert pushed.commit == server.repos["me/hardened"].head.oid


def test_a_pull_request_leaves_main_alone(server: Hub, parent: ModelRef, made: Path) -> None:
    server.writable.remove("org")
    before = server.repos["org/model"].head.oid
    pushed = push.push(made, push.prepare("org/model", parent, create_pr=True), message="m")
    repo = server.repos["org/model"]
    assert repo.head.oid == before
    assert repo.refs["refs/pr/1"] == pushed.commit
    assert pushed.pr_url == f"{server.url}/org/model/discussions/1"


def test_a_server_without_pull_requests_is_told_apart(server: Hub, parent: ModelRef, made: Path) -> None:
    server.pull_requests = False
    with pytest.raises(HubError, match="push to a branch"):
        push.push(made, push.prepare("org/model", parent, create_pr=True), message="m")


def test_a_branch_is_made_filled_and_leaves_main_alone(server: Hub, parent: ModelRef, made: Path) -> None:
    for title in ("first", "second"):
        pushed = push.push(made, push.prepare("org/model", parent, branch="hardened"), message=title)
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
    target = push.prepare("me/hardened", parent, branch=branch)
    server.fail("POST .*/commit/", status)
    with pytest.raises(HubError):
        push.push(made, target, message="m")
    assert server.repos["me/hardened"].refs == before


@pytest.mark.parametrize("status", [504, None])
def test_a_commit_whose_answer_is_lost_is_found_and_checked(
    server: Hub, parent: ModelRef, made: Path, status: int | None
) -> None:
    target = push.prepare("me/hardened", parent)
    server.fail("POST .*/commit/", status, after=True)
    pushed = push.push(made, target, message="m")
    assert pushed.commit == server.repos["me/hardened"].head.oid
    assert remote(server, "me/hardened") == contents(made)
    assert not server.repos["me/hardened"].private


def test_a_new_target_whose_commit_fails_is_empty_private_and_can_be_withdrawn(
    server: Hub, parent: ModelRef, made: Path
) -> None:
    target = push.prepare("me/hardened", parent)
    server.fail("POST .*/commit/", 502)
    with pytest.raises(HubError, match="status 502"):
        push.push(made, target, message="m")
    assert server.repos["me/hardened"].private
    assert remote(server, "me/hardened") == {}
    assert push.withdraw(target)


def test_a_target_that_moved_meanwhile_is_not_overwritten(server: Hub, parent: ModelRef, made: Path) -> None:
    target = push.prepare("me/hardened", parent)
    theirs = server.repos["me/hardened"].add("main", "somebody", dict(server.repos["me/hardened"].files))
    with pytest.raises(HubError, match="changed in the meantime"):
        push.push(made, target, message="m")
    assert server.repos["me/hardened"].head is theirs


def test_a_card_with_wrong_metadata_is_refused_before_any_weight_is_sent(
    server: Hub, parent: ModelRef, tmp_path: Path
) -> None:
    folder = release(tmp_path / "bad", **{"README.md": "---\nlicense: My Own\n---\n"})
    target = push.prepare("me/hardened", parent)
    with pytest.raises(HubError, match='"license" must be one of'):
        push.push(folder, target, message="m")
    assert server.objects == {}


@pytest.mark.parametrize("path", [WEIGHTS, "hardener/report.json"])
def test_what_arrived_damaged_stays_private(server: Hub, parent: ModelRef, made: Path, path: str) -> None:
    server.corrupt.add(path)
    with pytest.raises(HubError, match=f"not what was sent: {path}; it stays private"):
        push.push(made, push.prepare("me/hardened", parent), message="m")
    assert server.repos["me/hardened"].private


def test_a_folder_and_its_sums_must_agree(parent: ModelRef, made: Path) -> None:
    target = push.prepare("me/hardened", parent)
    (made / "note.txt").write_text("forgotten")
    with pytest.raises(UsageError, match=r"differ in note\.txt"):
        push.push(made, target, message="m")
    (made / "SHA256SUMS").unlink()
    with pytest.raises(UsageError, match="not a release"):
        push.push(made, target, message="m")


def test_a_taken_tag_is_refused_before_the_commit(server: Hub, parent: ModelRef, made: Path) -> None:
    target = push.prepare("me/hardened", parent, tag="v1")
    server.repos["me/hardened"].tags["v1"] = server.repos["me/hardened"].head.oid
    with pytest.raises(UsageError, match="tag v1 already"):
        push.prepare("me/hardened", parent, tag="v1")
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
    push.push(made, push.prepare("me/hardened", parent), message="m")
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
    push.push(made, push.prepare("me/hardened", parent), message="m")
    assert sum(path.stat().st_size for path in server.xet_store.rglob("*") if path.is_file()) > len(weights) / 2
    assert remote(server, "me/hardened") == contents(made)
    assert server.asked("/lfs/") == []
