"""Capture a trained PyTorch model as the one ATen graph (contract in calibrators.graph.aten).

Must not know: quantization, targets, ONNX.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from calibrators.errors import ModelError, first_line
from calibrators.graph.aten import infer_shapes, outputs_of, where
from calibrators.grid.metrics import alike
from exporter.frontend.functionalize import HALVES, flatten

__all__ = ["SAME", "capture", "evaluating", "quiet"]

Example = Tensor | Sequence[Tensor]

SAME, SAME_IN_HALF = 1e-3, 5e-2
"""Largest legal difference of outputs between a model, its program and the captured graph, relative to the outputs."""


def capture(
    model: nn.Module | torch.export.ExportedProgram, example: Example, *, free_batch: bool = True
) -> fx.GraphModule:
    """Return the flat ATen graph of `model` in eval mode, with a free batch dimension where the model allows one.

    model:   a module, or a program made by torch.export (a .pt2 file).
    example: one tensor per model input, first dimension the batch; values do not matter, shapes and dtypes do.
    free_batch: whether the batch may be free; if not, it is 1, or what a program declares.
    returns: a new GraphModule; meta["dynamic_batch"], meta["notes"] (what the user should know), meta["input_names"],
             meta["output_names"], meta["example"] (batch 2 where the batch is free, else as captured).
    raises:  ModelError naming the module and the line that cannot be captured, or for a program whose batch is free
             although it must not be.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if isinstance(model, torch.export.ExportedProgram):
        notes: list[str] = []
        program, dynamic = model, _has_free_batch(model)
        if dynamic and not free_batch:
            raise ModelError("the program has a free batch, but the target needs a fixed one; export it with batch 1")
        inputs = _with_batch(inputs, 2) if dynamic else _declared_example(model)
    else:
        program, dynamic, notes = _export(model, inputs, free_batch=free_batch)
        inputs = _with_batch(inputs, 2 if dynamic else 1)
    with quiet():
        graph = flatten(program)
    notes += graph.meta["notes"]
    graph.meta |= {"example": inputs, "dynamic_batch": dynamic, "notes": notes}
    if isinstance(model, torch.export.ExportedProgram) and not dynamic:
        notes.append(f"the program was exported with a fixed batch of {inputs[0].shape[0]}")
    _check(graph)
    _check_same(program, graph)
    return graph


def _export(
    model: nn.Module, inputs: tuple[Tensor, ...], *, free_batch: bool
) -> tuple[torch.export.ExportedProgram, bool, list[str]]:
    """Return the exported program, whether its batch is free, and notes; the batch is 1 where it cannot be free."""
    with evaluating(model), torch.no_grad(), quiet():
        try:
            if free_batch:
                return _export_free(model, inputs), True, []
            reason = "the target needs it"
        except Exception as free:  # torch.export raises many types; the fixed batch decides which one counts
            reason = f"a free batch cannot be exported ({first_line(free)})"
        try:
            program = torch.export.export(model, _with_batch(inputs, 1), strict=False)
        except Exception as fixed:
            raise ModelError(_refusal(model, inputs, fixed)) from fixed
        return program, False, [f"the batch is fixed at 1, because {reason}"]


def _export_free(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Return the program with a free batch, checked against the model at batches of 1, 2 and 3.

    Tracing sees one batch size and would miss that a model treats another one differently (`if len(x) == 1`).
    """
    batch = torch.export.Dim("batch", min=1, max=2**20)
    dynamic_shapes = _as_called(model, tuple({0: batch} if x.ndim else None for x in inputs))
    program = torch.export.export(model, _with_batch(inputs, 2), dynamic_shapes=dynamic_shapes, strict=False)
    traced, limit = program.module(), _limit(program, inputs)
    for size in (1, 2, 3):
        if not all(_agreement(model, traced, _with_batch(inputs, size), limit)):
            raise ValueError(f"at a batch of {size} the model computes something else than at a batch of 2")
    return program


def _limit(program: torch.export.ExportedProgram, inputs: tuple[Tensor, ...]) -> float:
    halves = any(x.dtype in HALVES for x in (*program.state_dict.values(), *inputs))
    return SAME_IN_HALF if halves else SAME


def _agreement(
    original: Callable[..., Any], other: Callable[..., Any], inputs: tuple[Tensor, ...], limit: float
) -> list[bool]:
    """Return for each output whether two callables agree, each called with its own copy of the inputs."""
    expected, found = (pytree.tree_leaves(each(*(x.clone() for x in inputs))) for each in (original, other))
    return [alike(torch.as_tensor(a), torch.as_tensor(b), limit) for a, b in zip(expected, found, strict=True)]


def _as_called(model: nn.Module, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return one value per argument of forward; the values for *args are one tuple."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return values
    first = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL), len(values))
    return (*values[:first], values[first:]) if first < len(values) else values


def _check_same(program: torch.export.ExportedProgram, graph: fx.GraphModule) -> None:
    """Refuse a graph that computes something else than the program on its own example."""
    example = graph.meta["example"]
    with torch.no_grad(), quiet():
        same = _agreement(program.module(), graph, example, _limit(program, example))
    for name, is_same in zip(graph.meta["output_names"], same, strict=True):
        if not is_same:
            raise ModelError(
                f"the captured graph computes another {name!r} than the model; an operator that writes into the memory "
                "of another value may be the cause: replace in-place operators in the model"
            )


def _with_batch(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """Return the inputs cut or repeated to `size` samples."""
    return tuple(torch.cat([x] * size)[:size].clone() if x.ndim and len(x) else x for x in inputs)


def _has_free_batch(program: torch.export.ExportedProgram) -> bool:
    shapes = [node.meta["val"].shape for node in _user_inputs(program)]
    return bool(shapes) and all(len(shape) and isinstance(shape[0], torch.SymInt) for shape in shapes)


def _user_inputs(program: torch.export.ExportedProgram) -> list[fx.Node]:
    names = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _declared_example(program: torch.export.ExportedProgram) -> tuple[Tensor, ...]:
    """Return zero tensors of the shapes that a static program was exported with."""
    values = [node.meta["val"] for node in _user_inputs(program)]
    return tuple(torch.zeros([int(n) for n in value.shape], dtype=value.dtype) for value in values)


def _check(graph: fx.GraphModule) -> None:
    """Run the captured graph once to infer shapes; refuse branches at run time and outputs that are not tensors."""
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise ModelError(
                f"{where(node)} chooses between subgraphs at run time ({node.target}), which no integer runtime "
                "executes; export one branch, or compute both and select with torch.where"
            )
    try:
        infer_shapes(graph)
    except Exception as error:
        raise ModelError(
            f"the captured graph does not run on its own example: {first_line(error)}; please report this model"
        ) from error
    for value in outputs_of(graph):
        if not isinstance(value, fx.Node):
            raise ModelError(f"the model returns {value!r}, which is not a tensor; return tensors only")


def _refusal(model: nn.Module, inputs: tuple[Tensor, ...], error: Exception) -> str:
    """Return the error text: what failed, in which module, at which line, and what to do."""
    names = {id(module): name for name, module in model.named_modules()}
    module, line = "", ""
    for frame, number in _frames(error):
        file = frame.f_code.co_filename
        arguments = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        owner = id(frame.f_locals.get(arguments[0])) if arguments else 0
        if owner in names and "/torch/" not in file:
            module = names[owner] or type(model).__name__
            line = f"{file}:{number}"
    shapes = ", ".join(str(list(x.shape)) for x in inputs)
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as eager:
        return (
            f"the model does not run on inputs of shape {shapes}: {type(eager).__name__}: {first_line(eager)}"
            f"{f' (in {module!r}, {line})' if line else ''}; check that the data fits the model's forward()"
        )
    return (
        f"torch.export cannot capture {module or type(model).__name__!r}{f' at {line}' if line else ''}: "
        f"{type(error).__name__}: {first_line(error)}; make the control flow there independent of tensor values, or "
        "export the model yourself with torch.export.save and pass the .pt2 file"
    )


def _frames(error: BaseException | None) -> Iterator[tuple[Any, int]]:
    """Yield the frames of the error, then of its causes."""
    while error is not None:
        yield from traceback.walk_tb(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside, and those of its modules that were training back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's own messages (deprecations inside torch, graph dumps) off the user's terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
