"""Settings: errors are one sentence per setting, in the words of the declaration."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import Field, model_validator

from calibrators.errors import InputError, UnknownNameError
from calibrators.settings import Settings, expected, setting


class Kettle(Settings):
    litres: Annotated[float, Field(gt=0)] = setting(1.5, "Capacity.")
    cups: Annotated[int, Field(ge=1, le=8), expected("a whole number from 1 to 8")] | None = setting(None, "Cups.")
    colour: Annotated[str | tuple[str, str], expected("a colour, or two")] = setting("red", "Colour.")

    @model_validator(mode="after")
    def _is_sold(self) -> Kettle:
        if self.colour == "blue" and self.litres > 2:
            raise ValueError("large kettles are not blue")
        return self


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"litres": 0}, "litres = 0 should be greater than 0.", id="pydantic's words"),
        pytest.param({"litres": float("nan")}, "litres = nan should be a finite number.", id="nan"),
        pytest.param({"cups": 9}, "cups = 9 should be a whole number from 1 to 8.", id="our words"),
        pytest.param({"colour": 3}, "colour = 3 should be a colour, or two.", id="union"),
        pytest.param(
            {"litres": -1, "cups": "x"},
            "litres = -1 should be greater than 0; cups = 'x' should be a whole number from 1 to 8.",
            id="two",
        ),
        pytest.param({"colour": "blue", "litres": 3}, "large kettles are not blue.", id="together"),
    ],
)
def test_an_error_is_a_sentence_per_setting(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Kettle(**values)
    assert str(caught.value) == message


def test_unknown_settings_are_told_their_neighbours() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown setting 'litre'\. Did you mean 'litres'"):
        Kettle(litre=1)  # type: ignore[call-arg]
