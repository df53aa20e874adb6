"""Trained networks as their authors write them, the whole way; skipped where the zoo of models does not lie beside the
project."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, fx, nn

from calibrators import calibrate
from calibrators.graph.aten import bind, constant, module_path
from exporter import capture, emit, fold
from runtime_tests.ort.coverage import coverage
from runtime_tests.ort.lint import lint
from runtime_tests.parity.results import FLOAT_LSB
from runtime_tests.proof import parity
from runtime_tests.reference.execute import FLOAT
from tests.support.networks import randomize

ZOO = Path(__file__).parents[3] / "shared" / "zoo" / "zoo.py"
pytestmark = pytest.mark.skipif(not ZOO.is_file(), reason=f"no model zoo at {ZOO}")

aten = torch.ops.aten

CALIBRATION_BATCHES = 2
SAMPLES = 64
FOLD_ERROR = 1e-9
"""Relative error of a fold in float64: thousands of roundings of 1e-16 each, with room for cancellation."""


EXACT = ("repvgg", "mobileone", "mobilenetv2")
"""Networks in which every operator between quantizers has an integer kernel."""

INTEGER_MACS = 0.99


@functools.cache
def zoo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zoo", ZOO)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network(name: str) -> nn.Module:
    """The trained network; the one without weights with random weights and batch norm statistics."""
    model: nn.Module = getattr(zoo(), name)()
    return randomize(model) if name == "fastvit" else model


@functools.cache
def calibration() -> list[Tensor]:
    return [torch.from_numpy(x) for x, _ in itertools.islice(zoo().calibration(32), CALIBRATION_BATCHES)]


def evaluation() -> Tensor:
    return torch.from_numpy(next(zoo().evaluation(SAMPLES))[0])


def weighted(graph: fx.GraphModule) -> Counter[str]:
    """Count the convolutions, linear layers and batch norms of a graph, depthwise convolutions separately."""
    kinds = {aten.linear.default: "linear", aten.batch_norm.default: "batch_norm"}
    found = Counter(kinds[node.target] for node in graph.graph.nodes if node.target in kinds)
    convolutions = [node for node in graph.graph.nodes if node.target is aten.conv2d.default]
    depthwise = [node for node in convolutions if is_depthwise(graph, node)]
    return found + Counter(depthwise=len(depthwise), conv=len(convolutions) - len(depthwise))


def is_depthwise(graph: fx.GraphModule, node: fx.Node) -> bool:
    weight = constant(graph, bind(node)["weight"])
    return bool(bind(node)["groups"] == len(weight) > 1 == weight.shape[1])


FOLDED = {
    "repvgg": Counter(conv=14, linear=1),
    "mobileone": Counter(conv=13, depthwise=12, linear=1),
    "mobilenetv2": Counter(conv=29, depthwise=14, linear=1),
    "fastvit": Counter(conv=19, depthwise=14, linear=1),
    "vit": Counter(conv=1, linear=25),
}
"""The operators of each folded network: one convolution per block of branches, and no batch norms."""


@functools.cache
def folded(name: str) -> fx.GraphModule:
    """A folded network; the tests of one process share it, so none may change it."""
    return fold(capture(network(name), calibration()[0]))


@pytest.mark.parametrize("name", FOLDED)
def test_every_block_folds_to_one_operator(name: str) -> None:
    graph = folded(name)
    assert weighted(graph) == FOLDED[name]
    assert graph.meta["fold"].max_rel_error <= FOLD_ERROR


def test_every_token_mixer_folds_to_one_depthwise_convolution() -> None:
    graph = folded("fastvit")
    mixers = [name for name, module in network("fastvit").named_modules() if isinstance(module, zoo().RepMixer)]
    assert len(mixers) == 6
    for mixer in mixers:
        inside = [node for node in graph.graph.nodes if node.op == "call_function" and mixer in module_path(node)]
        assert [node.target for node in inside] == [aten.conv2d.default], mixer
        assert is_depthwise(graph, inside[0])


@pytest.mark.parametrize("name", FOLDED)
def test_runtime_computes_the_reference(name: str, tmp_path: Path) -> None:
    result = calibrate(folded(name), calibration(), method="mse", options={}, target="ort-cpu", seed=0)
    path = tmp_path / "model.onnx"
    emit(result, path)
    report = parity(path, result.program, [(evaluation(),)], optimized=True)
    covered = coverage(path)
    assert (report.samples, report.violations, report.unplanned) == (SAMPLES, 0, {})
    assert lint(path, load=True) == []
    assert covered.by_op["QGemm"] == FOLDED[name]["linear"]
    if name in EXACT:
        assert report.mismatched == 0 and report.outputs_identical
        assert covered.integer_macs >= INTEGER_MACS
    else:
        floats = [site for site in report.nodes if site.kernel == FLOAT]
        integers = [site for site in report.nodes if site.kernel != FLOAT]
        assert max(found.max_lsb for found in floats) <= FLOAT_LSB
        assert not any(found.mismatched for found in integers)
