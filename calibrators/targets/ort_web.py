"""onnxruntime-web, compiled to WebAssembly, which holds every sum in 32 bits: no pair of weights is limited.

Files give the same integers on x86-64 CPUs with VNNI, so that they can be proved where they are made. On CPUs with AVX2
but without VNNI they give others.
"""

from __future__ import annotations

from dataclasses import replace

from calibrators.targets import ort_cpu

TARGET = replace(
    ort_cpu.TARGET,
    name="ort-web",
    summary="onnxruntime-web, WebAssembly",
    exact_on=("wasm", "x86-vnni"),
    costs={},
)
