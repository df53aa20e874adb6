"""Find how large the values of a program are without computing them: a small file can ask for any amount of memory.

Must not know: where the program comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from calibrators.errors import ModelError, first_line
from calibrators.graph.aten import where

__all__ = ["check_value_sizes"]

FREE, PER_WEIGHT_BYTE, PER_INPUT_BYTE = 1 << 28, 4, 256
"""Bytes that any value may take, and further ones for each byte of the weights and of the inputs. A first convolution
makes 20 to 40 times its input, the logits of a language model are smaller than its table of words."""


def check_value_sizes(program: torch.export.ExportedProgram, inputs: Sequence[Tensor]) -> None:
    """Check that no value of a program is far larger than its weights and these inputs.

    raises: ModelError naming the operator.
    """
    weights = {**program.state_dict, **program.constants}
    given = iter(inputs)
    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    values = [
        next(given, None) if spec.kind is InputKind.USER_INPUT else weights.get(spec.target or "")
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT or spec.kind in kinds
    ]
    limit = FREE + PER_WEIGHT_BYTE * _bytes(weights.values()) + PER_INPUT_BYTE * _bytes(inputs)
    shapes = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes) as mode:
        unreal = [mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x for x in values]
        _Sized(program.graph_module, limit).run(*unreal)


class _Sized(fx.Interpreter):
    """Runs a program on tensors without values, up to the first one of more than `limit` bytes."""

    def __init__(self, module: fx.GraphModule, limit: int) -> None:
        super().__init__(module)
        self.limit = limit

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:  # of the operator: torch.export traces with such tensors, so that none fails
            raise ModelError(f"{where(n)} does not run on its inputs: {first_line(error)}; export it again") from error
        if n.op != "placeholder" and (size := _bytes(pytree.tree_leaves(value))) > self.limit:
            raise ModelError(
                f"{where(n)} makes {size / 2**30:.3g} GiB of {n.target}, far more than weights and inputs have; "
                "give the network as file.py:factory if that is what it is meant to do"
            )
        return value


def _bytes(values: Any) -> int:
    """Return the bytes of the tensors among values; sizes that only a run can tell count nothing."""
    tensors = (value for value in values if isinstance(value, Tensor))
    return sum(size for x in tensors if isinstance(size := x.numel() * x.itemsize, int))
