"""How the tensors of a batch are given to a model: one after the other, or as the named arguments that they make up.

Must not know: data, quantization, ONNX.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

__all__ = [
    "Arguments",
    "Form",
    "arguments",
    "call_of",
    "input_names",
    "optional_inputs",
    "restoring",
    "shapes_of",
    "tensor_names",
    "user_inputs",
]

Model = nn.Module | torch.export.ExportedProgram

Form = pytree.TreeSpec | None
"""The arguments by name, nested as forward takes them, that tensors make up; None for one tensor per argument."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def input_names(model: Model) -> tuple[str, ...]:
    """Return the names of the model's inputs in call order; () where its signature does not tell (*args)."""
    if isinstance(model, torch.export.ExportedProgram):
        return tuple(node.name for node in user_inputs(model))
    parameters = _parameters(model)
    return () if any(p.kind is p.VAR_POSITIONAL for p in parameters) else tuple(p.name for p in _named(parameters))


def tensor_names(model: Model, count: int, form: Form) -> tuple[str, ...]:
    """Return the names of the tensors of a batch: those of the inputs, with the way into nested ones."""
    if form is not None:
        paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), form))
        return tuple("_".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path) for path, _ in paths)
    names = input_names(model)
    return (*names, *(f"input_{index}" for index in range(len(names), count)))[:count]


def optional_inputs(model: Model) -> frozenset[str]:
    """Return the names of the inputs that a call may leave out."""
    if isinstance(model, torch.export.ExportedProgram):
        return frozenset()
    return frozenset(p.name for p in _named(_parameters(model)) if p.default is not p.empty)


def user_inputs(program: torch.export.ExportedProgram) -> list[fx.Node]:
    """Return the inputs of a program that are tensors."""
    names = set(program.graph_signature.user_inputs)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    return [node for node in placeholders if isinstance(node.meta.get("val"), Tensor)]


def call_of(model: Model, form: Form = None) -> Callable[..., Any]:
    """Return the function that calls a module or a program with the tensors of a batch, each an argument.

    A call leaves the buffers as they were; a program gets the types that it was exported with.

    form: how a module takes them; a program knows it itself.
    """
    if isinstance(model, torch.export.ExportedProgram):
        module, spec = model.module(), model.call_spec.in_spec
        declared = _values(model)

        def run(*tensors: Tensor) -> Any:
            left = iter(tensors)
            values = [next(left).to(each.dtype) if isinstance(each, Tensor) else each for each in declared]
            args, kwargs = pytree.tree_unflatten(values, spec)
            with restoring(module):
                return module(*args, **kwargs)

        return run

    def call(*tensors: Tensor) -> Any:
        args, kwargs = arguments(model, tensors, form)
        with restoring(model):
            return model(*args, **kwargs)

    return call


def arguments(model: nn.Module, values: Sequence[Any], form: Form) -> Arguments:
    """Return the positional and the named arguments of forward that hold these values, one per tensor of a batch."""
    if form is None:
        only = [p.name for p in _parameters(model) if p.kind is p.KEYWORD_ONLY] if input_names(model) else []
        count = len(input_names(model)) - len(only) if only else len(values)
        return tuple(values[:count]), dict(zip(only, values[count:], strict=False))
    given = pytree.tree_unflatten(list(values), form)
    positional = []
    for parameter in _named(_parameters(model)):
        if parameter.name not in given or parameter.kind is parameter.KEYWORD_ONLY:
            break
        positional.append(given.pop(parameter.name))
    return tuple(positional), given


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """Give the buffers of a model, which its calls may change, their values back afterwards."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def shapes_of(model: nn.Module, values: Sequence[Any], form: Form) -> Any:
    """Return what torch.export takes as dynamic shapes: one value per argument of forward, those of *args one tuple."""
    positional, named = arguments(model, values, form)
    parameters = _parameters(model)
    first = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL), len(positional))
    rest = (positional[first:],) if first < len(positional) else ()
    if not named:
        return (*positional[:first], *rest)
    return dict(zip((p.name for p in parameters), positional, strict=False)) | named


def _values(program: torch.export.ExportedProgram) -> list[Any]:
    """Return what each input of a program stands for: a tensor, or a constant such as None."""
    names = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    return [node.meta.get("val") for node in nodes if node.name in names]


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # forward of a scripted module has no signature
        return []


def _named(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
