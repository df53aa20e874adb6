"""The shape of report.json as types: what every reader (HTML, JUnit, gates, another program) may rely on.

The keys that are not `NotRequired` are fixed; more keys are welcome anywhere and are kept. Two conventions hold:
shares and accuracies are fractions in 0..1, and `None` means "not measured" (a JSON number cannot be NaN).

Must not know: graphs, torch, ONNX, runtimes; how any number was obtained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NotRequired, TypeAlias, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from calibrators.errors import InputError

__all__ = [
    "SCHEMA_VERSION",
    "Accuracy",
    "GateResult",
    "Grouping",
    "Lapq",
    "LayerEntry",
    "Level",
    "MixedPrecision",
    "NodeParity",
    "OutputParity",
    "ReconstructedUnit",
    "Reconstruction",
    "Report",
    "Rule",
    "ScaleSensitivity",
    "dump_json",
    "is_integer_kernel",
    "is_legal",
    "json_schema",
    "metric_paths",
    "read_report",
    "validate_report",
]

SCHEMA_VERSION = 1

# Several keys are called "float"; inside such a class the builtin would be shadowed.
Real: TypeAlias = float
_MORE_WELCOME = with_config(ConfigDict(extra="allow"))


@_MORE_WELCOME
class Tool(TypedDict):
    """Who wrote the bundle."""

    name: str
    version: str


@_MORE_WELCOME
class Port(TypedDict):
    """One input or output of the model; a free dimension is its name or None."""

    name: str
    shape: list[int | str | None]
    dtype: str


@_MORE_WELCOME
class Model(TypedDict):
    """What went in."""

    source: str
    inputs: list[Port]
    outputs: list[Port]
    parameters: NotRequired[int]
    dynamic_batch: NotRequired[bool]
    notes: NotRequired[list[str]]


@_MORE_WELCOME
class Environment(TypedDict, total=False):
    """The machine and the libraries of the measurement."""

    cpu: str
    flags: list[str]
    torch: str
    onnxruntime: str
    onnx: str
    python: str
    threads: int


@_MORE_WELCOME
class Bits(TypedDict):
    """Default widths of the grids."""

    weight: int
    activation: int


@_MORE_WELCOME
class Refused(TypedDict):
    """One region that was not folded."""

    where: str
    why: str


@_MORE_WELCOME
class FoldedNorm(TypedDict):
    """A batch norm that was folded in: what it multiplied its branch by, and the smallest variance that it had seen."""

    where: str
    gain: float
    largest_gain: float
    least_variance: float


@_MORE_WELCOME
class Folded(TypedDict):
    """One region that became one operator, with its proof; MACs per sample."""

    where: str
    nodes: int | list[str]
    kernel: str | list[int]
    rel_error: float
    macs_before: NotRequired[float]
    macs_after: NotRequired[float]
    norms: NotRequired[list[FoldedNorm]]


@_MORE_WELCOME
class Fold(TypedDict):
    """What folding did and what it refused."""

    regions: int
    max_rel_error: float
    refused: list[Refused]
    folded: NotRequired[list[Folded]]


@_MORE_WELCOME
class Triple(TypedDict):
    """The same score of the float model, of the reference program and in the runtime."""

    float: Real | None
    reference: Real | None
    runtime: Real | None


@_MORE_WELCOME
class Accuracy(Triple):
    """Scores on the held-out data; drop_ci is the 95 % interval of float - runtime, paired."""

    metric: str
    samples: int
    top5: NotRequired[Triple | None]
    agreement: NotRequired[Real | None]
    sqnr_db: NotRequired[Real | None]
    drop_ci: NotRequired[tuple[Real, Real] | None]


@_MORE_WELCOME
class Forced(TypedDict):
    """Comparison of every node from the runtime's own input codes: no error travels."""

    values: int
    mismatched: int
    max_lsb: int


@_MORE_WELCOME
class NodeParity(Forced):
    """One compared site: `kernel` is the operator that computed it, or starts with "float" for float arithmetic.

    legal: no difference in an integer kernel, at most rare single steps behind float arithmetic.
    """

    site: str
    kernel: str
    legal: NotRequired[bool]


@_MORE_WELCOME
class OutputParity(TypedDict):
    """One float output: exact where an integer kernel writes it, so that its bits must agree."""

    name: str
    exact: bool
    legal: bool
    relative: NotRequired[float | None]


@_MORE_WELCOME
class Level(TypedDict):
    """Runtime against reference at one optimisation level, end to end; `forced` and `*_mismatched` node by node.

    violations: sites and outputs whose differences are not legal.
    unplanned:  integer kernels executed minus planned, by operator, where they differ.
    """

    values: int
    mismatched: int
    max_lsb: int
    forced: NotRequired[Forced]
    outputs_identical: NotRequired[bool | None]
    outputs: NotRequired[list[OutputParity]]
    violations: NotRequired[int]
    unplanned: NotRequired[dict[str, int] | None]
    kernel_mismatched: NotRequired[int | None]
    float_mismatched: NotRequired[int | None]
    float_values: NotRequired[int | None]
    worst: NotRequired[list[NodeParity]]
    nodes: NotRequired[list[NodeParity]]


@_MORE_WELCOME
class SecondLevel(Level):
    """OpenVINO against reference; `violations` counts sites with more than rare single steps, node by node.

    executed:  layers of the file as it is deployed, by type and precision.
    relative:  its largest difference of an output there, as a share of the largest; agreement: same decisions.
    """

    version: str
    executed: dict[str, int]
    relative: Real
    agreement: Real | None


@_MORE_WELCOME
class Parity(TypedDict):
    """The two levels of optimisation of the runtime, and OpenVINO where it was asked for."""

    unoptimized: Level
    optimized: Level
    openvino: NotRequired[SecondLevel]


@_MORE_WELCOME
class FloatNode(TypedDict):
    """One compute node that the runtime executes in float."""

    name: str
    op: NotRequired[str]
    why: NotRequired[str]
    macs: NotRequired[float | None]


@_MORE_WELCOME
class Coverage(TypedDict):
    """Integer share of the optimised graph; integer_macs is a fraction.

    weight_only_macs: the fraction in float kernels that read codes of the weight alone.
    accuracy_level:   what these kernels may round their other operand to: 0 and 1 float32, 4 int8; null without any.
    """

    integer_nodes: int
    compute_nodes: int
    integer_macs: float
    float_nodes: list[FloatNode]
    by_op: NotRequired[dict[str, int]]
    weight_only_macs: NotRequired[float]
    accuracy_level: NotRequired[int | None]


@_MORE_WELCOME
class Rule(TypedDict):
    """A rule for layers: its glob, what it sets, and the layers of which it decides something; later rules win."""

    match: str
    settings: dict[str, int | str | bool]
    layers: list[str]


@_MORE_WELCOME
class EqualizedPair(TypedDict):
    """Two layers between which a factor per channel moved: of all channels the smallest and the largest.

    precision_*: mean over the channels of range / largest range, of the first times of the second layer.
    """

    first: str
    second: str
    channels: int
    factor_lo: float
    factor_hi: float
    precision_before: float
    precision_after: float


@_MORE_WELCOME
class Equalization(TypedDict):
    """Cross-layer equalisation; skipped are the layers that are the first of no pair."""

    pairs: list[EqualizedPair]
    sweeps: int
    skipped: list[Refused]


@_MORE_WELCOME
class AbsorbedPair(TypedDict):
    """Two layers between which a constant per channel moved, from the bias of one to that of the other.

    absorbed:    of the channels, those with such a constant; largest of them.
    exact:       for all inputs; else an output of the second layer changes by at most `worst`, where every value of the
                 first is 0, and on average by at most `mean`, where they are normally distributed.
    """

    first: str
    second: str
    channels: int
    absorbed: int
    largest: float
    exact: bool
    worst: float
    mean: float


@_MORE_WELCOME
class Absorption(TypedDict):
    """High biases moved on; skipped are the layers of which nothing could be, or was."""

    pairs: list[AbsorbedPair]
    skipped: list[Refused]


@_MORE_WELCOME
class Preparation(TypedDict, total=False):
    """Rewrites of the float graph before anything was quantized."""

    cle: Equalization
    absorb: Absorption


@_MORE_WELCOME
class LayerEntry(TypedDict):
    """One site: the chosen range [lo, hi] against the observed one, with the histogram of the observed values.

    input_bits: of what the layer reads, at weights; the widest where several layers share the weight, and absent where
                that is float.
    """

    site: str
    kind: Literal["activation", "weight"]
    bits: int
    lo: float
    hi: float
    module: NotRequired[str]
    op: NotRequired[str]
    granularity: NotRequired[Literal["tensor", "channel", "block"]]
    block_size: NotRequired[int]
    tap_bits: NotRequired[int]
    symmetric: NotRequired[bool]
    input_bits: NotRequired[int]
    scale_min: NotRequired[float]
    scale_max: NotRequired[float]
    zero_point: NotRequired[int | None]
    observed_lo: NotRequired[float | None]
    observed_hi: NotRequired[float | None]
    sqnr_db: NotRequired[float | None]
    histogram: NotRequired[list[int]]


@_MORE_WELCOME
class ReconstructedUnit(TypedDict):
    """A part of the network that was worked on as one: error of its output relative to the output's energy.

    before, after: with weights rounded to nearest, and as the method left them; all units before it already quantized.
    steps:         of training; a unit that others were joined to has theirs as well.
    weights:       layers with weights; undecided: share of roundings that training left between 0 and 1.
    loss_before, loss_after: what the method makes small, likewise; where it did not fall, nearest rounding was kept.
    gain_lo, gain_hi: smallest and largest factor by which weight scales were learned to change.
    """

    name: str
    weights: int
    steps: NotRequired[int]
    before: float | None
    after: float | None
    undecided: NotRequired[float | None]
    loss_before: NotRequired[float | None]
    loss_after: NotRequired[float | None]
    gain_lo: NotRequired[float]
    gain_hi: NotRequired[float]
    seconds: NotRequired[float]


@_MORE_WELCOME
class Grouping(TypedDict):
    """Which units were joined, and by what: losses or capacities, one for each of units_before.

    groups:       indices of the units that were trained jointly.
    losses:       relative error at the output of every unit after a shorter run in which each was trained alone.
    losses_after: the same in the finished network.
    """

    granularity: str
    units_before: list[str]
    groups: NotRequired[list[list[int]]]
    losses: NotRequired[list[float | None]]
    losses_after: NotRequired[list[float | None]]
    capacities: NotRequired[list[float]]


@_MORE_WELCOME
class Reconstruction(TypedDict):
    """What training unit by unit did; spilled_bytes of cached activations went to temporary files."""

    units: list[ReconstructedUnit]
    spilled_bytes: int
    grouping: NotRequired[Grouping]


@_MORE_WELCOME
class PowerLoss(TypedDict):
    """Loss of the network whose ranges minimise the mean |error| ** p of every tensor."""

    p: float
    loss: float | None


@_MORE_WELCOME
class Parabola(TypedDict):
    """Fit of the loss over p: of p**2, p and 1; verdict says why there is no vertex; p and loss are what was tried."""

    coefficients: list[float]
    vertex: float | None
    verdict: NotRequired[str]
    p: NotRequired[float]
    loss: NotRequired[float | None]


@_MORE_WELCOME
class Bend(TypedDict):
    """How the loss bends at one width: Hessian of the log scales of `sites`, mean |off-diagonal| / mean |diagonal|."""

    hessian: list[list[float | None]]
    share: float | None
    eigenvalues: list[float | None]
    p: NotRequired[float]


@_MORE_WELCOME
class LossLandscape(TypedDict):
    """The loss around the best p, by bits of the activations."""

    sites: list[str]
    bits: dict[str, Bend]


@_MORE_WELCOME
class Lapq(TypedDict, total=False):
    """A search of scales by the loss of the whole network: of the ranges compared, and where it began and ended.

    evaluations: full passes over the samples; multipliers: final scale over initial scale, by site.
    """

    optimizer: str
    samples: int
    evaluations: float
    seconds: float
    losses: dict[str, float | None]
    powers: list[PowerLoss]
    parabola: Parabola
    multipliers: dict[str, float]
    landscape: LossLandscape


@_MORE_WELCOME
class Reading(TypedDict):
    """The network at some bits: loss of its prediction, noise of its outputs, loss of top-1 on calibration samples."""

    loss: float | None
    sqnr_db: float | None
    accuracy_drop: float | None


@_MORE_WELCOME
class WidthReading(Reading):
    """A reading with one scale on so many bits."""

    bits: int


@_MORE_WELCOME
class ScaleSensitivity(TypedDict):
    """What the bits of one weight or activation scale cost; bits: those that a budget left it.

    Of weights: spread is the largest magnitude of a channel over the median channel's, spike how many times an identity
    branch that was folded in exceeds the values around it.
    """

    site: str
    kind: Literal["weight", "activation"]
    widths: list[WidthReading]
    bits: NotRequired[int]
    values: NotRequired[int]
    spread: NotRequired[float]
    spike: NotRequired[float | None]


@_MORE_WELCOME
class Sensitivity(TypedDict):
    """Readings with one scale on a coarser grid and all others on their finest, and with all on their finest."""

    loss: Literal["kl", "mse"]
    samples: int
    finest: Reading
    scales: list[ScaleSensitivity]


@_MORE_WELCOME
class MixedChoice(Reading):
    """A choice of bits: what it takes, and the loss predicted above that of the finest grids; uniform: one width."""

    weight_bytes: float
    avg_weight_bits: float
    bops: float
    predicted: float
    uniform: NotRequired[int]


@_MORE_WELCOME
class MixedPrecision(TypedDict):
    """Bits by budget: the choice found, and the front of choices along `axis` beside uniform bits.

    rank_correlation: Spearman's, of what scales cost alone and in the network found.
    """

    budgets: list[str]
    axis: Literal["weight_bytes", "avg_weight_bits", "bops"]
    samples: int
    rank_correlation: float | None
    found: MixedChoice
    front: list[MixedChoice]
    seconds: NotRequired[float]


@_MORE_WELCOME
class Size(TypedDict):
    """Bytes of the float and of the quantized model; by_type counts initialisers."""

    float_bytes: int
    bytes: int
    by_type: NotRequired[dict[str, int]]


@_MORE_WELCOME
class StoredOtherwise(TypedDict):
    """The file with weights in another type; latency_ms is None where nothing was timed."""

    storage: str
    bytes: int
    latency_ms: Real | None


@_MORE_WELCOME
class Storage(TypedDict):
    """How weights of few bits are stored, and what other types would cost; those that change nothing are left out."""

    storage: str
    alternatives: list[StoredOtherwise]


@_MORE_WELCOME
class Latency(TypedDict):
    """Medians in milliseconds; iqr is the interquartile range of each."""

    float: Real | None
    quantized: Real | None
    ratio: NotRequired[Real | None]
    runs: NotRequired[int]
    threads: NotRequired[int]
    batch: NotRequired[int]
    iqr: NotRequired[dict[str, Any]]


@_MORE_WELCOME
class Times(TypedDict):
    """Seconds per step."""

    capture: float
    fold: float
    calibrate: float
    emit: float
    validate: float


@_MORE_WELCOME
class SaturatingLayer(TypedDict):
    """Largest magnitude a pair of products can reach against what 16 bits hold."""

    name: str
    worst: float
    limit: float


@_MORE_WELCOME
class Saturation(TypedDict):
    """Whether the file gives the same integers on a CPU without VNNI."""

    safe_without_vnni: bool
    affected_here: bool
    layers: NotRequired[list[SaturatingLayer]]


@_MORE_WELCOME
class Simplifier(TypedDict):
    """Whether the simplified graph was kept."""

    applied: bool
    why: str


@_MORE_WELCOME
class Emission(TypedDict):
    """The file as written."""

    opset: int
    ir_version: NotRequired[int]
    nodes: NotRequired[dict[str, int]]


@_MORE_WELCOME
class LintEntry(TypedDict):
    """One finding against the rules of the target."""

    rule: str
    severity: str
    where: str
    message: str


@_MORE_WELCOME
class GateResult(TypedDict):
    """One condition of the verdict, evaluated."""

    name: str
    limit: float
    value: float | None
    passed: bool
    expression: NotRequired[str]


@_MORE_WELCOME
class DataSource(TypedDict):
    """Where samples came from; sha256 is of their values."""

    source: str
    samples: int
    sha256: NotRequired[str]


@_MORE_WELCOME
class Data(TypedDict):
    """Calibration and held-out data."""

    calibration: NotRequired[DataSource | None]
    evaluation: NotRequired[DataSource | None]


@_MORE_WELCOME
class Report(TypedDict):
    """The whole of report.json."""

    schema: Literal[1]
    verdict: Literal["pass", "fail"]
    target: str
    method: str
    bits: Bits
    fold: Fold
    accuracy: Accuracy | None
    parity: Parity
    coverage: Coverage
    size: Size
    latency_ms: Latency | None
    storage: NotRequired[Storage]
    time_s: Times
    gates: list[GateResult]
    tool: NotRequired[Tool]
    model: NotRequired[Model]
    environment: NotRequired[Environment]
    preparation: NotRequired[Preparation]
    rules: NotRequired[list[Rule]]
    layers: NotRequired[list[LayerEntry]]
    reconstruction: NotRequired[Reconstruction]
    lapq: NotRequired[Lapq]
    sensitivity: NotRequired[Sensitivity]
    mixed_precision: NotRequired[MixedPrecision]
    saturation: NotRequired[Saturation | None]
    simplifier: NotRequired[Simplifier | None]
    emission: NotRequired[Emission]
    lint: NotRequired[list[LintEntry]]
    warnings: NotRequired[list[str]]
    config: NotRequired[dict[str, Any]]
    data: NotRequired[Data]


@cache
def _adapter() -> TypeAdapter[Report]:
    """Checker of the types above, built once and on first use: it costs tens of milliseconds."""
    return TypeAdapter(Report)


def validate_report(report: object) -> Report:
    """The report itself, once every fixed key is there with its type.

    raises: InputError naming the first wrong key.
    """
    try:
        _adapter().validate_python(report, strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(map(str, first["loc"])) or "the report"
        raise InputError(
            f"not a report of schema {SCHEMA_VERSION}: {path}: {first['msg']} (and {error.error_count() - 1} more)."
        ) from error
    return cast(Report, report)


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of report.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _adapter().json_schema()


def read_report(path: Path) -> Report:
    """The validated report of a file.

    raises: InputError if the file cannot be read, is not JSON or is not a report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the report {path}: {error}; export the model again.") from error
    return validate_report(report)


def dump_json(value: object) -> str:
    """Text of a JSON document: keys in the order given, numbers that are not finite as null, newline at the end."""
    return json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def is_legal(node: NodeParity) -> bool:
    """Whether the differences of a compared site are allowed."""
    return node.get("legal", not (is_integer_kernel(node) and node["mismatched"]))


def is_integer_kernel(node: NodeParity) -> bool:
    """Whether a compared site was computed in integers, so that no difference at all is allowed."""
    return not node["kernel"].lower().startswith("float")


@cache
def metric_paths() -> frozenset[str]:
    """Dotted paths of every number in the report; `*` stands for a key that the model decides (an operator, a type)."""
    schema = _adapter().json_schema()
    return frozenset(_number_paths(schema, schema["$defs"], ""))


def _number_paths(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> Iterator[str]:
    """Paths below one part of a JSON schema; lists of objects are left out (which entry would be meant?)."""
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
