"""Define a rule of the linter: what it says about a file, and how it is declared.

Must not know: which rules there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import onnx
import onnx_ir as ir

from calibrators.grid.target import Target
from runtime_tests.ort.operands import where
from runtime_tests.ort.sessions import Model
from runtime_tests.ort.versions import Version

__all__ = ["Case", "Finding", "Hits", "Rule", "each"]

Hits = Iterator[tuple[str, str]]  # place and message of each violation of a rule


@dataclass(frozen=True)
class Finding:
    """One violation: its rule, severity ("error" or "warning"), node or value, and a message that says what to do."""

    rule: str
    severity: str
    where: str
    message: str


@dataclass(frozen=True, eq=False)
class Case:
    """A file and what it is meant for.

    target:  the runtime.
    min_ort: the oldest onnxruntime that has to load it.
    """

    model: Model
    target: Target
    min_ort: Version

    @property
    def proto(self) -> onnx.ModelProto:
        return self.model.proto

    @property
    def graphs(self) -> ir.Model:
        return self.model.graph_model


@dataclass(frozen=True)
class Rule:
    """A check of a whole file.

    why:    what goes wrong if the rule is broken.
    source: the vendor's document that states it, or the experiment that found it.
    """

    name: str
    severity: str
    why: str
    check: Callable[[Case], Hits]
    source: str = ""


class _HasNode(Protocol):
    @property
    def node(self) -> ir.Node: ...


Subject = TypeVar("Subject", bound="ir.Node | _HasNode")


def each(
    subjects: Callable[[ir.Model], Iterable[Subject]],
    broken: Callable[[Subject], object],
    message: str | Callable[[Subject], str],
) -> Callable[[Case], Hits]:
    """Return the check that reports each of `subjects` that is `broken`; `message` is formatted with the subject."""

    def check(case: Case) -> Hits:
        for subject in subjects(case.graphs):
            if broken(subject):
                text = message.format(subject) if isinstance(message, str) else message(subject)
                yield where(subject if isinstance(subject, ir.Node) else subject.node), text

    return check
