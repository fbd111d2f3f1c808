"""Nothing is written in place: a temporary name beside the target, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hardener.errors import ResourceError

SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"
SEAL = "itself"
"""Key of the hash that a file of JSON has over all else that it says."""
UNSUMMED = (SUMS, SIGNATURE)
"""What lies at the root of a release and is not in its sums: the sums themselves, and the signature over them."""


@contextmanager
def explained_disk(path: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into an error that says what to do (exit 5)."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) else _system_error(error)
        if why is None:
            raise
        raise ResourceError(f"cannot write {path}: {why}; free some space or mend its rights, then go on") from error


def _system_error(error: SafetensorError) -> str | None:
    """The system's words in an error of safetensors, which hides them in its own."""
    found = re.search(r"[^:]*(?= \(os error \d+\))", str(error))
    return found and found[0].strip()


def unfinished(path: Path) -> Path:
    """The name under which a file or folder is written until it is whole; what a killed process leaves."""
    return path.with_name(f".{path.name}.new")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically. Raises ResourceError if the disk is full."""
    with explained_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = unfinished(path)
        with new.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(path)
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in their order."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write JSON atomically, with a hash over all that it says."""
    write_json(path, value | {SEAL: _seal(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises ValueError if the file is torn, or changed since."""
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict) or value.pop(SEAL, None) != _seal(value):
        raise ValueError("it does not agree with its own hash")
    return value


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` as a whole when the block ends well, and vanishes otherwise."""
    new, old = unfinished(path), path.with_name(f".{path.name}.old")
    with explained_disk(path):
        for left in (new, old):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            yield new
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        for file in new.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        if path.exists():
            path.rename(old)  # a folder that is being removed is half a folder
        new.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that is gone after the block. Its name is fixed: the next one removes what a kill left."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256(path: Path) -> str:
    """Hash of one file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def has_hash(path: Path, digest: str) -> bool:
    """Whether a file is the one that the Hub knows by this hash: SHA-256 of a large one, git's own of a small one."""
    return digest == (sha256(path) if len(digest) == 64 else git_blob(path))


def git_blob(path: Path) -> str:
    """The hash by which git knows a file."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
