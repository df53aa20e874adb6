"""The number formats that a device multiplies fast.

Must not know: graphs, methods.
"""

from __future__ import annotations

import torch

__all__ = ["computes_bfloat16", "multiplies_int8"]


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether the device has instructions for bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return _has("avx512_bf16", "amx_bf16")


def multiplies_int8(device: torch.device) -> bool:
    """Return whether `torch._int_mm` is exact and fast: on processors that add products of int8 in 32 bits.

    Without VNNI it saturates, and is no faster than float32; with it, it takes a quarter of the time, a sixth with AMX.
    """
    return device.type == "cpu" and _has("avx512_vnni", "avx_vnni", "amx_int8")


def _has(*instructions: str) -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in instructions)
