"""Signed bundles: the owner's signature is taken, and no other."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

sys.path.insert(0, str(Path(__file__).parent))
from hostile_bundles import check_answer, copy_bundle, edited, replace_file

from mige_rt.bundle import MANIFEST
from mige_rt.cli import main
from mige_rt.errors import InputError
from mige_rt.signing import SIGNATURE, sign_bundle, verify_bundle


def write_keys(folder: Path, name: str, private: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey) -> tuple[Path, Path]:
    key, public = folder / f"{name}.pem", folder / f"{name}.pub"
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return key, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "author", ed25519.Ed25519PrivateKey.generate())


def refusal(bundle: Path, key: Path) -> str:
    with pytest.raises(InputError) as refused:
        verify_bundle(bundle, key)
    check_answer(str(refused.value))
    return str(refused.value)


def test_a_signed_bundle_is_verified_by_the_commands(keys: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, (key, public) = copy_bundle(tmp_path / "bundle"), keys
    result = CliRunner().invoke(main, ["sign", str(bundle), "--key", str(key)])
    assert result.exit_code == 0 and result.output.strip() == str(bundle / SIGNATURE)
    result = CliRunner().invoke(main, ["verify", str(bundle), "--key", str(public)])
    assert result.exit_code == 0 and "signed it" in result.output
    edited(MANIFEST, source="changed")(bundle)
    assert CliRunner().invoke(main, ["verify", str(bundle), "--key", str(public)]).exit_code == 2


def test_what_was_changed_or_signed_by_another_is_refused(keys: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, (key, public) = copy_bundle(tmp_path / "bundle"), keys
    assert "is not signed" in refusal(bundle, public)
    sign_bundle(bundle, key)
    verify_bundle(bundle, public)
    other = write_keys(tmp_path, "other", ed25519.Ed25519PrivateKey.generate())[1]
    assert "is not a signature of this manifest" in refusal(bundle, other)
    replace_file(bundle / "onnx/denoiser.onnx", b"changed")
    assert "denoiser.onnx was changed" in refusal(bundle, public)
    with pytest.raises(InputError, match=r"denoiser\.onnx was changed"):
        sign_bundle(bundle, key)


@pytest.mark.parametrize("content", [b"", b"AAAA", b"\xff" * 64, b"not base64", b"A" * 20_000])
def test_a_signature_that_is_none_is_refused(content: bytes, keys: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    (bundle / SIGNATURE).write_bytes(content)
    assert SIGNATURE in refusal(bundle, keys[1])


def test_keys_that_are_none_are_refused(keys: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, (key, public) = copy_bundle(tmp_path / "bundle"), keys
    rsa_key, rsa_public = write_keys(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    for wrong in (rsa_public, key, bundle / MANIFEST, tmp_path / "missing"):
        refusal(bundle, wrong)
    for wrong in (rsa_key, public, bundle / MANIFEST, tmp_path / "missing"):
        with pytest.raises(InputError):
            sign_bundle(bundle, wrong)
    assert not (bundle / SIGNATURE).exists()


def test_openssl_makes_the_keys_and_reads_the_signatures(tmp_path: Path) -> None:
    """With the commands that the help names."""
    bundle, key, public = copy_bundle(tmp_path / "bundle"), tmp_path / "key.pem", tmp_path / "key.pub"
    try:
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not here")
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    sign_bundle(bundle, key)
    verify_bundle(bundle, public)
