"""A whole export as a TOML file and the command line give it: model, data, folder, settings.

Must not know: what the settings mean, the command line itself.
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calibrators.errors import InputError, UnknownNameError, first_line, no_file
from calibrators.settings import Settings, setting, shown
from calibrators.targets import DEFAULT_TARGET
from exporter.config import LONGEST_LINE, ExportConfig, Name, assignment, list_settings, make_config, with_underscores

__all__ = ["KEYS", "Job", "as_flag", "config_schema", "errors_of", "load_job", "make_job", "read_toml"]

LARGEST_FILE = 1 << 20
"""Bytes of the largest TOML file that is read."""


class Job(Settings):
    """The sources of an export and its folder: keys of the TOML file and flags beside the settings."""

    model: Name | None = setting(
        None, "`file.py:factory`, `file.py:factory(width=0.5)`, or `.pt2`.", panel="", flag=None, metavar="MODEL"
    )
    data: Name | None = setting(
        None, "Calibration data: `.npz`, image folder or `file.py:callable`.", panel="", metavar="CALIB"
    )
    out: Name | None = setting(
        None, "Folder for the bundle; it must be empty or not exist yet.", panel="", metavar="DIR"
    )
    eval: Name | None = setting(
        None,
        "Held-out data in the same forms as CALIB; with labels, accuracy is measured.",
        panel="",
        metavar="EVAL",
    )
    checkpoint: Name | None = setting(
        None, "Weights for the factory's module: `.pt`, `.pth` or `.safetensors`.", panel="", metavar="FILE"
    )
    checkpoint_key: Name | None = setting(
        None,
        "Where the weights are in the checkpoint: `ema`, `state_dict.teacher`; by default what fits best.",
        panel="",
        metavar="KEY",
    )

    def arguments(self, *, writes: bool = True) -> dict[str, Any]:
        """Return the arguments of `exporter.export`, or of `exporter.dry_run`, which does not write.

        raises: InputError naming the first thing that is missing without which there is no export.
        """
        for name in ("model", "data", *(["out"] if writes else ())):
            if getattr(self, name) is None:
                given = name.upper() if name == "model" else as_flag(name)
                raise InputError(f"{given} is missing; give it, or write `{name} = ...` into the TOML file.")
        return {
            "model": self.model,
            "data": self.data,
            "out": self.out and Path(self.out),
            "eval_data": self.eval,
            "checkpoint": self.checkpoint and Path(self.checkpoint),
            "checkpoint_key": self.checkpoint_key,
        }


KEYS = frozenset({*Job.model_fields, *ExportConfig.model_fields})
"""Keys of the TOML file of an export."""


def load_job(
    file: Path | None = None, flags: Mapping[str, Any] | None = None, sets: Iterable[str] = ()
) -> tuple[Job, ExportConfig, tuple[str, ...]]:
    """Return a whole export and its targets: a TOML file, overridden by flags, overridden by `key=value` texts.

    The settings are those for the first target; the others differ in nothing else.

    file:  keys are fields of Job and of ExportConfig (dashes or underscores), the method's options are in a table
           `[options]`, each rule for layers in a table `[[layers]]`. Its paths are relative to the current folder, as
           those of the command line are.
    flags: None and [] are flags that were not given; `layers` come after those of the file, for later rules win.
    sets:  `key=value`; a key that is a setting sets it, any other key is an option of the method.
    raises: InputError naming the key.
    """
    values, source = (read_toml(file), str(file)) if file is not None else ({}, "")
    given = {key: value for key, value in (flags or {}).items() if value not in (None, [])}
    with errors_of(source):
        merged = _merged(values, given, sets)
        targets = _targets(merged.pop("target", DEFAULT_TARGET))
        return *make_job({"target": targets[0], **merged}), tuple(targets)


def make_job(values: Mapping[str, Any]) -> tuple[Job, ExportConfig]:
    """Return the parts and the settings of an export from their values by name.

    raises: InputError naming the key, with near misses for one that is neither.
    """
    if strangers := values.keys() - KEYS:
        unknown = UnknownNameError("setting", min(strangers), KEYS)
        raise InputError(f"{unknown} Options of the method belong in the table [options].")
    parts = {name: value for name, value in values.items() if name in Job.model_fields}
    return Job(**parts), make_config({name: value for name, value in values.items() if name not in parts})


def as_flag(name: str, value: object = None) -> str:
    """Write an argument of exporter.export as the command line takes it: `--weight-bits 4`, `--set wide_taps=false`."""
    if isinstance(value, Mapping):
        return " ".join(as_flag(key, each) for key, each in value.items())
    if isinstance(value, list):
        return " ".join(as_flag(name, shlex.quote(each)) for each in value)
    flags = {each.name: each.flag for model in (Job, ExportConfig) for each in list_settings(model)}
    flag = (flags | {"eval_data": flags["eval"], "overwrite": "--overwrite", "jobs": "--jobs"}).get(name)
    if not flag:
        return f"--set {name}={str(value).lower() if isinstance(value, bool) else value}"
    return flag if value is None or isinstance(value, bool) else f"{flag} {value}"


def config_schema(*, many_targets: bool = True) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the TOML file of an export: the keys of Job and of ExportConfig.

    many_targets: whether `target` may be a list.
    """
    schema, job = ExportConfig.model_json_schema(), Job.model_json_schema()
    if many_targets:
        name = {"type": schema["properties"]["target"].pop("type")}
        schema["properties"]["target"]["anyOf"] = [name, {"type": "array", "items": name, "minItems": 1}]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "An export of intact",
        "properties": job["properties"] | schema["properties"],
    }


def _targets(given: object) -> list[Any]:
    """Return the names of a target or of several, each once."""
    if given == [] or (isinstance(given, list) and not all(isinstance(name, str) for name in given)):
        raise InputError(f"target = {shown(given)} should be a name, or a list of names.")
    return [*dict.fromkeys(given)] if isinstance(given, list) else [given]


def _merged(values: dict[str, Any], given: dict[str, Any], sets: Iterable[str]) -> dict[str, Any]:
    """Return the settings of a file, overridden by flags and texts."""
    if isinstance(before := values.get("layers", []), list) and "layers" in given:
        given["layers"] = [*before, *given["layers"]]
    elif "layers" in values:
        given["layers"] = before
    values |= given
    for text in sets:
        key, value = assignment(text)
        if key in ExportConfig.model_fields and key != "options":
            values[key] = value
        else:
            options = values.get("options", {})
            values["options"] = {**options, key: value} if isinstance(options, Mapping) else options
    return values


@contextmanager
def errors_of(source: str) -> Iterator[None]:
    """Put the name of the file before the message of an error, if there is a file."""
    try:
        yield
    except InputError as error:
        if not source:
            raise
        raise InputError(f"{source}: {error}") from error


def read_toml(file: Path) -> dict[str, Any]:
    """Return the values of a TOML file by name.

    raises: InputError for a file that is missing, no TOML, or far larger than any configuration.
    """
    if not file.is_file():
        raise InputError(f"configuration file {no_file(file)}")
    try:
        if (size := file.stat().st_size) > LARGEST_FILE:
            raise ValueError(f"it has {size:,} bytes, more than {LARGEST_FILE:,}")
        text = file.read_text(encoding="utf-8")
        if any(len(line) > LONGEST_LINE for line in text.splitlines()):
            raise ValueError(f"it has lines of more than {LONGEST_LINE:,} characters")
        values = tomllib.loads(text)
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{file} is not a readable TOML file: {first_line(error)}.") from error
    with errors_of(str(file)):
        return with_underscores(values)
