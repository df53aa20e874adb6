"""Check the contents of a .pt2 file and copy it clean, before `torch.export.load`, which may run code found in it.

That loader unpickles members, evaluates shape expressions, generates Python from names, follows dotted operator names
and opens compiled libraries. Here each of these is held to the form that `torch.export.save` writes for plain networks;
any other file is refused before torch sees it. Operators are those that networks call, since some others trust their
arguments and read foreign memory. Sizes are checked before memory is taken. A refused user can give a factory and a
checkpoint instead.

Must not know: how the program is used afterwards.
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._decomp import decomposition_table

from calibrators.errors import ModelError, argument
from exporter.frontend.untrusted import check_pickle, check_sizes

__all__ = ["clean_archive"]

MEMBERS = re.compile(
    r"data/(weights|constants)/((weight|tensor)_\d+|\w+_(weights|constants)_config\.json)|models/\w+\.json"
    r"|data/sample_inputs/\w+\.pt|archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version|extra/.*"
)
ON_NUMBERS = re.compile(
    r"torch\.sym_\w+|torch\._sym_\w+|math\.(ceil|floor|trunc)|round"
    r"|_operator\.(getitem|add|mul|sub|truediv|floordiv|mod|pow|neg|abs|ge|le|gt|lt|eq|ne|and_|or_|not_|lshift|rshift)"
)
OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+?)(?:\.(\w+))?")
NAMESPACES = {
    "intact": re.compile("quantize|dequantize"),
    "quantized_decomposed": re.compile(r"(de)?quantize_per_(tensor|channel)\w*"),
    "torchvision": re.compile("nms|(ps_)?roi_(align|pool)|deform_conv2d"),
    "higher_order": re.compile("cond|scan|while_loop|associative_scan|wrap_with_(autocast|set_grad_enabled)"),
    "prims": re.compile("convert_element_type|iota"),
}
"""Operators that a program may call besides those of `aten`, by namespace."""

UNCHECKED = re.compile(
    r"sparse|coo_|_coo|cs[rc]|bs[rc]|nested|mkldnn|fbgemm|cudnn|miopen|mps|cufft|backward|from_file|_?save"
    r"|^set_|^_?set$|storage|resize|validate|record_stream|foreach|^_(?!unsafe_(view|index)|assert)\w*unsafe"
)
"""Names of `aten` operators that trust their arguments, read files, or change what a tensor points to."""

FURTHER = re.compile(
    r"(unsqueeze|squeeze|transpose|t|copy|detach|masked_scatter|bernoulli|addr|index_reduce)_|cum(max|min)|(nan)?median"
    r"|masked_select|kthvalue|mode|logcumsumexp|bincount|hist(c|ogram)|searchsorted|angle|view_as_(real|complex)|equal"
    r"|rand(n|int)?_like|randint|multinomial|poisson|polygamma|range|grid_sampler_3d|(linalg_|ormqr|triangular_|lu_)\w+"
    r"|nonzero_static|slow_conv\w+|conv_depthwise3d|fft_\w+|(bartlett|blackman|hamming|hann|kaiser)_window|fake_quant\w+"
    r"|sort|lift_fresh_copy|_upsample_\w+_aa|_embedding_bag(_forward_only)?|_?sym_constrain_range\w*"
    r"|_assert_(tensor_metadata|scalar|async)|rrelu_with_noise\w*|unique_\w+|special_\w+|addbmm|put|segment_reduce|fractional_max_pool\w+"
)
"""Operators of `aten` that torch neither calls core nor decomposes, and that check their arguments."""
NAME = re.compile(r"[\w.]*")

EXPANDED = 4
"""Largest number of elements of all weights, over the bytes of the file."""

SAFE_NODES = (
    ast.Expression,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.UnaryOp,
    ast.BinOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
)


def clean_archive(path: Path) -> io.BytesIO:
    """Return a new archive with only the checked members of `path`: loading it can only build a graph and tensors.

    The copy matters: torch's own zip reader may see other members in a crafted file than the check did.
    raises: ModelError if the file is not a .pt2 archive, is damaged, or holds anything that could run code.
    """
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as clean:
            check_sizes(path, archive.infolist())
            for name, full in _members(path, archive).items():
                content = archive.read(full)
                if name.endswith(".json"):
                    document = json.loads(content)
                    _check_json(path, name, document)
                    if name.endswith("_config.json"):
                        _check_tensors(path, name, document)
                elif name.endswith(".pt"):
                    _check_pickle(path, name, content)
                clean.writestr(f"model/{name}", content)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, RecursionError, NotImplementedError) as error:
        reason = f"{path} is not a readable .pt2 archive ({error}); write it again with torch.export.save."
        raise ModelError(reason) from error
    copy.seek(0)
    return copy


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, str]:
    """Return the full names of the members, by their names without the archive's root folder."""
    names = archive.namelist()
    if len(set(names)) != len(names):
        raise _refusal(path, "a member stored twice")
    if "serialized_exported_program.json" in names:
        raise ModelError(
            f"{path} is in the archive form of torch < 2.8; export the model again with torch 2.8 or newer."
        )
    members = {name.partition("/")[2]: name for name in names}
    if not any(name.startswith("models/") for name in members):
        raise ModelError(
            f"{path} holds no exported program; write it with torch.export.save(torch.export.export(...), path)."
        )
    for name in members:
        if not MEMBERS.fullmatch(name) or ".." in name:
            raise _refusal(path, f"the member {name!r} (compiled code or a pickled object)")
    return members


def _check_tensors(path: Path, name: str, config: Any) -> None:
    """Refuse weights with far more elements than bytes, which stand for memory that the file does not hold."""
    entries = config.get("config", {}).values() if isinstance(config, dict) else ()
    try:
        elements = sum(math.prod(size["as_int"] for size in entry["tensor_meta"]["sizes"]) for entry in entries)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} is malformed: {error!r}") from error
    size = path.stat().st_size
    if elements > EXPANDED * size:
        raise ModelError(
            f"{path} has {size:,} bytes, but its weights have {elements:,} elements; store them without expanded views."
        )


def _check_pickle(path: Path, name: str, content: bytes) -> None:
    check_pickle(path, io.BytesIO(content))
    try:
        torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises many types for hostile bytes: each of them is a refusal
        raise _refusal(path, f"Python objects in {name!r}") from error


def _check_json(path: Path, name: str, document: Any) -> None:
    for key, value in _entries(document):
        if key == "use_pickle" and value:
            raise _refusal(path, f"a pickled object listed in {name!r}")
        if key == "guards_code" and value:
            raise _refusal(path, "guards written as Python source")
        if not isinstance(value, str):
            continue
        if "default_factory_module" in value:
            raise _refusal(path, "an import of a Python module by name")
        if key == "expr_str" and not _is_safe_expression(value):
            raise _refusal(path, f"the shape expression {value[:80]!r}")
        if key == "target" and not (ON_NUMBERS.fullmatch(value) or _is_checked(value)):
            raise _refusal(path, f"a call of {value[:80]!r}")
        if key.endswith("name") and not NAME.fullmatch(value):
            raise _refusal(path, f"the name {value[:80]!r}")


def _entries(document: Any) -> Iterator[tuple[str, Any]]:
    """Yield every (key, value) of nested dicts; items of a list come under the list's key."""
    stack: list[tuple[str, Any]] = [("", document)]
    while stack:
        key, value = stack.pop()
        yield key, value
        if isinstance(value, dict):
            stack.extend((str(inner), item) for inner, item in value.items())
        elif isinstance(value, list):
            stack.extend((key, item) for item in value)


@cache
def _is_checked(target: str) -> bool:
    """Return whether an operator is one of those that networks call, which check their arguments."""
    match = OPERATOR.fullmatch(target)
    if match is None:
        return False
    namespace, name, overload = match.groups()
    if namespace != "aten":
        return namespace in NAMESPACES and bool(NAMESPACES[namespace].fullmatch(name))
    operator = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
    if not isinstance(operator, torch._ops.OpOverload) or UNCHECKED.search(name):
        return False
    implicit = operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    is_known = torch.Tag.core in operator.tags or implicit or operator in decomposition_table
    return is_known or bool(FURTHER.fullmatch(name))


def _is_safe_expression(text: str) -> bool:
    """Return whether sympy, which evaluates `text` as Python, can only build a number from it.

    Allowed are numbers, strings that are identifiers, and calls of capitalized names (sympy's constructors), as in
    `Symbol('s0')`.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        return False
    for node in ast.walk(tree):
        if not isinstance(node, SAFE_NODES):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id[:1].isupper()):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.isidentifier():
            return False
    return True


def _refusal(path: Path, what: str) -> ModelError:
    return ModelError(
        f"{path} holds {what}, which is refused because it could run code when loaded; "
        f"give the network as file.py:factory and its weights as {argument('checkpoint', 'FILE.safetensors')}."
    )
