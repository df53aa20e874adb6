"""Settings of an export: one frozen model for the TOML file, the flags, `--set`, `--help` and Python keywords.

Must not know: models, data, methods (which check their own options), torch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator
from pydantic.fields import FieldInfo

from calibrators.errors import InputError, argument, is_text
from calibrators.mixed_precision.budgets import Budgets
from calibrators.placement.layer_rules import LayerRule
from calibrators.placement.placement_options import PlacementOptions
from calibrators.settings import Settings, expected, setting, shown
from calibrators.targets import DEFAULT_TARGET
from exporter.frontend.axes import Axes, parse_axes, with_axes
from exporter.inputs.form import DATA, DataForm, Names, Positive

__all__ = [
    "MOST_THREADS",
    "ExportConfig",
    "Name",
    "Setting",
    "assignment",
    "list_settings",
    "make_config",
    "takes_settings",
    "with_underscores",
]

Function = TypeVar("Function", bound=Callable[..., Any])

NO_EFFECT = frozenset(
    {
        "cache_gib",
        "explain",
        "sensitivity",
        "accuracy_gate",
        "gates",
        "golden",
        "metric",
        "baseline",
        "cache",
        "resume",
        "openvino",
        "prove_on",
        "parity_samples",
        "reference_samples",
        "latency_runs",
        "threads",
    }
)
"""Settings that change how an export is computed, verified and reported, but nothing in the model."""

AIMS = frozenset({"accuracy_gate", "gates", "metric", "baseline"})
"""Those of them at which method "auto" aims, so that they do change the model."""


def without_effect(method: object) -> frozenset[str]:
    """Return the names of the settings that change nothing in a model that this method calibrates."""
    return NO_EFFECT - AIMS if method == "auto" else NO_EFFECT


LONGEST_LINE = 4096
"""Characters of the longest line of TOML that is read: the time that a key takes grows with the square of its parts."""

MOST_THREADS = 1024

PROOF, RUNNING = "Proof and verdict", "Running"
"""Panels of `intact export --help`."""


Device = Annotated[str, Field(pattern="^(cpu|cuda(:[0-9]{1,4})?)$"), expected("cpu, cuda or cuda:N")]


def _named(text: str) -> str:
    if text and "\0" not in text:
        return text
    raise ValueError("a name that is not empty and without NUL")


Name = Annotated[str, AfterValidator(_named)]
"""The name of a file, a folder, or a callable. It may hold bytes that are no UTF-8."""

Texts = Annotated[tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)]


Release = Annotated[str, Field(pattern=r"^\d{1,4}\.\d{1,4}(\.\d{1,4})?$"), expected("a release such as 1.19")]


Samples = Annotated[Literal["all"] | Positive, expected("all, or a number of samples")]


class _Calibration(Settings):
    """Target and method: a base class, so that they come first wherever settings are listed."""

    target: Annotated[str, expected("the name of one target; exporter.export_for takes several")] = setting(
        DEFAULT_TARGET,
        "Runtime to export to; `intact targets` lists them. Repeatable, in a file a list of names: a bundle for each.",
    )
    method: str = setting("gptq", "Calibration method; `intact methods` lists them.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the method: the table [options], or `--set NAME=VALUE`."
    )


class ExportConfig(DataForm, PlacementOptions, _Calibration):
    """One export: every setting, as a TOML key, a flag of `intact export` and a Python keyword."""

    weight_storage: Literal["auto", "int8", "int4", "int2"] = setting(
        "auto",
        "Type of the weights in the file: `int8`, or `int4` or `int2`, which the runtime unpacks for the same integer "
        "kernels when it loads the file; auto: int4 for weights that fit.",
        metavar="TYPE",
    )
    min_ort: Release | None = setting(
        None,
        "Oldest release of onnxruntime that has to load the file: forms of weights that it does not know are stored as "
        "int8. The report states the oldest release in any case.",
        metavar="VERSION",
    )
    dynamic: Annotated[tuple[str, ...], BeforeValidator(with_axes)] = setting(
        (),
        "Axes besides the batch whose size stays free in the file; repeatable: `x:2,3` (height and width of the input "
        "x), `tokens:1=length`, `x:2[32..512]`. In Python also {'x': {2: Dim('height')}}, the Dim of torch.export.",
        panel=DATA,
        metavar="INPUT:AXES",
    )
    input: Texts = setting(
        (),
        "Let the file take an input as bytes, which it normalizes with --mean and --std; repeatable: `uint8`, "
        "`uint8:nhwc` (channels last), `image:uint8`.",
        panel=DATA,
        metavar="[NAME:]uint8[:LAYOUT]",
    )
    output: Texts = setting(
        (),
        "Let the file give an output as codes, without the last dequantizer; repeatable: `codes` (all outputs), "
        "`boxes:codes`.",
        panel=DATA,
        metavar="[NAME:]codes",
    )
    prepare: Names = setting(
        (),
        "Rewrites of the float model before calibration: `cle` equalizes the ranges of neighbouring layers, `absorb` "
        "absorbs high biases into the next layer; both help weights with one scale per tensor. `migrate` makes the "
        "channels that linear layers read alike, which helps activations of few bits, above all in transformers.",
        metavar="NAME,NAME",
    )
    bias_correction: bool = setting(False, "Shift biases by the mean error of each layer.")
    budget: Budgets = setting(
        (),
        "Choose bits per layer (mixed precision) within this limit; repeatable: `weight_bytes<=0.6M`, "
        "`avg_weight_bits<=3.5`, `bops<=2G` (chooses activation bits too), `accuracy_drop<=1%`.",
        metavar="LIMIT",
    )
    sensitivity: bool = setting(False, "Measure and plot what fewer bits cost in each layer; `--budget` does this too.")
    explain: bool = setting(False, "Compute and plot the reasons for the method's choice; takes longer.")
    simplify: bool = setting(True, "Simplify the ONNX graph where that provably changes nothing.", flag=None)
    labels: Name | None = setting(
        None,
        "Names of the classes, one a line, for the bundle's README and the file's metadata; by default the class "
        "folders of the data.",
        panel=DATA,
        metavar="FILE",
    )
    calibration_batches: Positive | None = setting(
        None, "Use only the first N calibration batches.", panel=DATA, metavar="N", shown="all"
    )
    gates: tuple[str, ...] = setting(
        (),
        "Condition for exit code 0; repeatable: `agreement>=0.9`, `size<=1MB`.",
        panel=PROOF,
        flag="gate",
        metavar="EXPR",
    )
    accuracy_gate: bool = setting(
        True,
        "Gate on accuracy where none of `--gate` is on it: with labels, the lower end of the drop's 95 % interval is "
        "at most 1 point; without, decisions agree in 95 % of the samples, and other outputs have 15 dB.",
        panel=PROOF,
    )
    golden: str = setting(
        "samples",
        "Inputs of the golden set, which the bundle holds: `samples` (the first of the evaluation or calibration "
        "data), `synthetic` (noise within the calibrated ranges), or the samples of an `.npz` file.",
        panel=PROOF,
        metavar="INPUTS",
    )
    metric: Name | None = setting(
        None,
        "Function of all outputs and labels of --eval that returns a number: `metrics.py:iou`. Gates: `metric`, "
        "`metric_drop`.",
        panel=PROOF,
        metavar="FILE:NAME",
    )
    baseline: Name | None = setting(
        None,
        "An earlier bundle: the report lists the differences from it. Gates: `baseline_drop`, `baseline_error`, "
        "`baseline_size`, `baseline_latency` and others.",
        panel=PROOF,
        metavar="DIR",
    )
    openvino: bool = setting(
        False, "Prove the model in OpenVINO too, kernel by kernel; needs the extra `openvino`.", panel=PROOF
    )
    prove_on: tuple[str, ...] = setting(
        (),
        "Prove the model in this runtime too; repeatable: `avx2`, `arm64`, `web`, `ort==1.19.2`; `intact runtimes` "
        "lists them. Emulated processors and `web` compare 16 samples.",
        panel=PROOF,
        metavar="RUNTIME",
    )
    parity_samples: Positive = setting(256, "Samples compared integer by integer.", panel=PROOF)
    reference_samples: Samples = setting(
        512,
        "Samples of --eval on which the reference program is scored besides the runtime, those compared among them: a "
        "number, or `all`. The report says how many they were; gates on accuracy read the runtime, which takes all.",
        panel=PROOF,
        metavar="N|all",
    )
    latency_runs: Annotated[int, Field(ge=0)] = setting(
        200,
        "Timed runs per model at most, fewer where 95 % intervals get tight or 20 s are over; 0: no timing.",
        panel=PROOF,
        flag=None,
    )
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] = setting(
        1, "Threads of the runtime while timing.", panel=PROOF, flag=None
    )
    resume: bool = setting(
        False,
        "Keep finished units of methods that train, and continue after those of an interrupted export of the same "
        "model, data and settings; a first run may have it too.",
        panel=RUNNING,
    )
    cache: Annotated[str, Field(min_length=1), expected("the name of a folder")] | None = setting(
        None,
        "Keep the statistics of the calibration data in this folder, for exports of the same network and data with "
        "another method or other bits.",
        panel=RUNNING,
        metavar="DIR",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = setting(0, "Seed of all random numbers.", panel=RUNNING)
    device: Device = setting("cpu", "Device on which methods train or search: `cpu`, `cuda`, `cuda:1`.", panel=RUNNING)
    cache_gib: Annotated[float, Field(gt=0)] = setting(
        4.0,
        "Memory in GiB (2^30 bytes) for activations that training keeps; the rest goes to temporary files.",
        panel=RUNNING,
        metavar="GIB",
    )

    @field_validator("*")
    @classmethod
    def _files_can_hold_texts(cls, value: object) -> object:
        if all(map(is_text, _texts(value))):
            return value
        raise ValueError("text in UTF-8 without NUL")

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_are_rules(cls, rules: object) -> list[LayerRule]:
        if isinstance(rules, (list, tuple)):
            return [_rule(rule) for rule in rules]
        raise InputError(
            f"layers = {shown(rules)} is not a list of rules; in a file, write [[layers]] above each rule."
        )

    @property
    def is_for_images(self) -> bool:
        """Whether any setting is given that applies to folders of images alone."""
        return self.image_size is not None if self.input else super().is_for_images

    @property
    def free_axes(self) -> Axes:
        """Return the axes besides the batch whose size stays free.

        raises: InputError for a text that names none.
        """
        return parse_axes(self.dynamic)

    @property
    def proving_runtimes(self) -> tuple[str, ...]:
        """Return the runtimes in which the model is proved besides this process's onnxruntime."""
        return tuple(dict.fromkeys([*self.prove_on, *(["openvino"] if self.openvino else [])]))

    def digest(self) -> str:
        """Return the sha256 of the canonical JSON of all fields that can change the model."""
        values = self.model_dump(mode="json", exclude=set(without_effect(self.method)))
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class Setting:
    """A setting as documentation and the command line show it; `flag` is empty where there is none."""

    name: str
    flag: str
    type: type
    metavar: str
    default: str
    help: str
    panel: str
    repeatable: bool


def list_settings(model: type[Settings] = ExportConfig) -> list[Setting]:
    """Return every setting but the method's options, in the order of declaration."""
    return [_described(name, field) for name, field in model.model_fields.items() if name != "options"]


def _described(name: str, field: FieldInfo) -> Setting:
    extra: Any = field.json_schema_extra
    default, flag, metavar = field.default, extra["flag"], extra["metavar"]
    hidden = default is None or default is False or default == ()
    is_number = isinstance(default, (bool, int, float)) and "|" not in metavar
    kind = type(default) if is_number else int if metavar == "N" else str
    negated = "no-" if default is True else ""
    return Setting(
        name=name,
        flag="" if flag is None else f"--{negated}{(flag or name).replace('_', '-')}",
        type=kind,
        metavar=metavar or {bool: "", int: "N", str: "NAME"}[kind],
        default=extra["shown"] or ("" if hidden else f"{default:g}" if kind is float else str(default)),
        help=field.description or "",
        panel=extra["panel"],
        repeatable=default == () and "," not in metavar,
    )


def takes_settings(function: Function) -> Function:
    """Put every setting into the signature of a function that takes them as `**settings`, for help and completion."""
    signature = inspect.signature(function)
    given = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    settings = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.get_default(call_default_factory=True))
        for name, field in ExportConfig.model_fields.items()
        if name not in signature.parameters
    ]
    vars(function)["__signature__"] = signature.replace(parameters=[*given, *settings])
    return function


def make_config(values: Mapping[str, Any]) -> ExportConfig:
    """Return the configuration with these settings.

    raises: InputError naming the key, with near misses for a key that is no setting.
    """
    return ExportConfig(**values)


def _texts(value: object) -> Iterator[str]:
    """Yield all texts in the value of a setting."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)


def with_underscores(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return settings by name; TOML has no null, so the text "none" stands for it, as in `--set`.

    raises: InputError for a name that is given twice, with dashes and with underscores.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in found:
            raise InputError(f"{name} is given twice, with dashes and with underscores; leave one of them out.")
        found[name] = None if value == "none" else value
    return found


def _rule(given: object) -> LayerRule:
    """Return the rule of a table, or of the text `GLOB: key=value, key=value`.

    raises: InputError.
    """
    if isinstance(given, LayerRule):
        return given
    table = _rule_of_text(given) if isinstance(given, str) else given
    if not isinstance(table, Mapping):
        raise InputError(
            f"layers holds {shown(given)}; a rule is a table, for example match = 'a.*' and weight_bits = 4."
        )
    values = with_underscores(table)
    if "match" not in values:
        raise InputError(
            f"the rule for layers {shown(dict(table))} has no match; name its layers, as in match = 'a.*'."
        )
    return LayerRule(**values)


def _rule_of_text(text: str) -> dict[str, Any]:
    glob, _, settings = text.partition(":")
    try:
        pairs = [assignment(part) for part in settings.split(",")]
    except InputError:
        pairs = []
    keys = [key for key, _ in pairs]
    if not pairs or not glob.strip() or len(set(keys)) < len(keys) or "match" in keys or None in dict(pairs).values():
        raise InputError(
            f"the rule for layers {text!r} is not GLOB: key=value, key=value with each key once; write for example "
            f"{argument('layers', ['stages.3.*: weight_bits=4, activation_bits=4'])}."
        )
    return {"match": glob.strip(), **dict(pairs)}


def assignment(text: str) -> tuple[str, Any]:
    """Return key and value of `key=value`; the value is `none` or TOML, and text where it is neither."""
    key, equals, value = (part.strip() for part in text.partition("="))
    key = key.replace("-", "_")
    if not equals or not key.isidentifier():
        raise InputError(f"--set {text!r} is not key=value; write for example --set weight_bits=4.")
    if len(value) > LONGEST_LINE:
        return key, value
    if value.lower() in ("true", "false", "none"):
        return key, {"true": True, "false": False, "none": None}[value.lower()]
    try:
        found = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return key, value
    return key, found["value"] if len(found) == 1 else value
