"""`--on hf-jobs`: the same command as a Job on the Hub's machines, followed to its end.

    asked = jobs.request("org/model", recipe="ctrap", push_to="org/model-hardened", flavor="a10g-small")
    jobs.submit(asked).exit_code

The Job installs this version of hardener and runs one command line. The recipe travels resolved, as text in the Job's
environment; the token travels as a secret; nothing else of this machine goes along, and what the Job does not push is
gone with it. Hub Jobs are billed by the Hub; the flavor decides by how much.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from hardener import __version__, recipe_file
from hardener.client import check_id, client, explained, scrub
from hardener.console import Narrator
from hardener.errors import HubError, ResourceError, UsageError
from hardener.recipe import ROLES, Recipe

if TYPE_CHECKING:
    from huggingface_hub import JobInfo

IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
"""Python and uv; the packages, torch with them, come with hardener."""
RECIPE = "recipe.yaml"
SCRIPT = (
    f'if [ -n "$HARDENER_RECIPE" ]; then printf %s "$HARDENER_RECIPE" | base64 -d > {RECIPE}; fi; '
    'uvx --from "$HARDENER_PACKAGE" hardener "$@"; code=$?; echo "$HARDENER_END $code"; exit $code'
)
"""One line of sh. The Hub tells only whether a Job failed, so the exit code is in the last line of its log."""
MOST_BYTES = 2**16
"""Of a recipe in the environment, where Linux takes 128 KiB in one variable, and base64 adds a third."""


@dataclass(frozen=True)
class Ended:
    """A Job that has come to its end."""

    id: str
    url: str
    exit_code: int
    """What `hardener harden` ended with there."""


def request(
    model: str | None,
    *,
    flavor: str = "a10g-small",
    timeout: str = "12h",
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    revision: str | None = None,
    push_to: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    branch: str | None = None,
    tag: str | None = None,
    device: str = "auto",
    from_report: str | None = None,
    push_anyway: bool = False,
    num_processes: int = 1,
    shard: bool = False,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    sign: str | None = None,
    card_template: str | Path | None = None,
) -> dict[str, Any]:
    """What `HfApi.run_job` will be asked for, as JSON; of secrets the names alone. Nothing is sent.

    Arguments are those of `pipeline.harden`, with the number of processes over there, the Hub's `flavor` of machine and
    `timeout`, a number with s, m, h or d. Raises RecipeError for what is wrong with the recipe, and UsageError for what
    cannot go with a Job: a model, recipe data or judge on this machine, a run folder, a key, or a hardening that is
    pushed nowhere.
    """
    here = {"--output": output, "--resume": resume, "--sign": sign, "--card-template": card_template}
    if stays := [option for option, value in here.items() if value is not None]:
        raise UsageError(f"a Job has no file, key or run of this machine; leave out {', '.join(stays)} with --on")
    if push_to is None:
        raise UsageError("what a Job makes is gone with it unless it is pushed; name a repository with --push-to")
    if not (from_report or (model and recipe)):
        raise UsageError("name a model and a recipe: hardener harden org/model --recipe ctrap --on hf-jobs")
    if not re.fullmatch(r"\d+(\.\d+)?[smhd]", timeout):
        raise UsageError(f"--timeout {timeout}: must be a number with s, m, h or d, such as 12h")
    _check_remote("MODEL", model)
    _check_remote("--from-report", from_report)
    text = None if recipe is None else _travelling(recipe, overrides)
    options = {
        **{
            "--recipe": RECIPE if text else None,
            "--from-report": from_report,
            "--revision": revision,
            "--push-to": push_to,
        },
        **{"--branch": branch, "--tag": tag, "--device": None if device == "auto" else device},
        **{"--num-processes": str(num_processes) if num_processes > 1 else None},
    }
    switches = {"--private": private, "--create-pr": create_pr, "--push-anyway": push_anyway, "--shard": shard}
    words = [*_given(options, switches), *(f"--set={_checked(one)}" for one in overrides if text is None), "--yes"]
    return {
        "image": IMAGE,
        "command": ["sh", "-c", SCRIPT, "hardener", "harden", *words, *(["--", model] if model else [])],
        "env": _environment(text),
        "secrets": ["HF_TOKEN"],
        "flavor": flavor,
        "timeout": timeout,
    }


def submit(asked: dict[str, Any], narrator: Narrator | None = None) -> Ended:
    """Send a request, tell the Job's log as it comes, and return how the Job ended.

    An error or signal while the log is followed leaves the Job running, and says how to stop it. Raises HubError where
    the Hub does not take the request or cannot be reached, ResourceError for a Job that ended without an exit code.
    """
    say = narrator or Narrator(silent=True)
    api = client()
    with explained("the Job"):
        job = api.run_job(**{**asked, "secrets": {"HF_TOKEN": _token()}})
    say.stage(f"Job {job.id} on {asked['flavor']}")
    say.note(job.url)
    with _goes_on(job), explained(f"following {job.url}"):
        end: str = asked["env"]["HARDENER_END"]
        where: dict[str, Any] = {"job_id": job.id, "namespace": job.owner.name}
        code = _told(api.fetch_job_logs(**where, follow=True), end, say)
        ended = api.wait_for_job(**where)
        if code is None:  # a log that broke off shortly before the end is not taken up again
            code = _told(api.fetch_job_logs(**where), end, Narrator(silent=True))
    return Ended(job.id, job.url, _exit_code(ended, code))


def _given(options: Mapping[str, str | None], switches: Mapping[str, bool]) -> list[str]:
    """The words of a command line for what was asked for; a value stays within the word of its option."""
    valued = [f"{option}={value}" for option, value in options.items() if value]
    return valued + [switch for switch, wanted in switches.items() if wanted]


def _travelling(recipe: str | Path, overrides: Sequence[str]) -> bytes:
    """The resolved recipe as text that needs no other file. Raises UsageError naming what stays on this machine."""
    chosen = recipe_file.load(recipe, overrides)
    if local := _local(chosen):
        raise UsageError(f"a Job cannot read files of this machine; push them to the Hub and name them there: {local}")
    text = recipe_file.dump(chosen).encode()
    if len(text) > MOST_BYTES:
        raise UsageError(f"{recipe} has {len(text):,} bytes when resolved, and a Job takes {MOST_BYTES:,} at most")
    return text


def _environment(recipe: bytes | None) -> dict[str, str]:
    """What the script reads. The word before the exit code is random, so that no line of a log can pass for it."""
    known = {"HARDENER_PACKAGE": f"hardener[dpo,eval]=={__version__}", "HARDENER_END": f"end-{token_hex(8)}"}
    return known if recipe is None else {**known, "HARDENER_RECIPE": base64.b64encode(recipe).decode()}


def _local(recipe: Recipe) -> str:
    """The keys and paths of a recipe that are on this machine, as text."""
    roles = [(role, index, s) for role in ROLES for index, s in enumerate(getattr(recipe.data, role) or ())]
    data = [f"data.{role}.{index} = {s.dataset}" for role, index, s in roles if _is_here(s.dataset)]
    judges = [*recipe.probe.judges, *([recipe.probe.refusal_judge] if recipe.probe.refusal_judge else [])]
    return ", ".join([*data, *(f"judge = {judge.model}" for judge in judges if _is_here(judge.model))])


def _is_here(name: str) -> bool:
    """Whether a model, dataset or judge is a file or folder of this machine, or can only be meant as one."""
    meant = name.startswith((".", "/", "~", "local:")) or name.lower().endswith(recipe_file.LOCAL_SUFFIXES)
    # Not Path.exists, which raises for a text too long to be a path.
    return meant or os.path.exists(name)  # noqa: PTH110


def _check_remote(option: str, name: str | None) -> None:
    """Raise UsageError for a folder of this machine and for what no Hub id can be."""
    if name is None:
        return
    if _is_here(name):
        raise UsageError(f"{option} {name} is on this machine, where a Job cannot read it; push it to the Hub first")
    check_id(name)


def _checked(override: str) -> str:
    """An override of a recipe that is known only over there. Raises UsageError for a path of this machine."""
    if _is_here(override.partition("=")[2]):
        raise UsageError(f"--set {override}: a Job cannot read files of this machine; push them to the Hub first")
    return override


def _token() -> str:
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        raise HubError("a Job needs a token; run `hf auth login`, or set HF_TOKEN")
    return token


def _told(log: Iterable[str], end: str, say: Narrator) -> int | None:
    """Tell a log to its end; returns the exit code that stands in it, None where none came."""
    code = None
    for line in log:
        if last := re.fullmatch(rf"{end} (\d+)\s*", line):
            code = int(last[1])
        else:
            say.note(scrub(line))
    return code


def _exit_code(job: JobInfo, code: int | None) -> int:
    if job.status.stage == "COMPLETED":
        return 0
    if job.status.stage == "ERROR" and code:
        return code
    said = f": {job.status.message}" if job.status.message else ""
    raise ResourceError(
        f"the Job ended as {job.status.stage}{said}; see {job.url}, and raise --timeout or choose another --flavor "
        "if time or memory ran out"
    )


@contextmanager
def _goes_on(job: JobInfo) -> Iterator[None]:
    """Whatever ends the following does not end the Job: the error says so."""
    try:
        yield
    except BaseException as error:
        vars(error)["go_on"] = f"The Job goes on at {job.url}; stop it with: hf jobs cancel {job.id}"
        raise
