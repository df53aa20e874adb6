"""onnxruntime on x86-64 with AVX2 but without VNNI, where sums of two products saturate at 16 bits."""

from __future__ import annotations

from runtime_tests.workers.emulation import EmulatedX86

__all__ = ["RUNTIME"]

RUNTIME = EmulatedX86("avx2", "onnxruntime, emulated Intel Haswell (2013)", processor="x86-avx2", cpu="Haswell-noTSX")
