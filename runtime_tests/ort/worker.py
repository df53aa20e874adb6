"""Open a file in onnxruntime and run batches: in this process, or as a script for a process on another processor.

As a script it needs numpy and onnxruntime only, from version 1.19 on. It answers one line of JSON on standard input
with one on standard output, `{"error": ...}` where it cannot. Arrays pass as .npy files in the folder `argv[1]`.

    {"model": "model.onnx", "inputs": [...], "outputs": [...], "threads": 1, "entries": {...}} -> {"version": "1.32.0"}
    "provider": null, or {"name": ..., "library": "/path", "options": {...}}: a plug-in that has to run every node
    {"batch": true}: reads in_0.npy, in_1.npy, ...; writes out_0.npy, out_1.npy, ...           -> {}

Must not know: the project, which it cannot import as a script.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

__all__ = ["EXACT", "LAYOUT_OPTIMIZERS", "PINNED", "session_options"]

EXACT = {"session.disable_double_qdq_remover": "1", "session.qdq_matmulnbits_accuracy_level": "0"}
"""Entries without which numbers change: by default two QDQ pairs in a row are merged into one with other parameters,
and weight-only MatMuls quantize their activations on the fly."""

PINNED = {**EXACT, "session.optimized_model_external_initializers_file_name": "weights.bin"}
"""Entries of every session. The last one keeps optimized models above 2 GB writable."""

LAYOUT_OPTIMIZERS = ("NchwcTransformer",)
LOG_FATAL = 4
"""Errors are raised; what is logged of them besides is for nobody."""


def session_options(
    *,
    optimized: bool = True,
    threads: int = 1,
    save_optimized: Path | None = None,
    entries: Mapping[str, str] = PINNED,
) -> ort.SessionOptions:
    """Return the options of a session: deterministic, silent below errors, everything that changes a number pinned.

    optimized:      all graph optimizations (integer kernels), else none (QDQ executed literally in float32).
    save_optimized: file that receives the graph as it is executed; large initializers go to weights.bin beside it.
    """
    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = LOG_FATAL
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def _register(options: ort.SessionOptions, provider: Mapping[str, Any]) -> None:
    """Let an execution provider of a library of its own run every node, or refuse the file."""
    ort.register_execution_provider_library(provider["name"], provider["library"])
    devices = [device for device in ort.get_ep_devices() if device.ep_name == provider["name"]]
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(devices[:1], dict(provider["options"]))


class _Opened:
    """A session that reads its inputs from the folder and writes its outputs there."""

    def __init__(self, folder: Path, request: Mapping[str, Any]) -> None:
        self.folder, self.inputs, self.outputs = folder, request["inputs"], request["outputs"]
        options = session_options(threads=request["threads"], entries=request["entries"])
        path = str(folder / request["model"])
        if request["provider"]:
            _register(options, request["provider"])
            self.session = ort.InferenceSession(path, options)
        else:
            self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self) -> None:
        feeds = {name: np.load(self.folder / f"in_{index}.npy") for index, name in enumerate(self.inputs)}
        for index, array in enumerate(self.session.run(self.outputs, feeds)):
            np.save(self.folder / f"out_{index}.npy", array)


class _Server:
    """Answers requests, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: _Opened | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a request and return what to answer."""
        if self.opened is not None:
            self.opened.run()
            return {}
        self.opened = _Opened(self.folder, request)
        return {"version": ort.__version__}


def _serve() -> None:
    """Answer until standard input ends; whatever else prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    server = _Server(Path(sys.argv[1]))
    for line in sys.stdin:
        try:
            answer = server.answer(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
