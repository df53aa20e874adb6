"""Signatures of bundles, made and checked by the library that others use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from typer.testing import CliRunner

from calibrators.errors import InputError
from exporter.cli import app
from exporter.handover import bundle as bundle_module
from exporter.handover.bundle import write_bundle
from exporter.handover.signature import check_signature, sign
from exporter.reporting.schema import validate_report
from tests.exporter.reporting.sample_report import sample_report

GOLDEN = ({"image": np.zeros((1, 2), np.float32)}, {"logits": np.zeros((1, 2), np.float32)})


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bundle_module, "render_html", lambda report: "<!doctype html>")
    files = {"model.onnx": b"the graph"}
    report = validate_report(sample_report(3))
    return write_bundle(tmp_path / "net", files=files, report=report, golden=[GOLDEN], config={"seed": 0})


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A new private and public key as files."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    paths = folder / f"{name}.pem", folder / f"{name}.pub"
    paths[0].write_bytes(private)
    paths[1].write_bytes(public)
    return paths


def test_a_signature_holds_until_a_byte_changes(bundle: Path, tmp_path: Path) -> None:
    private, public = keys(tmp_path, "ours")
    result = CliRunner().invoke(app, ["sign", str(bundle), "--key", str(private)])
    assert result.exit_code == 0, result.output
    signature = tmp_path / "net.sig"
    check_signature(bundle, public, signature)
    with pytest.raises(InputError, match="Do not use"):
        check_signature(bundle, keys(tmp_path, "theirs")[1], signature)
    path = bundle / "model.onnx"
    path.write_bytes(b"the graqh")
    with pytest.raises(InputError, match="not a valid signature"):
        check_signature(bundle, public, signature)
    path.write_bytes(b"the graph")
    (bundle / "more").write_bytes(b"")
    with pytest.raises(InputError, match="not a valid signature"):
        check_signature(bundle, public, signature)


def test_bad_input_is_refused(bundle: Path, tmp_path: Path) -> None:
    private, public = keys(tmp_path, "ours")
    with pytest.raises(InputError, match="inside the bundle"):
        sign(bundle, private, bundle / "net.sig")
    with pytest.raises(InputError, match="elliptic-curve key"):
        sign(bundle, public, tmp_path / "net.sig")
    pem = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "rsa.pem").write_bytes(pem)
    with pytest.raises(InputError, match="elliptic-curve key"):
        sign(bundle, tmp_path / "rsa.pem", tmp_path / "net.sig")
    with pytest.raises(InputError, match="does not exist"):
        sign(bundle, tmp_path / "none.pem", tmp_path / "net.sig")
    result = CliRunner().invoke(app, ["verify", str(bundle), "--signature", "x.sig"])
    assert result.exit_code == 2 and "belong together" in result.stderr
