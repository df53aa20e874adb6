"""Options of a method: the fields of its frozen dataclass, declared once, validated by pydantic, and listed.

Must not know: which methods there are, tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from calibrators.errors import InputError, UnknownNameError

__all__ = ["Option", "Options", "Value", "build", "list_options", "option"]

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
    """Declare a field of a method's dataclass: its default, a line of help, and its values (bounds inclusive)."""
    return dataclasses.field(default=default, metadata={"doc": doc, "limits": (minimum, maximum, choices)})


def list_options(method: type) -> tuple[Option, ...]:
    """Return the options of a method class, in order of declaration."""
    types = get_type_hints(method)
    fields: tuple[Any, ...] = dataclasses.fields(method)
    return tuple(Option(f.name, types[f.name].__name__, f.default, f.metadata["doc"]) for f in fields)


def build(method: type[Method], name: str, options: Mapping[str, object]) -> Method:
    """Return the method called `name` with `options`; text is parsed as the type of its field.

    raises: UnknownNameError for an option that the method does not have, InputError for a value it does not allow.
    """
    known = {field.name: field for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    for given in options:
        if given not in known:
            raise UnknownNameError(f"{name} option", given, known)
    types = get_type_hints(method)
    return method(**{o: _validated(name, known[o], types[o], value, strict=False) for o, value in options.items()})


class Options:
    """Base of a method's dataclass, which checks the options of every new object."""

    def __post_init__(self) -> None:
        """Raise InputError for the first field whose value its declaration does not allow."""
        method = type(self)
        types = get_type_hints(method)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            _validated(method.__name__.lower(), field, types[field.name], getattr(self, field.name), strict=True)


def _validated(name: str, field: dataclasses.Field[Any], kind: type, value: object, *, strict: bool) -> Any:
    """Return a value in the type of its field; without `strict` it may be text, or of a type that converts exactly."""
    limits = field.metadata["limits"]
    strict = strict or isinstance(value, bool)  # True is not the number 1
    try:
        return _adapter(kind, *limits).validate_python(value, strict=strict)
    except ValidationError:
        expected = _expected(kind, *limits)
        raise InputError(f"option {field.name!r} of method {name!r} is {value!r}; {expected}.") from None


@cache
def _adapter(kind: type, minimum: float | None, maximum: float | None, choices: tuple[str, ...]) -> TypeAdapter[Any]:
    allowed: Any = Annotated[kind, Field(ge=minimum, le=maximum, allow_inf_nan=False if kind is float else None)]
    if choices:
        allowed = Literal[choices]
    return TypeAdapter(allowed)


def _expected(kind: type, minimum: float | None, maximum: float | None, choices: tuple[str, ...]) -> str:
    """Return the part of an error that says which values are allowed."""
    if choices:
        return f"choose one of {', '.join(map(repr, choices))}"
    wanted = f"give {EXPECTED[kind.__name__]}"
    if minimum is None:
        return wanted
    return f"{wanted} from {minimum:g} up" if maximum is None else f"{wanted} between {minimum:g} and {maximum:g}"
