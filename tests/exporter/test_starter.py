"""A written configuration: whole, valid, and with the meaning of the flags that it was made from."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from calibrators.errors import InputError
from exporter.cli import app
from exporter.config import ExportConfig, list_settings
from exporter.job import Job, config_schema, load_job
from exporter.starter import starter

FLAGS = (
    "net.py:build(width=0.5)", "--data", "im ages/", "--out", 'build/"x"', "--method", "qdrop", "--weight-bits", "4",
    "--gate", "size<=300kB", "--gate", "agreement>=0.9", "--mean", "0.5,0.4,0.3", "--layer", "a.*: weight_bits=6",
    "--set", "iters=77", "--set", "first_last_bits=none", "--dynamic", "x:2,3",
)  # fmt: skip


def test_a_file_repeats_the_flags_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["init", *FLAGS])
    assert result.exit_code == 0, result.output
    job, config, targets = load_job(Path("intact.toml"))
    assert job == Job(model="net.py:build(width=0.5)", data="im ages/", out='build/"x"')
    assert (config.method, config.weight_bits, config.options, targets) == ("qdrop", 4, {"iters": 77}, ("ort-cpu",))
    assert config.gates == ("size<=300kB", "agreement>=0.9") and config.mean == (0.5, 0.4, 0.3)
    assert [rule.match for rule in config.layers] == ["a.*"] and config.first_last_bits is None
    assert config.free_axes == {"x": {2: "x_2", 3: "x_3"}} or set(config.free_axes["x"]) == {2, 3}
    again = CliRunner().invoke(app, ["init", "other.py:build"])
    assert again.exit_code == 2 and "intact.toml exists" in again.stderr


def test_every_setting_is_there_and_its_default_can_be_uncommented() -> None:
    text = starter(Job(), ExportConfig())
    assert tomllib.loads(text) == {"options": {}}
    for each in [*list_settings(Job), *list_settings()]:
        if each.name == "layers":
            continue
        line = re.search(rf"^# ({each.name} = .+)$", text, re.MULTILINE)
        assert line is not None, each.name
        field = (Job if each.name in Job.model_fields else ExportConfig).model_fields[each.name]
        if field.default is not None:
            value = tomllib.loads(line[1])[each.name]
            assert (tuple(value) if isinstance(value, list) else value) == field.default


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.toml"
    init = ["init", "net.py:build", "--file", str(path), "--overwrite"]
    unknown = CliRunner().invoke(app, [*init, "--method", "mse", "--set", "gate=1"])
    assert unknown.exit_code == 2 and "gate" in unknown.stderr
    bytes_only = CliRunner().invoke(app, [*init, "--data", "\udcff"])
    assert bytes_only.exit_code == 2 and not path.exists()
    assert CliRunner().invoke(app, [*init, "--data", "x\x7fy"]).exit_code == 0
    assert load_job(path)[0].data == "x\x7fy"


def test_a_file_may_name_several_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = tmp_path / "net.toml", ["--target", "openvino", "--target", "ort-qnn"]
    arguments = ["net.py:build", "--data", "x.npz", "--out", "out", *asked, "--file", str(path)]
    assert CliRunner().invoke(app, ["init", *arguments]).exit_code == 0
    _, config, targets = load_job(path)
    assert (config.target, targets) == ("openvino", ("openvino", "ort-qnn"))
    assert load_job(path, {"target": ["tensorrt"]})[2] == load_job(path, {}, ["target=tensorrt"])[2] == ("tensorrt",)
    jsonschema.validate(tomllib.loads(path.read_text()), config_schema())
    exported: list[Any] = []
    monkeypatch.setattr("exporter.several.export_for", lambda targets, *_, **__: exported.append(targets) or ())
    assert CliRunner().invoke(app, ["export", "--config", str(path)]).exit_code == 0
    assert exported == [targets]


@pytest.mark.parametrize("given", ["[]", "[3]", "3", "{a = 1}"])
def test_what_is_no_target_is_refused(given: str, tmp_path: Path) -> None:
    (tmp_path / "net.toml").write_text(f"target = {given}")
    with pytest.raises(
        InputError, match=r"net\.toml: target = .* should be (a name, or a list|the name of one target)"
    ):
        load_job(tmp_path / "net.toml")


def test_schema_describes_the_file() -> None:
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"].keys() == {*Job.model_fields, *ExportConfig.model_fields}
    jsonschema.validate(tomllib.loads('model = "a.py:b"\nweight_bits = 4\n[options]\niters = 5'), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"weight_bits": "four"}, schema)
    result = CliRunner().invoke(app, ["schema", "config"])
    assert json.loads(result.stdout) == json.loads(json.dumps(schema))
    assert CliRunner().invoke(app, ["schema", "sarif"]).exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('model = "a.py:b"', "--data is missing"),
        ("model = 3", "model = 3 should be"),
        ('data = "x.npz"\nout = "y"', "MODEL is missing"),
        ('model = "a.py:b"\nmetod = "mse"', "Did you mean 'method'"),
    ],
)
def test_an_incomplete_or_wrong_file_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.toml"
    path.write_text(content)
    result = CliRunner().invoke(app, ["export", "--config", str(path)])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.stderr
