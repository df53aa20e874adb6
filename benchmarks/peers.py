"""Files that other tools make of the same float ONNX file and the same calibration samples, 8 bits, as they default.

quantize_static: onnxruntime.quantization: quant_pre_process, then QDQ with int8 weights per channel, uint8 activations
                 and minima and maxima as ranges.
nncf:            nncf.quantize, one sample after another, in an environment of its own that is made when first needed
                 (about 0.5 GB in the user's cache folder).

Must not know: methods, scores.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from metered import metered
from torch import Tensor

from runtime_tests.ort.sessions import session

BITS = "8/8"
Batches = Sequence[tuple[Tensor, ...]]

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "intact-benchmarks"
INSTALLED = ("nncf", "onnx", "onnxruntime")


class PeerError(Exception):
    """Tell in one line why a tool made no file."""


@dataclass(frozen=True)
class Made:
    """How a tool made its file.

    seconds:  of the whole tool, without its start.
    peak_mib: how far its memory rose above that after its imports, None where the system does not say.
    tool:     its name and version.
    """

    seconds: float
    peak_mib: float | None
    tool: str


def make(name: str, float_file: Path, batches: Batches, path: Path) -> Made:
    """Write to `path` what the tool `name` makes of the float file.

    raises: PeerError.
    """
    try:
        return PEERS[name](float_file, batches, path)
    except PeerError:
        raise
    except Exception as error:  # other people's tools raise anything
        lines = str(error).strip().splitlines() or [""]
        raise PeerError(f"{name} failed ({type(error).__name__}: {lines[-1]})") from error


def quantize_static(float_file: Path, batches: Batches, path: Path) -> Made:
    """Write what onnxruntime.quantization makes of the float file."""
    prepared = path.with_name("prepared.onnx")

    with metered() as spent:
        prepare(float_file, prepared)
        quantize_statically(prepared, batches, path)
    return Made(**vars(spent), tool=f"onnxruntime {importlib.metadata.version('onnxruntime')}")


def prepare(float_file: Path, path: Path) -> None:
    """Write what onnxruntime's recommended pre-processing makes: shape inference and graph optimisation."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with silence():
        quant_pre_process(str(float_file), str(path))


def quantize_statically(float_file: Path, batches: Batches, path: Path) -> None:
    """Write what quantize_static makes of a float file, prepared or not."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    names = [info.name for info in session(float_file).get_inputs()]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter([dict(zip(names, map(_array, batch), strict=True)) for batch in batches])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with silence():
        quantize_static(
            str(float_file), str(path), Reader(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, per_channel=True,
        )  # fmt: skip


def nncf(float_file: Path, batches: Batches, path: Path) -> Made:
    """Write what NNCF makes of the float file.

    raises: PeerError where it cannot be installed, or fails.
    """
    python = nncf_python()
    names = [info.name for info in session(float_file).get_inputs()]
    arrays = [np.concatenate(values) for values in zip(*(map(_array, batch) for batch in batches), strict=True)]
    samples = path.with_name("samples.npz")
    np.savez(samples, **dict(zip(names, arrays, strict=True)))
    script = Path(__file__).with_name("nncf_quantize.py")
    output = _run([python, "-I", script, float_file, samples, path], "nncf failed", NNCF_CI="1")  # no telemetry
    return Made(**json.loads(output.strip().splitlines()[-1]))


def nncf_python(cache: Path = CACHE) -> Path:
    """Return the interpreter of the environment with NNCF, which is made if there is none.

    raises: PeerError where it cannot be installed.
    """
    folder = cache / "nncf"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "installed"
    if not done.exists():
        print(f"installing {', '.join(INSTALLED)} into {folder}", file=sys.stderr, flush=True)
        why = "nncf cannot be installed"
        _run([sys.executable, "-I", "-m", "venv", folder], why)
        _run([python, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *INSTALLED], why)
        done.touch()
    return python


def _run(command: Sequence[str | Path], why: str, **variables: str) -> str:
    """Return what a command prints.

    raises: PeerError with the last line of its errors.
    """
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | variables)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise PeerError(f"{why} ({lines[-1].strip()})")
    return done.stdout


def _array(x: Tensor) -> Any:
    return x.numpy()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep the warnings of other people's tools out of the table."""
    with warnings.catch_warnings(), tempfile.TemporaryFile("w") as sink, contextlib.redirect_stdout(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


PEERS: dict[str, Callable[[Path, Batches, Path], Made]] = {"quantize_static": quantize_static, "nncf": nncf}
