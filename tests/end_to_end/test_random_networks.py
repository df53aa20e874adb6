"""Random networks are exported, proved, and compared with the module in plain onnxruntime."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from exporter import export
from tests.support.random_networks import RandomNetwork

BATCHES, SAMPLES = 3, 8
LEAST_DECIBELS = 20.0
"""Least signal to noise: seeds 0 to 39 have 31 and more; a network that is computed wrongly has about 0."""


SETTINGS: tuple[dict[str, Any], ...] = (
    *[{}] * 4,
    {"method": "minmax", "placement": "integer"},
    {"method": "mse", "simplify": False},
    {"weight_bits": 6, "activation_bits": 6, "method": "mse"},
    {"reduce_range": True, "per_tensor_weights": True},
)
"""Settings to draw from."""


def decibels(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Return the signal to noise ratio where values are finite, minus infinity if only some of a pair are."""
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(found)):
        return -math.inf
    signal, noise = (np.square(each[finite].astype(np.float64)).sum() for each in (expected, found - expected))
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-30) / noise)


def compared(path: Path, model: RandomNetwork, batch: tuple[Tensor, ...]) -> dict[str, float]:
    """Return decibels by output; outputs of integers, which may differ where values are equal, are left out."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    found = session.run(None, dict(zip(names, (x.numpy() for x in batch), strict=True)))
    expected = [y.numpy() for y in pytree.tree_leaves(model(*batch))]
    assert [(y.shape, y.dtype) for y in found] == [(y.shape, y.dtype) for y in expected]
    pairs = zip(session.get_outputs(), expected, found, strict=True)
    return {out.name: decibels(a, b) for out, a, b in pairs if a.dtype == np.float32}


def check(seed: int, folder: Path) -> dict[str, float]:
    """Export the network of a seed; return the least decibels by output at batches of 1, 3 and 8."""
    model, generator = RandomNetwork(seed), torch.Generator().manual_seed(seed)
    batches = [tuple(x.batch(SAMPLES, generator) for x in model.inputs) for _ in range(BATCHES)]
    named = [dict(zip("xy", batch, strict=False)) for batch in batches]
    settings = Random(seed).choice(SETTINGS)
    report = export(model, named, out=folder / "out", latency_runs=0, parity_samples=BATCHES * SAMPLES, **settings)
    failed = [gate["expression"] for gate in report["gates"] if not gate["passed"]]
    assert not failed, f"seed {seed}, steps {model.steps}: {failed}"
    found = [compared(folder / "out" / "model.onnx", model, tuple(x[:n] for x in batches[0])) for n in (1, 3, 8)]
    return {name: min(each[name] for each in found) for name in found[0]}


@pytest.mark.parametrize("seed", range(40))
def test_a_random_network_is_exported(seed: int, tmp_path: Path) -> None:
    for name, least in check(seed, tmp_path).items():
        assert least >= LEAST_DECIBELS, f"seed {seed}: {name} has {least:.1f} dB"
