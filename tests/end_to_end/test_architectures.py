"""From any PyTorch network to an ONNX file that computes its reference: the families of networks that people export."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from calibrators.calibration import calibrate
from calibrators.placement.place import PlacementOptions
from calibrators.program.freeze import CalibrationResult
from exporter.emission.build_model import emit
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from runtime_tests.ort.coverage import coverage
from runtime_tests.ort.lint import lint
from runtime_tests.ort.sessions import session
from runtime_tests.proof import parity
from tests.support.architectures import ARCHITECTURES, construct

AT_FOUR_BITS = ("shufflenet", "paddings")

LEAST_SQNR = 25.0
"""Decibels at 8 bits. Each layer's rounding costs some 45 dB; ten of them in a row, and weights as uneven as random
ones are, still leave this much. A wrong scale, zero point or axis leaves less than 10."""

BATCH_TOLERANCE = 1e-4
"""Float operators may sum in another order at another batch size; the outputs here are of magnitude 1."""

RETURNED_TWICE = {"odd": 2}
"""Outputs that are another output or an input; their copies stay, because a value has one name."""

SIZED_BY_THE_BATCH = ("lstm",)
"""Networks with a state of zeros, one per sample, whose size only the run knows."""

INTEGER_LAYERS = ("QLinearConv", "QGemm")


@dataclass(frozen=True, eq=False)
class Exported:
    result: CalibrationResult
    path: Path
    inputs: tuple[Tensor, ...]
    expected: list[Tensor]
    names: list[str]

    def feed(self, batch: int) -> dict[str, Any]:
        names = self.result.program.meta["input_names"]
        return {name: x[:batch].numpy() for name, x in zip(names, self.inputs, strict=True)}


@pytest.fixture(scope="module")
def export_once(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name, bits -> the emitted network; each is exported once."""
    folder = tmp_path_factory.mktemp("architectures")

    @cache
    def make(name: str, bits: int) -> Exported:
        model, inputs = construct(name)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using padding='same'")
            returned = model(*inputs)
        names = list(returned) if isinstance(returned, dict) else []
        options = PlacementOptions(weight_bits=bits, activation_bits=bits)
        result = calibrate(fold(capture(model, inputs)), [inputs], method="minmax", placement=options)
        path = folder / f"{name}-{bits}.onnx"
        emit(result, path)
        return Exported(result, path, inputs, pytree.tree_leaves(returned), names)

    return make


CASES = [(name, 8) for name in ARCHITECTURES] + [(name, 4) for name in AT_FOUR_BITS]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}bit", scope="module")
def case(request: pytest.FixtureRequest, export_once: Any) -> tuple[str, int, Exported]:
    name, bits = request.param
    return name, bits, export_once(name, bits)


def test_runtime_computes_the_reference(case: tuple[str, int, Exported]) -> None:
    name, _, exported = case
    report = parity(exported.path, exported.result.program, [exported.inputs], optimized=True)
    report.raise_for_mismatch()
    assert report.kernel_mismatched == 0
    if ARCHITECTURES[name].exact:
        assert report.mismatched == 0
        assert report.outputs_identical


def test_outputs_are_the_models(case: tuple[str, int, Exported]) -> None:
    """Names, order, shapes, types, and at 8 bits the values; at any batch."""
    _, bits, exported = case
    runtime = session(exported.path)
    outputs = runtime.run(None, exported.feed(len(exported.inputs[0])))
    found = ir.load(exported.path).graph.outputs
    assert not exported.names or [value.name for value in found] == exported.names
    for output, expected in zip(outputs, exported.expected, strict=True):
        assert output.shape == tuple(expected.shape) and torch.from_numpy(output).dtype == expected.dtype
        noise = (torch.from_numpy(output).double() - expected.double()).square().sum()
        if bits == 8:
            assert float(noise) <= float(expected.double().square().sum()) * 10 ** (-LEAST_SQNR / 10)
    for batch in (1, 3):
        for few, all_ in zip(runtime.run(None, exported.feed(batch)), outputs, strict=True):
            np.testing.assert_allclose(few, all_[:batch], rtol=0, atol=BATCH_TOLERANCE)


def test_layers_run_on_integers(case: tuple[str, int, Exported]) -> None:
    """Every convolution and linear layer that the target knows, and nothing in float beside the listed operators."""
    name, _, exported = case
    covered = coverage(exported.path, sample=exported.feed(1))
    assert {node.op for node in covered.float_nodes} <= ARCHITECTURES[name].floats
    layers = sum(len(site.users) for site in exported.result.placement.sites if site.kind == "weight")
    assert sum(covered.by_op.get(op, 0) for op in INTEGER_LAYERS) == layers


def test_file_is_clean(case: tuple[str, int, Exported]) -> None:
    """No findings, no nodes that only prepare constants, no computed shapes, names without torch's counters."""
    name, _, exported = case
    assert lint(exported.path) == []
    model = ir.load(exported.path)
    operators = Counter(node.op_type for node in model.graph)
    assert operators.keys().isdisjoint({"CastLike", "ConstantOfShape", "Constant"})
    assert operators["Cast"] == bool(ARCHITECTURES[name].tokens)  # of the codes that an embedding looks up
    assert operators["Identity"] == RETURNED_TWICE.get(name, 0)
    for node in model.graph:
        if node.op_type in ("Reshape", "Slice", "Pad", "Clip") and name not in SIZED_BY_THE_BATCH:
            assert all(value is None or value.is_initializer() for value in node.inputs[1:]), node.name
    values = [value.name for node in model.graph for value in node.outputs]
    values += [value.name for value in [*model.graph.inputs, *model.graph.initializers.values()]]
    assert len(values) == len(set(values))
    assert not [value for value in values if str(value).startswith("val_")]
