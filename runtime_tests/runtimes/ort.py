"""onnxruntime in this process, or another version of it in a process of its own (`ort==1.19.2`).

Must not know: the reference.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnxruntime

from calibrators.errors import InputError
from runtime_tests.ort.sessions import Model, run, session
from runtime_tests.workers.install import Component, PipPackages
from runtime_tests.workers.process import LoadedInWorker, python_worker
from runtime_tests.workers.runtime import Array, Artifact, Loaded, Runtime

__all__ = ["RUNTIME", "OnnxRuntimeSession"]


class OnnxRuntimeSession:
    """A session in this process.

    optimized: with all optimizations on, as files are deployed, or with none.
    """

    name = "onnxruntime"
    kernel_rate, float_factor = 0.0, 1.0

    def __init__(self, model: Model, probes: Sequence[str], *, optimized: bool = True, threads: int = 1) -> None:
        self.model, self.optimized, self.probes = model, optimized, list(probes)
        self.session = session(model, optimized=optimized, threads=threads, probes=probes)
        names = [info.name for info in self.session.get_outputs()]
        self.input_names = [info.name for info in self.session.get_inputs()]
        self.output_names = [name for name in names if name not in set(probes)]

    def run(self, inputs: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """Return the model's outputs and the probes."""
        feeds = dict(zip(self.input_names, inputs, strict=True))
        results = [np.asarray(x) for x in run(self.session, [*self.output_names, *self.probes], feeds)]
        count = len(self.output_names)
        return results[:count], results[count:]

    def executed(self) -> Mapping[str, int]:
        """Count the nodes of the graph that runs, by operator."""
        model = self.model.optimized if self.optimized else self.model
        return Counter(node.op_type for node in model.proto.graph.node)


@dataclass(frozen=True)
class _OnnxRuntime(Runtime):
    """onnxruntime on this machine's processor; wanted: a version other than that of this environment."""

    wanted: str = ""

    @property
    def version(self) -> str:
        return self.wanted or str(onnxruntime.__version__)

    @property
    def components(self) -> tuple[Component, ...]:
        return (PipPackages(f"ort-{self.wanted}", (f"onnxruntime=={self.wanted}",)),) if self.wanted else ()

    def variant(self, text: str) -> Runtime:
        if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,4}){2}", text):
            raise InputError(f"ort=={text} is not a version of onnxruntime; write for example ort==1.19.2.")
        summary = f"onnxruntime {text} in a process of its own"
        return replace(self, name=f"{self.name}=={text}", summary=summary, variants=(), wanted=text)

    def open(self, artifact: Artifact, probes: Sequence[str], threads: int) -> Loaded:
        if not self.wanted:
            return OnnxRuntimeSession(artifact.model, probes, threads=threads)
        path = os.pathsep.join([str(self.components[0].folder), *filter(None, sys.path)])
        worker = python_worker(self.name, PYTHONPATH=path)
        return LoadedInWorker(worker, artifact.model, probes, threads=threads, version=self.version)


RUNTIME = _OnnxRuntime("ort", "onnxruntime in this environment", variants=("1.19.2", "1.23.2"), samples=None)
