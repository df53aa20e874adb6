"""Capture a trained PyTorch model as the one ATen graph (contract in calibrators.graph.aten).

Must not know: quantization, targets, ONNX.
"""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from calibrators.errors import DataError, ModelError, argument, first_line
from calibrators.graph.aten import infer_shapes, outputs_of, where
from calibrators.grid.metrics import alike
from exporter.frontend.axes import Axes, FreeAxis, axes_by_input
from exporter.frontend.calling import Form, arguments, call_of, restoring, shapes_of, tensor_names, user_inputs
from exporter.frontend.declared import other_size
from exporter.frontend.free_sizes import bounds_of, free_axes, has_free_batch, inputs_of_other_sizes
from exporter.frontend.functionalize import HALVES, dtypes, flatten, is_double
from exporter.frontend.lookups import check_indices, lookups_of
from exporter.frontend.recurrences import recurrences_by_shape
from exporter.frontend.size_limits import fixed_axis, narrowed
from exporter.frontend.value_sizes import check_value_sizes

__all__ = ["SAME", "capture", "evaluating", "quiet"]

Example = Tensor | Sequence[Tensor]

FreeAxes = Sequence[Mapping[int, FreeAxis]]
"""Free axes by number, for each input."""

OURS = Path(__file__).parents[1]
"""Frames of this package say nothing about the user's code."""

OTHER_SIZES = 2
"""Number of other sizes on which a model with free axes is compared with its export, its folding and its file."""

SAME, SAME_IN_HALF = 1e-3, 5e-2
"""Largest legal difference of outputs between a model, its program and the captured graph, relative to the outputs."""


def capture(
    model: nn.Module | torch.export.ExportedProgram,
    example: Example,
    *,
    form: Form = None,
    free_batch: bool = True,
    axes: Axes | None = None,
) -> fx.GraphModule:
    """Return the flat ATen graph of `model` in eval mode, with a free batch dimension where the model allows one.

    model:   a module, or a program made by torch.export (a .pt2 file).
    example: one tensor per model input, first dimension the batch; values do not matter, shapes and dtypes do. A model
             with float64 weights becomes one in float32 unless the example is in float64 too.
    form:    the named, nested arguments that these tensors make up; None for one argument each.
    free_batch: whether the batch may be free; if not, it is 1, or what a program declares.
    axes:    further axes that have to be free. Those of a program are what it was exported with.
    returns: a new GraphModule; meta["dynamic_batch"], meta["notes"] (what the user should know), meta["input_names"],
             meta["output_names"], meta["example"] (batch 2 where the batch is free, else as captured),
             meta["free_axes"], meta["size_bounds"] (by the name of the size), and meta["other_examples"], in which the
             model agrees with the graph too.
    raises:  ModelError naming the module and the line that cannot be captured, for axes that cannot be free, or for a
             program whose batch is free although it must not be; DataError for ids beyond a table; InputError for axes
             that its inputs do not have.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    narrow = is_double(model.parameters()) and not any(x.dtype == torch.float64 for x in inputs)
    if narrow:
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    if isinstance(model, torch.export.ExportedProgram):
        notes: list[str] = []
        program, dynamic = model, has_free_batch(model)
        if dynamic and not free_batch:
            raise ModelError("the program has a free batch, but the target needs a fixed one; export it with batch 1")
        _check_fits(model, inputs)
        _check_ids(model, inputs)
        inputs = _with_batch(inputs, 2) if dynamic else _declared_example(model, inputs)
        with quiet():
            check_value_sizes(program, inputs)
        free = free_axes(program)
        _check_declared(axes or {}, free)
    else:
        named = axes_by_input(axes or {}, tensor_names(model, len(inputs), form), inputs)
        program, dynamic, notes = _export(model, inputs, form, named, free_batch=free_batch)
        inputs = _with_batch(inputs, 2 if dynamic else 1)
        free = free_axes(program, named)
    bounds = bounds_of(program, free)
    if isinstance(model, nn.Module):
        bounds = narrowed(bounds, program, free)
    with quiet():
        graph = flatten(program, narrow=narrow)
    notes += graph.meta["notes"]
    others = [_with_batch(inputs, 3)] if dynamic else []
    if free:
        with evaluating(model) if isinstance(model, nn.Module) else contextlib.nullcontext():
            others += _other_sizes(call_of(model, form), program, inputs, notes)
    if narrow:
        inputs, *others = (tuple(x.float() if x.dtype == torch.float64 else x for x in e) for e in (inputs, *others))
    graph.meta |= {"example": inputs, "other_examples": tuple(others), "dynamic_batch": dynamic, "free_axes": free}
    graph.meta |= {"size_bounds": bounds, "notes": notes}
    if isinstance(model, torch.export.ExportedProgram) and not dynamic:
        notes.append(f"the program was exported with a fixed batch of {inputs[0].shape[0]}")
    _check(graph)
    _check_same(program, graph)
    return graph


def _export(
    model: nn.Module, inputs: tuple[Tensor, ...], form: Form, axes: FreeAxes, *, free_batch: bool
) -> tuple[torch.export.ExportedProgram, bool, list[str]]:
    """Return the exported program, whether its batch is free, and notes; the batch is 1 where it cannot be free."""
    _refuse_script(model)
    with evaluating(model), restoring(model), torch.no_grad(), quiet(), recurrences_by_shape():
        _register_outputs(model, inputs, form)
        reason = "the target needs it"
        for strict in (False, True) if free_batch else ():
            try:
                return _export_free(model, inputs, form, axes, strict=strict), True, []
            except DataError:
                raise
            except Exception as free:  # torch.export raises many types; the fixed batch decides which one counts
                reason = f"a free batch cannot be exported ({first_line(free)})" if not strict else reason
            if _error(model, inputs, form) is not None:
                break  # the model itself fails
        try:
            args, kwargs = arguments(model, _with_batch(inputs, 1), form)
            shapes = shapes_of(model, tuple(map(_hints, axes)), form) if any(axes) else None
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            _check_ids(program, inputs)
        except DataError:
            raise
        except Exception as fixed:
            raise ModelError(_refusal(model, inputs, form, fixed)) from fixed
        _check_one_sample(model, inputs, form)
        return program, False, [f"the batch is fixed at 1, because {reason}"]


def _check_one_sample(model: nn.Module, inputs: tuple[Tensor, ...], form: Form) -> None:
    """Check that one sample gives one row of each output that has a row per sample.

    raises: ModelError for a model that works with the batch of the data alone, and broadcasts others to it.
    """
    samples, call = len(inputs[0]), call_of(model, form)
    whole, one = (pytree.tree_leaves(call(*_with_batch(inputs, size))) for size in (samples, 1))
    for ours, alone in zip(whole, one, strict=False):
        if isinstance(ours, Tensor) and ours.ndim and len(ours) == samples > 1 and len(alone) != 1:
            raise ModelError(
                f"the model works with batches of {samples} alone: one sample gives an output of shape "
                f"{list(alone.shape)}; make its constants independent of the batch, or give data in batches of 1"
            )


def _export_free(
    model: nn.Module, inputs: tuple[Tensor, ...], form: Form, axes: FreeAxes, *, strict: bool
) -> torch.export.ExportedProgram:
    """Return the program with a free batch, checked against the model at batches of 1, 2 and 3.

    Tracing sees one batch size and would miss that a model treats another one differently (`if len(x) == 1`).

    strict: read the model's bytecode, which keeps `len(x)` free where tracing makes it a number, but reads less code.
    """
    batch = torch.export.Dim("batch", min=1, max=2**20)
    sizes = ({0: batch} | _hints(free) if x.ndim else None for x, free in zip(inputs, axes, strict=True))
    args, kwargs = arguments(model, _with_batch(inputs, 2), form)
    shapes = shapes_of(model, tuple(sizes), form)
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
    _check_ids(program, inputs)
    traced, original, limit = call_of(program), call_of(model, form), _limit(program, inputs)
    for size in (1, 2, 3):
        if not all(_agreement(original, traced, _with_batch(inputs, size), limit)):
            raise ValueError(f"at a batch of {size} the model computes something else than at a batch of 2")
    return program


def _check_ids(program: torch.export.ExportedProgram, inputs: Sequence[Tensor]) -> None:
    """Raise DataError for inputs that hold indices beyond a table in which the program looks them up."""
    nodes = user_inputs(program)
    check_indices(lookups_of(program.graph, nodes), inputs, [node.name for node in nodes])


def _hints(axes: Mapping[int, FreeAxis]) -> dict[int, Any]:
    """Return what torch.export takes for free axes; it finds out by itself which sizes have to be equal."""
    return {axis: torch.export.Dim.DYNAMIC(min=free.low, max=free.high) for axis, free in axes.items()}


def _other_sizes(
    original: Callable[..., Any], program: torch.export.ExportedProgram, inputs: tuple[Tensor, ...], notes: list[str]
) -> list[tuple[Tensor, ...]]:
    """Return inputs of other sizes of the free axes, on which model and program agree; note those on which they do not.

    raises: ModelError if there are none.
    """
    traced, limit, found, reason = call_of(program), _limit(program, inputs), [], ""
    for other in inputs_of_other_sizes(program, inputs):
        shapes = ", ".join(str(list(x.shape[1:])) for x in other)
        with torch.no_grad(), quiet():
            try:
                original(*(x.clone() for x in other))
            except Exception as error:  # a size that the model does not take
                reason = reason or f"on samples of shape {shapes} it raises {type(error).__name__}: {first_line(error)}"
                continue
            try:
                same = all(_agreement(original, traced, other, limit))
                why = "computes something else"
            except Exception as error:  # what torch.export assumed about sizes
                same, why = False, f"does not run ({first_line(error)})"
        if same:
            found.append(other)
        else:
            notes.append(f"on samples of shape {shapes} the model runs, but its export {why}: do not use such sizes")
            reason = notes[-1]
        if len(found) == OTHER_SIZES:
            break
    if not found:
        raise ModelError(f"no free axis of the model can have another size than that of the data: {reason}")
    return found


def _check_declared(axes: Axes, free: Mapping[str, Mapping[int, str]]) -> None:
    """Raise ModelError for axes that a program was exported without."""
    for name, wanted in axes.items():
        if missing := [axis for axis in wanted if axis not in free.get(name, {})]:
            raise ModelError(
                f"the program has a fixed size at axis {missing[0]} of {name!r}; export it with dynamic_shapes for "
                f"that axis, or leave {argument('dynamic')} out"
            )


def _register_outputs(model: nn.Module, inputs: tuple[Tensor, ...], form: Form) -> None:
    """Make the dataclasses that a model returns known to torch.export, which takes no others."""
    waiting: list[Any] = []
    with contextlib.suppress(Exception):  # of the user's own code, which the export will report
        waiting.append(call_of(model, form)(*_with_batch(inputs, 2)))
    while waiting:
        value = waiting.pop()
        if is_dataclass(value) and not isinstance(value, type):
            if type(value) not in pytree.SUPPORTED_NODES:
                torch.export.register_dataclass(type(value))
            waiting += [getattr(value, each.name) for each in fields(value)]
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value


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


def _declared_example(program: torch.export.ExportedProgram, data: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return zero tensors of the shapes that a program with a fixed batch was exported with; free sizes are the data's.

    data: which fits.
    """
    values = [node.meta["val"] for node in user_inputs(program)]
    shapes = [[n if isinstance(n, int) else data[i].shape[axis] for axis, n in enumerate(value.shape)]
              for i, value in enumerate(values)]  # fmt: skip
    return tuple(torch.zeros(shape, dtype=value.dtype) for value, shape in zip(values, shapes, strict=True))


def _check_fits(program: torch.export.ExportedProgram, data: tuple[Tensor, ...]) -> None:
    """Raise ModelError for samples of another shape than a program was exported for."""
    for node, x in zip(user_inputs(program), data, strict=False):
        declared = tuple(node.meta["val"].shape)
        fixed = [(a, b) for a, b in zip(declared[1:], x.shape[1:], strict=False) if isinstance(a, int)]
        if len(declared) != x.ndim or any(a != b for a, b in fixed):
            takes = ", ".join(str(n) if isinstance(n, int) else "any" for n in declared[1:])
            given = ", ".join(map(str, x.shape[1:]))
            raise ModelError(
                f"input {node.name!r} of the program takes [n, {takes}], but the data has [n, {given}]; give data of "
                f"that shape ({argument('image_size')} resizes images), or export the program for the shape of the data"
            )


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
            f"{f' (in {module!r}, {line})' if line else ''}; "
            f"{other_size(model, inputs) or 'check that the data fits the forward() of the model'}"
        )
    if (axis := fixed_axis(error)) is not None:
        return axis
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
