"""Options of a method: the fields of its frozen dataclass, declared once, validated by pydantic, and listed.

Must not know: which methods there are, tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from calibrators.errors import InputError, UnknownNameError
from calibrators.settings import expected, shown, words

__all__ = ["RANGES", "Option", "Options", "Value", "build", "list_options", "option"]

Value = str | int | float | bool
Method = TypeVar("Method")

EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


@dataclasses.dataclass(frozen=True)
class Option:
    """One option as it is listed: its name, type ("int", "float", "bool" or "str"), default and help."""

    name: str
    type: str
    default: Value
    doc: str


def option(
    default: Value,
    doc: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare a field of a method's dataclass: a default of its type, a line of help, and its values (with bounds)."""
    return dataclasses.field(default=default, metadata={"doc": doc, "limits": (minimum, maximum, choices)})


def list_options(method: type) -> tuple[Option, ...]:
    """Return the options of a method class, in order of declaration."""
    fields: tuple[Any, ...] = dataclasses.fields(method)
    return tuple(Option(f.name, type(f.default).__name__, f.default, f.metadata["doc"]) for f in fields)


def build(method: type[Method], name: str, options: Mapping[str, object]) -> Method:
    """Return the method called `name` with `options`; text is parsed as the type of its field.

    raises: UnknownNameError for an option that the method does not have, InputError for a value it does not allow.
    """
    known = {field.name: field for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    for given in options:
        if given not in known:
            raise UnknownNameError(f"{name} option", given, known)
    return method(**{option: _validated(name, known[option], value, strict=False) for option, value in options.items()})


class Options:
    """Base of a method's dataclass, which checks the options of every new object.

    slow: whether fitting takes minutes, so that a result is kept where little changes.
    places_again: whether it tries other placements than that of the problem.
    parallel: whether several processes can share the work.
    """

    slow: ClassVar[bool] = False
    places_again: ClassVar[bool] = False
    parallel: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raise InputError for the first field whose value its declaration does not allow."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            _validated(type(self).__name__.lower(), field, getattr(self, field.name), strict=True)

    def effort(self, samples: int) -> float:
        """Return how many samples the float network computes in the time that a calibration takes, for estimates.

        Measured with benchmarks/estimates.py; right up to a factor of about two.

        samples: of the calibration data.
        """
        return RANGES * samples


RANGES = 4.0
"""Effort of ranges for a sample: they and the cost of portability are found in passes through the network."""


def _validated(name: str, field: dataclasses.Field[Any], value: object, *, strict: bool) -> Any:
    """Return a value in the type of its field; without `strict` it may be text, or of a type that converts exactly."""
    strict = strict or isinstance(value, bool)  # True is not the number 1
    kind: Any = type(field.default)
    try:
        return _adapter(kind, *field.metadata["limits"]).validate_python(value, strict=strict)
    except ValidationError as error:
        wanted = words(error.errors(include_url=False)[0])
        raise InputError(f"option {field.name!r} of method {name!r} is {shown(value)}; {wanted}.") from None


@cache
def _adapter(kind: type, minimum: float | None, maximum: float | None, choices: tuple[str, ...]) -> TypeAdapter[Any]:
    """Return what parses and checks a value, and says what to give instead of one that is not allowed."""
    allowed: Any = Annotated[kind, Field(ge=minimum, le=maximum, allow_inf_nan=False if kind is float else None)]
    wanted = f"give {EXPECTED[kind.__name__]}"
    if choices:
        allowed, wanted = Literal[choices], f"choose one of {', '.join(map(repr, choices))}"
    elif minimum is not None:
        wanted += f" from {minimum:g} up" if maximum is None else f" between {minimum:g} and {maximum:g}"
    allowed = Annotated[allowed, expected(wanted)]
    return TypeAdapter(allowed)
