"""Measure what it costs to feed a file bytes instead of normalized floats, and what it saves outside.

    python benchmarks/raw_inputs.py

It prints the least time of many runs at 224x224 pixels, batch 1, on one thread: of a file of two small layers with each
form of its input, and of the normalization in NumPy that a file with float inputs needs before it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporter import export
from runtime_tests.ort.worker import session_options

SIZE, RUNS = 224, 400
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SETTINGS: dict[str, Any] = {"method": "minmax", "latency_runs": 0, "parity_samples": 4, "placement": "integer"}
FORMS: dict[str, dict[str, Any]] = {
    "floats": {},
    "bytes, channels first, normalized per channel": {"input": "uint8", "mean": MEAN, "std": STD},
    "bytes, channels last, normalized per channel": {"input": "uint8:nhwc", "mean": MEAN, "std": STD},
    "bytes, channels last, normalized per channel, free size": {
        "input": "uint8:nhwc",
        "mean": MEAN,
        "std": STD,
        "dynamic": ("input:2,3",),
    },
    "bytes, channels first, divided by 255": {"input": "uint8"},
    "bytes, channels last, divided by 255": {"input": "uint8:nhwc"},
}


def network() -> nn.Module:
    """Return two layers, so that the input is most of the work."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def inputs(settings: dict[str, Any], pixels: Tensor) -> Tensor:
    """Return pixels, uint8 [n, 3, height, width], as a file with these settings takes them."""
    if "input" in settings:
        return pixels.permute(0, 2, 3, 1).contiguous() if "nhwc" in settings["input"] else pixels
    return torch.from_numpy(normalized(pixels.permute(0, 2, 3, 1).numpy()))


def normalized(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return images [n, height, width, 3] as float32 [n, 3, height, width]."""
    values = (images.astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def main() -> None:
    """Measure the forms in turn, so that all of them see the same machine."""
    pixels = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = pixels[:1].permute(0, 2, 3, 1).contiguous().numpy()
    calls: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in FORMS.items():
            data, out = inputs(settings, pixels), Path(folder) / name
            export(network(), [data], out=out, **settings, **SETTINGS)
            session = ort.InferenceSession(out / "model.onnx", session_options(), providers=["CPUExecutionProvider"])
            calls[name] = partial(session.run, None, {"input": data[:1].numpy()})
    calls["normalization in NumPy, before a file that takes floats"] = partial(normalized, image)
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(RUNS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            least[name] = min(least[name], time.perf_counter() - start)
    for name, seconds in least.items():
        print(f"{seconds * 1e3:6.3f} ms  {name}")


if __name__ == "__main__":
    main()
