"""Networks with many weights: one copy of each, data outside of protobuf, and the same bytes as those of small ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from calibrators import calibrate
from calibrators.grid import numerics
from calibrators.grid.limits import Limits, coarsened, pairings, within
from calibrators.grid.spec import QParams, QuantSpec
from calibrators.placement.layer_rules import LayerRule
from calibrators.placement.place import PlacementOptions
from exporter import capture, export, fold
from exporter.emission import build_model
from exporter.emission.build_model import emit
from exporter.verify import verify
from runtime_tests.ort.sessions import session
from tests.support.networks import build, randomize

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


def available() -> int:
    """Bytes of memory that processes can still take."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), 0)


def pointers(values: list[Tensor]) -> set[int]:
    return {value.data_ptr() for value in values}


def test_weights_that_nothing_changes_are_there_once() -> None:
    model, x = randomize(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))), torch.randn(8, 6)
    folded = fold(capture(model, x))
    assert pointers(list(folded.parameters())) == pointers(list(model.parameters()))
    result = calibrate(folded, [x], method="minmax")
    codes = pointers([coded.codes for coded in result.weights.values()])
    assert codes <= pointers(list(result.program.buffers()))


def test_a_tensor_that_is_a_part_of_a_larger_one_is_copied() -> None:
    model, x = nn.Linear(6, 9), torch.randn(8, 6)
    model.weight = nn.Parameter(torch.randn(9, 12)[:, 3:9])
    (weight,) = [p for p in fold(capture(model, x)).parameters() if p.ndim == 2]
    assert weight.untyped_storage().nbytes() == weight.nbytes
    assert torch.equal(weight, model.weight)


SYMMETRIC = QuantSpec(bits=8, signed=True, symmetric=True, axis=0, narrow=True)


@pytest.mark.parametrize(
    "spec",
    [SYMMETRIC, QuantSpec(bits=8, signed=True, symmetric=True), QuantSpec(bits=4, axis=0, block_size=4)],
    ids=["channel", "tensor", "block"],
)
def test_few_rows_at_a_time_give_the_same_codes(
    spec: QuantSpec, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(7, 10, generator=generator)
    shape = {"channel": (7,), "tensor": (), "block": (7, 3)}[spec.granularity]
    qparams = QParams(torch.rand(shape, generator=generator) + 0.02, torch.zeros(shape, dtype=torch.int32), spec)
    pairs = Limits(partners=pairings(weight.shape), pair_lowest=-30, pair_highest=30)

    def made() -> list[Tensor]:
        codes = numerics.quantize(weight, qparams)
        if spec.block_size is not None:
            return [codes]
        return [codes, within(codes, weight, qparams, pairs), coarsened(weight, qparams, pairs).scale]

    whole = made()
    monkeypatch.setattr(numerics, "BLOCK", 20)
    assert len([*numerics.by_rows(weight, qparams)]) == 4
    parts = made()
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_data_outside_of_protobuf_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("transformer", batch=16)
    reports = [export(model, [x], out=tmp_path / "inside", method="minmax", latency_runs=0)]
    monkeypatch.setattr(build_model, "LARGE_WEIGHT", 0)
    monkeypatch.setattr(build_model, "FLOAT_DATA_ABOVE", 0)
    reports.append(export(model, [x], out=tmp_path / "apart", method="minmax", latency_runs=0))
    files = [(tmp_path / name / "model.onnx").read_bytes() for name in ("inside", "apart")]
    assert files[0] == files[1]
    assert [report["simplifier"]["applied"] for report in reports] == [True, True]
    inside, apart = (report["size"]["float_bytes"] for report in reports)
    assert inside < apart < 2 * inside  # the places of the data


def test_a_bundle_with_external_data_is_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_model, "EXTERNAL_DATA_ABOVE", 100)
    model, x = build("transformer", batch=16)
    report = export(model, [x], out=tmp_path / "out", method="minmax", latency_runs=0)
    assert report["verdict"] == "pass"
    files = [tmp_path / "out" / name for name in ("model.onnx", "model.onnx.data")]
    assert report["size"]["bytes"] == sum(path.stat().st_size for path in files)
    assert verify(tmp_path / "out")["verdict"] == "pass"


@pytest.mark.slow
def test_a_file_above_two_gigabytes_computes_the_calibrated_integers(tmp_path: Path) -> None:
    """A layer of 2.2 GB stays in float, as that of its integers would need 9 GB of weights."""
    if available() < 13 * GIB:
        pytest.skip(f"{available() / GIB:.1f} GiB of memory are free, and 13 are needed")
    width = 23_500
    layers = nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 8)
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 16)
    with torch.no_grad():
        graph = fold(capture(model, x))
        options = PlacementOptions(layers=(LayerRule(match="2", float=True),))
        result = calibrate(graph, [x], method="minmax", placement=options)
        emit(result, tmp_path / "model.onnx")
        expected = result.program(x)[0].numpy()
    assert (tmp_path / "model.onnx.data").stat().st_size > 2**31
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    [found] = session(tmp_path / "model.onnx", optimized=False).run(None, {"input": x.numpy()})
    assert np.allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_stages_take_twice_the_memory_of_the_weights(tmp_path: Path) -> None:
    """What does not grow with the weights takes up to 64 MiB."""
    command = [sys.executable, "benchmarks/large.py", "--width", "1024", "--layers", "6", "--method", "minmax"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    weights = float(done.stdout.split()[1])
    peaks = {words[0]: float(words[1]) for words in map(str.split, done.stdout.splitlines()[2:])}
    assert set(peaks) >= {"capture", "fold", "calibrate", "emit"}, done.stdout
    for stage in ("capture", "fold", "calibrate", "emit"):
        assert peaks[stage] <= 2 * weights + 64, done.stdout
