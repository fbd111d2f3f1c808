"""A signature over a release: who made it, in the OpenSSF format of the package `model-signing`.

`model.sig` at the root lists every other file with its SHA-256 and is made last. It is checked with the signer's
public key, or with the identity that Sigstore vouches for; never with anything that the release itself brings.

    openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    openssl ec -in key.pem -pubout -out public.pem
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardener.errors import HubError, UsageError, VerifyError
from hardener.files import SIGNATURE, sha256
from hardener.target import HUBS_OWN

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

KEYLESS = "sigstore"
"""What stands in the place of a key file where the identity of a CI job signs."""
UNSIGNED = (SIGNATURE, HUBS_OWN)
"""The signature itself, and what the Hub writes after the release was signed."""
UNCHECKED = "present, not checked: give --public-key, or --identity and --issuer"
CURVES = ("secp256r1", "secp384r1", "secp521r1")
DIGESTS = re.compile(r": Expected 'Digest.*?\)', Actual 'Digest.*?\)'")
"""Unreadable bytes after the name of a changed file, in what the package says."""
NEW_KEY = "make one with `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`"


def chosen(asked: str) -> Path | None:
    """The key file that `--sign` names, checked; None where it is `sigstore`. Raises UsageError as `sign` does."""
    if asked == KEYLESS:
        _library("signing")
        _identity()
        return None
    path = Path(asked).expanduser()
    check_key(path)
    return path


def check_key(path: Path) -> None:
    """Raise UsageError unless `path` is a private key that can sign: PEM, without a password, on a known curve."""
    _library("signing")
    _signer(path)


def sign(release: Path, key: Path | None = None) -> str:
    """Sign every file of a release by a private key, or keyless by Sigstore; return who signed.

    Keyless, the ambient identity of a CI job signs, and that identity enters Sigstore's public log for good. This way
    was never run against the real service. Raises UsageError as `check_key`, or where there is no such identity;
    HubError where Sigstore does not serve.
    """
    config = _library("signing").Config().set_hashing_config(_hashing())
    if key is None:
        token = _identity()
        with _sigstore_explained():
            config.use_sigstore_signer(identity_token=token).sign(release, release / SIGNATURE)
        return KEYLESS
    who = _signer(key)
    config.use_elliptic_key_signer(private_key=key).sign(release, release / SIGNATURE)
    return who


def stands(release: Path, asked: str) -> bool:
    """Whether `model.sig` names the signer that `--sign` asks for, and covers what is there: no need to sign again.

    Raises UsageError as `check_key`. Whether the signature is genuine is for `check` to say.
    """
    return signer(release) == (KEYLESS if asked == KEYLESS else _signer(Path(asked))) and covers(release)


def covers(release: Path) -> bool:
    """Whether `model.sig` lists exactly the files that are there, each with the SHA-256 that it has now."""
    try:
        signed = json.loads(base64.b64decode(_bundle(release)["dsseEnvelope"]["payload"]))
        listed = {one["name"]: one["digest"] for one in signed["predicate"]["resources"]}
    except (ValueError, LookupError, TypeError):
        return False
    found = {path.relative_to(release).as_posix(): path for path in release.rglob("*") if path.is_file()}
    return listed == {name: sha256(path) for name, path in found.items() if name not in UNSIGNED}


def signer(release: Path) -> str | None:
    """Who `model.sig` says has signed: a key, or Sigstore's word for somebody; None where it says nothing."""
    try:
        material = _bundle(release)["verificationMaterial"]
        if "publicKey" in material:
            return f"key {material['publicKey']['hint'][:16]}"
        return KEYLESS if "certificate" in material else None
    except (ValueError, LookupError, TypeError):
        return None


def _bundle(release: Path) -> Any:
    """What `model.sig` holds; nothing where it is missing."""
    try:
        return json.loads((release / SIGNATURE).read_bytes())
    except FileNotFoundError:
        return {}


def check(release: Path, public_key: Path | None = None, identity: str | None = None, issuer: str | None = None) -> str:
    """Say whether a release is signed, and by whom if a key or an identity is given to check that with.

    Raises VerifyError where that key or identity has not signed exactly these files, UsageError for a key that
    cannot check, HubError where Sigstore's root of trust cannot be had. The keyless way is as untried as in `sign`.
    """
    if (identity is None) != (issuer is None) or (public_key is not None and identity is not None):
        raise UsageError("a signature is checked with --public-key alone, or with --identity and --issuer together")
    asked = public_key is not None or identity is not None
    if not (release / SIGNATURE).is_file():
        if asked:
            raise VerifyError(f"{SIGNATURE} is missing, so nobody has signed this")
        return "none"
    if not asked:
        return UNCHECKED
    config = _library("verifying").Config().set_hashing_config(_hashing())
    with _sigstore_explained():
        if public_key is not None:
            who = _fingerprint(_public(public_key))
            config.use_elliptic_key_verifier(public_key=public_key)
        else:
            who = f"{identity} by {issuer}"
            config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
    _compare(config, release, who)
    return f"ok ({who})"


def _compare(config: Any, release: Path, who: str) -> None:
    from cryptography.exceptions import InvalidSignature
    from sigstore.errors import VerificationError

    # The last three are how the package meets a signature file that is JSON and no signature.
    wrong = (InvalidSignature, VerificationError, ValueError, LookupError, TypeError, AttributeError)
    try:
        config.verify(release, release / SIGNATURE)
    except wrong as error:
        said = textwrap.shorten(DIGESTS.sub("", str(error)) or "it is forged", 300)
        raise VerifyError(f"{SIGNATURE} is no signature of these files by {who}: {said}") from None


def _hashing() -> Any:
    """Every file but two. Links are followed, as the Hub's cache is made of them; `verify` refuses all others."""
    config = _library("hashing").Config().set_allow_symlinks(True)
    return config.set_ignored_paths(paths=UNSIGNED, ignore_git_paths=False)


def _library(part: str) -> Any:
    try:
        return import_module(f"model_signing.{part}")
    except ImportError as error:
        raise UsageError(f'signatures need packages that are missing ({error}); pip install "hardener[sign]"') from None


def _signer(path: Path) -> str:
    """Whose key a file holds."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path)
    if b"PUBLIC KEY" in data:
        raise UsageError(f"{path} is a public key; a private one signs")
    try:
        key = load_pem_private_key(data, None)
    except TypeError:
        raise UsageError(f"{path} is encrypted; sign with one without a password that only you can read") from None
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(f"{path} is no private key in PEM; {NEW_KEY}") from None
    return _fingerprint(_curve(path, key.public_key()))


def _public(path: Path) -> EllipticCurvePublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return _curve(path, load_pem_public_key(_read(path)))
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(f"{path} is no public key in PEM; the signer makes one with `openssl ec -pubout`") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"the key {path} cannot be read: {error.strerror}") from None


def _curve(path: Path, key: object) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise UsageError(f"{path} is not a key on one of the curves {', '.join(CURVES)}; {NEW_KEY}")
    return key


def _fingerprint(key: EllipticCurvePublicKey) -> str:
    """The key by the hash that `model.sig` names it by, which is that of its PEM file."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return f"key {hashlib.sha256(pem).hexdigest()[:16]}"


def _identity() -> str:
    """The token of the CI job's own identity. Without one the package would ask in a browser."""
    from sigstore.oidc import detect_credential

    with _sigstore_explained():
        token = detect_credential()
    if token is None:
        raise UsageError("there is no identity to sign with; in GitHub Actions give the job `id-token: write`")
    return token


@contextmanager
def _sigstore_explained() -> Iterator[None]:
    from requests import RequestException
    from sigstore.errors import Error
    from sigstore.oidc import ExpiredIdentity

    try:
        yield
    except (Error, ExpiredIdentity, RequestException) as error:
        raise HubError(f"Sigstore: {error}; run the same line again, or sign with a key") from error
