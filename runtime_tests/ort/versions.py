"""State the oldest onnxruntime that loads a file and runs it.

Measured by loading one file per form, and running it, in releases 1.16.3 to 1.32.0 (benchmarks/ort_versions.py).

Must not know: how files are made, which form is the better one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
import onnxruntime as ort

from calibrators.errors import InputError
from runtime_tests.ort.onnx_operators import DEQUANTIZE, QUANTIZE
from runtime_tests.ort.operands import flag, inputs, stated_type, where

__all__ = [
    "RELEASE_KEY",
    "Need",
    "Version",
    "first_version",
    "installed",
    "minimum_version",
    "needs",
    "parse_version",
    "release_of",
]

RELEASE_KEY = "intact.min_onnxruntime"
"""Metadata key of the oldest release that runs a file."""

OLDEST = "1.16"

OPSETS: Final[Mapping[int, str]] = {
    0: OLDEST, 20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23", 24: "1.24", 26: "1.25", 27: "1.32", 29: "1.33"
}  # fmt: skip
"""First release that loads an opset and those up to the next one listed. Opset 29 has no release yet."""

IR_VERSIONS: Final[Mapping[int, str]] = {0: OLDEST, 10: "1.18", 11: "1.23", 12: "1.24", 14: "1.32", 15: "1.33"}
"""The same for IR versions."""

FOUR_BIT = frozenset({ir.DataType.INT4, ir.DataType.UINT4})


@dataclass(frozen=True)
class Form:
    """A form of an operator that needs a later release than its opset does.

    types:  types of the first input for which this holds; empty: all.
    opset:  first opset for which it holds.
    blocks: it holds where there is one scale per block.
    """

    op: str
    release: str
    types: frozenset[ir.DataType] = frozenset()
    opset: int = 0
    blocks: bool = False


FORMS: Final = (
    Form(DEQUANTIZE, "1.19", types=FOUR_BIT),
    Form(DEQUANTIZE, "1.19", blocks=True),
    Form("Cast", "1.23", types=FOUR_BIT),
    Form(QUANTIZE, "1.24", opset=23),
)
"""Every such form. 2-bit types came with opset 25, whose releases have them in all these operators."""


@dataclass(frozen=True, order=True)
class Version:
    """A release of onnxruntime; patch releases load the same files."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


@dataclass(frozen=True)
class Need:
    """Something in a file that only loads from `version` on.

    where: the node, or the field of the file.
    what:  the form that needs it, as words for a message.
    """

    version: Version
    where: str
    what: str


def parse_version(text: str) -> Version:
    """Return the release in a text such as "1.19" or "1.19.2".

    raises: InputError for any other text.
    """
    found = re.fullmatch(r"(\d{1,4})\.(\d{1,4})(\.\S+)?", text)
    if found is None:
        raise InputError(f"{text!r} is not a release of onnxruntime; write for example 1.19.")
    return Version(int(found[1]), int(found[2]))


def installed() -> Version:
    """Return the release that is installed here."""
    return parse_version(ort.__version__)


def minimum_version(model: ir.Model) -> Need:
    """Return what needs the latest release in a file; its version is the oldest onnxruntime that runs the file."""
    return max(needs(model), key=lambda need: need.version)


def needs(model: ir.Model) -> Iterator[Need]:
    """Yield what opset, IR version and every listed form of a file need."""
    opset = model.opset_imports.get("", 1)
    yield Need(_release(OPSETS, opset), "opset", f"opset {opset}")
    yield Need(_release(IR_VERSIONS, model.ir_version), "ir_version", f"IR version {model.ir_version}")
    for graph in model.graphs():
        for node in graph:
            for form in FORMS:
                if form.op == node.op_type and not node.domain and _has(node, form, opset):
                    dtype = stated_type(inputs(node, 1)[0])
                    form_of = "with blocks" if form.blocks else f"of {dtype}" if form.types else f"of opset {opset}"
                    yield Need(parse_version(form.release), where(node), f"{node.op_type} {form_of}")


def release_of(opset: int, ir_version: int) -> Version:
    """Return the first release that loads files of this opset and IR version."""
    return max(_release(OPSETS, opset), _release(IR_VERSIONS, ir_version))


def first_version(op: str, dtype: ir.DataType, opset: int) -> Version:
    """Return the first release that runs an operator on a type, in a file of this opset."""
    forms = (form for form in FORMS if form.op == op and opset >= form.opset and not form.blocks)
    releases = [parse_version(form.release) for form in forms if not form.types or dtype in form.types]
    return max([_release(OPSETS, opset), *releases])


def _has(node: ir.Node, form: Form, opset: int) -> bool:
    types = not form.types or stated_type(inputs(node, 1)[0]) in form.types
    return opset >= form.opset and types and (not form.blocks or flag(node, "block_size") > 0)


def _release(table: Mapping[int, str], number: int) -> Version:
    return parse_version(table[max((first for first in table if first <= number), default=0)])
