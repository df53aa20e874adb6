"""The folder of methods as a registry: names, options, and what is refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from calibrators import methods
from calibrators.errors import InputError, UnknownNameError
from calibrators.methods import RangeMethod, get_method, list_methods
from calibrators.methods.percentile import Percentile
from calibrators.options import build, option
from calibrators.targets import list_targets

ROOT = Path(__file__).parents[3]

RANGE_METHODS = {"aciq", "entropy", "lp", "mae", "minmax", "mse", "percentile"}


def test_every_file_is_a_method() -> None:
    files = {path.stem for path in Path(methods.__file__).parent.glob("*.py")} - {"__init__"}
    assert {info.name for info in list_methods()} == files
    assert files >= RANGE_METHODS


@pytest.mark.parametrize("info", list_methods(), ids=lambda info: info.name)
def test_every_method_can_be_made_and_described(info: methods.MethodInfo) -> None:
    method = get_method(info.name)
    assert dataclasses.is_dataclass(method)
    assert method == get_method(info.name, {o.name: str(o.default) for o in info.options})
    assert info.summary.endswith(".")
    assert all(o.doc and o.type in ("int", "float", "bool", "str") for o in info.options)


@pytest.mark.parametrize("name", sorted(RANGE_METHODS))
def test_range_methods(name: str) -> None:
    assert isinstance(get_method(name), RangeMethod)


def test_options_of_percentile() -> None:
    (info,) = (info for info in list_methods() if info.name == "percentile")
    assert [(o.name, o.type, o.default) for o in info.options] == [("q", "float", 99.999)]


@pytest.mark.parametrize("given", ["99.99", 99.99, " 99.99 "], ids=["text", "number", "spaces"])
def test_options_are_parsed(given: str | float) -> None:
    assert get_method("percentile", {"q": given}) == Percentile(99.99)


def test_unknown_method() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown method 'entrpy'\. Did you mean 'entropy'\? Known: .*minmax"):
        get_method("entrpy")


def test_unknown_option() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown aciq option 'lwa'\. Did you mean 'law'\? Known: law\."):
        get_method("aciq", {"lwa": "gauss"})
    with pytest.raises(UnknownNameError, match=r"Known: none\."):
        get_method("minmax", {"q": 1})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "percentile",
            {"q": "100.5"},
            r"option 'q' of method 'percentile' is '100.5'; give a number between 50 and 100",
        ),
        ("percentile", {"q": "high"}, r"is 'high'; give a number"),
        ("percentile", {"q": "nan"}, r"give a number"),
        ("percentile", {"q": True}, r"is True; give a number"),
        ("percentile", {"q": None}, r"is None; give a number"),
        ("lp", {"p": "inf"}, r"give a number between"),
        ("aciq", {"law": "cauchy"}, r"is 'cauchy'; choose one of 'auto', 'laplace', 'gauss'"),
        ("aciq", {"law": 3}, r"is 3; choose one of"),
    ],
    ids=["range", "text", "nan", "bool", "none", "inf", "choice", "not-text"],
)
def test_values_that_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_method(name, options)


@pytest.mark.parametrize("q", [101.0, float("nan"), "99.9", True], ids=["range", "nan", "text", "bool"])
def test_values_are_checked_without_the_registry_too(q: object) -> None:
    with pytest.raises(InputError, match="option 'q'"):
        Percentile(q)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Everything:
    """One option of each type."""

    steps: int = option(3, "how many", minimum=1)
    rate: float = option(0.5, "how fast")
    warm: bool = option(False, "whether warm")
    law: str = option("auto", "any text")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"steps": "20_000"}, Everything(steps=20_000)),
        ({"steps": 4.0}, Everything(steps=4)),
        ({"steps": str(2**60 + 1)}, Everything(steps=2**60 + 1)),
        ({"rate": 2}, Everything(rate=2.0)),
        ({"rate": "1e-3"}, Everything(rate=1e-3)),
        ({"warm": "Yes"}, Everything(warm=True)),
        ({"warm": 0}, Everything(warm=False)),
        ({"law": "x y"}, Everything(law="x y")),
    ],
    ids=["int", "whole-float", "large-int", "int-as-float", "exponent", "yes", "zero", "text"],
)
def test_every_type_of_option(options: dict[str, object], expected: Everything) -> None:
    made = build(Everything, "everything", options)
    assert made == expected
    assert [type(v) for v in vars(made).values()] == [type(v) for v in vars(expected).values()]


@pytest.mark.parametrize(
    "options", [{"steps": 1.5}, {"steps": "inf"}, {"warm": "maybe"}, {"law": True}], ids=["half", "inf", "bool", "text"]
)
def test_every_type_refuses_the_others(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"of method 'everything' is .*; give "):
        build(Everything, "everything", options)


def test_a_file_is_enough_to_add_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halving.py").write_text(
        "from dataclasses import dataclass\n"
        "from calibrators.options import option\n"
        "__all__ = ['Halving']\n"
        "@dataclass(frozen=True)\n"
        "class Halving:\n"
        "    '''Not a range method at all.'''\n"
        "    times: int = option(1, 'how often')\n"
    )
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert "halving" in {info.name for info in list_methods()}
    assert get_method("halving", {"times": "2"}).times == 2
    monkeypatch.delitem(sys.modules, "calibrators.methods.halving")
    monkeypatch.delattr(methods, "halving")


def test_methods_and_targets_are_listed_without_torch() -> None:
    code = (
        "import sys; from calibrators.methods import list_methods; from calibrators.targets import list_targets;"
        "print(len(list_methods()), len(list_targets()), 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert found.split() == [str(len(list_methods())), str(len(list_targets())), "False"]
