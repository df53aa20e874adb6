"""Write a commented configuration: every setting with its meaning and default, those that were given set.

Must not know: the command line, how an export runs.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from calibrators.methods import list_methods
from exporter.config import ExportConfig, Setting, list_settings
from exporter.job import Job

__all__ = ["starter"]

WIDTH = 100
RULE = """\
# Settings of some layers: one table per rule, later rules win.
# [[layers]]
# match = "stages.3.*"
# weight_bits = 4
"""


def starter(job: Job, config: ExportConfig, targets: Sequence[str] = ()) -> str:
    """Return a TOML file for `intact export --config`, with the job and with the settings that are not defaults.

    targets: those of the export, where it has several.
    """
    given = job.model_dump(mode="json", exclude_none=True)
    chosen = config.model_dump(mode="json", exclude_defaults=True)
    if len(targets) > 1:
        chosen["target"] = targets
    options, rules = chosen.pop("options", {}), chosen.pop("layers", [])
    parts = [
        "# An export: run it with `intact export --config` and this file. Flags take precedence.\n"
        "# Paths are relative to the folder in which the command runs.\n",
        *_settings(list_settings(Job), given),
    ]
    panels: dict[str, list[Setting]] = {}
    for each in list_settings():
        if each.name != "layers":
            panels.setdefault(each.panel, []).append(each)
    for panel, settings in panels.items():
        parts += [f"# {panel}\n# {'-' * len(panel)}\n", *_settings(settings, chosen)]
    parts.append("\n".join(_options(config.method, options)) + "\n")
    parts += [_table("[[layers]]", rule) for rule in rules] or [RULE]
    return "\n".join(parts)


def _settings(settings: Iterable[Setting], given: Mapping[str, Any]) -> Iterator[str]:
    for each in settings:
        if each.name in given:
            line = f"{each.name} = {_value(given[each.name])}"
        else:
            line = f"# {each.name} = {_default(each)}"
        yield f"{_comment(each.help)}\n{line}\n"


def _options(method: str, given: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the table of the method's options."""
    yield f"# Options of the method {method}: `intact methods {method}`."
    yield "[options]"
    for option in next(each for each in list_methods() if each.name == method).options:
        yield _comment(option.doc)
        if option.name in given:
            yield f"{option.name} = {_value(given[option.name])}"
        else:
            yield f"# {option.name} = {_value(option.default) if option.default is not None else '...'}"


def _table(head: str, values: Mapping[str, Any]) -> str:
    lines = (f"{name} = {_value(value)}" for name, value in values.items() if value is not None)
    return "\n".join([head, *lines]) + "\n"


def _comment(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _default(setting: Setting) -> str:
    """Return what to write for a setting: its default, or the form of its values where it has none."""
    field = (Job if setting.name in Job.model_fields else ExportConfig).model_fields[setting.name]
    if field.default is None:
        return _value(setting.metavar)
    return _value(field.default)


def _value(value: Any) -> str:
    """Return a value as TOML, whose strings, numbers and lists are those of JSON; it has no null."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps("none" if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")
