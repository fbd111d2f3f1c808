"""A small Hub on the loopback address, for the real huggingface_hub client.

It speaks the routes that the client 2.4 uses for models: reading (info, tree, resolve with ranges, refs),
creating, uploading (preupload, LFS, one commit as newline-delimited JSON), pull requests, branches, tags,
settings. Every request can be made to fail: forbidden, put off, dropped, cut short, slow, held (see Fault), or not
even taken, as nobody listens (see Hub.refuse).
With hf_xet switched on, the client meets a 404 on its token route unless `xet_store` is set.

    with hub_server(tmp_path) as hub:
        hub.add_model("org/model", folder, gated="manual", card={"license": "mit"})
        hub.connect(monkeypatch)         # or, for a child process, env={**os.environ, **hub.environment}

A run against it is not a run against the real Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".png", ".model")
PLAIN_HTTP = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""For tests that upload without Xet: the client's own call of httpx2 is deprecated there."""
CREATED = "2026-01-01T00:00:00.000Z"
NO_REPO = (404, "RepoNotFound", "Repository not found")


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Discussion:
    """A pull request, or a mere discussion, which has no reference."""

    title: str
    author: str
    status: str = "open"
    """open, draft, closed, merged"""
    is_pull_request: bool = True


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: str | bool = False
    granted: bool = False
    """Whether the user of the token was let in to a gated repository."""
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    """Branch, or refs/pr/N, → commit."""
    tags: dict[str, str] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)
    """Number 1 is the first."""

    def at(self, revision: str) -> Commit | None:
        oid = self.refs.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.oid == oid), None)

    @property
    def head(self) -> Commit:
        return self.commits[[commit.oid for commit in self.commits].index(self.refs["main"])]

    @property
    def files(self) -> dict[str, bytes]:
        return self.head.files

    def add(self, ref: str, title: str, files: dict[str, bytes]) -> Commit:
        parts = [self.id, str(len(self.commits)), title, *(path + sha256(files[path]) for path in sorted(files))]
        oid = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits.append(Commit(oid, title, files))
        self.refs[ref] = oid
        return self.commits[-1]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    user_agent: str
    sent: int
    """Bytes of the answer's body."""


How = int | Literal["cut", "slow", "held", "reset", "loop", "altered", "refused"] | None
PUT_OFF = {"Retry-After": "0", "RateLimit": '"api";r=0;t=0', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
"""What the Hub says beside status 429."""


@dataclass
class Fault:
    """What happens to requests whose "METHOD /path" matches."""

    pattern: str
    how: How
    """A status; None: the connection is dropped; cut: half of the answer's body comes; slow: it comes in drops;
    held: no answer, until the server ends; reset: half of the body comes and then the connection is reset; loop: a
    redirect to the same address; altered: as many bytes, but others. Refused is what Hub.refuse does."""
    skip: int
    times: int
    after: bool
    """True: the server does the work and only then fails. An answer that is cut, slow or held has its work done."""


class Refusal(Exception):
    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Hub:
    """The state of the server, to be looked at and set by tests."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.url = ""
        self.user = "me"
        self.token = "hf_" + "canary" * 6
        self.role = "write"
        self.writable = {"me", "org"}
        self.pull_requests = True
        self.redirects = False
        """Send readers of LFS files to another host, as the real Hub does."""
        self.xet_store: Path | None = None
        """Folder in which hf_xet stores what it uploads; this server cannot read it. None: no Xet."""
        self.announces_xet = False
        """Tell readers to use Xet, which then is not there."""
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.corrupt: set[str] = set()
        """Paths of which the server loses a byte on arrival."""
        self.ended = threading.Event()
        self.listener: socket.socket
        """Where connections come in; the server sets it."""
        self.refusing = False
        self._until: int | None = None
        """Requests that are answered before connections are refused."""
        self._patient = True

    @property
    def elsewhere(self) -> str:
        """The same server by another name."""
        return self.url.replace("127.0.0.1", "localhost")

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to talk to this Hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def connect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same for this process, where the client has read its environment long ago."""
        from huggingface_hub import constants

        for key, value in self.environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(self.home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(self.home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def add_model(
        self,
        repo: str,
        folder: Path,
        *,
        gated: str | bool = False,
        private: bool = False,
        card: dict[str, Any] | None = None,
    ) -> Repo:
        """Store all files of a folder as the second commit of a repository; `card` becomes README.md."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        if card is not None:
            files["README.md"] = f"---\n{yaml.safe_dump(card)}---\n\n# {repo}\n".encode()
        model = self.create(repo, private=private)
        model.gated = gated
        model.add("main", "upload", {**model.files, **files})
        return model

    def create(self, repo: str, *, private: bool = False) -> Repo:
        model = self.repos[repo] = Repo(repo, private)
        model.add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return model

    def fail(self, pattern: str, how: How, *, skip: int = 0, times: int = 1, after: bool = False) -> None:
        """Let the next `times` matching requests fail, after `skip` good ones. See Fault."""
        self.faults.append(
            Fault(pattern, how, skip, times, after or how in ("cut", "slow", "held", "reset", "altered"))
        )

    def fail_at(self, nth: int, lines: Sequence[str], how: How, *, times: int = 1, after: bool = False) -> None:
        """Let the nth of these requests fail, of which an undisturbed client makes one after the other."""
        if how == "refused":
            self.refuse(nth, for_hours=times > 1)
        else:
            self.fail(f"^{lines[nth]}$", how, skip=lines[:nth].count(lines[nth]), times=times, after=after)

    def refuse(self, after: int, *, for_hours: bool) -> None:
        """Once so many requests are answered, nobody listens: until `heal`, or the first time that the client waits."""
        self._until, self._patient = after, not for_hours
        self.answering()

    def answering(self) -> None:
        """An answer is about to go out, or none is awaited: stop listening if it is time."""
        if self._until is not None and len(self.requests) >= self._until and not self.refusing:
            self.refusing = True
            self.listener.shutdown(socket.SHUT_RDWR)  # at once; closed, it would listen as long as a thread polls it

    def waited(self, seconds: float) -> None:
        """The client would have waited so long."""
        if self._patient:
            self._listen()

    def heal(self) -> None:
        """Nothing fails any more."""
        self.faults.clear()
        self._listen()

    def _listen(self) -> None:
        self._until = None
        if self.refusing:
            with suppress(OSError):  # a port that the system chose went with the listening; one that was named stays
                self.listener.bind(("127.0.0.1", urlsplit(self.url).port))
            self.listener.listen(5)
            self.refusing = False

    def asked(self, pattern: str) -> list[Request]:
        """All requests so far whose "METHOD /path" matches."""
        return [one for one in self.requests if re.search(pattern, f"{one.method} {one.path}")]

    def writes(self) -> list[Request]:
        """All requests that could have changed something."""
        return self.asked(r"^(PUT|DELETE|POST) (?!.*(preupload|validate-yaml))")


@dataclass
class Answer:
    """What goes back."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def answer(value: Any, status: int = 200) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


@dataclass
class Call:
    """One request with what the routes need of it."""

    hub: Hub
    method: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    known: bool
    """The request carries the token."""

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not (self.known and name.split("/")[0] in self.hub.writable)):
            raise Refusal(*NO_REPO) if self.known else Refusal(401, "RepoNotFound", NO_REPO[2])
        return repo

    def commit(self, name: str, revision: str) -> Commit:
        commit = self.repo(name).at(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def may_write(self, name: str, ref: str = "main") -> None:
        """Everyone who has a token may write to a pull request of theirs."""
        if not self.known:
            raise Refusal(401, None, "Invalid username or password.")
        mine = ref.startswith("refs/pr/") and self.request(name, ref).author == self.hub.user
        if self.hub.role == "read" or not (mine or name.split("/")[0] in self.hub.writable):
            raise Refusal(403, None, "You don't have the rights to write here")

    def request(self, name: str, ref: str) -> Discussion:
        number = int(ref.removeprefix("refs/pr/"))
        if not 0 < number <= len(self.repo(name).discussions):
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {ref}")
        return self.repo(name).discussions[number - 1]


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []
ID = r"(?P<name>[\w.-]+/[\w.-]+)"


def route(method: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, re.compile(pattern + "$"), function))
        return function

    return register


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def known_as(path: str, data: bytes) -> str:
    """By what hash the Hub knows a file."""
    return sha256(data) if is_lfs(path) else git_blob(data)


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def front_matter(text: str) -> Any:
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


# --- reading ---------------------------------------------------------------------------------------------


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Answer:
    if not call.known:
        raise Refusal(401, None, "Invalid credentials in Authorization header")
    token = {"displayName": "laptop", "role": call.hub.role}
    return answer({"type": "user", "name": call.hub.user, "orgs": [], "auth": {"accessToken": token}})


@route("GET", f"/api/models/{ID}(/revision/(?P<revision>[^/]+))?")
def model_info(call: Call, name: str, revision: str | None) -> Answer:
    repo, commit = call.repo(name), call.commit(name, unquote(revision or "main"))
    readme = commit.files.get("README.md", b"").decode()
    return answer(
        {
            **{"_id": "0", "id": repo.id, "modelId": repo.id, "sha": commit.oid},
            **{"private": repo.private, "gated": repo.gated, "disabled": False, "tags": []},
            "siblings": [{"rfilename": path} for path in commit.files],
            "cardData": front_matter(readme),
        }
    )


@route("GET", f"/api/models/{ID}/tree/(?P<revision>[^/]+)")
def tree(call: Call, name: str, revision: str) -> Answer:
    entries = []
    for path, data in call.commit(name, unquote(revision)).files.items():
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_blob(data)}
        if is_lfs(path):
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
        entries.append(entry)
    return answer(entries)


@route("GET", f"/api/models/{ID}/refs")
def refs(call: Call, name: str) -> Answer:
    repo = call.repo(name)
    branches = [
        {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid}
        for ref, oid in repo.refs.items()
        if not ref.startswith("refs/")
    ]
    tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": oid} for t, oid in repo.tags.items()]
    return answer({"branches": branches, "converts": [], "tags": tags})


@route("(GET|HEAD)", f"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(call: Call, name: str, revision: str, path: str) -> Answer:
    repo, commit = call.repo(name), call.commit(name, unquote(revision))
    if repo.gated and not repo.granted:
        raise Refusal(403 if call.known else 401, "GatedRepo", f"Access to model {name} is restricted")
    data = commit.files.get(unquote(path))
    if data is None:
        raise Refusal(404, "EntryNotFound", "Entry not found")
    etag = known_as(path, data)
    headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    if call.hub.announces_xet and is_lfs(path):
        headers["X-Xet-Hash"] = sha256(data)
        headers["X-Xet-Refresh-Route"] = f"{call.hub.url}/api/models/{name}/xet-read-token/{commit.oid}"
    if call.hub.redirects and is_lfs(path):
        call.hub.objects[etag] = data
        linked = {"X-Linked-ETag": headers.pop("ETag"), "X-Linked-Size": str(len(data))}
        return Answer(b"", 302, {**headers, **linked, "Location": f"{call.hub.elsewhere}/cdn/{etag}"})
    return ranged(call, data, headers)


@route("(GET|HEAD)", "/cdn/(?P<oid>[0-9a-f]{64})")
def cdn(call: Call, oid: str) -> Answer:
    """A store on another host, which must not see the token."""
    if call.known:
        raise Refusal(400, None, "Only one auth mechanism allowed")
    return ranged(call, call.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def ranged(call: Call, data: bytes, headers: dict[str, str]) -> Answer:
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
    if asked is None:
        return Answer(data, 200, headers)
    first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return Answer(data[first : last + 1], 206, headers)


# --- creating --------------------------------------------------------------------------------------------


@route("POST", "/api/repos/create")
def create(call: Call) -> Answer:
    name = f"{call.json.get('organization') or call.hub.user}/{call.json['name']}"
    call.may_write(name)
    if name in call.hub.repos:
        raise Refusal(409, None, "You already created this model repo")
    call.hub.create(name, private=call.json.get("visibility") == "private")
    return answer({"url": f"{call.hub.url}/{name}"})


@route("DELETE", "/api/repos/delete")
def delete(call: Call) -> Answer:
    name = f"{call.json.get('organization') or call.hub.user}/{call.json['name']}"
    call.may_write(name)
    del call.hub.repos[call.repo(name).id]
    return Answer()


@route("PUT", f"/api/models/{ID}/settings")
def settings(call: Call, name: str) -> Answer:
    call.may_write(name)
    repo = call.repo(name)
    if "gated" in call.json:
        repo.gated = call.json["gated"]
    if "visibility" in call.json:
        repo.private = call.json["visibility"] == "private"
    return answer({})


@route("(POST|DELETE)", f"/api/models/{ID}/branch/(?P<branch>[^/]+)")
def branch(call: Call, name: str, branch: str) -> Answer:
    call.may_write(name)
    if call.method == "DELETE":
        del call.repo(name).refs[unquote(branch)]
    else:
        if unquote(branch) in call.repo(name).refs:
            raise Refusal(409, None, "Branch reference exists already")
        start = call.json.get("startingPoint", "main")
        call.repo(name).refs[unquote(branch)] = call.commit(name, start).oid
    return answer({})


@route("POST", f"/api/models/{ID}/tag/(?P<revision>[^/]+)")
def tag(call: Call, name: str, revision: str) -> Answer:
    call.may_write(name)
    if call.json["tag"] in call.repo(name).tags:
        raise Refusal(409, None, "Tag reference exists already")
    call.repo(name).tags[call.json["tag"]] = call.commit(name, unquote(revision)).oid
    return answer({})


@route("GET", f"/api/models/{ID}/discussions")
def discussions(call: Call, name: str) -> Answer:
    """Pages of two, so that a client which reads one page only is found out."""
    if not call.hub.pull_requests:
        raise Refusal(404, None, "Not found")
    wanted = {key: values[0] for key, values in call.query.items()}
    found = [
        {"num": number, "title": one.title, "status": one.status, "isPullRequest": one.is_pull_request}
        | {"author": {"name": one.author}, "repo": {"name": name, "type": "model"}, "createdAt": CREATED}
        for number, one in reversed(list(enumerate(call.repo(name).discussions, 1)))
        if one.author == wanted.get("author", one.author)
        if one.is_pull_request or wanted.get("type") != "pull_request"
    ]
    start = 2 * int(wanted.get("p", 0))
    return answer({"count": len(found), "start": start, "discussions": found[start : start + 2]})


# --- uploading -------------------------------------------------------------------------------------------


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    metadata = front_matter(call.json["content"]) or {}
    errors = []
    if not re.fullmatch(r"[a-z0-9.-]+", str(metadata.get("license", "mit"))):
        errors.append({"message": f'"license" must be one of the known licenses, not {metadata["license"]!r}'})
    return answer({"errors": errors, "warnings": []}, 400 if errors else 200)


@route("POST", f"/api/models/{ID}/preupload/(?P<revision>[^/]+)")
def preupload(call: Call, name: str, revision: str) -> Answer:
    if "create_pr" not in call.query:
        call.may_write(name, unquote(revision))
    there = call.commit(name, unquote(revision)).files
    modes = [
        {
            "path": one["path"],
            "uploadMode": "lfs" if is_lfs(one["path"]) else "regular",
            "shouldIgnore": False,
            "oid": known_as(one["path"], there[one["path"]]) if one["path"] in there else None,
        }
        for one in call.json["files"]
    ]
    return answer({"files": modes})


@route("GET", f"/api/models/{ID}/xet-(read|write)-token/.+")
def xet_token(call: Call, name: str) -> Answer:
    if call.hub.xet_store is None:
        raise Refusal(404, None, "Not found")
    grant = {"casUrl": f"local://{call.hub.xet_store}", "accessToken": "grant", "exp": 1 << 40}
    headers = {"Xet-Cas-Url": grant["casUrl"], "Xet-Access-Token": "grant", "Xet-Token-Expiration": grant["exp"]}
    reply = answer(grant)
    reply.headers |= {f"X-{key}": str(value) for key, value in headers.items()}
    return reply


@route("POST", rf"/{ID}\.git/info/lfs/objects/batch")
def lfs_batch(call: Call, name: str) -> Answer:
    call.repo(name)
    objects = []
    for one in call.json["objects"]:
        links = {
            "upload": {"href": f"{call.hub.url}/lfs/{one['oid']}"},
            "verify": {"href": f"{call.hub.url}/lfs/{one['oid']}/verify"},
        }
        objects.append(one if one["oid"] in call.hub.objects else {**one, "actions": links})
    return answer({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(call: Call, oid: str) -> Answer:
    if sha256(call.body) != oid:
        raise Refusal(400, None, "content does not have this hash")
    call.hub.objects[oid] = call.body
    return Answer()


@route("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify")
def lfs_verify(call: Call, oid: str) -> Answer:
    if len(call.hub.objects[oid]) != call.json["size"]:
        raise Refusal(400, None, "wrong size")
    return answer({})


@route("POST", f"/api/models/{ID}/commit/(?P<revision>[^/]+)")
def commit(call: Call, name: str, revision: str) -> Answer:
    as_pr = "create_pr" in call.query
    if as_pr and not call.hub.pull_requests:
        raise Refusal(501, None, "Pull requests are not implemented")
    repo, ref = call.repo(name), unquote(revision)
    if not as_pr:
        call.may_write(name, ref)
    parent = call.commit(name, ref)
    lines = [json.loads(line) for line in call.body.splitlines()]
    header = lines[0]["value"]
    if header.get("parentCommit", parent.oid) != parent.oid:
        raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
    files = changed(call.hub, parent.files, lines[1:])
    if as_pr:
        repo.discussions.append(Discussion(header["summary"], call.hub.user))
        ref = f"refs/pr/{len(repo.discussions)}"
    made = repo.add(ref, header["summary"], files)
    reply = {"success": True, "commitOid": made.oid, "commitUrl": f"{call.hub.url}/{name}/commit/{made.oid}"}
    if as_pr:
        reply["pullRequestUrl"] = f"{call.hub.url}/{name}/discussions/{ref.rsplit('/', 1)[1]}"
    return answer(reply)


def changed(hub: Hub, files: dict[str, bytes], lines: list[dict[str, Any]]) -> dict[str, bytes]:
    """The files after a commit; refuses what was not uploaded and deletions of what is not there."""
    files = dict(files)
    for key, value in ((line["key"], line["value"]) for line in lines):
        path = value["path"]
        if key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
            continue
        if key == "lfsFile" and value["oid"] not in hub.objects:
            raise Refusal(400, None, f"{path} was not uploaded")
        data = hub.objects[value["oid"]] if key == "lfsFile" else base64.b64decode(value["content"])
        files[path] = data[:-1] if path in hub.corrupt else data
    return files


# --- the wire --------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.due(f"{self.command} {url.path}")
        reply = Answer() if fault and not fault.after else self.routed(url.path, url.query, body)
        how = fault.how if fault else "well"
        if how is None:
            self.hang_up()
            return
        if how == "loop":
            reply = Answer(b"", 302, {"Location": f"{self.hub.url}{self.path}"})
        if isinstance(how, int):
            # The worst that a server or proxy can do: repeat what it was sent, in a text that is shown to people.
            reply = answer({"error": f"bad day for {self.headers.get('Authorization')}"}, how)
            reply.headers |= PUT_OFF if how == 429 else {}
        self.hub.requests.append(
            Request(
                self.command,
                unquote(url.path),
                self.headers.get("range"),
                self.headers.get("user-agent", ""),
                0 if self.command == "HEAD" else len(reply.body),
            )
        )
        self.hub.answering()
        if how == "held":
            self.hub.ended.wait()
            return
        self.send(reply, how)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def due(self, line: str) -> Fault | None:
        for fault in self.hub.faults:
            if re.search(fault.pattern, line):
                fault.skip -= 1
                if fault.skip < 0 and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def routed(self, path: str, query: str, body: bytes) -> Answer:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        headers = {key.lower(): value for key, value in self.headers.items()}
        call = Call(self.hub, self.command, parse_qs(query), headers, body, token == self.hub.token)
        try:
            if token not in ("", self.hub.token) and not path.startswith("/lfs/"):
                raise Refusal(401, None, "Invalid credentials in Authorization header")
            for method, pattern, function in ROUTES:
                if re.fullmatch(method, self.command) and (match := pattern.match(path)):
                    return function(call, **match.groupdict())
            raise Refusal(404, None, f"no route {self.command} {path}")
        except Refusal as refusal:
            reply = answer({"error": refusal.message}, refusal.status)
            reply.headers["X-Error-Message"] = refusal.message
            if refusal.code:
                reply.headers["X-Error-Code"] = refusal.code
            return reply

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, reply: Answer, how: object) -> None:
        self.send_response(reply.status)
        for key, value in reply.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.send_header("Connection", "close")  # else each idle connection holds a thread beyond the end
        self.end_headers()
        if self.command == "HEAD":
            return
        if how == "slow":
            step = max(1, len(reply.body) // 8)
            for start in range(0, len(reply.body), step):
                self.wfile.write(reply.body[start : start + step])
                time.sleep(0.01)
            return
        if how == "altered":
            reply.body = reply.body[:-1] + bytes([reply.body[-1] ^ 1]) if reply.body else b""
        self.wfile.write(reply.body[: len(reply.body) // 2] if how in ("cut", "reset") else reply.body)
        if how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif how == "cut":
            self.hang_up()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def service_actions(self) -> None:
        """Between two looks at the listener, which always looks ready while nobody listens."""
        if self.hub.refusing:
            time.sleep(0.005)


@contextmanager
def hub_server(home: Path) -> Iterator[Hub]:
    """Run a Hub until the block ends. Its state is in memory; `home` is for the cache of its clients."""
    hub = Hub(home)
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.hub, hub.listener = hub, server.socket
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
