"""The report as a whole: how its parts compose report.json, how it is written, read and validated.

Each part is a dataclass where its value is produced; field names are the keys. Three conventions hold: shares and
accuracies are fractions from 0 to 1; None means "not measured" (a JSON number cannot be NaN); a field that is None by
default is left out. Keys that are not known are ignored, so that a later version may add some.

Must not know: graphs, runtimes, how any number was obtained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, TypeAdapter, ValidationError
from pydantic_core import to_json

from calibrators.errors import InputError, first_line, no_file
from calibrators.ladder_record import CostlyLayers, Ladder
from calibrators.placement.layer_rules import AppliedRule
from calibrators.record import (
    Lapq,
    LimitedWeight,
    MixedPrecision,
    PortabilityCost,
    Preparation,
    Reconstruction,
    Sensitivity,
    Settled,
)
from exporter.config import MOST_THREADS
from exporter.folding.fold_regions import FoldReport
from exporter.reporting.difference import Difference
from exporter.reporting.interface import Model, Sizes
from exporter.reporting.layer_sections import LayerEntry
from exporter.reporting.provenance import Provenance
from exporter.reporting.sections import Emission, Environment, Storage
from exporter.reporting.standing import Standing
from runtime_tests.measure.accuracy import Accuracy
from runtime_tests.measure.latency import Latency
from runtime_tests.measure.metric import UserMetric
from runtime_tests.measure.profile import TimeShares
from runtime_tests.measure.size import Size
from runtime_tests.ort.coverage import Coverage
from runtime_tests.ort.lint import Finding
from runtime_tests.ort.saturation import Saturation
from runtime_tests.ort.simplifier import Simplifier
from runtime_tests.parity.golden import GoldenOutput
from runtime_tests.parity.results import Parity, ProvedOn
from runtime_tests.reference.where_exact import Holds

__all__ = [
    "SCHEMA_VERSION",
    "Bits",
    "DataSource",
    "DataSources",
    "GateResult",
    "Report",
    "Times",
    "Tool",
    "dump",
    "dump_json",
    "json_schema",
    "metric_paths",
    "read_json",
    "read_report",
    "validate_report",
]

SCHEMA_VERSION: Final = 1

LARGEST_JSON = 1 << 24
"""Bytes of the largest document of a bundle that is read; in memory one takes up to 25 times as many."""

DIGITS = 19
"""Characters of the longest whole number that is read."""


@dataclass(frozen=True)
class Tool:
    """The program that wrote the bundle."""

    name: str
    version: str


@dataclass(frozen=True)
class Bits:
    """Default widths of the grids."""

    weight: int
    activation: int


@dataclass(frozen=True)
class Times:
    """Seconds per step."""

    capture: float
    fold: float
    calibrate: float
    emit: float
    validate: float


@dataclass(frozen=True)
class GateResult:
    """One condition of the verdict, evaluated; an infinite value is None."""

    name: str
    limit: float
    value: float | None
    passed: bool
    expression: str


@dataclass(frozen=True)
class DataSource:
    """The origin of samples; sha256 is that of their values, classes the number of samples by class, where known."""

    source: str
    samples: int
    sha256: str
    classes: dict[str, int] | None = None


@dataclass(frozen=True)
class DataSources:
    """Calibration and held-out data, and the inputs of the first golden set."""

    calibration: DataSource
    evaluation: DataSource | None
    golden: DataSource | None = None


def _repeatable(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of an export; raise ValueError if `verify` could not repeat its gates or its timing."""
    gates, threads = config.get("gates", []), config.get("threads", 1)
    if not isinstance(gates, list) or not all(isinstance(gate, str) for gate in gates):
        raise ValueError(f"gates is {gates!r}, not a list of texts")
    if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"threads is {threads!r}, not a positive number")
    return config


@dataclass(frozen=True, kw_only=True)
class Report:
    """The whole of report.json.

    exported_on: only from `verify`, whose machine is `environment`: the machine whose claims accuracy, latency and the
                 cost of portability are.
    """

    schema: Literal[1]
    verdict: Literal["pass", "fail"]
    target: str
    method: str
    bits: Bits
    fold: FoldReport
    accuracy: Accuracy | None
    parity: Parity
    coverage: Coverage
    size: Size
    latency_ms: Latency | None
    time_s: Times
    gates: tuple[GateResult, ...]
    accuracy_standing: Standing | None = None
    proved_on: tuple[ProvedOn, ...] | None = None
    tool: Tool | None = None
    model: Model | None = None
    sizes: Sizes | None = None
    metric: UserMetric | None = None
    environment: Environment | None = None
    exported_on: str | None = None
    time_shares: TimeShares | None = None
    storage: Storage | None = None
    preparation: Preparation | None = None
    rules: tuple[AppliedRule, ...] | None = None
    layers: tuple[LayerEntry, ...] | None = None
    reconstruction: Reconstruction | None = None
    lapq: Lapq | None = None
    sensitivity: Sensitivity | None = None
    limited_weights: tuple[LimitedWeight, ...] | None = None
    unsigned_weights: tuple[str, ...] | None = None
    settled: Settled | None = None
    portability: PortabilityCost | None = None
    mixed_precision: MixedPrecision | None = None
    ladder: Ladder | None = None
    costly_layers: CostlyLayers | None = None
    saturation: Saturation | None = None
    holds: tuple[Holds, ...] | None = None
    simplifier: Simplifier | None = None
    emission: Emission | None = None
    golden: tuple[GoldenOutput, ...] | None = None
    lint: tuple[Finding, ...] | None = None
    warnings: tuple[str, ...] | None = None
    config: Annotated[dict[str, Any], AfterValidator(_repeatable)] | None = None
    data: DataSources | None = None
    baseline: Difference | None = None
    provenance: Provenance | None = None

    def __repr__(self) -> str:
        """Return a summary; `dump` gives all of it."""
        bits = f"{self.bits.weight}-bit weights, {self.bits.activation}-bit activations"
        return f"Report({self.verdict}: {self.method}, {bits}, target {self.target}, {len(self.gates)} gates)"


@cache
def _adapter() -> TypeAdapter[Report]:
    """Build the adapter of `Report` once, on first use: it costs tens of milliseconds."""
    return TypeAdapter(Report)


def dump(report: Report) -> dict[str, Any]:
    """Return the report as the mapping that report.json holds; numbers that are not finite become None."""
    found: dict[str, Any] = json.loads(_adapter().dump_json(report, exclude_defaults=True))
    return found


def dump_json(value: object) -> str:
    """Return the text of a JSON document: keys in their order, numbers that are not finite as null, a newline last."""
    return to_json(value, indent=2, inf_nan_mode="null").decode() + "\n"


def validate_report(report: object) -> Report:
    """Return the report in a mapping, which must have the form of report.json.

    raises: InputError naming the first key that is missing or wrong.
    """
    try:
        return _adapter().validate_python(report)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(map(str, first["loc"])) or "the report"
        raise InputError(
            f"not a report of schema {SCHEMA_VERSION}: {path}: {first['msg']} (and {error.error_count() - 1} more)."
        ) from error


def read_report(path: Path) -> Report:
    """Read and validate the report of a file.

    raises: InputError if the file cannot be read, is not JSON or is not a report.
    """
    return validate_report(read_json(path))


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of a bundle; its numbers are finite and fit into 64 bits.

    raises: InputError for anything but a plain file of a few megabytes with such a document.
    """
    if not path.is_file():
        raise InputError(f"{no_file(path)} Get a fresh copy of the bundle, or export the model again.")
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes, more than {LARGEST_JSON:,}")
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
        json.dumps(found, ensure_ascii=False).encode()  # fails for halves of characters, which no text can hold
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"cannot read {path}: {first_line(error)}; get a fresh copy of the bundle, or export the model again."
        ) from error


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"{digits[:DIGITS]}... is no number of a bundle")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:DIGITS]} is no number of a bundle")
    return number


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of report.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _adapter().json_schema()


@cache
def metric_paths() -> frozenset[str]:
    """Return dotted paths of every number in the report; `*` stands for a key that the model decides (an operator)."""
    schema = _adapter().json_schema()
    return frozenset(_number_paths(schema, schema["$defs"], ""))


def _number_paths(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> Iterator[str]:
    """Yield the paths below one part of a JSON schema, except in lists, where a path names no single entry."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    prefix = f"{path}." if path else ""
    for option in schema.get("anyOf", ()):
        yield from _number_paths(option, definitions, path)
    for name, part in schema.get("properties", {}).items():
        yield from _number_paths(part, definitions, prefix + name)
    for index, part in enumerate(schema.get("prefixItems", ())):
        yield from _number_paths(part, definitions, f"{prefix}{index}")
    more = schema.get("additionalProperties")
    if isinstance(more, dict):
        yield from _number_paths(more, definitions, f"{prefix}*")
    if schema.get("type") in ("integer", "number", "boolean"):
        yield path
