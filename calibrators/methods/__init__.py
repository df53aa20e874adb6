"""The folder is the registry: every module here is one method, found by its file name.

A method module defines one frozen dataclass, the only name in its `__all__`, whose fields are its options
(`calibrators.options.option`) and whose docstring begins with the line that lists it.

Must not know: which methods there are, graphs, ONNX.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from calibrators.errors import InputError, UnknownNameError, argument
from calibrators.options import Option, build, list_options
from calibrators.ranges.range_method import RangeMethod

if TYPE_CHECKING:
    from calibrators.execution.ranks import Ranks
    from calibrators.execution.task import Problem
    from calibrators.program.freeze import CalibrationResult

__all__ = ["Method", "MethodInfo", "RangeMethod", "check_parallel", "get_method", "list_methods", "range_method"]


class Method(Protocol):
    """The interface of a method."""

    def fit(self, problem: Problem) -> CalibrationResult:
        """Return scales, zero points, integer weights and biases for a problem."""


@dataclass(frozen=True)
class MethodInfo:
    """One method as it is listed: its name, its summary, and its options."""

    name: str
    summary: str
    options: tuple[Option, ...]


def get_method(name: str, options: Mapping[str, object] | None = None) -> Any:
    """Return the method called `name` with `options`; text such as "99.99" is parsed.

    raises: UnknownNameError for a method or option that does not exist, InputError for a value out of range.
    """
    known = _names()
    if name not in known:
        raise UnknownNameError("method", name, known)
    return build(_class(name), name, options or {})


def range_method(name: str, options: Mapping[str, object] | None = None) -> RangeMethod:
    """Return the range method called `name` with `options`.

    raises: UnknownNameError for a name or option, InputError for a method that needs the whole network.
    """
    method = get_method(name, options)
    if not isinstance(method, RangeMethod):
        ranges = ", ".join(known for known in _names() if issubclass(_class(known), RangeMethod))
        raise InputError(f"method {name!r} works on whole networks; a rule for layers takes a range method: {ranges}.")
    return method


def check_parallel(method: Method, ranks: Ranks) -> None:
    """Raise InputError for a method whose work several processes cannot share."""
    if ranks.count > 1 and not getattr(method, "parallel", False):
        able = ", ".join(known for known in _names() if getattr(_class(known), "parallel", False))
        raise InputError(
            f"method {type(method).__name__.lower()!r} cannot be shared by {ranks.count} processes; start one, or give "
            f"another {argument('method')}: {able}."
        )


def list_methods() -> tuple[MethodInfo, ...]:
    """Return every method, by name."""
    return tuple(MethodInfo(name, _summary(_class(name)), list_options(_class(name))) for name in _names())


def _names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def _class(name: str) -> type:
    module = importlib.import_module(f"{__name__}.{name}")
    (public,) = module.__all__
    method: type = getattr(module, public)
    return method


def _summary(method: type) -> str:
    return (inspect.getdoc(method) or "").splitlines()[0]
