"""Bundles of earlier formats.

bundle_format_1.zip was made at commit 74bb6fa by
    intact export net.py:build --data net.py:data --out out --method minmax --set latency_runs=0 --set simplify=false
from Linear(4, 4), ReLU, Linear(4, 2) and four samples: all of its operators have integer kernels on every processor.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from calibrators.errors import InputError
from exporter.handover.bundle import FORMAT, verify_manifest
from exporter.handover.check import main
from exporter.verify import verify


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with zipfile.ZipFile(Path(__file__).parent / "bundle_format_1.zip") as archive:
        archive.extractall(tmp_path / "old")
    return tmp_path / "old"


def test_a_bundle_of_the_first_format_is_proved_again(old: Path) -> None:
    found = verify(old)
    assert found["verdict"] == "pass" and found["accuracy_standing"] == "unmeasured"
    assert found["parity"]["optimized"]["outputs_identical"] and found["parity"]["optimized"]["values"] == 32
    assert "accuracy" not in {gate["name"].partition("_")[0] for gate in found["gates"]}
    assert main(["--bundle", str(old)]) == 0


@pytest.mark.parametrize("format", [FORMAT + 1, 0, "2", None])
def test_a_format_that_is_not_known_says_so(old: Path, format: object) -> None:
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps(manifest | {"format": format}))
    with pytest.raises(
        InputError, match=rf"has bundle format {format!r}, and this version of intact reads 1 to {FORMAT}"
    ):
        verify_manifest(old)
