"""onnxruntime on x86-64 before AVX2, without fused multiply-adds."""

from __future__ import annotations

from runtime_tests.workers.emulation import EmulatedX86

__all__ = ["RUNTIME"]

RUNTIME = EmulatedX86("sse", "onnxruntime, emulated Intel Nehalem (2008)", processor="x86-sse", cpu="Nehalem")
