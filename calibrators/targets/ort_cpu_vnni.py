"""onnxruntime on x86-64 CPUs with VNNI, which hold every sum in 32 bits: no pair of weights is limited.

On CPUs with AVX2 but without VNNI the file computes other integers.
"""

from __future__ import annotations

from dataclasses import replace

from calibrators.targets import ort_cpu

TARGET = replace(
    ort_cpu.TARGET,
    name="ort-cpu-vnni",
    summary="onnxruntime, CPU execution provider, x86-64 with VNNI alone",
    exact_on=("x86-vnni",),
)
