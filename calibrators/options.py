"""Options of a method as the fields of its frozen dataclass: declared once, checked, parsed from text, listed.

Must not know: which methods there are, tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from calibrators.errors import InputError, UnknownNameError

__all__ = ["Option", "Value", "build", "check", "list_options", "option"]

Value = str | int | float | bool
Method = TypeVar("Method")

EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclasses.dataclass(frozen=True)
class Option:
    """What can be said about one option: its name, type ("int", "float", "bool" or "str"), default and one line."""

    name: str
    type: str
    default: Value
    doc: str


def option(
    default: Value,
    doc: str,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    choices: tuple[Value, ...] = (),
) -> Any:
    """Field of a method's dataclass: its default, one line, and the values it may take (bounds inclusive)."""
    limits = {"minimum": minimum, "maximum": maximum, "choices": choices}
    return dataclasses.field(default=default, metadata={"doc": doc, **limits})


def list_options(method: type) -> tuple[Option, ...]:
    """The options of a method class, in order of declaration."""
    types = get_type_hints(method)
    described = []
    for field in dataclasses.fields(method):
        default: Any = field.default
        described.append(Option(field.name, types[field.name].__name__, default, field.metadata["doc"]))
    return tuple(described)


def build(method: type[Method], name: str, options: Mapping[str, object]) -> Method:
    """The method called `name` with `options`; text is parsed to the type of its field.

    raises: UnknownNameError for an option it does not have, InputError for a value that is none of its values.
    """
    types = {known.name: known.type for known in list_options(method)}
    for given in options:
        if given not in types:
            raise UnknownNameError(f"{name} option", given, types)
    return method(**{given: _parse(name, given, value, types[given]) for given, value in options.items()})


def check(method: object) -> None:
    """Raises InputError for the first field whose value is outside what its declaration allows."""
    types = get_type_hints(type(method))
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        value, limits = getattr(method, field.name), field.metadata
        remedy = _remedy(value, types[field.name], limits["choices"], (limits["minimum"], limits["maximum"]))
        if remedy:
            name = type(method).__name__.lower()
            raise InputError(f"option {field.name!r} of method {name!r} is {value!r}; {remedy}.")


def _remedy(value: object, kind: type, choices: tuple[Value, ...], bounds: tuple[float, float]) -> str:
    """What to give instead of `value`; empty if it may stay."""
    if choices:
        return "" if value in choices else f"choose one of {', '.join(map(repr, choices))}"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind not in (int, float) or not is_number or (kind is int and not isinstance(value, int)):
        return "" if type(value) is kind else f"give {EXPECTED[kind.__name__]}"
    minimum, maximum = bounds
    if minimum <= value <= maximum:  # type: ignore[operator]
        return ""
    if math.isinf(maximum):
        return f"give a number from {minimum:g} up"
    return f"give a number between {minimum:g} and {maximum:g}"


def _number(text: str) -> int | float:
    """The number that `text` spells, whole numbers exactly; NaN if it spells none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return math.nan


def _parse(name: str, given: str, value: object, kind: str) -> Value:
    """`value` as the type called `kind`, without loss: 3.0 is an int, 3.5, True and "3.5" are not."""
    text = str(value).strip()
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "bool" and text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    if kind in ("int", "float") and not isinstance(value, bool):
        number = _number(text)
        if kind == "float" and not math.isnan(number):
            return float(number)
        if kind == "int" and number == number // 1:
            return int(number)
    raise InputError(f"option {given!r} of method {name!r} is {value!r}; give {EXPECTED[kind]}.")
