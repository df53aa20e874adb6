"""Trace recurrent layers by the shapes of their results, instead of step by step.

The functions by which torch computes them on fake tensors loop over time: each trace of a GRU of 100 steps took 5 s,
and the length became a constant. Here the trace takes the same time for any length, which stays free.

Must not know: how programs are captured, quantization, ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["recurrences_by_shape"]

aten = torch.ops.aten

RECURRENCES = (aten.gru.input, aten.lstm.input, aten.rnn_tanh.input, aten.rnn_relu.input)
KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)


@contextmanager
def recurrences_by_shape() -> Iterator[None]:
    """Give fake tensors to recurrent layers inside, as their results on fake tensors; real ones are computed."""
    before = {operator: dict(operator.py_kernels) for operator in RECURRENCES}
    try:
        for operator, kernels in before.items():
            for key in kernels.keys() & {*KEYS}:
                operator.py_kernels[key] = partial(_by_shape, kernels[key])
            operator._dispatch_cache.clear()
        yield
    finally:
        for operator, kernels in before.items():
            operator.py_kernels.update(kernels)
            operator._dispatch_cache.clear()


def _by_shape(computed: Callable[..., Any], x: Tensor, hidden: Any, *arguments: Any, **keywords: Any) -> Any:
    """Return empty fake tensors of the shapes that a recurrent layer gives: the outputs of all steps, the last state.

    arguments: parameters, has_biases, num_layers, dropout, train, bidirectional, batch_first.
    """
    if not isinstance(x, FakeTensor):
        return computed(x, hidden, *arguments, **keywords)
    states = hidden if isinstance(hidden, (list, tuple)) else (hidden,)
    directions = 2 if arguments[5] else 1
    output = x.new_empty((*x.shape[:-1], states[0].shape[-1] * directions))
    return output, *(state.new_empty(state.shape) for state in states)
