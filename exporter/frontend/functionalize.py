"""Bring what `torch.export` gives to the one form that everything later reads: flat, functional, in float32.

In-place operators, operators that decompositions split, views and paddings by name each have one spelling afterwards.

Must not know: how a program was exported, quantization, ONNX.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from calibrators.errors import ModelError, first_line
from calibrators.graph.aten import bind, convolution, is_constant, overloads, where
from calibrators.graph.operators import DROPOUTS, PADDED_BY_NAME
from calibrators.graph.rewrite import Rule, apply_rules, call_before, origin, replace_by, replace_call
from calibrators.graph.spelling import SPELLINGS

__all__ = ["HALVES", "dtypes", "flatten", "is_double"]

aten = torch.ops.aten

HALVES = {torch.float16, torch.bfloat16}


def _functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return the program without operators that change tensors; some composite operators are split.

    raises: ModelError where torch cannot do that.
    """
    try:
        changed: torch.export.ExportedProgram = program.run_decompositions({})
    except (AssertionError, RuntimeError) as error:
        raise ModelError(
            f"torch cannot rewrite operators that change tensors in place ({first_line(error)}); replace them, for "
            "example an Embedding with max_norm whose table another layer shares"
        ) from error
    return changed


def flatten(program: torch.export.ExportedProgram, *, narrow: bool = False) -> fx.GraphModule:
    """Return the program's module without guards, asserts, in-place operators and pytrees.

    narrow: compute in float32 in place of float64. Half precision always becomes float32.

    meta has "input_names", "output_names" and "notes", what the user should know.
    """
    changed = _changed_buffers(program)
    if any(_is_in_place(node) and not _is_plain_in_place(node) for node in _all_nodes(program.graph_module)):
        program = _functional(program)
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    _inline(module)
    for node in reversed(list(graph.nodes)):
        is_assert = node.op == "call_function" and "_assert" in str(node.target)
        if node.op == "call_module" or is_assert:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if _is_in_place(node):
            _make_functional(node)
        elif node.op == "placeholder" and not node.users and node.meta.get("val") is None:
            graph.erase_node(node)  # an argument captured as None has no tensor to feed
    graph.set_codegen(CodeGen())
    flat = fx.GraphModule(module, graph)
    apply_rules(flat, SPELLINGS)
    apply_rules(flat, RULES)
    output = flat.graph.output_node()
    outputs = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    names, left_out = _output_names(program.call_spec.out_spec, len(outputs)), []
    for name, value in zip(names, outputs, strict=True):
        if not isinstance(value, fx.Node):
            left_out.append(f"the output {name!r} is {value!r} for every input, and is left out")
    tensors = {name: value for name, value in zip(names, outputs, strict=True) if isinstance(value, fx.Node)}
    if not tensors:
        raise ModelError("the model returns no tensor; return at least one")
    output.args = (tuple(tensors.values()),)
    notes = _in_single(flat, narrow=narrow) + left_out
    graph.eliminate_dead_code()
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    notes += [
        f"forward changes the buffer {name!r}, which the file cannot keep: every call starts from its present value"
        for name in sorted(changed & read)
    ]
    notes += [
        f"the model does not use its input {node.target!r}"
        for node in graph.nodes
        if node.op == "placeholder" and not node.users
    ]
    flat.recompile()
    input_names = [str(node.target) for node in flat.graph.nodes if node.op == "placeholder"]
    flat.meta = {
        "input_names": input_names,
        "output_names": _distinct(list(tensors), flat, input_names),
        "notes": notes,
    }
    return flat


# Float types ---------------------------------------------------------------------------------------------------------


def _in_single(graph: fx.GraphModule, *, narrow: bool) -> list[str]:
    """Compute in float32 instead of half precision, with `narrow` of float64 too. Return a note for the user.

    Inputs and outputs in half precision keep their types; those in float64 become float32. Weights are the same in
    place of halves, and computed with at least as exactly: scales, codes and folds are defined on float32.
    """
    others = {*HALVES, torch.float64} if narrow else HALVES
    found = {_dtype(node) for node in graph.graph.nodes} & others
    if not found:
        return []
    output = graph.graph.output_node()
    declared = [_dtype(value) for value in output.args[0]]  # type: ignore[union-attr]
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            _to_single(graph, str(node.target), others)
        elif node.op == "placeholder" and _dtype(node) in others - HALVES:
            node.meta["val"] = node.meta["val"].float()
        elif node.op == "placeholder" and _dtype(node) in HALVES:
            with graph.graph.inserting_after(node):
                cast = graph.graph.call_function(aten.to.dtype, (node, torch.float32))
            node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
        elif node.op == "call_function":
            node.args, node.kwargs = pytree.tree_map(
                lambda value: torch.float32 if isinstance(value, torch.dtype) and value in others else value,
                (node.args, node.kwargs),
            )
    results = list(output.args[0])  # type: ignore[arg-type]
    for index, dtype in enumerate(declared):
        if dtype in HALVES:
            results[index] = call_before(output, aten.to.dtype, results[index], dtype)
            results[index].meta = {}
    output.args = (tuple(results),)
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
    weights = "its weights rounded to" if torch.float64 in found else "the same weights in"
    return [f"the model computes in {names}; it is exported with {weights} float32"]


def _dtype(node: object) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None) if isinstance(node, fx.Node) else None


def is_double(parameters: Iterable[Tensor]) -> bool:
    """Return whether weights are in float64."""
    return any(parameter.dtype == torch.float64 for parameter in parameters)


def _to_single(graph: fx.GraphModule, target: str, others: Collection[torch.dtype]) -> None:
    """Replace a parameter or buffer of the graph's own hierarchy that has another float type by its float32 copy."""
    path, _, name = target.rpartition(".")
    owner = graph.get_submodule(path)
    value = getattr(owner, name)
    if value.dtype in others:
        wide = value.detach().float()
        setattr(owner, name, nn.Parameter(wide, requires_grad=False) if isinstance(value, nn.Parameter) else wide)


# In-place operators --------------------------------------------------------------------------------------------------


# Regions -------------------------------------------------------------------------------------------------------------


def _all_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    for each in module.modules():
        if isinstance(each, fx.GraphModule):
            yield from each.graph.nodes


def dtypes(module: fx.GraphModule) -> set[torch.dtype]:
    """Return the types of all values of a graph and its regions."""
    return {dtype for node in _all_nodes(module) if (dtype := _dtype(node)) is not None}


def _inline(module: fx.GraphModule) -> None:
    """Replace every region by the operators inside it."""
    for node in [node for node in module.graph.nodes if _is_region(node)]:
        place = next(index for index, each in enumerate(node.args) if _is_graph(module, each))
        inner = module.get_submodule(str(node.args[place].target))
        assert isinstance(inner, fx.GraphModule)
        _inline(inner)
        placeholders = [each for each in inner.graph.nodes if each.op == "placeholder"]
        copies = dict(zip(placeholders, node.args[place + 1 :], strict=True))
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(inner.graph, copies)
        for user in list(node.users):
            assert user.target is operator.getitem
            replace_by(user, results[user.args[1]])  # type: ignore[index, arg-type]
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()


def _is_graph(module: fx.GraphModule, value: object) -> bool:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return False
    return isinstance(getattr(module, str(value.target), None), fx.GraphModule)


def _is_region(node: fx.Node) -> bool:
    """Return whether a node runs straight-line code in another mode of autograd or autocast."""
    return isinstance(node.target, torch._ops.HigherOrderOperator) and str(node.target).startswith("wrap_with_")


def _is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _changed_buffers(program: torch.export.ExportedProgram) -> set[str]:
    """Return the names of the buffers into which a program writes."""
    buffers, changed = program.graph_signature.inputs_to_buffers, set()
    for node in program.graph.nodes:
        source = node.args[0] if _is_in_place(node) else None
        while isinstance(source, fx.Node) and source.op == "call_function" and _is_view(source) and source.args:
            source = source.args[0]
        if isinstance(source, fx.Node) and source.name in buffers:
            changed.add(buffers[source.name])
    return changed


def _is_view(node: fx.Node) -> bool:
    """Return whether a call may return memory that it was given; for several results the schema does not say which.

    A dropout does so in evaluation, and its schema does not say so at all.
    """
    target = node.target
    if target in DROPOUTS or not isinstance(target, torch._ops.OpOverload):
        return True
    return any(argument.alias_info is not None for argument in target._schema.arguments)


def _is_plain_in_place(node: fx.Node) -> bool:
    """Return whether its functional twin can replace an operator if later readers read the twin's result instead."""
    source = node.args[0]
    if _functional_twin(node) is None or not isinstance(source, fx.Node):
        return False
    if source.op != "call_function" or _is_view(source):
        return False
    return all(user is node or not _is_view(user) for user in source.users)


def _functional_twin(node: fx.Node) -> torch._ops.OpOverload | None:
    """Return aten.relu.default for aten.relu_.default; None where there is none of the same name."""
    target: Any = node.target
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    return getattr(packet, target._overloadname, None) if name.endswith("_") and packet is not None else None


def _make_functional(node: fx.Node) -> None:
    """Rewrite an in-place operator; a final copy into a model input, the caller's buffer, is dropped."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if node.target is aten.copy_.default:
        replace_by(node, node.args[1])  # type: ignore[arg-type]
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


# One spelling --------------------------------------------------------------------------------------------------------


def _batch_norm(node: fx.Node) -> None:
    x, weight, bias, mean, variance, momentum, epsilon = node.args
    whole = (aten.batch_norm.default, (x, weight, bias, mean, variance, False, momentum, epsilon, False))
    values = node.meta.get("val")
    for user in [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]:
        user.meta = node.meta | ({"val": values[0]} if values is not None else {})
        replace_call(user, whole)


def _convolution(node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    target = convolution(len(stride), transposed=transposed)  # type: ignore[arg-type]
    rest = (padding, output_padding, groups, dilation) if transposed else (padding, dilation, groups)
    replace_call(node, (target, (x, weight, bias, stride, *rest)))


def _linear(node: fx.Node) -> None:
    bias, x, turned = node.args if node.target is aten.addmm.default else (None, *node.args)
    if not node.kwargs and isinstance(turned, fx.Node) and _is_transposed_constant(turned):
        replace_call(node, (aten.linear.default, (x, turned.args[0], bias)))


def _is_transposed_constant(node: fx.Node) -> bool:
    """Return whether a call swaps the two dimensions of a constant matrix."""
    swaps = {aten.t.default: (), aten.permute.default: ([1, 0],), aten.transpose.int: (0, 1)}
    return node.target in swaps and tuple(node.args[1:]) == swaps[node.target] and is_constant(node.args[0])


def _embedding_bag(node: fx.Node) -> None:
    """Replace bags of one size, the rows of a matrix of indices, by a lookup and a reduction.

    raises: ModelError for bags given by offsets, or with a padding index.
    """
    bound = bind(node)
    size, indices, weights = _size_of_bags(bound["offsets"]), bound["indices"], bound["per_sample_weights"]
    if size is None or bound.get("padding_idx", -1) not in (None, -1):
        raise ModelError(
            f"{where(node)} has bags given by offsets, or with a padding index, which ONNX computes in a loop; give "
            "the indices as a matrix with a bag in each row, without padding_idx"
        )
    rows = call_before(node, aten.reshape.default, indices, [-1, size])
    found = call_before(node, aten.embedding.default, bound["weight"], rows)
    if weights is not None:
        found = call_before(
            node, aten.mul.Tensor, found, call_before(node, aten.reshape.default, weights, [-1, size, 1])
        )
    reduced = call_before(node, BAG_REDUCTIONS[bound["mode"]], found, [1])
    for user in list(node.users):
        reduced.meta = dict(user.meta)
        replace_by(user, reduced)


BAG_REDUCTIONS = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default)
"""By the number of the mode of an embedding bag."""


def _size_of_bags(offsets: object) -> int | None:
    """Return the size of bags whose offsets are 0, size, 2 size, ..."""
    if not isinstance(offsets, fx.Node) or offsets.target is not aten.arange.start_step:
        return None
    step = offsets.args[2]
    return step if offsets.args[0] == 0 and isinstance(step, int) else None


def _constant_pad(node: fx.Node) -> None:
    """Replace padding with a constant by the operator that does only that."""
    x, widths, mode, value = bind(node).values()
    if mode == "constant":
        node.target, node.args, node.kwargs = aten.constant_pad_nd.default, (x, widths, value or 0), {}


def _padding_by_name(node: fx.Node) -> None:
    """Replace 'same' and 'valid' by numbers; where the two sides of an axis differ, an explicit pad adds the rest."""
    bound = bind(node)
    kernel = bound["weight"].meta["val"].shape[2:]
    stride, dilation = ((list(bound[key]) * len(kernel))[: len(kernel)] for key in ("stride", "dilation"))
    total = [d * (k - 1) if bound["padding"] == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    x = bound["input"]
    if any(amount % 2 for amount in total):
        sides = [side for amount in reversed(total) for side in (0, amount % 2)]
        x = call_before(node, aten.constant_pad_nd.default, x, sides)
        x.meta = origin(node)
    node.target = convolution(len(kernel))
    padding = [amount // 2 for amount in total]
    node.args = (x, bound["weight"], bound["bias"], stride, padding, dilation, bound["groups"])
    node.kwargs = {}


def _clamp(node: fx.Node) -> None:
    """Give bounds of floats as floats: torch.onnx refuses an int beside a float."""
    x, *bounds = bind(node).values()
    if x.meta["val"].is_floating_point():
        node.args, node.kwargs = (x, *(float(bound) if isinstance(bound, int) else bound for bound in bounds)), {}


RULES: dict[Any, tuple[Rule, ...]] = {
    aten._native_batch_norm_legit_no_training.default: (_batch_norm,),
    aten.convolution.default: (_convolution,),
    **dict.fromkeys((aten.addmm.default, aten.mm.default), (_linear,)),
    **dict.fromkeys((aten.embedding_bag.padding_idx, aten._embedding_bag.default), (_embedding_bag,)),
    aten.pad.default: (_constant_pad,),
    aten.clamp.default: (_clamp,),
    **dict.fromkeys(overloads(PADDED_BY_NAME), (_padding_by_name,)),
}
"""Core-ATen operators become those that modules call; paddings have one form."""


# Names of the outputs ------------------------------------------------------------------------------------------------


def _distinct(names: list[str], graph: fx.GraphModule, input_names: list[str]) -> list[str]:
    """Append underscores to each name until no other value of the file has it: input, parameter, integers, output."""
    taken = {*input_names, *(name for name, _ in [*graph.named_parameters(), *graph.named_buffers()])}
    found: list[str] = []
    for name in names:
        while not name or name in taken or name in found or name.endswith("_quantized"):
            name += "_"
        found.append(name)
    return found


def _output_names(spec: Any, count: int) -> list[str]:
    """Return the names of nested outputs: the keys and positions that lead to them, 'output' where there are none.

    A single output is 'output', those of a tuple 'output_0', 'output_1', ...; {"a": x, "b": (y, z)} gives 'a', 'b_0',
    'b_1'.
    """
    if spec is None:
        return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), spec))
    if count == 1 and not any(isinstance(path[-1], pytree.MappingKey) for path, _ in paths if path):
        return ["output"]
    return [_output_name(path) for path, _ in paths]


def _output_name(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    is_named = bool(path) and not isinstance(path[0], pytree.SequenceKey)
    return "_".join(parts if is_named else ["output", *parts])
