"""Configuration: file, flags and --set merge in that order; a fault names its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from calibrators.errors import InputError
from exporter.config import ExportConfig, load_config, make_config


def toml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_flags_override_the_file_and_sets_override_flags(tmp_path: Path) -> None:
    file = toml(tmp_path / "a.toml", 'method = "lp"\nweight-bits = 4\nseed = 1\n[options]\np = 2.5\nbins = 10\n')
    config = load_config(
        file, {"seed": 2, "target": None, "activation_bits": 6}, ["activation_bits=5", "bins=20", "kind=x y"]
    )
    assert (config.method, config.weight_bits, config.seed, config.target) == ("lp", 4, 2, "ort-cpu")
    assert config.activation_bits == 5
    assert config.options == {"p": 2.5, "bins": 20, "kind": "x y"}


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        pytest.param("weight_bits=4", "weight_bits", 4, id="int"),
        pytest.param("reduce-range=true", "reduce_range", True, id="bool with dash"),
        pytest.param("simplify=False", "simplify", False, id="Python bool"),
        pytest.param("first_last_bits=none", "first_last_bits", None, id="none"),
        pytest.param('exclude=["a.*", "b"]', "exclude", ("a.*", "b"), id="list"),
        pytest.param("method=aciq", "method", "aciq", id="bare text"),
        pytest.param("image_size=[224, 160]", "image_size", (224, 160), id="pair"),
        pytest.param("gates=['a<=0.1']", "gates", ("a<=0.1",), id="gate"),
        pytest.param("device=cuda:1", "device", "cuda:1", id="device"),
        pytest.param("cache-gib=0.25", "cache_gib", 0.25, id="float"),
        pytest.param("explain=true", "explain", True, id="explain"),
    ],
)
def test_set_reaches_fields(text: str, field: str, value: Any) -> None:
    assert getattr(load_config(sets=[text]), field) == value


def test_set_keeps_numbers_of_options_as_numbers() -> None:
    assert load_config(sets=["a=1", "b=1e-3", "c=abc", "d=true"]).options == {"a": 1, "b": 1e-3, "c": "abc", "d": True}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param(
            "weight_bit = 4", ["unknown setting 'weight_bit'", "Did you mean 'weight_bits'", "a.toml"], id="misspelt"
        ),
        pytest.param("percentile = 99.9", ["unknown setting", "[options]"], id="option at the top"),
        pytest.param("weight_bits = 9", ["weight_bits = 9", "less than or equal to 8"], id="too wide"),
        pytest.param("activation_bits = 1", ["activation_bits = 1", "greater than or equal to 2"], id="too narrow"),
        pytest.param('seed = "x"', ["seed = 'x'", "integer"], id="type"),
        pytest.param("image_size = 0", ["image_size = 0"], id="size"),
        pytest.param("options = 3", ["options = 3", "dictionary"], id="options"),
        pytest.param("weight_bits = 1\nthreads = 0", ["weight_bits = 1", "threads = 0"], id="two faults"),
        pytest.param('include = ["a"]\nexclude = ["a"]', ["'a' stands in include and in exclude"], id="contradiction"),
        pytest.param("weight_bits = ", ["no readable TOML"], id="syntax"),
        pytest.param('device = "cuda:"', ["device = 'cuda:'", "cpu, cuda or cuda:N"], id="device"),
        pytest.param("cache-gib = -1", ["cache_gib = -1", "greater than 0"], id="no memory"),
        pytest.param("mean = [0.1, nan, 0.1]", ["mean", "finite"], id="nan"),
    ],
)
def test_a_bad_file_is_one_message(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_config(toml(tmp_path / "a.toml", text))
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    toml(tmp_path / "export.toml", "")
    with pytest.raises(InputError, match=r"did you mean 'export\.toml'"):
        load_config(tmp_path / "exprt.toml")


@pytest.mark.parametrize("text", ["novalue", "=3", "a b=3"])
def test_a_bad_set_is_one_message(text: str) -> None:
    with pytest.raises(InputError, match="is not key=value"):
        load_config(sets=[text])


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError):
        ExportConfig().seed = 3  # type: ignore[misc]


def test_the_digest_depends_on_every_value_with_effect_and_not_on_their_order() -> None:
    plain = ExportConfig()
    assert plain.digest() == make_config({"seed": 0, "method": "mse"}).digest()
    assert make_config({"options": {"a": 1, "b": 2}}).digest() == make_config({"options": {"b": 2, "a": 1}}).digest()
    changed = {"seed": 1, "method": "lp", "options": {"a": 1}, "gates": ("a<=1",), "mean": (0.5,), "threads": 2,
               "device": "cuda"}  # fmt: skip
    assert len({plain.digest(), *(make_config({key: value}).digest() for key, value in changed.items())}) == 8
    assert plain.digest() == make_config({"cache_gib": 0.1, "explain": True}).digest()
