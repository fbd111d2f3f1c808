"""The plan: from metadata alone; a dry run asks, fails as the run would, leaves nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import hub_server
import pytest
import small

from hardener import hub, pipeline, plan, recipe_file
from hardener.errors import HubError, ResourceError
from hardener.target import destination

pytestmark = hub_server.PLAIN_HTTP
Hub = hub_server.Hub
CARD = {"license": "other", "license_name": "house", "license_link": "LICENSE"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server.hub_server(tmp_path / "home") as running:
        running.connect(monkeypatch)
        yield running


def recipe(*overrides: str, name: str = "tiny-ctrap"):
    return recipe_file.load(name, overrides)


# --- the plan ------------------------------------------------------------------------------


def test_the_plan_is_made_without_a_byte_of_weights(server: Hub, letters: Path, tmp_path: Path) -> None:
    repo = server.add_model("org/model", letters, card=CARD, gated="manual")
    repo.granted = True
    ref = hub.resolve("org/model")
    made = plan.plan(recipe(), ref, destination("me/new", ref), place=tmp_path / "runs" / "new", device="cpu")
    assert (made.model, made.commit, made.gated, made.private) == ("org/model", repo.head.oid, "manual", False)
    assert (made.license, made.license_name, made.license_link) == ("other", "house", "LICENSE")
    assert (made.download, made.files) == (ref.bytes, len(ref.files))
    assert made.disk_free > made.disk > 2 * made.download
    assert (made.push_to, made.push_exists, made.push_gated) == ("me/new", False, "manual")
    assert made.hardening_seconds > 0 < made.probe_seconds
    read = server.asked(r"GET .*\.safetensors")
    assert [one.range for one in read] == ["bytes=0-100000"]  # the header, within the client's first look
    assert server.writes() == []


def test_a_dry_run_asks_the_hub_fails_as_the_run_would_and_leaves_nothing(
    server: Hub, letters: Path, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_model("org/model", letters, card=CARD)
    monkeypatch.chdir(tmp_path)
    asked = {"recipe": "tiny-ctrap", "overrides": small.overrides(paths), "dry_run": True}
    made = pipeline.harden("org/model", push_to="new", **asked).plan
    assert (made.push_to, made.push_exists, made.push_writable) == ("me/new", False, True)
    with pytest.raises(HubError, match="lacks the right") as caught:
        pipeline.harden("org/model", push_to="other/new", **asked)
    assert caught.value.exit_code == 3
    assert server.writes() == []
    assert all(one.range for one in server.asked(r"GET .*\.safetensors"))
    assert not (tmp_path / "runs").exists()


def test_the_json_form_has_the_names_that_pipelines_read(letters: Path) -> None:
    told = json.loads(json.dumps(plan.plan(recipe(), hub.resolve(str(letters)), None, device="cpu").to_dict()))
    assert list(told) == [field.name for field in fields(plan.Plan)]
    assert {name: told[name] for name in ("model", "commit", "download", "push_to", "push_exists")} == {
        **{"model": letters.name, "commit": None, "download": 0, "push_to": None, "push_exists": None}
    }


def test_a_disk_that_is_too_small_is_refused(letters: Path, tmp_path: Path) -> None:
    made = plan.plan(recipe(), hub.resolve(str(letters)), None, device="cpu")
    plan.check_disk(made, tmp_path / "not" / "yet" / "there")
    with pytest.raises(ResourceError, match=r"free, the run needs about 1,000,000,000\.00 GB"):
        plan.check_disk(replace(made, disk=10**18), tmp_path / "not" / "yet" / "there")


MADE = plan.Plan(
    **{"model": "org/" + "m" * 90, "commit": "c" * 40, "license": "other", "license_name": "house"},
    **{"license_link": "https://example.org/" + "terms/" * 12, "gated": "manual", "private": False},
    **{"parameters": 1_235_814_400, "dtype": "bfloat16", "files": 9, "download": 2_480_000_000, "recipe": "ctrap"},
    **{"defense": "ctrap", "outer_steps": 20000, "passes_per_step": 3, "attacks": "standard: 64 steps of 16 rows"},
    **{"attack_runs": 100, "disk": 30_000_000_000, "disk_free": 10**12, "device": "cuda"},
    **{"hardening_seconds": 1800.0, "probe_seconds": 600.0, "push_to": "me/new", "push_exists": False},
    **{"push_private": False, "push_gated": "manual", "push_writable": True, "push_note": None},
    **{"hardening_memory": 20_000_000_000, "probe_memory": 3_000_000_000, "activations": True},
    push_transfer="unknown until it exists",
)


def test_the_human_form_fits_into_eighty_columns_and_tells_everything() -> None:
    rows = plan.lines(MADE)
    assert all(len(f"  {name:<10} {value}") <= 80 for name, value in rows)
    told: dict[str, str] = {}
    for name, value in rows:
        told |= {name or next(reversed(told)): f"{told[next(reversed(told))]} {value}" if not name else value}
    assert told["time"] == (
        "about 23 min to 69 min on cuda, 75% of it to harden; "
        "less where attacks are answered early, more where ladders of rates grow"
    )
    assert told["size"] == "1,235,814,400 parameters, bfloat16; 9 files, 2.48 GB to fetch"
    assert told["memory"] == "about 20.00 GB to harden, 3.00 GB to attack"
    less = replace(MADE, hardening_memory=0, activations=False)
    assert dict(plan.lines(less))["memory"] == "about 3.00 GB to attack; activations not counted"
    assert told["access"] == "public, gated (manual)"
    assert told["push to"] == (
        "me/new: will be created; public, gated (manual); this token may write; transfer: unknown until it exists"
    )
    assert "house" in told["licence"]
    assert dict(plan.lines(replace(MADE, push_exists=None, push_note="nobody asked")))["push to"] == (
        "me/new: nobody asked"
    )
    kept = replace(MADE, push_transfer="xet", push_note="it stays private")
    assert plan.lines(kept)[-1] == ("", "write; transfer: xet; it stays private")
    assert "push to" not in dict(plan.lines(replace(MADE, push_to=None)))


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.1, "1 s"), (80, "80 s"), (3599, "60 min"), (5401, "2 h"), (200_000, "2 days")]
)
def test_times_are_told_in_the_unit_that_suits_them(seconds: float, said: str) -> None:
    told = plan.expected(replace(MADE, hardening_seconds=seconds * plan.RANGE, probe_seconds=0.0))
    assert told.startswith(f"about {said} to ")
