"""A signature holds for exactly the files that were signed, and for the key that signed them."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from sample_report import language_model

from hardener import recipe_file, signing
from hardener import release as releases
from hardener.errors import UsageError, VerifyError
from hardener.run import RunFolder


def write_keys(folder: Path, name: str, key) -> tuple[Path, Path]:
    """A private key and its public half, as PEM files."""
    private, public = folder / f"{name}.pem", folder / f"{name}-public.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "ours", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def release(tmp_path) -> Path:
    folder = tmp_path / "release"
    (folder / "hardener").mkdir(parents=True)
    for name in ("README.md", "SHA256SUMS", "model.safetensors", "hardener/report.json"):
        (folder / name).write_text(f"this is {name}")
    return folder


def test_a_signed_release_is_known_by_the_hash_of_the_public_key_file(release, keys):
    private, public = keys
    who = signing.sign(release, private)
    assert who == f"key {hashlib.sha256(public.read_bytes()).hexdigest()[:16]}"
    assert signing.check(release, public) == f"ok ({who})"


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_the_other_curves_sign_too(release, tmp_path, curve):
    private, public = write_keys(tmp_path, "other", ec.generate_private_key(curve))
    who = signing.sign(release, private)
    assert signing.check(release, public) == f"ok ({who})"


CHANGES = {
    "weights": (lambda r: (r / "model.safetensors").write_text("other"), "model.safetensors"),
    "card": (lambda r: (r / "README.md").write_text("protected"), "README.md"),
    "sums": (lambda r: (r / "SHA256SUMS").write_text(""), "SHA256SUMS"),
    "report": (lambda r: (r / "hardener" / "report.json").write_text("{}"), "hardener/report.json"),
    "a file more": (lambda r: (r / "tokenizer.py").write_text(""), "tokenizer.py"),
    "a file more where git looks": (lambda r: write_below(r / ".github", "x.yml"), ".github/x.yml"),
    "a second signature below": (lambda r: write_below(r / "hardener", "model.sig"), "hardener/model.sig"),
    "a file less": (lambda r: (r / "hardener" / "report.json").unlink(), "hardener/report.json"),
    "a file elsewhere": (lambda r: (r / "README.md").rename(r / "hardener" / "README.md"), "hardener/README.md"),
}


def write_below(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("")


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_after_the_signature_is_found_and_named(release, keys, name):
    private, public = keys
    change, said = CHANGES[name]
    signing.sign(release, private)
    change(release)
    with pytest.raises(VerifyError, match="no signature of these files") as caught:
        signing.check(release, public)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", CHANGES)
def test_a_signature_covers_what_was_signed_and_nothing_else(release, keys, name):
    signing.sign(release, keys[0])
    (release / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert signing.covers(release)
    CHANGES[name][0](release)
    assert not signing.covers(release)


def test_the_name_and_place_of_the_folder_and_the_hubs_own_file_are_not_signed(release, keys, tmp_path):
    private, public = keys
    signing.sign(release, private)
    moved = release.rename(tmp_path / "elsewhere")
    (moved / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert signing.check(moved, public).startswith("ok (")


def test_a_folder_of_links_as_the_hub_caches_it_holds_the_signed_files(release, keys, tmp_path):
    private, public = keys
    signing.sign(release, private)
    cached = tmp_path / "cached"
    for path in (path for path in release.rglob("*") if path.is_file()):
        link = cached / path.relative_to(release)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert signing.check(cached, public).startswith("ok (")


def test_a_release_that_is_signed_again_has_one_signature_that_holds(release, keys):
    private, public = keys
    signing.sign(release, private)
    (release / "README.md").write_text("a new card")
    signing.sign(release, private)
    assert signing.check(release, public).startswith("ok (")
    assert [path.name for path in release.rglob("*.sig")] == ["model.sig"]


def test_another_key_is_found_out(release, keys, tmp_path):
    _, others = write_keys(tmp_path, "theirs", ec.generate_private_key(ec.SECP256R1()))
    signing.sign(release, keys[0])
    with pytest.raises(VerifyError, match="Key mismatch"):
        signing.check(release, others)


def test_a_signature_under_another_keys_name_is_found_out(release, keys, tmp_path):
    """Who signs with a key of his own can write what he likes beside it, but not make the signature fit."""
    theirs, _ = write_keys(tmp_path, "theirs", ec.generate_private_key(ec.SECP256R1()))
    signing.sign(release, keys[0])
    ours = json.loads((release / "model.sig").read_text())
    signing.sign(release, theirs)
    forged = json.loads((release / "model.sig").read_text())
    forged["verificationMaterial"] = ours["verificationMaterial"]
    (release / "model.sig").write_text(json.dumps(forged))
    with pytest.raises(VerifyError, match="it is forged"):
        signing.check(release, keys[1])


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"verificationMaterial": {}}', '{"verificationMaterial": 1}']
)
def test_a_file_that_is_no_signature_is_a_disagreement_and_no_crash(release, keys, text):
    assert not signing.covers(release)
    (release / "model.sig").write_text(text)
    assert (signing.covers(release), signing.signer(release)) == (False, None)
    with pytest.raises(VerifyError, match=r"model\.sig is no signature"):
        signing.check(release, keys[1])


def test_a_keyless_signature_is_no_signature_by_a_key(release, keys):
    signing.sign(release, keys[0])
    bundle = json.loads((release / "model.sig").read_text())
    bundle["verificationMaterial"] = {"certificate": {"rawBytes": "AAAA"}, "tlogEntries": []}
    (release / "model.sig").write_text(json.dumps(bundle))
    assert signing.stands(release, "sigstore")
    assert not signing.stands(release, str(keys[0]))
    with pytest.raises(VerifyError, match=r"model\.sig is no signature"):
        signing.check(release, keys[1])


def test_a_release_that_is_written_again_keeps_its_signature_unless_something_changed(release, keys, tmp_path):
    theirs, public = write_keys(tmp_path, "theirs", ec.generate_private_key(ec.SECP256R1()))
    run = RunFolder.create(tmp_path / "run", {"sign": str(keys[0])}, "")
    release.rename(run.release)
    recipe, report = recipe_file.load("tiny-ctrap"), language_model()

    def written() -> bytes | None:
        releases.write(run, recipe, report, tmp_path)
        signature = run.release / "model.sig"
        return signature.read_bytes() if signature.exists() else None

    first = written()
    assert written() == first
    report = language_model("protected")
    assert written() != first
    assert signing.check(run.release, keys[1]).startswith("ok (")
    run.ask(sign=str(theirs))
    written()
    assert signing.check(run.release, public).startswith("ok (")
    run.ask(sign="sigstore")
    assert written() is None  # until it is published
    run.ask(sign=None)
    assert written() is None


def test_without_a_key_a_signature_is_only_said_to_be_there(release, keys):
    assert signing.check(release) == "none"
    signing.sign(release, keys[0])
    assert signing.check(release) == signing.UNCHECKED


def test_a_signature_that_was_asked_for_and_is_not_there_is_a_disagreement(release, keys):
    with pytest.raises(VerifyError, match=r"model\.sig is missing"):
        signing.check(release, keys[1])
    with pytest.raises(VerifyError, match=r"model\.sig is missing"):
        signing.check(release, identity="me@example.org", issuer="https://issuer.example.org")


@pytest.mark.parametrize(("identity", "issuer"), [("me", None), (None, "https://issuer.example.org"), ("me", "i")])
def test_a_key_stands_alone_and_an_identity_has_its_issuer(release, keys, identity, issuer):
    key = keys[1] if identity and issuer else None
    with pytest.raises(UsageError, match="--public-key alone, or with --identity and --issuer together"):
        signing.check(release, key, identity, issuer)


def encrypted(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))


def encrypted_as_openssl_did(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"secret"))
    )


def in_der(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))


def another_kind(key):
    return lambda path: path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


UNFIT = {
    "missing": (lambda path: None, "cannot be read: No such file"),
    "a folder": (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    "empty": (lambda path: path.write_text(""), "is no private key in PEM; make one with `openssl"),
    "a certificate's text": (lambda path: path.write_text("-----BEGIN X-----\nAA\n-----END X-----"), "is no private"),
    "DER": (in_der, "is no private key in PEM"),
    "encrypted": (encrypted, "is encrypted"),
    "encrypted in the old way": (encrypted_as_openssl_did, "is encrypted"),
    "RSA": (another_kind(rsa.generate_private_key(65537, 2048)), "is not a key on one of the curves secp256r1, "),
    "Ed25519": (another_kind(ed25519.Ed25519PrivateKey.generate()), "is not a key on one of the curves"),
    "another curve": (another_kind(ec.generate_private_key(ec.SECP256K1())), "is not a key on one of the curves"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_key_that_cannot_sign_is_refused_before_anything_is_written(release, tmp_path, name):
    make, said = UNFIT[name]
    make(tmp_path / "key.pem")
    for use in (signing.check_key, lambda path: signing.sign(release, path), lambda path: signing.chosen(str(path))):
        with pytest.raises(UsageError, match=said) as caught:
            use(tmp_path / "key.pem")
        assert str(tmp_path / "key.pem") in str(caught.value)
    assert not (release / "model.sig").exists()


def test_a_public_key_does_not_sign_and_a_private_one_does_not_check(release, keys):
    private, public = keys
    with pytest.raises(UsageError, match="is a public key; a private one signs"):
        signing.check_key(public)
    signing.sign(release, private)
    with pytest.raises(UsageError, match="is no public key in PEM"):
        signing.check(release, private)


def test_what_is_chosen_is_a_key_file_or_the_ambient_identity(keys, monkeypatch):
    assert signing.chosen(str(keys[0])) == keys[0]
    monkeypatch.setattr("sigstore.oidc.detect_credential", lambda: "token")
    assert signing.chosen("sigstore") is None


def test_without_an_ambient_identity_nothing_is_signed_and_nobody_is_asked(release, monkeypatch):
    monkeypatch.setattr("sigstore.oidc.detect_credential", lambda: None)
    for use in (lambda: signing.chosen("sigstore"), lambda: signing.sign(release)):
        with pytest.raises(UsageError, match="no identity to sign with; in GitHub Actions"):
            use()
    assert not (release / "model.sig").exists()


def test_neither_the_key_nor_its_path_is_in_what_was_signed(release, keys):
    private, _ = keys
    signing.sign(release, private)
    secret = "".join(private.read_text().splitlines()[1:-1])
    for path in (path for path in release.rglob("*") if path.is_file()):
        text = path.read_text()
        assert str(private.parent) not in text
        assert private.name not in text
        assert secret not in text
    signed = json.loads((release / "model.sig").read_text())["dsseEnvelope"]["payload"]
    told = json.loads(base64.b64decode(signed))
    assert [one["name"] for one in told["subject"]] == ["release"]
    assert {one["name"] for one in told["predicate"]["resources"]} == {
        *("README.md", "SHA256SUMS", "model.safetensors", "hardener/report.json")
    }


@pytest.mark.parametrize("missing", ["model_signing", "OpenSSL"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(release, keys, missing):
    code = (
        "import sys; from pathlib import Path; from hardener import signing; from hardener.errors import UsageError\n"
        f"sys.modules[{missing!r}] = None\n"
        "for use in (lambda: signing.chosen('sigstore'), lambda: signing.check_key(Path('x')),\n"
        f"            lambda: signing.sign(Path({str(release)!r}), Path({str(keys[0])!r}))):\n"
        "    try: use()\n"
        "    except UsageError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.count('pip install "hardener[sign]"') == 3
    assert missing in ran.stdout
