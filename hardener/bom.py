"""The ML-BOM of a release: what it is made of, in CycloneDX 1.6, for tools that track models and licences. Pure.

Everything in it comes from `report.json` and from the weight files beside it, so equal runs have equal BOMs.
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hardener import card, checkpoint, files, summary
from hardener.report import DataRecord, Interval, Measures, Report

NAME = "hardener/bom.cdx.json"
"""Where it lies in a release."""
KINDS = {"hardener": "application", "python": "platform"}
"""What the parts of a report's environment are; all others are libraries."""
WEB = re.compile(r"https?://[A-Za-z0-9.-]+(:\d+)?([/?#].*)?", re.DOTALL)
"""An address that others can open."""


def bom(report: Report, release: Path) -> dict[str, Any]:
    """The BOM of a release folder as JSON data; a probe's folder has no weights, and its BOM no files."""
    data = [_data(record, f"data-{place}") for place, record in enumerate(report.data, 1)]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, report.weights or report.subject)}",
        "version": 1,
        "metadata": {
            "timestamp": f"{report.created}T00:00:00Z",
            "tools": {"components": _tools(report)},
            "component": _model(report, release, [part["bom-ref"] for part in data]),
        },
        "components": data,
    }


def _tools(report: Report) -> list[dict[str, str]]:
    """What made the release, by version."""
    versions = {**report.environment, "hardener": report.hardener}
    versions.pop("device", None)
    return [{"type": KINDS.get(name, "library"), "name": name, "version": v} for name, v in versions.items()]


def _model(report: Report, release: Path, data: list[str]) -> dict[str, Any]:
    weights = _weights(release)
    ancestors = {"pedigree": {"ancestors": [_parent(report)]}} if report.training else {}
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": report.subject,
        "hashes": [hash for file in weights for hash in file["hashes"]],
        "licenses": _licenses(card.metadata(report, None)),
        **ancestors,
        "components": weights,
        "modelCard": _card(report, data),
        "properties": _properties({"hardener:weights": report.weights}),
    }


def _weights(release: Path) -> list[dict[str, Any]]:
    """Each weight file by its name; tools that look at the model alone find the same hashes there."""
    if not any(release.rglob("*.safetensors")):
        return []
    paths = checkpoint.weight_files(release)
    return [{"type": "file", "name": path.name, "hashes": _hashes(files.sha256(path))} for path in paths]


def _parent(report: Report) -> dict[str, Any]:
    """The checkpoint that was hardened; a local one has a name and no address."""
    parent = report.parent
    known: dict[str, Any] = {"type": "machine-learning-model", "name": parent.id}
    if parent.commit:
        known |= {"version": parent.commit, "purl": f"pkg:huggingface/{quote(parent.id)}@{parent.commit}"}
    return {**known, "properties": _properties({"hardener:weights": parent.weights})}


def _card(report: Report, data: list[str]) -> dict[str, Any]:
    task = str(report.recipe["task"])
    return {
        "modelParameters": {
            "task": card.TASK_TYPES.get(task, task),
            "modelArchitecture": report.parent.architecture,
            "datasets": [{"ref": ref} for ref in data],
        },
        "quantitativeAnalysis": {"performanceMetrics": _metrics(report)},
        "considerations": {"technicalLimitations": [summary.LIMIT]},
    }


def _metrics(report: Report) -> list[dict[str, Any]]:
    """The verdict with its price flags, and every figure that has an interval; without evidence there is none."""
    evidence = report.evidence
    if evidence is None:
        return []
    told = [{"type": "verdict", "value": evidence.word}, *({"type": "flag", "value": flag} for flag in evidence.flags)]
    figures = ((name, getattr(evidence.measures, name)) for name in Measures.model_fields)
    return told + [_metric(name, figure) for name, figure in figures if isinstance(figure, Interval)]


def _metric(name: str, figure: Interval) -> dict[str, Any]:
    """One figure; where the budget ended first it is a bound, and nothing is known of how far above it the truth is."""
    if figure.censored:
        return {"type": name, "value": f"≥ {figure.value}", "confidenceInterval": {"lowerBound": str(figure.low)}}
    interval = {"lowerBound": str(figure.low), "upperBound": str(figure.high)}
    return {"type": name, "value": str(figure.value), "confidenceInterval": interval}


def _data(record: DataRecord, ref: str) -> dict[str, Any]:
    """The rows of one source in one use: their number and hash, never their text."""
    return {
        "type": "data",
        "bom-ref": ref,
        "name": record.source,
        **({"version": record.revision} if record.revision else {}),
        "description": f"{record.role} rows for {record.use}",
        "hashes": _hashes(record.sha256),
        "licenses": _licenses({"license": record.license}),
        "properties": _properties({"hardener:rows": str(record.rows), "hardener:dropped": str(record.dropped)}),
    }


def _licenses(known: dict[str, Any]) -> list[dict[str, Any]]:
    """The licences that a card names: by SPDX id where there is one, else by name and address."""
    value = known.get("license")
    every = value if isinstance(value, list) else [value] if value else []
    return [{"license": _license(str(one), known)} for one in every]


def _license(license: str, known: dict[str, Any]) -> dict[str, str]:
    if (spdx := _spdx(license)) is not None:
        return {"id": spdx}
    return {"name": str(known.get("license_name") or license), **_address(str(known.get("license_link", "")))}


def _address(link: str) -> dict[str, str]:
    """A link of the web, in the form that a strict reader takes; nothing else, such as a path, leaves the machine."""
    if not WEB.fullmatch(link):
        return {}
    parts = (re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", part) for part in link.split("#", 1))
    return {"url": "#".join(quote(part, safe=":/?&=+~.,-_%") for part in parts)}


def _spdx(license: str) -> str | None:
    """The id as SPDX spells it; the Hub spells all in small letters, and has licences that SPDX does not know."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    if not re.fullmatch(r"[\w.-]+", license, re.ASCII) or license.lower().startswith("licenseref-"):
        return None
    try:
        return canonicalize_license_expression(license)
    except InvalidLicenseExpression:
        return None


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]


def _properties(known: dict[str, str | None]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in known.items() if value is not None]
