"""Files of calibrated networks as they would be stored."""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir

from calibrators.program.freeze import CalibrationResult
from exporter.emission.build_model import needed_opset, to_onnx
from exporter.emission.packing import pack


def stored(result: CalibrationResult, storage: str = "auto", min_ort: str | None = None) -> onnx.ModelProto:
    """Return the model with its weights in a storage; the slow translation to ONNX is done once for all storages."""
    model = ir.from_proto(_unpacked(result))
    pack(model, storage, min_ort)
    return ir.to_proto(model)


@functools.lru_cache(maxsize=4)
def _unpacked(result: CalibrationResult) -> onnx.ModelProto:
    return ir.to_proto(to_onnx(result.program, opset=needed_opset(result)))
