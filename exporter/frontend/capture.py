"""Capture a trained PyTorch model as the one ATen graph (contract in calibrators.graph.aten).

Must not know: quantization, targets, ONNX.
"""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from calibrators.errors import ModelError, first_line
from calibrators.graph.aten import infer_shapes, outputs_of, where
from calibrators.grid.metrics import alike
from exporter.frontend.calling import Form, arguments, call_of, restoring, shapes_of, user_inputs
from exporter.frontend.functionalize import HALVES, dtypes, flatten, is_double

__all__ = ["SAME", "capture", "evaluating", "quiet"]

Example = Tensor | Sequence[Tensor]

OURS = Path(__file__).parents[1]
"""Frames of this package say nothing about the user's code."""

SAME, SAME_IN_HALF = 1e-3, 5e-2
"""Largest legal difference of outputs between a model, its program and the captured graph, relative to the outputs."""


def capture(
    model: nn.Module | torch.export.ExportedProgram, example: Example, *, form: Form = None, free_batch: bool = True
) -> fx.GraphModule:
    """Return the flat ATen graph of `model` in eval mode, with a free batch dimension where the model allows one.

    model:   a module, or a program made by torch.export (a .pt2 file).
    example: one tensor per model input, first dimension the batch; values do not matter, shapes and dtypes do. A model
             with float64 weights becomes one in float32 unless the example is in float64 too.
    form:    the named, nested arguments that these tensors make up; None for one argument each.
    free_batch: whether the batch may be free; if not, it is 1, or what a program declares.
    returns: a new GraphModule; meta["dynamic_batch"], meta["notes"] (what the user should know), meta["input_names"],
             meta["output_names"], meta["example"] (batch 2 where the batch is free, else as captured).
    raises:  ModelError naming the module and the line that cannot be captured, or for a program whose batch is free
             although it must not be.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    narrow = is_double(model.parameters()) and not any(x.dtype == torch.float64 for x in inputs)
    if narrow:
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    if isinstance(model, torch.export.ExportedProgram):
        notes: list[str] = []
        program, dynamic = model, _has_free_batch(model)
        if dynamic and not free_batch:
            raise ModelError("the program has a free batch, but the target needs a fixed one; export it with batch 1")
        inputs = _with_batch(inputs, 2) if dynamic else _declared_example(model)
    else:
        program, dynamic, notes = _export(model, inputs, form, free_batch=free_batch)
        inputs = _with_batch(inputs, 2 if dynamic else 1)
    with quiet():
        graph = flatten(program, narrow=narrow)
    notes += graph.meta["notes"]
    if narrow:
        inputs = tuple(x.float() if x.dtype == torch.float64 else x for x in inputs)
    graph.meta |= {"example": inputs, "dynamic_batch": dynamic, "notes": notes}
    if isinstance(model, torch.export.ExportedProgram) and not dynamic:
        notes.append(f"the program was exported with a fixed batch of {inputs[0].shape[0]}")
    _check(graph)
    _check_same(program, graph)
    return graph


def _export(
    model: nn.Module, inputs: tuple[Tensor, ...], form: Form, *, free_batch: bool
) -> tuple[torch.export.ExportedProgram, bool, list[str]]:
    """Return the exported program, whether its batch is free, and notes; the batch is 1 where it cannot be free."""
    _refuse_script(model)
    with evaluating(model), restoring(model), torch.no_grad(), quiet():
        reason = "the target needs it"
        for strict in (False, True) if free_batch else ():
            try:
                return _export_free(model, inputs, form, strict=strict), True, []
            except Exception as free:  # torch.export raises many types; the fixed batch decides which one counts
                reason = f"a free batch cannot be exported ({first_line(free)})" if not strict else reason
            if _error(model, inputs, form) is not None:
                break  # the model itself fails
        try:
            args, kwargs = arguments(model, _with_batch(inputs, 1), form)
            program = torch.export.export(model, args, kwargs, strict=False)
        except Exception as fixed:
            raise ModelError(_refusal(model, inputs, form, fixed)) from fixed
        return program, False, [f"the batch is fixed at 1, because {reason}"]


def _export_free(
    model: nn.Module, inputs: tuple[Tensor, ...], form: Form, *, strict: bool
) -> torch.export.ExportedProgram:
    """Return the program with a free batch, checked against the model at batches of 1, 2 and 3.

    Tracing sees one batch size and would miss that a model treats another one differently (`if len(x) == 1`).

    strict: read the model's bytecode, which keeps `len(x)` free where tracing makes it a number, but reads less code.
    """
    batch = torch.export.Dim("batch", min=1, max=2**20)
    dynamic_shapes = shapes_of(model, tuple({0: batch} if x.ndim else None for x in inputs), form)
    args, kwargs = arguments(model, _with_batch(inputs, 2), form)
    program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict)
    traced, original, limit = call_of(program), call_of(model, form), _limit(program, inputs)
    for size in (1, 2, 3):
        if not all(_agreement(original, traced, _with_batch(inputs, size), limit)):
            raise ValueError(f"at a batch of {size} the model computes something else than at a batch of 2")
    return program


def _refuse_script(model: nn.Module) -> None:
    """Raise ModelError for a module of TorchScript, at the top or inside."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{f'{name!r} in the model' if name else 'the model'} is TorchScript (torch.jit.load, script or trace),"
                " which torch.export cannot read; give the Python module, and the weights by its state_dict"
            )


def _limit(program: torch.export.ExportedProgram, inputs: tuple[Tensor, ...]) -> float:
    return SAME_IN_HALF if HALVES & {*dtypes(program.graph_module), *(x.dtype for x in inputs)} else SAME


def _agreement(
    original: Callable[..., Any], other: Callable[..., Any], inputs: tuple[Tensor, ...], limit: float
) -> list[bool]:
    """Return for each output whether two callables agree, each called with its own copy of the inputs."""
    results = (pytree.tree_leaves(each(*(x.clone() for x in inputs))) for each in (original, other))
    expected, found = ([y for y in result if isinstance(y, Tensor)] for result in results)
    return [alike(a.to(b.dtype), b, limit) for a, b in zip(expected, found, strict=True)]


def _check_same(program: torch.export.ExportedProgram, graph: fx.GraphModule) -> None:
    """Refuse a graph that computes something else than the program on its own example."""
    example = graph.meta["example"]
    with torch.no_grad(), quiet():
        same = _agreement(call_of(program), graph, example, _limit(program, example))
    for name, is_same in zip(graph.meta["output_names"], same, strict=True):
        if not is_same:
            raise ModelError(f"the captured graph computes another {name!r} than the model; {_suspect(program)}")


def _suspect(program: torch.export.ExportedProgram) -> str:
    """Return what probably makes a program compute something else each time, and what to do about it."""
    calls = [node for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    random = [node for node in calls if torch.Tag.nondeterministic_seeded in node.target.tags]
    if random:
        return (
            f"{where(random[0])} is random ({random[0].target}), so that no two runs agree; switch it off in eval mode "
            "or make its values an input"
        )
    return (
        "an operator that writes into the memory of another value may be the cause: replace in-place operators in the "
        "model"
    )


def _with_batch(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """Return the inputs cut or repeated to `size` samples."""
    return tuple(torch.cat([x] * size)[:size].clone() if x.ndim and len(x) else x for x in inputs)


def _has_free_batch(program: torch.export.ExportedProgram) -> bool:
    shapes = [node.meta["val"].shape for node in user_inputs(program)]
    return bool(shapes) and all(len(shape) and isinstance(shape[0], torch.SymInt) for shape in shapes)


def _declared_example(program: torch.export.ExportedProgram) -> tuple[Tensor, ...]:
    """Return zero tensors of the shapes that a static program was exported with."""
    values = [node.meta["val"] for node in user_inputs(program)]
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
        with quiet():
            infer_shapes(graph)
    except Exception as error:
        raise ModelError(
            f"the captured graph does not run on its own example: {first_line(error)}; please report this model"
        ) from error
    for value in outputs_of(graph):
        if not isinstance(value, fx.Node):
            raise ModelError(f"the model returns {value!r}, which is not a tensor; return tensors only")


def _error(model: nn.Module, inputs: tuple[Tensor, ...], form: Form) -> Exception | None:
    """Return why the model itself does not run on its example."""
    try:
        with torch.no_grad():
            call_of(model, form)(*inputs)
    except Exception as error:  # of the user's own code
        return error
    return None


def _refusal(model: nn.Module, inputs: tuple[Tensor, ...], form: Form, error: Exception) -> str:
    """Return the error text: what failed, in which module, at which line, and what to do."""
    names = {id(module): name for name, module in model.named_modules()}
    module, line = "", ""
    for frame, number in _frames(error):
        file = frame.f_code.co_filename
        arguments = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        owner = id(frame.f_locals.get(arguments[0])) if arguments else 0
        if owner in names and "/torch/" not in file and not file.startswith(str(OURS)):
            module = names[owner] or type(model).__name__
            line = f"{file}:{number}"
    shapes = ", ".join(str(list(x.shape)) for x in inputs)
    if (eager := _error(model, inputs, form)) is not None:
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
