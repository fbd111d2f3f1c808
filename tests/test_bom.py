"""The ML-BOM: valid for a strict reader, equal for equal runs, and silent about data and machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sample_report
import torch
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hypothesis import given, settings
from hypothesis import strategies as st
from packageurl import PackageURL
from safetensors.torch import save_file
from sample_report import classifier, language_model, parent, probe_only, unprobed

from hardener import bom, files, summary
from hardener.report import Measures, Report

READER = JsonStrictValidator(SchemaVersion.V1_6)
HOSTILE = ["", " ", "\u202e\x00\n", "<script>", '"}', "a" * 300, "../../etc/passwd", "org/ä@#?%", "€ ≥ 漢"]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A model in two shards."""
    folder = tmp_path_factory.mktemp("release")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for place, (tensor, name) in enumerate(shards.items()):
        save_file({tensor: torch.full((2,), float(place))}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder


def errors(made: dict[str, Any]) -> list[str]:
    found = READER.validate_str(json.dumps(made), all_errors=True)
    return [str(error)[:500] for error in found or ()]


def model_of(made: dict[str, Any]) -> dict[str, Any]:
    return made["metadata"]["component"]


def licences(report: Report, release: Path) -> list[dict[str, str]]:
    return [one["license"] for one in model_of(bom.bom(report, release))["licenses"]]


REPORTS: dict[str, Report] = {
    **{word: language_model(word) for word in sample_report.WORDS},
    **{make.__name__: make() for make in (classifier, probe_only, unprobed, sample_report.compared)},
    **{make.__name__: make() for make in (sample_report.searched, sample_report.every_family, sample_report.withheld)},
    "a local parent": language_model(parent=parent(id="checkpoint", commit=None, local=True)),
    "a parent without owner": language_model(parent=parent(id="gpt2")),
    "no licence": language_model(parent=parent(license={})),
    "no weights": language_model(weights=None),
    "no data": language_model(data=()),
}


@pytest.mark.parametrize("name", REPORTS)
def test_every_report_gives_a_bom_that_a_strict_reader_takes(name, release, tmp_path):
    assert errors(bom.bom(REPORTS[name], release)) == []
    assert errors(bom.bom(REPORTS[name], tmp_path)) == []


def test_the_strict_reader_finds_what_is_wrong(release):
    made = bom.bom(language_model(), release)
    model_of(made)["licenses"] = [{"license": {"id": "gemma"}}]
    made["components"][0]["hashes"][0]["content"] = "text"
    assert len(errors(made)) == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_stays_a_text(text, release):
    hostile = parent(id=text, architecture=text, license={"license": text, "license_name": text, "license_link": text})
    records = tuple(r.model_copy(update={"source": text, "license": text}) for r in sample_report.records())
    report = language_model(parent=hostile, subject=text, data=records, environment={text: "1.0"})
    made = bom.bom(report, release)
    assert errors(made) == []
    assert model_of(made)["name"] == text
    if text.strip():
        purl = PackageURL.from_string(model_of(made)["pedigree"]["ancestors"][0]["purl"])
        assert purl.version == report.parent.commit


FEW = settings(max_examples=40, deadline=None)


@FEW
@given(st.sampled_from(["", "https://", "https://example.org/"]), st.text(max_size=20))
def test_any_link_of_a_licence_is_an_address_or_left_out(start, text):
    known = {"license": "other", "license_name": "ours", "license_link": start + text}
    report = language_model(parent=parent(license=known), data=())
    assert errors(bom.bom(report, Path("nowhere"))) == []


@FEW
@given(st.text(max_size=20) | st.text("abcxyz019.-+ ()", max_size=10))
def test_any_text_is_an_spdx_id_or_a_name(text):
    report = language_model(parent=parent(license={"license": text}), data=())
    assert errors(bom.bom(report, Path("nowhere"))) == []


@pytest.mark.parametrize(
    ("known", "told"),
    [
        ({"license": "apache-2.0"}, [{"id": "Apache-2.0"}]),
        ({"license": "cc-by-nc-sa-4.0"}, [{"id": "CC-BY-NC-SA-4.0"}]),
        ({"license": "gemma"}, [{"name": "gemma"}]),
        ({"license": "other"}, [{"name": "other"}]),
        ({"license": "mit or gpl-3.0"}, [{"name": "mit or gpl-3.0"}]),
        ({"license": "LicenseRef-ours"}, [{"name": "LicenseRef-ours"}]),
        ({"license": ["mit", "llama3"]}, [{"id": "MIT"}, {"name": "llama3"}]),
        ({"license": ["no", 7]}, [{"name": "no"}, {"name": "7"}]),
        ({}, []),
        (
            {"license": "other", "license_name": "ours", "license_link": "https://example.org/a b#1%"},
            [{"name": "ours", "url": "https://example.org/a%20b#1%25"}],
        ),
    ],
)
def test_a_licence_is_told_by_its_spdx_id_or_else_by_name_and_address(known, told, release):
    assert licences(language_model(parent=parent(license=known)), release) == told


def test_a_licence_that_is_a_file_of_the_parent_is_found_at_the_parent_and_a_local_one_nowhere(release):
    known = {"license": "other", "license_name": "ours", "license_link": "LICENSE.md"}
    page = f"https://huggingface.co/acme/tiny-chat/blob/{parent().commit}/LICENSE.md"
    assert licences(language_model(parent=parent(license=known)), release) == [{"name": "ours", "url": page}]
    known["license_link"] = "/home/someone/LICENSE.md"
    local = parent(id="checkpoint", commit=None, local=True, license=known)
    assert licences(language_model(parent=local), release) == [{"name": "ours"}]


def test_the_licence_of_the_recipe_is_that_of_the_release(release):
    report = language_model(parent=parent(license={"license": "other"}))
    report.recipe["card"]["license"] = "mit"
    assert licences(report, release) == [{"id": "MIT"}]


def test_every_weight_file_stands_there_with_its_hash(release):
    model = model_of(bom.bom(language_model(), release))
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    hashes = [[{"alg": "SHA-256", "content": files.sha256(release / name)}] for name in names]
    assert [file["name"] for file in model["components"]] == names
    assert [file["hashes"] for file in model["components"]] == hashes
    assert model["hashes"] == [*hashes[0], *hashes[1]]


def test_the_parent_is_the_ancestor_at_its_commit_and_a_local_one_has_no_address(release):
    (ancestor,) = model_of(bom.bom(language_model(), release))["pedigree"]["ancestors"]
    assert ancestor["purl"] == f"pkg:huggingface/acme/tiny-chat@{parent().commit}"
    local = language_model(parent=parent(id="checkpoint", commit=None, local=True))
    (ancestor,) = model_of(bom.bom(local, release))["pedigree"]["ancestors"]
    assert ancestor["name"] == "checkpoint"
    assert not {"purl", "version"} & {*ancestor}


def test_a_probed_model_was_made_elsewhere_and_its_ancestors_are_not_known(release):
    for report in (probe_only(), sample_report.compared()):
        assert "pedigree" not in model_of(bom.bom(report, release))


def test_verdict_and_every_interval_of_the_report_are_metrics(release):
    report = language_model("broken")
    metrics = model_of(bom.bom(report, release))["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert metrics[:2] == [{"type": "verdict", "value": "broken"}, {"type": "flag", "value": "utility lost"}]
    measures = report.evidence.measures
    known = [name for name in Measures.model_fields if hasattr(getattr(measures, name), "low")]
    assert [one["type"] for one in metrics[2:]] == known
    kept = next(one for one in metrics if one["type"] == "utility_kept")
    figure = measures.utility_kept
    assert (float(kept["value"]), kept["confidenceInterval"]["upperBound"]) == (figure.value, str(figure.high))


def test_a_censored_figure_is_a_bound_without_an_upper_end(release):
    metrics = model_of(bom.bom(language_model("protected"), release))["modelCard"]["quantitativeAnalysis"]
    cost = next(one for one in metrics["performanceMetrics"] if one["type"] == "multiplier")
    assert cost == {"type": "multiplier", "value": "≥ 16.0", "confidenceInterval": {"lowerBound": "12.48"}}


def test_what_was_not_probed_has_no_metrics_and_its_limits_all_the_same(release):
    told = model_of(bom.bom(unprobed(), release))["modelCard"]
    assert told["quantitativeAnalysis"]["performanceMetrics"] == []
    assert told["considerations"]["technicalLimitations"] == [summary.LIMIT]


def test_data_sets_are_told_by_name_commit_hash_and_number_and_the_model_refers_to_them(release):
    made = bom.bom(language_model(), release)
    first, local = made["components"][0], made["components"][3]
    record = sample_report.records()[0]
    assert (first["name"], first["version"]) == (record.source, record.revision)
    assert first["hashes"] == [{"alg": "SHA-256", "content": record.sha256}]
    assert {"name": "hardener:rows", "value": "2000"} in first["properties"]
    assert first["licenses"] == [{"license": {"id": "CC-BY-4.0"}}]
    assert local["name"].startswith("local:")
    assert "version" not in local
    refs = [one["ref"] for one in model_of(made)["modelCard"]["modelParameters"]["datasets"]]
    assert refs == [part["bom-ref"] for part in made["components"]]
    assert len({*refs}) == len(sample_report.records())


def test_the_tools_are_those_of_the_environment_and_the_device_is_none(release):
    report = language_model(environment={"hardener": "0.1.0", "python": "3.12.3", "torch": "2.13.0", "device": "cuda"})
    tools = bom.bom(report, release)["metadata"]["tools"]["components"]
    told = [("application", "hardener", "0.1.0"), ("platform", "python", "3.12.3"), ("library", "torch", "2.13.0")]
    assert [(tool["type"], tool["name"], tool["version"]) for tool in tools] == told


def test_equal_reports_and_weights_have_equal_boms_and_other_weights_another_number(release):
    made = bom.bom(language_model(), release)
    assert json.dumps(made) == json.dumps(bom.bom(language_model(), release))
    assert made["serialNumber"] != bom.bom(language_model(weights="00" * 32), release)["serialNumber"]
    assert made["metadata"]["timestamp"] == "2026-11-21T00:00:00Z"
    assert json.loads(json.dumps(made)) == made  # nothing that JSON cannot hold
