"""A trained PyTorch model becomes the one ATen graph (contract in calibrators.graph).

Must not know: quantization, targets, ONNX.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from calibrators.errors import ModelError
from calibrators.graph import bind, infer_shapes, is_constant, where

__all__ = ["SAME", "alike", "capture", "quiet"]

Example = Tensor | Sequence[Tensor]

_PADDED_BY_NAME: dict[object, Any] = {
    torch.ops.aten.conv1d.padding: torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.padding: torch.ops.aten.conv2d.default,
    torch.ops.aten.conv3d.padding: torch.ops.aten.conv3d.default,
}
_HALVES = {torch.float16, torch.bfloat16}
_RESHAPES = {
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.unflatten.int,
}


_RETURN_THEIR_INPUT = {
    torch.ops.aten.dropout.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.alpha_dropout.default,
    torch.ops.aten.feature_alpha_dropout.default,
}
"""In evaluation, though their schemas do not say so."""

SAME, SAME_IN_HALF = 1e-3, 5e-2
"""Largest legal difference between the captured graph and the program it was made from, relative to its outputs."""


def capture(model: nn.Module | torch.export.ExportedProgram, example: Example) -> fx.GraphModule:
    """Flat ATen graph of `model` in eval mode, with a free batch dimension where the model allows one.

    model:   a module, or a program made by torch.export (a .pt2 file).
    example: one tensor per model input, first dimension the batch; values do not matter, shapes and dtypes do.
    returns: a new GraphModule; meta["dynamic_batch"], meta["notes"] (what the user should know), meta["input_names"],
             meta["output_names"], meta["example"] (batch 2 where the batch is free, else as captured).
    raises:  ModelError naming the module and the line that cannot be captured.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if isinstance(model, torch.export.ExportedProgram):
        notes: list[str] = []
        program, dynamic = model, _has_free_batch(model)
        inputs = _with_batch(inputs, 2) if dynamic else _declared_example(model)
    else:
        program, dynamic, notes = _export(model, inputs)
        inputs = _with_batch(inputs, 2 if dynamic else 1)
    with quiet():
        graph = _flatten(program)
    notes += graph.meta["notes"]
    graph.meta |= {"example": inputs, "dynamic_batch": dynamic, "notes": notes}
    if isinstance(model, torch.export.ExportedProgram) and not dynamic:
        notes.append(f"the program was exported with a fixed batch of {inputs[0].shape[0]}")
    _check(graph)
    _prove(program, graph)
    return graph


def _export(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[torch.export.ExportedProgram, bool, list[str]]:
    """The exported program, whether its batch is free, and notes; a fixed batch of 1 where the model insists."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), quiet():
            try:
                return _export_free(model, inputs), True, []
            except Exception as free:  # torch.export raises many types; the fixed batch decides which one counts
                reason = _first_line(free)
            try:
                program = torch.export.export(model, _with_batch(inputs, 1), strict=False)
            except Exception as fixed:
                raise ModelError(_refusal(model, inputs, fixed)) from fixed
            return program, False, [f"the batch is fixed at 1: no free batch can be exported ({reason})"]
    finally:
        for module in was_training:
            module.training = True


def _export_free(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """The program with a free batch, checked against the model at batches of 1, 2 and 3.

    Tracing sees one batch size; a model that treats another one differently (`if len(x) == 1`) would be lost.
    """
    batch = torch.export.Dim("batch", min=1, max=2**20)
    dynamic_shapes = _as_called(model, tuple({0: batch} if x.ndim else None for x in inputs))
    program = torch.export.export(model, _with_batch(inputs, 2), dynamic_shapes=dynamic_shapes, strict=False)
    traced = program.module()
    for size in (1, 2, 3):
        sample = _with_batch(inputs, size)
        expected = pytree.tree_leaves(model(*(x.clone() for x in sample)))
        found = pytree.tree_leaves(traced(*(x.clone() for x in sample)))
        for left, right in zip(expected, found, strict=True):
            if not torch.allclose(torch.as_tensor(left), torch.as_tensor(right), rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(f"at a batch of {size} it computes something else than at a batch of 2")
    return program


def _as_called(model: nn.Module, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """One value per argument of forward; what goes into *args is one tuple."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return values
    first = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL), len(values))
    return (*values[:first], values[first:]) if first < len(values) else values


def _prove(program: torch.export.ExportedProgram, graph: fx.GraphModule) -> None:
    """Refuse a graph that computes something else than the program on its own example."""
    halves = any(x.dtype in _HALVES for x in (*program.state_dict.values(), *graph.meta["example"]))
    limit = SAME_IN_HALF if halves else SAME
    with torch.no_grad(), quiet():
        original = program.module()
        expected = pytree.tree_leaves(original(*(x.clone() for x in graph.meta["example"])))
        found = graph(*(x.clone() for x in graph.meta["example"]))
    for name, left, right in zip(graph.meta["output_names"], expected, found, strict=True):
        if not alike(torch.as_tensor(left), torch.as_tensor(right), limit):
            raise ModelError(
                f"the captured graph computes another {name!r} than the model: an operator that writes into memory of "
                "another value may be the cause; write it without in-place operators"
            )


def alike(expected: Tensor, found: Tensor, limit: float = SAME) -> bool:
    """Whether an output is what it should be, up to `limit` of its largest finite value."""
    expected, found = expected.double(), found.double()
    finite = expected[expected.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return expected.shape == found.shape and torch.allclose(found, expected, limit, limit * largest, equal_nan=True)


def _with_batch(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """The inputs cut or repeated to `size` samples."""
    return tuple(torch.cat([x] * size)[:size].clone() if x.ndim and len(x) else x for x in inputs)


def _has_free_batch(program: torch.export.ExportedProgram) -> bool:
    shapes = [node.meta["val"].shape for node in _user_inputs(program)]
    return bool(shapes) and all(len(shape) and isinstance(shape[0], torch.SymInt) for shape in shapes)


def _user_inputs(program: torch.export.ExportedProgram) -> list[fx.Node]:
    names = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _declared_example(program: torch.export.ExportedProgram) -> tuple[Tensor, ...]:
    """Zero tensors of the shapes a static program was exported with."""
    values = [node.meta["val"] for node in _user_inputs(program)]
    return tuple(torch.zeros([int(n) for n in value.shape], dtype=value.dtype) for value in values)


def _flatten(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """ep.module() without guards, asserts, in-place operators and pytrees."""
    if any(_is_in_place(node) and not _is_plain_in_place(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # functionalises; splits some composite operators
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    for node in reversed(list(graph.nodes)):
        is_assert = node.op == "call_function" and "_assert" in str(node.target)
        if node.op == "call_module" or is_assert:
            graph.erase_node(node)
    for node in list(graph.nodes):
        _restore_composite(node)
        if _is_in_place(node):
            _make_functional(node)
        _settle_reshape(node)
        _settle_padding(node)
    out_spec = program.call_spec.out_spec
    graph.set_codegen(CodeGen())
    _drop_empty_inputs(graph)
    graph.eliminate_dead_code()
    flat = fx.GraphModule(module, graph)
    output = next(iter(reversed(flat.graph.nodes)))
    outputs = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    output.args = (tuple(outputs),)
    notes = _widen(flat)
    flat.recompile()
    input_names = [str(node.target) for node in flat.graph.nodes if node.op == "placeholder"]
    flat.meta = {
        "input_names": input_names,
        "output_names": _unlike(_output_names(out_spec, len(outputs)), input_names),
        "notes": notes,
    }
    return flat


def _widen(graph: fx.GraphModule) -> list[str]:
    """Half precision becomes float32 between inputs and outputs, which keep their types; returns what to tell the user.

    The same weights, computed at least as exactly: scales, codes and folds are defined on float32.
    """
    found = {_dtype(node) for node in graph.graph.nodes} & _HALVES
    if not found:
        return []
    output = next(iter(reversed(graph.graph.nodes)))
    declared = [_dtype(value) for value in output.args[0]]
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            _widen_attribute(graph, str(node.target))
        elif node.op == "placeholder" and _dtype(node) in _HALVES:
            with graph.graph.inserting_after(node):
                cast = graph.graph.call_function(torch.ops.aten.to.dtype, (node, torch.float32))
            node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
        elif node.op == "call_function":
            node.args = pytree.tree_map(_widened, node.args)
            node.kwargs = pytree.tree_map(_widened, node.kwargs)
    results = list(output.args[0])
    with graph.graph.inserting_before(output):
        for index, dtype in enumerate(declared):
            if dtype in _HALVES:
                results[index] = graph.graph.call_function(torch.ops.aten.to.dtype, (results[index], dtype))
    output.args = (tuple(results),)
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
    return [f"the model computes in {names}; it is exported with the same weights in float32"]


def _dtype(node: object) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None) if isinstance(node, fx.Node) else None


def _widened(argument: Any) -> Any:
    return torch.float32 if isinstance(argument, torch.dtype) and argument in _HALVES else argument


def _widen_attribute(graph: fx.GraphModule, target: str) -> None:
    """Replace a half precision parameter or buffer of the graph's own hierarchy by its float32 copy."""
    path, _, name = target.rpartition(".")
    owner = graph.get_submodule(path)
    value = getattr(owner, name)
    if value.dtype in _HALVES:
        wide = value.detach().float()
        setattr(owner, name, nn.Parameter(wide, requires_grad=False) if isinstance(value, nn.Parameter) else wide)


def _is_in_place(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _is_view(node: fx.Node) -> bool:
    """Whether what the call returns may be memory that it was given: of one of several results nothing says so."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target in _RETURN_THEIR_INPUT:
        return True
    return any(argument.alias_info is not None for argument in target._schema.arguments)


def _is_plain_in_place(node: fx.Node) -> bool:
    """Whether replacing the operator by its functional twin and later readers by its result is all there is to it."""
    source = node.args[0]
    twin = _functional_twin(node)
    if twin is None or not isinstance(source, fx.Node) or source.op != "call_function" or _is_view(source):
        return False
    return all(user is node or not _is_view(user) for user in source.users)


def _functional_twin(node: fx.Node) -> torch._ops.OpOverload | None:
    """aten.relu_.default -> aten.relu.default; None where there is none of the same name."""
    target: Any = node.target
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    return getattr(packet, target._overloadname, None) if name.endswith("_") and packet is not None else None


def _make_functional(node: fx.Node) -> None:
    """Rewrite an in-place operator; a final copy into a model input is the caller's buffer and dropped."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if node.target is torch.ops.aten.copy_.default:
        node.replace_all_uses_with(node.args[1])  # type: ignore[arg-type]
        node.graph.erase_node(node)
        return
    later = set()
    following: fx.Node = node.next
    while following.op != "root":
        later.add(following)
        following = following.next
    twin = _functional_twin(node)
    assert twin is not None
    node.target = twin
    source.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)


def _restore_composite(node: fx.Node) -> None:
    """Core-ATen operators back to those that modules call: one normal form for folding and kernels."""
    aten: Any = torch.ops.aten
    if node.target is aten._native_batch_norm_legit_no_training.default:
        x, weight, bias, mean, variance, momentum, epsilon = node.args
        whole = _call(node, aten.batch_norm.default, (x, weight, bias, mean, variance, False, momentum, epsilon, False))
        whole.meta = node.meta | {"val": node.meta["val"][0]} if "val" in node.meta else dict(node.meta)
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(whole)
            node.graph.erase_node(user)
    elif node.target is aten.convolution.default:
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
        dims = len(stride)  # type: ignore[arg-type]
        rest: tuple[Any, ...]
        if transposed:
            kinds = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
            rest = (stride, padding, output_padding, groups, dilation)
        else:
            kinds = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
            rest = (stride, padding, dilation, groups)
        node.replace_all_uses_with(_call(node, kinds[dims - 1], (x, weight, bias, *rest)))
    elif node.target in (aten.addmm.default, aten.mm.default):
        bias, x, turned = node.args if node.target is aten.addmm.default else (None, *node.args)
        if node.kwargs or not isinstance(turned, fx.Node) or not _is_transposed_constant(turned):
            return
        node.replace_all_uses_with(_call(node, aten.linear.default, (x, turned.args[0], bias)))
    else:
        return
    node.graph.erase_node(node)


def _call(node: fx.Node, target: Any, arguments: tuple[Any, ...]) -> fx.Node:
    """A call in front of `node`, which it is to replace."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, arguments)
    made.meta = dict(node.meta)
    return made


def _is_transposed_constant(node: fx.Node) -> bool:
    """Whether a call swaps the two dimensions of a constant matrix."""
    aten: Any = torch.ops.aten
    swaps = {aten.t.default: (), aten.permute.default: ([1, 0],), aten.transpose.int: (0, 1)}
    return node.target in swaps and tuple(node.args[1:]) == swaps[node.target] and is_constant(node.args[0])


def _settle_reshape(node: fx.Node) -> None:
    """Views as reshapes, which ask nothing of memory layout, to constant sizes: at most one is free and left as -1."""
    if node.target not in _RESHAPES:
        return
    node.target = torch.ops.aten.reshape.default
    value = node.meta.get("val")
    sizes = [size if isinstance(size, int) else -1 for size in value.shape] if isinstance(value, Tensor) else []
    if sizes and sizes.count(-1) <= 1 and 0 not in sizes:
        node.args = (node.args[0], sizes)
        node.kwargs = {}


def _settle_padding(node: fx.Node) -> None:
    """Convolutions padded by 'same' or 'valid' get numbers; where the sides differ, an explicit pad adds the rest.

    Padding with a constant gets the one operator that does just that.
    """
    if node.target is torch.ops.aten.pad.default and bind(node)["mode"] == "constant":
        x, widths, _, value = bind(node).values()
        node.target, node.args, node.kwargs = torch.ops.aten.constant_pad_nd.default, (x, widths, value or 0), {}
    plain = _PADDED_BY_NAME.get(node.target)
    if plain is None:
        return
    bound = bind(node)
    kernel = bound["weight"].meta["val"].shape[2:] if "val" in bound["weight"].meta else ()
    if bound["padding"] == "same" and not kernel:
        return
    sizes = list(kernel) or [1] * len(bound["stride"])
    per_axis = [list(bound[key]) * len(sizes) for key in ("stride", "dilation")]
    stride, dilation = (values[: len(sizes)] for values in per_axis)
    total = [d * (k - 1) if bound["padding"] == "same" else 0 for k, d in zip(sizes, dilation, strict=True)]
    x = bound["input"]
    if any(amount % 2 for amount in total):
        sides = [side for amount in reversed(total) for side in (0, amount % 2)]
        with node.graph.inserting_before(node):
            x = node.graph.call_function(torch.ops.aten.constant_pad_nd.default, (x, sides))
        x.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    node.target = plain
    padding = [amount // 2 for amount in total]
    node.args = (x, bound["weight"], bound["bias"], stride, padding, dilation, bound["groups"])
    node.kwargs = {}


def _drop_empty_inputs(graph: fx.Graph) -> None:
    """Arguments captured as None have no tensor to feed; nobody reads them."""
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users and node.meta.get("val") is None:
            graph.erase_node(node)


def _unlike(names: list[str], taken: list[str]) -> list[str]:
    """The names, each with as many underscores behind it as make it new."""
    found: list[str] = []
    for name in names:
        while name in taken or name in found:
            name += "_"
        found.append(name)
    return found


def _output_names(spec: Any, count: int) -> list[str]:
    """Keys of a dictionary of tensors, else 'output' or 'output_0', 'output_1', ..."""
    default = ["output"] if count == 1 else [f"output_{index}" for index in range(count)]
    if spec is None:
        return default
    structure = pytree.tree_unflatten(list(range(count)), spec)
    if not isinstance(structure, dict) or any(not isinstance(index, int) for index in structure.values()):
        return default
    return [str(name) for name, _ in sorted(structure.items(), key=lambda item: int(item[1]))]


def _check(graph: fx.GraphModule) -> None:
    """Run the captured graph once: it must return tensors, mark every shape, and have one way through."""
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise ModelError(
                f"{where(node)} chooses between subgraphs at run time ({node.target}), which no integer runtime "
                "executes; export one branch, or compute both and select with torch.where"
            )
    try:
        infer_shapes(graph)
    except Exception as error:
        raise ModelError(f"the captured graph does not run on its own example: {_first_line(error)}") from error
    output = next(iter(reversed(graph.graph.nodes)))
    for value in output.args[0]:
        if not isinstance(value, fx.Node):
            raise ModelError(f"the model returns {value!r}, which is no tensor; return tensors only")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _refusal(model: nn.Module, inputs: tuple[Tensor, ...], error: Exception) -> str:
    """What failed, in which module, at which line, and what to do."""
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
            f"the model does not run on inputs of shape {shapes}: {type(eager).__name__}: {_first_line(eager)}"
            f"{f' (in {module!r}, {line})' if line else ''}; check that the data fits the model's forward()"
        )
    return (
        f"torch.export cannot capture {module or type(model).__name__!r}{f' at {line}' if line else ''}: "
        f"{type(error).__name__}: {_first_line(error)}; make the control flow there independent of tensor values, or "
        "export the model yourself with torch.export.save and pass the .pt2 file"
    )


def _frames(error: BaseException | None) -> Iterator[tuple[Any, int]]:
    """Frames of the error and then of what it came from."""
    while error is not None:
        yield from traceback.walk_tb(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's own chatter (deprecations inside torch, graph dumps) off the user's terminal."""
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
