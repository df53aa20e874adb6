"""Time operators in integer forms against the same operators left in float, in onnxruntime.

    python benchmarks/forms.py [hard-swish transposed ...]

Each operator stands between two 1x1 convolutions of 64 channels, 56x56 (28x28 for transposed ones), batch 1, one thread.
Two files of one network: with all operators on integers, and with this one excluded from quantization. Medians of
interleaved runs; `saved` is the difference as a share of the network with the operator in float.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrators import PlacementOptions, calibrate
from exporter import capture, fold
from exporter.emission.build_model import needed_opset, to_onnx
from runtime_tests.ort.sessions import session

import onnx_ir as ir

ROUNDS = 60
CHANNELS = 64


class Form(nn.Module):
    """A function as a module of its own, which can be excluded by name."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
