"""Translate the nodes of an exported program to ONNX operators with torch.onnx, without tracing it again.

Only a program with operators that torch.onnx has to take apart is traced.

Must not know: calibration, readable names, files.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import onnx_ir as ir
import onnxscript.function_libs.torch_lib.ops  # noqa: F401 (fills the registry)
import torch
from onnxscript.function_libs.torch_lib.registration import default_registry
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.fx.experimental._config import patch  # type: ignore[attr-defined]
from torch.onnx._internal.exporter._core import _exported_program_to_onnx_program, exported_program_to_ir
from torch.onnx._internal.exporter._fx_passes import insert_type_promotion_nodes
from torch.onnx._internal.exporter._registration import OnnxDecompMeta, ONNXRegistry
from torch.onnx._internal.exporter._torchlib._torchlib_registry import get_torchlib_ops

from exporter.emission.onnx_forms import ONNX_FORMS
from exporter.frontend.recurrences import recurrences_by_shape

__all__ = ["translate"]

aten = torch.ops.aten


def translate(exported: ExportedProgram, *, opset: int) -> ir.Model:
    """Return the ONNX model of a program without submodules whose outputs are distinct results of operators.

    The graph of the program is changed in place.

    raises: what torch.onnx raises for an operator that it cannot translate.
    """
    table = _Table(opset)
    calls = {node.target for node in exported.graph.nodes if node.op == "call_function"} - {operator.getitem}
    if not all(map(table.is_registered, calls)):
        return _taken_apart(exported, opset)
    with patch(backed_size_oblivious=True), recurrences_by_shape():
        insert_type_promotion_nodes(exported.graph_module)
    _reshape_by_views(exported.graph)
    return _exported_program_to_onnx_program(exported, registry=table).model


def _taken_apart(exported: ExportedProgram, opset: int) -> ir.Model:
    """Translate a program after torch.onnx has taken its operators apart, which gives some outputs new names."""
    signature = exported.module_call_graph[0].signature
    assert signature is not None
    named, signature.outputs = signature.outputs, [TensorArgument("") for _ in signature.outputs]
    try:
        return exported_program_to_ir(exported, registry=_whole_table(opset))
    finally:
        signature.outputs = named


class _Table(ONNXRegistry):
    """The translations of torch.onnx and ours, each made when it is asked for: all take a second and a half."""

    def __init__(self, opset: int) -> None:
        super().__init__()
        self._opset_version = opset

    def get_decomps(self, target: Any) -> list[OnnxDecompMeta]:
        """Return the translations of an operator, ours first."""
        return _translations(target, self.opset_version)


@functools.cache
def _translations(target: Any, opset: int) -> list[OnnxDecompMeta]:
    table = ONNXRegistry()
    table._opset_version = opset
    is_aten = isinstance(target, torch._ops.OpOverload)
    name = target.name() if is_aten else f"{target.__module__}::{target.__name__}"  # _operator::add
    for translation in get_torchlib_ops():
        if translation.fx_target is target:
            table._register(target, translation)
    if name in default_registry:
        entry = default_registry[name]
        for function in (*entry.overloads, *entry.complex):
            is_complex = function in entry.complex
            table._register(target, OnnxDecompMeta(function, target, signature=None, is_complex=is_complex))
    table._cleanup_registry_based_on_opset_version()
    if target in ONNX_FORMS:
        table.register_op(target, ONNX_FORMS[target])
    return table.get_decomps(target)


@functools.cache
def _whole_table(opset: int) -> ONNXRegistry:
    """Return all translations; which operators are among them decides what is taken apart."""
    table = ONNXRegistry.from_torchlib(opset)
    for target, translation in ONNX_FORMS.items():
        table.register_op(target, translation)
    return table


def _reshape_by_views(graph: fx.Graph) -> None:
    """Replace what reshapes by a view, which has one form in ONNX; only one free size stays open."""
    for node in graph.nodes:
        if node.target is aten.flatten.using_ints:
            sizes = [-1 if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape]
            if sizes.count(-1) < 2:
                node.target, node.args, node.kwargs = aten.view.default, (node.args[0], sizes), {}
        elif node.target is aten.reshape.default:
            node.target = aten.view.default
