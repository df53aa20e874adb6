"""The whole way on small networks: bundle, proof, determinism, verification, and what bad input leaves behind."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from calibrators.errors import DataError, InputError, ModelError
from exporter import pipeline
from exporter.checks import checked_data
from exporter.config import ExportConfig
from exporter.emission import packing
from exporter.handover.bundle import read_golden, verify_manifest
from exporter.inputs.open import open_data
from exporter.pipeline import export
from exporter.verify import verify
from runtime_tests.ort.sessions import session
from tests.support.networks import NETWORKS, ThinBlocks, build, randomize

EXACT = ("residual", "pooled", "mlp")
"""Networks in which every operator between quantizers has an integer kernel."""


def batches(name: str, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Labelled batches; the labels are the float model's own answers."""
    model, _ = build(name)
    data = [build(name, seed=seed)[1] for seed in range(count)]
    return [(x, model(x).argmax(1)) for x in data]


def run(name: str, out: Path, **settings: Any) -> Any:
    settings = {"method": "mse", "latency_runs": 0, "parity_samples": 24} | settings
    return export(build(name)[0], batches(name), eval_data=batches(name), out=out, **settings)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "out"
    run("pooled", out, latency_runs=3, parity_samples=16, reference_samples=18)
    return out


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a network with float operators."""
    out = tmp_path_factory.mktemp("transformer") / "out"
    run("transformer", out)
    return out


@pytest.mark.parametrize("bits", [8, 4], ids=["w8a8", "w4a4"])
@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_runtime_computes_the_reference(name: str, bits: int, tmp_path: Path) -> None:
    report = run(name, tmp_path / "out", weight_bits=bits, activation_bits=bits)
    optimized = report["parity"]["optimized"]
    assert report["verdict"] == "pass"
    assert optimized["kernel_mismatched"] == 0 and optimized["kernel_values"] > 0
    if name in EXACT:
        assert optimized["mismatched"] == 0 and optimized["outputs_identical"]
        assert report["coverage"]["integer_macs"] == 1.0
    assert report["lint"] == []
    assert report["accuracy"]["samples"] == 24 and report["accuracy"]["metric"] == "top1"


def test_bundle_holds_what_it_promises(bundle: Path) -> None:
    names = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert {"model.onnx", "report.json", "report.html", "junit.xml", "manifest.json"} <= names
    assert "golden/test_data_set_0/input_0.pb" in names and "golden/reference.pt2" in names
    verify_manifest(bundle)
    ((inputs, outputs),) = read_golden(bundle)
    found = session(bundle / "model.onnx").run(list(outputs), inputs)
    assert all(np.array_equal(a, b) for a, b in zip(outputs.values(), found, strict=True))


def test_report_is_complete(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    assert report["schema"] == 1
    assert set(report["time_s"]) == {"capture", "fold", "calibrate", "emit", "validate"}
    assert {gate["name"] for gate in report["gates"]} >= {"kernel_mismatched", "lint_errors"}
    assert report["data"]["calibration"]["samples"] == report["accuracy"]["samples"] == 24
    assert report["parity"]["optimized"]["samples"] == 16 and report["accuracy"]["reference_samples"] == 18
    assert report["latency_ms"]["runs"] == 3 and report["latency_ms"]["stopped"] == "runs"
    sites = {entry["site"] for entry in report["layers"]}
    assert {"x", "stem.weight", "sigmoid"} <= sites
    assert all(sum(e["floats"]) == sum(e["codes"]) > 0 for e in report["layers"])


def test_same_input_same_bytes(bundle: Path, tmp_path: Path) -> None:
    run("pooled", tmp_path / "again", latency_runs=3)
    for file in ("model.onnx", "golden/reference.pt2", "golden/test_data_set_0/output_0.pb"):
        assert (bundle / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


@pytest.mark.parametrize(("kind", "words"), [("bundle", "bit-identical"), ("transformer", "absolute tolerance 0.")])
def test_golden_outputs_say_how_close_they_have_to_be(kind: str, words: str, request: pytest.FixtureRequest) -> None:
    out: Path = request.getfixturevalue(kind)
    tensor = onnx.load_tensor(out / "golden/test_data_set_0/output_0.pb")
    assert tensor.doc_string.startswith(words)
    assert f"| `{tensor.name}` | {tensor.doc_string} |" in (out / "golden/README.md").read_text()
    assert [output["name"] for output in json.loads((out / "report.json").read_text())["golden"]] == [tensor.name]
    assert verify(out)["verdict"] == "pass"


def test_verify_holds_outputs_to_the_tolerance_that_the_bundle_states(
    transformer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stated,) = (output["tolerance"] for output in json.loads((transformer / "report.json").read_text())["golden"])
    ((inputs, outputs),) = read_golden(transformer)
    for factor, verdict in ((0.9, "pass"), (1.1, "fail")):
        moved = {name: array + np.float32(factor * stated) for name, array in outputs.items()}
        monkeypatch.setattr(sys.modules["exporter.verify"], "read_golden", lambda _, moved=moved: [(inputs, moved)])
        assert verify(transformer)["verdict"] == verdict


def test_the_oldest_release_is_stated_everywhere(bundle: Path) -> None:
    report, manifest = (json.loads((bundle / name).read_text()) for name in ("report.json", "manifest.json"))
    metadata = {entry.key: entry.value for entry in onnx.load(bundle / "model.onnx").metadata_props}
    assert metadata["intact.min_onnxruntime"] == manifest["min_onnxruntime"] == "1.18"
    assert report["emission"]["min_onnxruntime"] == "1.18"
    assert "1.18 or newer" in (bundle / "report.html").read_text()


def test_four_bits_load_where_they_have_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "OVERHEAD", 0)
    settings: dict[str, Any] = {"weight_bits": 4, "activation_bits": 4, "latency_runs": 0, "first_last_bits": None}
    for release, stated in ((None, "1.23"), ("1.19", "1.18")):
        report = run("mlp", tmp_path / stated, min_ort=release, **settings)
        assert report["verdict"] == "pass"
        assert report["emission"]["min_onnxruntime"] == stated
    codes = [read_golden(tmp_path / stated)[0][1] for stated in ("1.23", "1.18")]
    assert all(np.array_equal(a, b) for a, b in zip(*(each.values() for each in codes), strict=True))


def test_a_release_that_the_file_cannot_have_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"weight_only": True, "block_size": 16, "min_ort": "1.18"}
    with pytest.raises(InputError, match=r"DequantizeLinear with blocks at .* needs onnxruntime 1\.19"):
        run("transformer", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_weights_that_stay_int8_against_the_request_are_named(tmp_path: Path) -> None:
    report = run("mlp", tmp_path / "out", weight_bits=4, weight_storage="int4", latency_runs=0)
    assert any("stored as int8 although weight_storage is 'int4'" in text for text in report["warnings"])


def test_verify_proves_again(bundle: Path) -> None:
    report = verify(bundle)
    assert report["verdict"] == "pass"
    assert report["parity"]["optimized"]["values"] > 0
    assert report["parity"]["optimized"]["mismatched"] == 0


class Named(nn.Module):
    """Returns three values under the given names, one of them twice, and its input."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.conv, self.head, self.names = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), names

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.conv(x))
        z = self.head(y)
        return dict(zip(self.names, (z, y, y, x, z), strict=False))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(("only",), ["only"], id="one"),
        pytest.param(("result", "again", "inner", "given", "last"), [], id="repeated-values"),
        pytest.param(
            ("output_1", "output_0", "a/b", "c d", "x"), ["output_1", "output_0", "a/b", "c d", "x_"], id="odd"
        ),
        pytest.param(
            ("conv.bias", "x_quantized", "head.weight_quantized", "", "relu"),
            ["conv.bias_", "x_quantized_", "head.weight_quantized_", "_", "relu"],
            id="names-of-other-values",
        ),
    ],
)
def test_verify_knows_outputs_by_their_names(names: tuple[str, ...], expected: list[str], tmp_path: Path) -> None:
    data = [torch.randn(4, 3, 6, 6) for _ in range(2)]
    report = export(randomize(Named(names)), data, method="mse", out=tmp_path / "out", latency_runs=0)
    assert [output["name"] for output in report["model"]["outputs"]] == (expected or list(names))
    assert report["verdict"] == verify(tmp_path / "out")["verdict"] == "pass"


def test_verify_notices_a_changed_weight(tmp_path: Path) -> None:
    """Even when the manifest was made to match: the reference program still knows the right codes."""
    out = tmp_path / "out"
    run("residual", out)
    model = onnx.load(out / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == "stem.weight_quantized")
    codes = onnx.numpy_helper.to_array(tensor).copy()
    codes[0, 0, 0, 0] ^= 1
    tensor.raw_data = codes.tobytes()
    onnx.save(model, out / "model.onnx")
    with pytest.raises(InputError, match=r"model\.onnx"):
        verify(out)
    reseal(out, "model.onnx")
    report = verify(out)
    assert report["verdict"] == "fail"
    assert report["parity"]["optimized"]["kernel_mismatched"] > 0


@pytest.mark.parametrize("name", ["bias_quantized", "bias_scale", "weight_quantized", "weight_scale"])
def test_verify_compares_weights_and_biases_as_stored(bundle: Path, tmp_path: Path, name: str) -> None:
    """One step of one constant, which no golden input needs to bring to light, fails and names the layer."""
    out = tmp_path / "out"
    shutil.copytree(bundle, out)
    model = onnx.load(out / "model.onnx")
    tensor = next(t for t in model.graph.initializer if t.name.endswith(name))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] = np.nextafter(values.flat[0], np.float32(1)) if values.dtype == np.float32 else values.flat[0] ^ 1
    tensor.raw_data = values.tobytes()
    onnx.save(model, out / "model.onnx")
    reseal(out, "model.onnx")
    report = verify(out)
    assert report["verdict"] == "fail"
    site = tensor.name.rpartition("_")[0]
    found = {node["site"]: node for node in report["parity"]["optimized"]["nodes"]}[site]
    assert found["mismatched"] >= 1 and found["site"] == site


@pytest.mark.parametrize("change", [lambda a: a[:, :1], lambda a: a.astype(np.int64), lambda a: a[0]])
def test_verify_refuses_golden_inputs_that_the_model_does_not_take(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]
) -> None:
    ((inputs, outputs),) = read_golden(bundle)
    changed = {name: change(array) for name, array in inputs.items()}
    monkeypatch.setattr(sys.modules["exporter.verify"], "read_golden", lambda _: [(changed, outputs)])
    with pytest.raises(InputError, match="which its model does not take"):
        verify(bundle)


def test_verify_notices_golden_outputs_of_something_else(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(bundle, out)
    name = "golden/test_data_set_0/output_0.pb"
    tensor = onnx.TensorProto.FromString((out / name).read_bytes())
    values = onnx.numpy_helper.to_array(tensor)
    (out / name).write_bytes(onnx.numpy_helper.from_array(values * 1.01, tensor.name).SerializeToString())
    reseal(out, name)
    assert verify(out)["verdict"] == "fail"
    (out / name).write_bytes(onnx.numpy_helper.from_array(values, "another").SerializeToString())
    reseal(out, name)
    with pytest.raises(InputError, match="golden outputs"):
        verify(out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": {"gates": 3}}, "config: Value error, gates is 3"),
        ({"config": {"gates": [3]}}, r"gates is \[3\], not a list of texts"),
        ({"config": {"threads": "x"}}, "threads is 'x', not a positive number"),
        ({"golden": []}, "tolerance of 0 golden outputs, but the bundle has 1"),
    ],
)
def test_verify_refuses_a_report_that_it_cannot_repeat(
    bundle: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(bundle, out)
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps(report | change))
    reseal(out, "report.json")
    with pytest.raises(InputError, match=words):
        verify(out)


def test_verify_repeats_a_report_without_settings(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(bundle, out)
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps(report | {"config": {}}))
    reseal(out, "report.json")
    assert verify(out)["verdict"] == "pass"


def reseal(out: Path, name: str) -> None:
    """Make the manifest say that a changed file is as it should be."""
    manifest = json.loads((out / "manifest.json").read_text())
    content = (out / name).read_bytes()
    manifest["files"][name].update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_failed_gate_writes_the_bundle_and_says_so(tmp_path: Path) -> None:
    report = run("mlp", tmp_path / "out", gates=("size_ratio<=0.0001",))
    assert report["verdict"] == "fail"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verdict"] == "fail"


def test_model_with_a_fixed_batch(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y.flatten(1) if x.shape[0] == 1 else y.flatten(1) * 2

    data = [torch.randn(4, 1, 5, 5) for _ in range(2)]
    report = export(randomize(Fixed()), data, out=tmp_path / "out", latency_runs=0)
    assert report["verdict"] == "pass"
    assert any("batch is fixed at 1" in warning for warning in report["warnings"])
    assert report["model"]["inputs"][0]["shape"] == [1, 1, 5, 5]
    assert report["data"]["calibration"]["samples"] == 8


def test_layers_that_are_faster_in_float_stay_there_and_are_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [torch.randn(4, 3, 48, 48)]
    report = export(ThinBlocks(), data, out=tmp_path / "out", method="minmax", parity_samples=4, latency_runs=0)
    assert report["verdict"] == "pass"
    assert any("left in float, which is faster" in warning for warning in report["warnings"])
    assert any(rule["match"] == "placement = fastest" and rule["layers"] for rule in report["rules"])
    assert 0 < report["coverage"]["integer_macs"] < 1


def test_exported_program_with_a_fixed_batch(tmp_path: Path) -> None:
    model, x = build("residual", batch=3)
    program = torch.export.export(model, (x,))
    report = export(program, [torch.randn(7, 3, 9, 9)], out=tmp_path / "out", latency_runs=2)
    assert report["verdict"] == "pass"
    assert report["latency_ms"]["batch"] == 3
    assert report["data"]["calibration"]["samples"] == 6  # the incomplete rest is dropped
    assert any("what is over is not used (1 sample)" in warning for warning in report["warnings"])
    assert sum(report["time_shares"][kind] for kind in ("integer", "float", "quantizers", "moves")) == pytest.approx(1)
    assert verify(tmp_path / "out")["verdict"] == "pass"


def test_fixed_batches_are_made_of_any_others(tmp_path: Path) -> None:
    """Smaller and larger batches of data are put together; labels go along."""
    model, x = build("residual", batch=5)
    program = torch.export.export(model, (x,))
    data = list(torch.randn(16, 3, 9, 9).split([2, 7, 1, 6]))
    labels = [model(batch).argmax(1) for batch in data]
    report = export(program, data, eval_data=list(zip(data, labels, strict=True)), out=tmp_path / "out", latency_runs=0)
    assert report["data"]["calibration"]["samples"] == report["accuracy"]["samples"] == 15
    assert report["accuracy"]["float"] == 1.0


def test_fixed_batches_are_never_cut(tmp_path: Path) -> None:
    """Neither the samples to compare nor the golden ones divide a batch of five."""
    model, x = build("residual", batch=5)
    program = torch.export.export(model, (x,))
    report = export(program, [torch.randn(10, 3, 9, 9)], out=tmp_path / "out", latency_runs=0, parity_samples=6)
    assert report["verdict"] == "pass"
    assert report["parity"]["optimized"]["samples"] == 10
    assert len(read_golden(tmp_path / "out")[0][0]["x"]) == 5


def test_excluded_layer_stays_in_float(tmp_path: Path) -> None:
    report = run("residual", tmp_path / "out", exclude=("depthwise",))
    assert [node["op"] for node in report["coverage"]["float_nodes"] if node["macs"]] == ["Conv"]
    assert report["verdict"] == "pass"


def test_an_excluded_transposed_convolution_stays_in_float(tmp_path: Path) -> None:
    """It is written as a convolution whose weights the runtime would quantize by itself: the file must prevent that."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3, 2), nn.Conv2d(3, 2, 1)))
    x = torch.randn(8, 3, 8, 8)
    report = export(model, [x], eval_data=[x], out=tmp_path / "out", latency_runs=0, exclude=("2",))
    assert report["verdict"] == "pass"
    assert report["parity"]["optimized"]["max_lsb"] <= 1
    assert [node["op"] for node in report["coverage"]["float_nodes"] if node["macs"]] == ["Conv"]


def bad_batches(kind: str) -> Any:
    x = torch.randn(4, 3, 9, 9)
    holed = x.clone()
    holed[1, 0, 0, 0] = float("nan")
    return {
        "empty": [],
        "nan": [x, holed],
        "shape": [x, torch.randn(4, 3, 8, 9)],
        "dtype": [x, x.to(torch.int64)],
        "channels": [torch.randn(4, 2, 9, 9)],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        pytest.param("empty", DataError, "no batches", id="no-batches"),
        pytest.param("nan", DataError, "NaN", id="nan"),
        pytest.param("shape", DataError, "shape", id="varying-shapes"),
        pytest.param("dtype", DataError, "int64", id="varying-dtypes"),
        pytest.param("channels", ModelError, "does not run on inputs of shape", id="does-not-fit-the-model"),
    ],
)
def test_bad_data_leaves_nothing(kind: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        export(build("residual")[0], bad_batches(kind), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        pytest.param(torch.full((4,), 9), "classes 0..4|model of 5 classes", id="out-of-range"),
        pytest.param(torch.full((4,), -2), "negative", id="negative"),
        pytest.param(torch.full((4,), -1), "no sample has a label", id="none"),
        pytest.param(torch.rand(4), "integers", id="not-integers"),
    ],
)
def test_bad_labels_leave_nothing(labels: Tensor, message: str, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 9, 9)
    with pytest.raises(DataError, match=message):
        export(build("residual")[0], [x], eval_data=[(x, labels)], out=tmp_path / "out", gates=("accuracy_drop<=1",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("labels", [torch.full((4,), -1), torch.rand(4), torch.zeros(4, 9, 9)])
def test_labels_that_no_gate_needs_are_left_out_with_a_note(labels: Tensor) -> None:
    x = torch.randn(4, 3, 9, 9)
    _, evaluation = checked_data(open_data([x]), open_data([(x, labels)]), ExportConfig(), [])
    assert evaluation is not None
    assert evaluation.example().labels is None
    assert any("labels of eval_data are not used" in note for note in evaluation.notes)


@pytest.mark.parametrize(("given", "is_scored"), [(64, False), (512, False), (64, True)])
def test_samples_of_the_reference_without_evaluation_are_noted(given: int, is_scored: bool) -> None:
    x = torch.randn(4, 3, 9, 9)
    config = ExportConfig(reference_samples=given)
    calibration, _ = checked_data(open_data([x]), open_data([x]) if is_scored else None, config, [])
    noted = "reference_samples has no effect without eval_data: nothing is scored" in calibration.notes
    assert noted == (given == 64 and not is_scored)


def test_gate_that_needs_labels_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs labels"):
        x = torch.randn(4, 3, 9, 9)
        export(build("residual")[0], [x], eval_data=[x], out=tmp_path / "out", gates=("accuracy_drop<=0.01",))


def test_existing_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        run("mlp", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_interrupt_half_way_leaves_nothing(tmp_path: Path) -> None:
    def stream() -> Iterator[Tensor]:
        yield torch.randn(4, 3, 9, 9)
        if len(passes) > 1:
            raise KeyboardInterrupt
        passes.append(1)
        yield torch.randn(4, 3, 9, 9)

    passes: list[int] = [1]
    with pytest.raises(KeyboardInterrupt):
        export(build("residual")[0], stream, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_failure_of_the_proof_itself_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "Proof", broken)
    with pytest.raises((InputError, OSError), match="No space left"):
        run("mlp", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
