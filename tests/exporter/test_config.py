"""Configuration: file, flags and --set merge in that order; a fault names its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from calibrators.errors import InputError
from calibrators.placement.layer_rules import LayerRule
from exporter.config import ExportConfig, list_settings, make_config
from exporter.job import load_job


def toml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def load_config(*given: Any, **named: Any) -> ExportConfig:
    """Return the settings without the job."""
    return load_job(*given, **named)[1]


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
        pytest.param("prepare=cle, absorb", "prepare", ("cle", "absorb"), id="names in one text"),
        pytest.param('prepare=["absorb"]', "prepare", ("absorb",), id="list of names"),
    ],
)
def test_set_reaches_fields(text: str, field: str, value: Any) -> None:
    assert getattr(load_config(sets=[text]), field) == value


def test_set_keeps_numbers_of_options_as_numbers() -> None:
    assert load_config(sets=["a=1", "b=1e-3", "c=abc", "d=true"]).options == {"a": 1, "b": 1e-3, "c": "abc", "d": True}


# --- rules for layers ------------------------------------------------------------------------------------------------

RULES = """
[[layers]]
match = "stages.0.*"
weight-bits = 4
activation_bits = 8

[[layers]]
match = "head"
float = true
"""


def test_rules_of_the_file_come_first_then_those_of_flags(tmp_path: Path) -> None:
    file = toml(tmp_path / "a.toml", RULES)
    flags = ["head: float=false, granularity=tensor", " a.* :weight-bits=3,symmetric=True "]
    config = load_config(file, {"layers": flags})
    assert config.layers == (
        LayerRule("stages.0.*", weight_bits=4, activation_bits=8),
        LayerRule("head", float=True),
        LayerRule("head", float=False, granularity="tensor"),
        LayerRule("a.*", weight_bits=3, symmetric=True),
    )
    assert load_config(flags={"layers": flags}).layers == config.layers[2:]
    assert load_config(file, {}).layers == config.layers[:2]
    assert load_config(file, {"layers": flags}, ['layers=["b: float=true"]']).layers == (LayerRule("b", float=True),)


def test_rules_are_told_as_they_were_given() -> None:
    rules = LayerRule("a", weight_bits=4), {"match": "b", "symmetric": False}, "c: activation_bits=3"
    config = make_config({"layers": rules})
    told = [{"match": "a", "weight_bits": 4}, {"match": "b", "symmetric": False}, {"match": "c", "activation_bits": 3}]
    assert config.model_dump(mode="json")["layers"] == told
    assert make_config({"layers": told}) == config
    turned = make_config({"layers": rules[::-1]})
    assert len({config.digest(), turned.digest(), ExportConfig().digest()}) == 3, "their order has an effect"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param("head", ["'head'"], id="glob alone"),
        pytest.param("head:", ["'head:'"], id="no settings"),
        pytest.param(": weight_bits=4", ["': weight_bits=4'"], id="no glob"),
        pytest.param("head=weight_bits=4", ["'head=weight_bits=4'"], id="equals for colon"),
        pytest.param("head: weight_bits", ["'head: weight_bits'"], id="no value"),
        pytest.param("head: weight_bits=4, weight-bits=5", ["each key once"], id="twice"),
        pytest.param("head: weight_bits=none", ["'head: weight_bits=none'"], id="none"),
        pytest.param("head: match=a, weight_bits=4", ["'head: match=a, weight_bits=4'"], id="match"),
    ],
)
def test_a_malformed_rule_is_one_message(text: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_config(flags={"layers": [text]})
    expected = ["is not GLOB: key=value", "layers=['stages.3.*: weight_bits=4", *parts]
    assert all(part in str(caught.value) for part in expected), str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param(
            '[[layers]]\nmatch = "a"\nweight_bit = 4',
            ["rule for layers 'a'", "unknown setting of layers 'weight_bit'", "Did you mean 'weight_bits'"],
            id="unknown key",
        ),
        pytest.param('[[layers]]\nmatch = "a"\npower = 2', ["'power'", "Known: activation_bits"], id="unknown key"),
        pytest.param('[[layers]]\nmatch = "a"\nweight_bits = 9', ["'a'", "weight_bits = 9", "2 to 8"], id="too wide"),
        pytest.param('[[layers]]\nmatch = "a"\nactivation_bits = "4"', ["activation_bits = '4'"], id="text"),
        pytest.param('[[layers]]\nmatch = "a"\ngranularity = "row"', ["'row'", "channel or block"], id="granularity"),
        pytest.param('[[layers]]\nmatch = "a"', ["'a'", "sets nothing"], id="nothing"),
        pytest.param("[[layers]]\nweight_bits = 4", ["{'weight_bits': 4}", "has no match"], id="no match"),
        pytest.param('[layers]\nmatch = "a"\nweight_bits = 4', ["list of rules", "[[layers]]"], id="single table"),
        pytest.param("layers = [3]", ["layers holds 3"], id="no table"),
        pytest.param('layers = "a: weight_bits=4"', ["list of rules"], id="bare text"),
        pytest.param(
            '[[layers]]\nmatch = "a"\nfloat = true\nsymmetric = true', ["'a'", "exclude each other"], id="contradiction"
        ),
    ],
)
def test_a_bad_rule_in_a_file_is_one_message(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_config(toml(tmp_path / "a.toml", text), {"layers": ["b: weight_bits=4"]})
    assert all(part in str(caught.value) for part in ["a.toml: ", *parts]), str(caught.value)
    assert "\n" not in str(caught.value)


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param(
            "weight_bit = 4", ["unknown setting 'weight_bit'", "Did you mean 'weight_bits'", "a.toml"], id="misspelt"
        ),
        pytest.param("percentile = 99.9", ["unknown setting", "[options]"], id="option at the top"),
        pytest.param("weight_bits = 9", ["weight_bits = 9 should be a whole number from 2 to 8"], id="too wide"),
        pytest.param(
            "activation_bits = 1", ["activation_bits = 1 should be a whole number from 2 to 8"], id="too narrow"
        ),
        pytest.param('seed = "x"', ["seed = 'x'", "integer"], id="type"),
        pytest.param("image_size = 0", ["image_size = 0"], id="size"),
        pytest.param("options = 3", ["options = 3", "dictionary"], id="options"),
        pytest.param("weight_bits = 1\nthreads = 0", ["weight_bits = 1", "threads = 0"], id="two faults"),
        pytest.param('include = ["a"]\nexclude = ["a"]', ["'a' is in include and in exclude"], id="contradiction"),
        pytest.param("weight_bits = ", ["not a readable TOML"], id="syntax"),
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
    with pytest.raises(InputError, match=r"did you mean '.*export\.toml'"):
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
    assert plain.digest() == make_config({"seed": 0, "method": "gptq"}).digest()
    assert make_config({"options": {"a": 1, "b": 2}}).digest() == make_config({"options": {"b": 2, "a": 1}}).digest()
    changed = {"seed": 1, "method": "lp", "options": {"a": 1}, "mean": (0.5,), "device": "cuda"}
    assert len({plain.digest(), *(make_config({key: value}).digest() for key, value in changed.items())}) == 6
    told = {"gates": ("a<=1",), "threads": 2, "parity_samples": 8, "reference_samples": "all", "latency_runs": 0}
    assert plain.digest() == make_config({"cache_gib": 0.1, "explain": True, "sensitivity": True} | told).digest()


def test_gates_have_an_effect_on_the_method_that_aims_at_them() -> None:
    settings: list[dict[str, object]] = [{}, {"gates": ["agreement>=0.9"]}, {"accuracy_gate": False}]
    assert len({make_config({"method": "auto"} | each).digest() for each in settings}) == len(settings)
    assert len({make_config({"method": "mse"} | each).digest() for each in settings}) == 1


def test_every_setting_is_described_once_and_has_a_flag_or_says_so() -> None:
    settings = list_settings()
    assert [s.name for s in settings] == [name for name in ExportConfig.model_fields if name != "options"]
    assert all(s.help.endswith(".") and s.panel for s in settings)
    assert {s.name for s in settings if not s.flag} == {"portable", "wide_taps", "simplify", "latency_runs", "threads"}


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("image_size", "224", (224, 224)),
        ("image_size", "224x160", (224, 160)),
        ("mean", "0.5", (0.5,)),
        ("std", "0.1,0.2,0.3", (0.1, 0.2, 0.3)),
        ("prepare", "cle, absorb", ("cle", "absorb")),
        ("reference_samples", "all", "all"),
        ("reference_samples", "96", 96),
    ],
)
def test_text_of_flags_is_parsed_by_the_settings(field: str, text: str, value: object) -> None:
    assert getattr(make_config({field: text}), field) == value


@pytest.mark.parametrize("text", ["\udcff", "a\0b"])
def test_files_can_hold_every_text(text: str) -> None:
    for name, value in (("labels", text), ("include", (text,)), ("options", {text: 1})):
        with pytest.raises(InputError, match=rf"{name} = .* should be .* without NUL"):
            make_config({name: value})
    with pytest.raises(InputError, match="cache = '' should be the name of a folder"):
        make_config({"cache": ""})


@pytest.mark.parametrize("name", ["model", "data", "out", "checkpoint", "labels"])
@pytest.mark.parametrize("text", ["", "a\0b"])
def test_a_name_is_not_empty(name: str, text: str) -> None:
    with pytest.raises(InputError, match=f"{name} = .* should be a name that is not empty and without NUL"):
        load_job(flags={name: text})
