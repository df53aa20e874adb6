"""Write the golden set of codes: what `check.py` compares a machine with, and the script itself.

golden/values.json: the quantized values in the order in which they are computed, with shape, checksum and whether every
correct runtime computes these codes; the tolerances of the outputs; the checksum of every part of the model.
golden/codes.npz: codes of each value, spread evenly. golden/probes.pb: a message that, appended to model.onnx, makes
every quantized value an output.

Must not know: graphs, the report.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from exporter.handover.check import FORMAT, parts_of, sampled, save_arrays
from runtime_tests.ort.sessions import Model
from runtime_tests.ort.worker import EXACT
from runtime_tests.parity.golden import GoldenOutput, GoldenValue

__all__ = ["CHECK", "write_golden_set"]

CHECK = "check.py"
"""The script in the bundle that compares a machine with the golden set."""


def write_golden_set(
    folder: Path,
    model: Model,
    values: Sequence[GoldenValue],
    outputs: Sequence[GoldenOutput],
    min_onnxruntime: str | None,
) -> None:
    """Write the golden codes and the script beside model.onnx, which must be in the folder; model: the same file."""
    golden = folder / "golden"
    golden.mkdir(parents=True, exist_ok=True)
    arrays = {value.name: value.codes.numpy() for value in values}
    some = {name: sampled(codes) for name, codes in arrays.items()}
    save_arrays(golden / "codes.npz", {name: codes for name, (codes, _) in some.items()})
    content = {
        "format": FORMAT,
        "min_onnxruntime": min_onnxruntime,
        "session": EXACT,
        "outputs": [{"name": output.name, "tolerance": output.tolerance} for output in outputs],
        "values": [
            {
                "name": value.name,
                "layer": value.layer,
                "kernel": value.kernel,
                "exact": value.exact,
                "dtype": str(arrays[value.name].dtype),
                "shape": list(value.codes.shape),
                "scale": value.scale,
                "zero_point": value.zero_point,
                "stride": some[value.name][1],
                "crc32": zlib.crc32(np.ascontiguousarray(arrays[value.name]).tobytes()),
            }
            for value in values
        ],
        "parts": parts_of((folder / "model.onnx").read_bytes()),
    }
    (golden / "values.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (golden / "probes.pb").write_bytes(model.further_outputs([value.name for value in values]))
    (folder / CHECK).write_bytes(files("exporter.handover").joinpath("check.py").read_bytes())
