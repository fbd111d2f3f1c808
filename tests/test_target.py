"""Where a release goes: every fault before the compute, alike in a dry run, which changes nothing."""

# ruff: noqa: F811 - fixtures that are imported are the arguments of tests
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import hub_server
import pytest
from hub_server import Hub
from huggingface_hub import constants
from test_hub import parent, plain, server  # noqa: F401

from hardener.errors import HardenerError, HubError, UsageError
from hardener.metadata import ModelRef
from hardener.target import Destination, Target, destination, prepare, withdraw

pytestmark = hub_server.PLAIN_HTTP


# --- prepare ------------------------------------------------------------------------------


def test_a_new_target_is_private_and_gated_like_the_parent_until_the_push(server: Hub, parent: ModelRef) -> None:
    target = prepare("me/hardened", replace(parent, gated="manual"))
    repo = server.repos["me/hardened"]
    assert (repo.private, repo.gated) == (True, "manual")
    assert (target.created, target.private, target.head) == (True, False, repo.head.oid)


def test_a_target_without_namespace_belongs_to_the_user(parent: ModelRef) -> None:
    assert prepare("hardened", parent).repo == "me/hardened"


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
        prepare(**{"repo": "me/hardened", "parent": parent, **arguments})
    assert set(server.repos) == {"org/model"}


def test_the_parent_can_take_a_request_or_a_branch(server: Hub, parent: ModelRef) -> None:
    assert prepare("org/model", parent, create_pr=True).head == parent.commit
    assert prepare("org/model", parent, branch="hardened").head is None


def test_a_read_only_token_is_refused_before_anything_is_created(server: Hub, parent: ModelRef) -> None:
    server.role = "read"
    with pytest.raises(HubError, match="'laptop' can only read"):
        prepare("me/hardened", parent)
    assert server.writes() == []


def test_no_token_says_how_to_log_in(server: Hub, parent: ModelRef, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        prepare("me/hardened", parent)


def test_an_existing_target_without_write_access_is_refused(server: Hub, plain: Path, parent: ModelRef) -> None:
    server.add_model("other/hardened", plain)
    with pytest.raises(HubError, match="lacks the right"):
        prepare("other/hardened", parent)
    assert prepare("other/hardened", parent, create_pr=True).create_pr
    assert server.writes() == []


def test_a_public_push_needs_a_licence(server: Hub, plain: Path, parent: ModelRef) -> None:
    unlicensed = replace(parent, card={})
    with pytest.raises(UsageError, match=r"set card\.license"):
        prepare("me/hardened", unlicensed)
    assert "me/hardened" not in server.repos
    assert prepare("me/hardened", unlicensed, private=True).private
    server.add_model("me/public", plain)
    with pytest.raises(UsageError, match=r"set card\.license"):
        prepare("me/public", unlicensed)


def test_gated_weights_do_not_go_to_an_open_repository(server: Hub, plain: Path, parent: ModelRef) -> None:
    server.add_model("me/open", plain)
    with pytest.raises(UsageError, match="gate it in its settings"):
        prepare("me/open", replace(parent, gated="auto"))
    with pytest.raises(UsageError, match="public; leave out --private"):
        prepare("me/open", parent, private=True)


def test_a_target_that_cannot_be_gated_stays_private_and_is_gated_by_the_next_try(
    server: Hub, parent: ModelRef
) -> None:
    noted: list[Target] = []
    server.fail("PUT .*/settings", 400)
    with pytest.raises(HubError, match="status 400"):
        prepare("me/hardened", replace(parent, gated="manual"), note=noted.append)
    assert (server.repos["me/hardened"].private, noted[-1].created) == (True, True)
    prepare("me/hardened", replace(parent, gated="manual"), known=noted[-1])
    assert server.repos["me/hardened"].gated == "manual"


def test_withdraw_removes_only_what_this_run_made_and_nobody_used(server: Hub, parent: ModelRef) -> None:
    target = prepare("me/hardened", parent)
    again = prepare("me/hardened", parent)
    assert withdraw(again) is False
    assert withdraw(target) is True
    assert withdraw(target) is True  # it is gone
    assert "me/hardened" not in server.repos
    used = prepare("me/used", parent)
    server.repos["me/used"].add("main", "somebody", {})
    assert withdraw(used) is False
    assert "me/used" in server.repos


# --- a look ------------------------------------------------------------------------------


def state(server: Hub) -> object:
    """Everything that a push could change."""
    return {
        name: (repo.private, repo.gated, dict(repo.refs), dict(repo.tags), len(repo.commits))
        for name, repo in server.repos.items()
    }


def existing(server: Hub, folder: Path) -> None:
    server.add_model("me/open", folder)
    server.add_model("me/closed", folder, private=True)
    server.add_model("me/gated", folder, gated="manual")
    server.add_model("other/model", folder)
    server.repos["me/open"].tags["v1"] = server.repos["me/open"].head.oid


WORKS: dict[str, tuple[dict[str, object], tuple[object, ...]]] = {
    "a new one": ({"repo": "me/new"}, ("me/new", False, False, False, True, "unknown until it exists")),
    "a new one by its short name": ({"repo": "new"}, ("me/new", False, False, False, True, "unknown until it exists")),
    "a new private one": (
        {"repo": "me/new", "private": True},
        ("me/new", False, True, False, True, "unknown until it exists"),
    ),
    "an open one": ({"repo": "me/open"}, ("me/open", True, False, False, True, "lfs")),
    "a private one": ({"repo": "me/closed"}, ("me/closed", True, True, False, True, "lfs")),
    "a gated one": ({"repo": "me/gated"}, ("me/gated", True, False, "manual", True, "lfs")),
    "a branch": ({"repo": "org/model", "branch": "v2"}, ("org/model", True, False, False, True, "lfs")),
    "somebody's, by request": (
        {"repo": "other/model", "create_pr": True},
        ("other/model", True, False, False, True, "lfs"),
    ),
}


@pytest.mark.parametrize("case", WORKS)
def test_a_target_that_works_is_told_and_nothing_is_changed(
    server: Hub, plain: Path, parent: ModelRef, case: str
) -> None:
    existing(server, plain)
    before = state(server)
    asked, told = WORKS[case]
    found = destination(parent=parent, **asked)
    assert (found.repo, found.exists, found.private, found.gated, found.writable, found.transfer) == told
    assert found.note is None
    assert (server.writes(), state(server)) == ([], before)
    target = prepare(parent=parent, **asked)
    assert (target.repo, target.created, target.private) == (found.repo, not found.exists, found.private)


FAILS: dict[str, dict[str, object]] = {
    "illegal name": {"repo": "a/b/c"},
    "the parent": {"repo": "org/model"},
    "request to nothing": {"repo": "me/new", "create_pr": True},
    "branch of nothing": {"repo": "me/new", "branch": "v2"},
    "request and branch": {"repo": "me/open", "create_pr": True, "branch": "v2"},
    "foreign namespace": {"repo": "other/new"},
    "foreign repository": {"repo": "other/model"},
    "public, but private was asked for": {"repo": "me/open", "private": True},
    "a taken tag": {"repo": "me/open", "tag": "v1"},
    "a tag of a request": {"repo": "me/open", "tag": "v2", "create_pr": True},
}
PARENTS: dict[str, dict[str, object]] = {"gated, to an open one": {"gated": "auto"}, "no licence": {"card": {}}}


@pytest.mark.parametrize("case", [*FAILS, *PARENTS, "read-only token", "wrong token"])
def test_a_target_that_cannot_work_fails_as_the_real_run_does(
    server: Hub, plain: Path, parent: ModelRef, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    existing(server, plain)
    asked = {"parent": replace(parent, **PARENTS.get(case, {})), **FAILS.get(case, {"repo": "me/open"})}
    if case == "read-only token":
        server.role = "read"
    if case == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    before = state(server)
    with pytest.raises(HardenerError) as dry:
        destination(**asked)
    assert (server.writes(), state(server)) == ([], before)
    with pytest.raises(HardenerError) as real:
        prepare(**asked)
    assert (type(dry.value), dry.value.exit_code) == (type(real.value), real.value.exit_code)
    said = re.sub(r" \(the Hub says: .*\)$", "", str(real.value))  # who may create is known without asking to
    assert str(dry.value).startswith(said)


def test_what_is_made_for_a_private_parent_stays_private_and_how_to_open_it_is_told(
    server: Hub, parent: ModelRef, caplog: pytest.LogCaptureFixture
) -> None:
    closed = replace(parent, private=True, card={})  # nor does it need a licence
    found = destination("me/new", closed)
    said = "it stays private as org/model is; to open it after the push: hf repos settings me/new --public"
    assert (found.private, found.note) == (True, said)
    assert destination("me/new", closed, private=True).note is None
    target = prepare("me/new", closed)
    assert (target.private, caplog.messages) == (True, [said])
    assert prepare("me/new", closed, known=target).private
    assert caplog.messages == [said]


def test_a_private_parent_does_not_go_to_a_public_repository(server: Hub, plain: Path, parent: ModelRef) -> None:
    existing(server, plain)
    closed = replace(parent, private=True)
    for look in (prepare, destination):
        with pytest.raises(UsageError, match="org/model is private and me/open is public; push elsewhere"):
            look("me/open", closed)
        assert look("me/closed", closed).private


def test_what_has_no_licence_may_go_to_a_repository_that_is_private(server: Hub, plain: Path, parent: ModelRef) -> None:
    existing(server, plain)
    assert destination("me/closed", replace(parent, card={})).private


def served_as(monkeypatch: pytest.MonkeyPatch, user: dict[str, object]) -> None:
    """Let the server say this of the token."""
    route = ("GET", re.compile("/api/whoami-v2$"), lambda call: hub_server.answer({"type": "user", **user}))
    monkeypatch.setattr(hub_server, "ROUTES", [route, *hub_server.ROUTES])


ORGS = [{"name": "lab", "roleInOrg": "contributor"}, {"name": "club", "roleInOrg": "read"}]
SCOPED = [{"entity": {"type": "org", "name": "lab"}, "permissions": ["repo.content.read", "repo.write"]}]
NARROW = {"accessToken": {"role": "fineGrained", "fineGrained": {"global": [], "scoped": SCOPED}}}
WIDE = {"accessToken": {"role": "write"}}


@pytest.mark.parametrize(
    ("auth", "space", "may"),
    [(WIDE, "me", 1), (WIDE, "lab", 1), (WIDE, "club", 0), (NARROW, "lab", 1), (NARROW, "me", 0), (NARROW, "club", 0)],
)
def test_who_may_create_a_repository_is_read_from_the_token(
    parent: ModelRef, monkeypatch: pytest.MonkeyPatch, auth: dict[str, object], space: str, may: int
) -> None:
    served_as(monkeypatch, {"name": "me", "orgs": ORGS, "auth": auth})
    if may:
        assert destination(f"{space}/new", parent).exists is False
    else:
        with pytest.raises(HubError, match="lacks the right to do this"):
            destination(f"{space}/new", parent)


@pytest.mark.parametrize(
    ("store", "switch", "told"), [(True, False, "xet"), (False, False, "lfs"), (True, True, "lfs")]
)
def test_the_transfer_is_the_one_that_a_push_would_take(
    server: Hub,
    plain: Path,
    parent: ModelRef,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    store: bool,
    switch: bool,
    told: str,
) -> None:
    pytest.importorskip("hf_xet")
    existing(server, plain)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", switch)
    server.xet_store = tmp_path / "xet" if store else None
    assert destination("me/open", parent).transfer == told
    assert server.writes() == []


def test_offline_or_without_a_token_the_plan_says_that_nobody_was_asked(
    server: Hub, parent: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    for switch, note in ((False, "no token is set"), (True, "HF_HUB_OFFLINE is set")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", switch)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        server.requests.clear()
        found = destination("me/new", parent)
        assert found == Destination("me/new", note=f"the Hub was not asked for it: {note}")
        with pytest.raises(UsageError, match=r"card\.license"):
            destination("me/new", replace(parent, card={}))
        assert server.requests == []
