"""The worker for node, with a module in the place of onnxruntime-web that returns its inputs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibrators.errors import ModelError
from runtime_tests.ort.sessions import Model
from runtime_tests.runtimes.web import SCRIPT
from runtime_tests.workers.process import LoadedInWorker, Worker, environment
from runtime_tests.workers.runtime import Array

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")

ECHO = """
export const env = { versions: { web: '1.2.3' }, wasm: {} };
export class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } }
export const InferenceSession = {
  create: async (model, options) => {
    console.log('a greeting on standard output');
    const { disable_double_qdq_remover: pinned } = options.extra.session;
    if (pinned !== '1' || options.executionProviders[0] !== 'wasm' || !model.length) throw new Error('not pinned');
    return { run: async (feeds, names) => {
      if (feeds['x'].dims[0] === 99) throw new Error('no kernel for 99');
      return Object.fromEntries(names.map((name, i) => [name, Object.values(feeds)[i]]));
    } };
  },
};
"""


def loaded(folder: Path, arrays: dict[str, Array], version: str = "1.2.3") -> LoadedInWorker:
    """A model whose outputs are its inputs, in node."""
    module = folder / "onnxruntime-web" / "dist" / "ort.node.min.mjs"
    module.parent.mkdir(parents=True, exist_ok=True)
    module.write_text(ECHO)
    value, types = onnx.helper.make_tensor_value_info, onnx.helper.np_dtype_to_tensor_dtype
    inputs = [value(name, types(array.dtype), None) for name, array in arrays.items()]
    outputs = [value(f"{name}/out", types(array.dtype), None) for name, array in arrays.items()]
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name}/out"]) for name in arrays]
    model = Model(onnx.helper.make_model(onnx.helper.make_graph(nodes, "echo", inputs, outputs)))
    worker = Worker([str(NODE), SCRIPT, folder], environment(), "web")
    return LoadedInWorker(worker, model, (), threads=1, version=version)


def test_arrays_of_every_type_and_shape_come_back(tmp_path: Path) -> None:
    numbers = np.arange(-6, 6)
    arrays = {
        "x": numbers.astype(np.float32).reshape(1, 3, 4) / 7,
        "transposed": numbers.astype(np.float64).reshape(3, 4).T,
        "scalar": np.float32(np.inf).reshape(()),
        "empty": np.zeros((0, 2), np.uint8),
        "bool": numbers > 0,
        **{
            kind: numbers.astype(kind)
            for kind in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
        },
    }
    session = loaded(tmp_path, arrays)
    for _ in range(2):
        found, probes = session.run(list(arrays.values()))
        assert probes == []
        for given, returned in zip(arrays.values(), found, strict=True):
            assert returned.dtype == given.dtype
            np.testing.assert_array_equal(returned, given, strict=True)


def test_what_the_runtime_refuses_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="web refuses the model: no kernel for 99"):
        loaded(tmp_path, {"x": np.zeros(1, np.float32)}).run([np.zeros(99, np.float32)])
    with pytest.raises(ModelError, match="inputs of type <f2 cannot be passed"):
        loaded(tmp_path, {"x": np.zeros(1, np.float16)}).run([np.zeros(1, np.float16)])


def test_another_version_than_the_installed_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"reports version 1\.2\.3 where 1\.30\.0 is installed"):
        loaded(tmp_path, {"x": np.zeros(1, np.float32)}, version="1.30.0")


def test_without_the_module(tmp_path: Path) -> None:
    session = Worker([str(NODE), SCRIPT, tmp_path], environment(), "web")
    with pytest.raises(ModelError, match=r"web ended without an answer .*Cannot find module"):
        session.ask({})
