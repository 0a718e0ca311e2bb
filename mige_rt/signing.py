"""Signatures of bundles: Ed25519 over manifest.json, which has the hashes of what a bundle runs, the plans apart.

The keys are PEM files, as OpenSSL makes them:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub
"""

import base64
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from mige_rt.atomic import atomic_file
from mige_rt.bundle import MANIFEST, SIGNATURE, check_files, read_manifest
from mige_rt.errors import InputError

LARGEST = 10_000  # bytes of a key or a signature


def sign_bundle(bundle: Path, key: Path) -> Path:
    """Check a bundle's files, and sign its manifest.

    Args:
        bundle: The bundle; an older signature is replaced.
        key: A private key, without a password.

    Returns:
        The signature's file.

    Raises:
        InputError: The bundle is damaged, or the key is none.
    """
    check_files(bundle, read_manifest(bundle), everything=True)
    try:
        private = load_pem_private_key(_read(key), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{key} is no private key of Ed25519 in PEM, without a password; {_KEYS}") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise InputError(f"{key} is a private key of another kind than Ed25519; {_KEYS}")
    path = bundle / SIGNATURE
    signature = base64.b64encode(private.sign((bundle / MANIFEST).read_bytes()))
    with atomic_file(path) as temporary:
        temporary.write_bytes(signature + b"\n")
    return path


def verify_bundle(bundle: Path, key: Path) -> None:
    """Check that a bundle is as the owner of a key signed it.

    Args:
        bundle: The bundle.
        key: The public key.

    Raises:
        InputError: It has no signature, or one of another key or manifest, or a file was changed since.
    """
    try:
        public = load_pem_public_key(_read(key))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{key} is no public key of Ed25519 in PEM; {_KEYS}") from error
    if not isinstance(public, Ed25519PublicKey):
        raise InputError(f"{key} is a public key of another kind than Ed25519; {_KEYS}")
    path = bundle / SIGNATURE
    if not path.is_file():
        raise InputError(f"{bundle} is not signed: {SIGNATURE} is missing; ask its author for a signed one")
    manifest = _read(bundle / MANIFEST, 16 << 20)
    try:
        public.verify(base64.b64decode(_read(path).strip(), validate=True), manifest)
    except (InvalidSignature, ValueError) as error:
        raise InputError(
            f"{path} is not a signature of this manifest by the owner of {key}: do not use this bundle"
        ) from error
    check_files(bundle, read_manifest(bundle), everything=True)


_KEYS = "make one with: openssl genpkey -algorithm ed25519 -out key.pem; openssl pkey -in key.pem -pubout -out key.pub"


def _read(path: Path, largest: int = LARGEST) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}): give a file that is there") from error
    if len(content) > largest:
        raise InputError(f"{path} has more than {largest} bytes: a key, a signature or a manifest is expected")
    return content
