"""Files in a process of their own: the same numbers as in this one, and every way in which a process can fail."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from calibrators.errors import InputError, ModelError
from runtime_tests.ort.sessions import Model
from runtime_tests.parity.probes import codes_of
from runtime_tests.reference.execute import plan
from runtime_tests.runtimes.ort import OnnxRuntimeSession
from runtime_tests.workers.process import LoadedInWorker, Worker, environment, python_worker
from tests.runtime_tests.reference.programs import emitted, network

HERE = str(onnxruntime.__version__)


def started(name: str = "worker") -> Worker:
    return python_worker(name, PYTHONPATH=":".join(filter(None, sys.path)))


def script(tmp_path: Path, text: str) -> Worker:
    """A worker whose program is `text`."""
    path = tmp_path / "program.py"
    path.write_text(text)
    return Worker([sys.executable, "-P", path], environment(), "program")


def test_a_process_gives_the_bits_of_this_one(tmp_path: Path) -> None:
    result, x = network("mobile", 8)
    onnx.save(emitted("mobile", 8), tmp_path / "model.onnx")
    model, probes = Model(tmp_path / "model.onnx"), [*codes_of(plan(result.program)).values()]
    here = OnnxRuntimeSession(model, probes)
    there = LoadedInWorker(started(), model, probes, threads=1, version=HERE)
    assert there.output_names == here.output_names
    for batch in (x[:5].numpy(), x[5:6].numpy()):
        for ours, theirs in zip(here.run([batch]), there.run([batch]), strict=True):
            assert [(a.dtype, a.shape, a.tobytes()) for a in ours] == [(a.dtype, a.shape, a.tobytes()) for a in theirs]
    folder = there.worker.folder
    assert folder.is_dir()
    process = there.worker._process
    del there
    assert process.poll() is not None and not folder.exists()


def test_names_and_shapes_of_every_kind(tmp_path: Path) -> None:
    """Names that would be no file names, scalars, empty arrays, views and every type of input."""
    value = onnx.helper.make_tensor_value_info
    kinds = {
        "../a/b\\c'\n": np.arange(6, dtype=np.int64).reshape(2, 3).T,
        "é": np.float32(1.5),
        "empty": np.zeros((0, 2), np.uint8),
        "bool": np.array([True, False]),
    }
    types = [onnx.helper.np_dtype_to_tensor_dtype(np.asarray(array).dtype) for array in kinds.values()]
    inputs = [value(name, kind, np.shape(array)) for (name, array), kind in zip(kinds.items(), types, strict=True)]
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name}/out"]) for name in kinds]
    outputs = [value(f"{name}/out", kind, None) for name, kind in zip(kinds, types, strict=True)]
    graph = onnx.helper.make_graph(nodes, "kinds", inputs, outputs)
    model = Model(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9))
    found, probes = LoadedInWorker(started(), model, (), threads=1, version=HERE).run(
        [np.asarray(array) for array in kinds.values()]
    )
    assert probes == []
    for given, returned in zip(kinds.values(), found, strict=True):
        assert returned.dtype == np.asarray(given).dtype
        np.testing.assert_array_equal(returned, given, strict=True)


def test_external_data_travels_with_the_file(tmp_path: Path) -> None:
    x = network("mobile", 8)[1].numpy()
    path = tmp_path / "model.onnx"
    model = onnx.ModelProto()
    model.CopyFrom(emitted("mobile", 8))  # saving puts references in the place of its weights
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    there = LoadedInWorker(started(), Model(path), (), threads=1, version=HERE)
    np.testing.assert_array_equal(there.run([x])[0][0], OnnxRuntimeSession(Model(path), ()).run([x])[0][0])


def test_a_refused_file() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(emitted("mobile", 8))
    model.graph.node[0].op_type = "Unheard"
    with pytest.raises(ModelError, match=r"worker refuses the model: .*Unheard"):
        LoadedInWorker(started(), Model(model), (), threads=1, version=HERE)


def test_another_version_than_the_one_asked_for() -> None:
    with pytest.raises(ModelError, match=rf"reports version {HERE} where 0\.1 is installed"):
        LoadedInWorker(started(), Model(emitted("mobile", 8)), (), threads=1, version="0.1")


def test_no_answer_in_time(tmp_path: Path) -> None:
    worker = script(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(ModelError, match=r"program gave no answer within 0\.2 s"):
        worker.ask({}, within=0.2)
    assert worker._process.wait(10) != 0


def test_a_process_that_ends(tmp_path: Path) -> None:
    worker = script(tmp_path, "import sys; sys.exit('no space for onnxruntime')")
    for _ in range(2):
        with pytest.raises(ModelError, match=r"program ended .*exit status 1 no space for onnxruntime"):
            worker.ask({})


def test_an_answer_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"program answered 'Hello'"):
        script(tmp_path, "print('Hello')").ask({})


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"program cannot be started: .*nowhere"):
        Worker([tmp_path / "nowhere"], environment(), "program")


def test_what_a_process_inherits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/elsewhere")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("SOME_PROXY", "kept")
    found = environment(PYTHONPATH=Path("/site"))
    assert found["PYTHONPATH"] == str(Path("/site")) and found["SOME_PROXY"] == "kept"
    assert not {"PYTHONHOME", "OPENBLAS_CORETYPE"} & found.keys()
