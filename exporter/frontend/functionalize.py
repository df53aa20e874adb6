"""Bring the program of `torch.export` to the one form that all later steps read: flat, functional, in float32.

In-place operators, operators that decompositions split, views and paddings by name each have one spelling afterwards.

Must not know: how a program was exported, quantization, ONNX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from calibrators.graph.aten import bind, is_constant

__all__ = ["HALVES", "flatten"]

_PADDED_BY_NAME: dict[object, Any] = {
    torch.ops.aten.conv1d.padding: torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.padding: torch.ops.aten.conv2d.default,
    torch.ops.aten.conv3d.padding: torch.ops.aten.conv3d.default,
}
HALVES = {torch.float16, torch.bfloat16}
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


def flatten(program: torch.export.ExportedProgram) -> fx.GraphModule:
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
    found = {_dtype(node) for node in graph.graph.nodes} & HALVES
    if not found:
        return []
    output = next(iter(reversed(graph.graph.nodes)))
    declared = [_dtype(value) for value in output.args[0]]
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            _widen_attribute(graph, str(node.target))
        elif node.op == "placeholder" and _dtype(node) in HALVES:
            with graph.graph.inserting_after(node):
                cast = graph.graph.call_function(torch.ops.aten.to.dtype, (node, torch.float32))
            node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
        elif node.op == "call_function":
            node.args = pytree.tree_map(_widened, node.args)
            node.kwargs = pytree.tree_map(_widened, node.kwargs)
    results = list(output.args[0])
    with graph.graph.inserting_before(output):
        for index, dtype in enumerate(declared):
            if dtype in HALVES:
                results[index] = graph.graph.call_function(torch.ops.aten.to.dtype, (results[index], dtype))
    output.args = (tuple(results),)
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
    return [f"the model computes in {names}; it is exported with the same weights in float32"]


def _dtype(node: object) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None) if isinstance(node, fx.Node) else None


def _widened(argument: Any) -> Any:
    return torch.float32 if isinstance(argument, torch.dtype) and argument in HALVES else argument


def _widen_attribute(graph: fx.GraphModule, target: str) -> None:
    """Replace a half precision parameter or buffer of the graph's own hierarchy by its float32 copy."""
    path, _, name = target.rpartition(".")
    owner = graph.get_submodule(path)
    value = getattr(owner, name)
    if value.dtype in HALVES:
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
    """Return the names, each with as many trailing underscores as make it unique."""
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
