"""Declare settings once, as the fields of a pydantic model: type, default, help, and their form on a command line.

Must not know: which settings there are, torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, WrapValidator
from pydantic_core import ErrorDetails

from calibrators.errors import InputError, UnknownNameError

__all__ = ["Settings", "expected", "setting", "shown", "words"]


class Settings(BaseModel):
    """A frozen set of settings; values that it does not allow raise one InputError of one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    noun: ClassVar[str] = "setting"

    def __init__(self, /, **values: Any) -> None:
        for name in values:
            if name not in type(self).model_fields:
                raise UnknownNameError(self.noun, name, type(self).model_fields)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(_explained(error)) from error


def setting(
    default: Any, help: str, *, panel: str = "Quantization", flag: str | None = "", metavar: str = "", shown: str = ""
) -> Any:
    """Declare a setting: its default, its help, and how the command line shows it.

    panel: heading of `--help` under which the flag stands.
    flag:  name of the flag; by default the field's name, None for a setting without one.
    shown: default as `--help` prints it, if not the value itself.
    """
    extra: dict[str, JsonValue] = {"panel": panel, "flag": flag, "metavar": metavar, "shown": shown}
    return Field(default, description=help, json_schema_extra=extra)


def expected(text: str) -> WrapValidator:
    """Return an annotation with the words for a type's values, which errors use in place of pydantic's."""

    def validate(value: object, handler: Callable[[object], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(text) from None

    return WrapValidator(validate)


def words(fault: ErrorDetails) -> str:
    """Return what pydantic says a value should be, or what `expected` says in its place."""
    return fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")


def shown(value: object) -> str:
    """Return a value as messages show it."""
    try:
        return repr(value)
    except ValueError:  # Python refuses to write whole numbers of thousands of digits
        return f"a number of {sys.int_info.default_max_str_digits} digits or more"


def _explained(error: ValidationError) -> str:
    """Return one sentence per wrong setting."""
    sentences: dict[str, str] = {}
    for fault in error.errors(include_url=False):
        name, what = str(fault["loc"][0]) if fault["loc"] else "", words(fault)
        sentences.setdefault(name or what, f"{name} = {shown(fault['input'])} should be {what}" if name else what)
    return "; ".join(sentences.values()) + "."
