"""Everything that decides what an export does, as one frozen value: from a TOML file, flags and `--set`, checked once.

Must not know: models, data, methods (which check their own options), torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from calibrators.errors import InputError, UnknownNameError
from calibrators.mixed_precision.budgets import parse_budgets
from calibrators.placement.layer_rules import LEAST_BLOCK, SETTINGS, LayerRule

__all__ = ["ExportConfig", "Setting", "list_settings", "load_config", "make_config"]

Width = Annotated[int, Field(ge=2, le=8)]
Positive = Annotated[int, Field(ge=1)]
Storage = Literal["auto", "int8", "int4", "int2"]
Channels = Annotated[tuple[float, ...], Field(min_length=1, max_length=3)]

NO_EFFECT = frozenset(
    {"cache_gib", "explain", "sensitivity", "gates", "openvino", "parity_samples", "latency_runs", "threads"}
)
"""Settings that change how an export is computed, proved and told, and nothing in the model."""

DEVICE = re.compile(r"cpu|cuda(:\d+)?", re.ASCII)


def _setting(
    default: Any,
    help: str,
    panel: str,
    *,
    flag: str | None = "",
    metavar: str | None = None,
    shown: str = "",
    **limits: Any,
) -> Any:
    """Declare a setting once: its default, its help, and how the command line shows it.

    flag:  name of the flag; by default the field's name, None for a setting without one (TOML file and `--set` only).
    shown: default as `--help` prints it, where it is not the value itself.
    """
    extra: dict[str, JsonValue] = {"panel": panel, "flag": flag, "metavar": metavar, "shown": shown}
    return Field(default, description=help, json_schema_extra=extra, **limits)


QUANTIZATION, DATA, PROOF, RUNNING = "Quantization", "Data", "Proof and verdict", "Running"
"""Panels of `intact export --help`."""

LAYER_RULE = (
    "Settings of matching layers, repeatable; the last match wins: `'stages.3.*: weight_bits=4, activation_bits=4'`. "
    "Keys: weight_bits, activation_bits (16: int16 between float kernels), weight_only, granularity (tensor, channel; "
    "block, with block_size, where weight_only), symmetric, method (of its ranges), float."
)


class ExportConfig(BaseModel):
    """One export: every setting, as a TOML key, a flag of `intact export` and a Python keyword."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=False)

    target: str = _setting("ort-cpu", "Runtime to export to; `intact targets` lists them.", QUANTIZATION)
    method: str = _setting("mse", "Calibration method; `intact methods` lists them.", QUANTIZATION)
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the method: the table [options], or `--set NAME=VALUE`."
    )
    weight_bits: Width = _setting(8, "Bits of weights, 2 to 8.", QUANTIZATION)
    activation_bits: Width = _setting(
        8, "Bits of the activations that layers with weights read, 2 to 8; others have 8.", QUANTIZATION
    )
    first_last_bits: Width | None = _setting(
        8, "Bits of the first and the last layer; `--set first_last_bits=none` treats them as all others.", QUANTIZATION
    )
    per_tensor_weights: bool = _setting(False, "One weight scale per tensor instead of per channel.", QUANTIZATION)
    weight_only: bool = _setting(
        False,
        "Linear layers: quantized weights, float inputs, float kernels; convolutions are unaffected.",
        QUANTIZATION,
    )
    block_size: int | None = _setting(
        None, "Inputs per weight scale of weight-only layers: 16, 32, 64, ...", QUANTIZATION, shown="per channel"
    )
    weight_storage: Storage = _setting(
        "auto",
        "Type of the weights in the file: `int8`, or `int4` or `int2`, which the runtime unpacks on loading for the "
        "same integer kernels; auto: int4 where they fit.",
        QUANTIZATION,
        metavar="TYPE",
    )
    reduce_range: bool = _setting(False, "7-bit weights, for CPUs without VNNI.", QUANTIZATION)
    wide_taps: bool = _setting(
        True, "Keep 8 bits for identity branches that few bits cannot hold beside the kernel.", QUANTIZATION, flag=None
    )
    prepare: tuple[str, ...] = _setting(
        (),
        "Rewrites of the float model before calibration: `cle` equalizes the ranges of neighbouring layers, `absorb` "
        "absorbs high biases into the next layer. For weights with one scale per tensor.",
        QUANTIZATION,
        metavar="NAME,NAME",
    )
    bias_correction: bool = _setting(False, "Shift biases by the mean error of each layer.", QUANTIZATION)
    include: tuple[str, ...] = _setting(
        (), "Quantize only what this name, module or operator glob matches, repeatable.", QUANTIZATION, metavar="GLOB"
    )
    exclude: tuple[str, ...] = _setting((), "Keep in float what this glob matches.", QUANTIZATION, metavar="GLOB")
    layers: tuple[LayerRule, ...] = _setting((), LAYER_RULE, QUANTIZATION, flag="layer", metavar="RULE")
    budget: tuple[str, ...] = _setting(
        (),
        "Choose bits per layer (mixed precision) within this limit, repeatable: `weight_bytes<=0.6M`, "
        "`avg_weight_bits<=3.5`, `bops<=2G` (chooses activation bits too), `accuracy_drop<=1%`.",
        QUANTIZATION,
        metavar="LIMIT",
    )
    sensitivity: bool = _setting(
        False, "Measure and plot the cost of bits, layer by layer; `--budget` does too.", QUANTIZATION
    )
    explain: bool = _setting(False, "Compute and plot the reasons for the method's choice; takes longer.", QUANTIZATION)
    simplify: bool = _setting(
        True, "Simplify the ONNX graph where that provably changes nothing.", QUANTIZATION, flag=None
    )
    batch_size: Positive = _setting(64, "Samples per batch for .npz files and folders.", DATA)
    calibration_batches: Annotated[int | None, Field(ge=1)] = _setting(
        None, "Use only the first N calibration batches.", DATA, metavar="N", shown="all"
    )
    image_size: Positive | tuple[Positive, Positive] | None = _setting(
        None,
        "Resize and centre-crop the images of a folder: `224`, or `224x160` (height x width).",
        DATA,
        metavar="SIZE",
    )
    mean: Channels | None = _setting(
        None, "Mean per channel of images in 0..1: `0.485,0.456,0.406`.", DATA, metavar="M,M,M"
    )
    std: Channels | None = _setting(None, "Standard deviation per channel of images in 0..1.", DATA, metavar="S,S,S")
    gates: tuple[str, ...] = _setting(
        (), "Condition for exit code 0, repeatable: `accuracy_drop<=0.01`.", PROOF, flag="gate", metavar="EXPR"
    )
    openvino: bool = _setting(
        False, "Prove the model in OpenVINO too, kernel by kernel; needs the extra `openvino`.", PROOF
    )
    parity_samples: Positive = _setting(256, "Samples compared integer by integer.", PROOF, metavar="N")
    latency_runs: int = _setting(50, "Timed runs per model; 0: no timing.", PROOF, flag=None, ge=0)
    threads: Positive = _setting(1, "Threads of the runtime while timing.", PROOF, flag=None)
    seed: int = _setting(0, "Seed of everything random.", RUNNING, ge=0)
    device: str = _setting("cpu", "Device on which methods train or search: `cpu`, `cuda`, `cuda:1`.", RUNNING)
    cache_gib: float = _setting(
        4.0,
        "Memory for activations that training keeps; the rest goes to temporary files.",
        RUNNING,
        metavar="GIB",
        gt=0,
    )

    @field_validator("device")
    @classmethod
    def _device_is_a_name(cls, name: str) -> str:
        if not DEVICE.fullmatch(name):
            raise ValueError("cpu, cuda or cuda:N")
        return name

    @field_validator("block_size")
    @classmethod
    def _block_size_is_a_power_of_two(cls, size: int | None) -> int | None:
        if size is not None and (size < LEAST_BLOCK or size & (size - 1)):
            raise ValueError(f"a power of two from {LEAST_BLOCK} on")
        return size

    @field_validator("prepare", mode="before")
    @classmethod
    def _names_may_stand_in_one_text(cls, names: object) -> object:
        return [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else names

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _numbers_may_stand_in_one_text(cls, value: object) -> object:
        if not isinstance(value, str):
            return (value,) if isinstance(value, (int, float)) else value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            raise ValueError("a number, or three separated by commas") from None

    @field_validator("image_size", mode="before")
    @classmethod
    def _size_may_be_text(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        parts = value.lower().split("x")
        if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
            raise ValueError("a size: 224, or 224x160 for height x width")
        return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))

    @field_validator("budget")
    @classmethod
    def _budgets_can_be_read(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(str, parse_budgets(texts)))

    @field_validator("budget", mode="before")
    @classmethod
    def _one_budget_may_stand_alone(cls, texts: object) -> object:
        return [texts] if isinstance(texts, str) else texts

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_are_rules(cls, rules: object) -> list[LayerRule]:
        if isinstance(rules, (list, tuple)):
            return [_rule(rule) for rule in rules]
        raise InputError(f"layers = {rules!r} should be a list of rules; write [[layers]] above each in a file.")

    @field_serializer("layers")
    def _what_rules_set(self, rules: tuple[LayerRule, ...]) -> list[dict[str, Any]]:
        return [{"match": rule.match, **rule.settings} for rule in rules]

    @model_validator(mode="after")
    def _patterns_are_unambiguous(self) -> ExportConfig:
        if self.include and set(self.include) & set(self.exclude):
            both = sorted(set(self.include) & set(self.exclude))[0]
            raise ValueError(f"pattern {both!r} stands in include and in exclude")
        return self

    @model_validator(mode="after")
    def _blocks_are_of_weight_only_layers(self) -> ExportConfig:
        if self.block_size is not None and not self.weight_only:
            raise ValueError(
                f"block_size is {self.block_size} and weight_only is not set, but integer kernels have no scales per "
                "block; set weight_only, or in a rule for layers granularity = 'block' beside its own weight_only"
            )
        return self

    def data_form(self) -> dict[str, Any]:
        """How data without batches is cut, and what images become (exporter.inputs.open.open_both)."""
        return {"batch": self.batch_size, "image_size": self.image_size, "mean": self.mean, "std": self.std}

    def digest(self) -> str:
        """sha256 of the canonical JSON of all fields but those without effect on the model."""
        values = self.model_dump(mode="json", exclude=set(NO_EFFECT))
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class Setting:
    """A setting as documentation and the command line show it; `flag` is empty where there is none."""

    name: str
    flag: str
    type: type
    metavar: str | None
    default: str
    help: str
    panel: str
    repeatable: bool


def list_settings() -> list[Setting]:
    """Return every setting but the method's options, in the order of declaration."""
    return [_described(name, field) for name, field in ExportConfig.model_fields.items() if name != "options"]


def _described(name: str, field: FieldInfo) -> Setting:
    extra, default = field.json_schema_extra, field.default
    assert isinstance(extra, dict)
    flag, repeatable = extra["flag"], default == () and name != "prepare"
    kind = next((kind for kind in (bool, int, float) if type(default) is kind or field.annotation == kind | None), str)
    hidden = default is None or default is False or default == ()
    shown = str(extra["shown"]) or ("" if hidden else f"{default:g}" if kind is float else str(default))
    return Setting(
        name=name,
        flag="" if flag is None else f"--{str(flag or name).replace('_', '-')}",
        type=kind,
        metavar=None if extra["metavar"] is None else str(extra["metavar"]),
        default=shown,
        help=field.description or "",
        panel=str(extra["panel"]),
        repeatable=repeatable,
    )


def load_config(
    file: Path | None = None, flags: Mapping[str, Any] | None = None, sets: Iterable[str] = ()
) -> ExportConfig:
    """The configuration of a TOML file, overridden by flags, overridden by `key=value` texts.

    file:  keys are fields (dashes or underscores), the method's options stand in a table `[options]`, each rule for
           layers in a table `[[layers]]`.
    flags: None values are flags that were not given; `layers` come after those of the file, because later rules win.
    sets:  `key=value`; a key that is a field sets the field, any other key is an option of the method.
    raises: InputError naming the key.
    """
    values = _read_toml(file) if file is not None else {}
    before = values.get("layers")
    values |= {key: value for key, value in (flags or {}).items() if value is not None}
    if before and values["layers"] is not before:
        values["layers"] = [*before, *values["layers"]] if isinstance(before, list) else before
    options = dict(values.get("options") or {}) if isinstance(values.get("options"), Mapping) else values.get("options")
    for text in sets:
        key, value = _assignment(text)
        if key in ExportConfig.model_fields and key != "options":
            values[key] = value
        else:
            options = {**(options or {}), key: value}
    if options is not None:
        values["options"] = options
    return make_config(values, str(file) if file is not None else "")


def make_config(values: Mapping[str, Any], source: str = "") -> ExportConfig:
    """The configuration with these fields.

    raises: InputError naming the key and its source; UnknownNameError with near misses for a key that is no field.
    """
    for key in values:
        if key not in ExportConfig.model_fields:
            hint = " Options of the method belong in the table [options]." if source else ""
            raise InputError(f"{_in(source)}{UnknownNameError('setting', key, ExportConfig.model_fields)}{hint}")
    try:
        return ExportConfig(**values)
    except ValidationError as error:
        raise InputError(_in(source) + _message(error)) from error
    except InputError as error:
        raise InputError(f"{_in(source)}{error}") from error


def _read_toml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        near = get_close_matches(file.name, [p.name for p in file.parent.glob("*.toml")], n=1)
        raise InputError(f"configuration file {file} does not exist{f'; did you mean {near[0]!r}?' if near else '.'}")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{file} is no readable TOML file: {error}.") from error
    return {key.replace("-", "_"): value for key, value in values.items()}


def _rule(given: object) -> LayerRule:
    """A rule for layers from its table, or from the text `GLOB: key=value, key=value`.

    raises: InputError.
    """
    if isinstance(given, LayerRule):
        return given
    table = _rule_of_text(given) if isinstance(given, str) else given
    if not isinstance(table, Mapping):
        raise InputError(f"layers holds {given!r}; a rule is a table, for example match = 'a.*' and weight_bits = 4.")
    values = {str(key).replace("-", "_"): value for key, value in table.items()}
    if "match" not in values:
        raise InputError(f"the layer rule {dict(table)!r} has no match; say for which layers it is, as match = 'a.*'.")
    for key in values:
        if key not in ("match", *SETTINGS):
            raise InputError(f"layer rule {values['match']!r}: {UnknownNameError('setting of layers', key, SETTINGS)}")
    return LayerRule(**values)


def _rule_of_text(text: str) -> dict[str, Any]:
    glob, _, settings = text.partition(":")
    try:
        pairs = [_assignment(part) for part in settings.split(",")]
    except InputError:
        pairs = []
    keys = [key for key, _ in pairs]
    if not pairs or not glob.strip() or len(set(keys)) < len(keys) or "match" in keys or None in dict(pairs).values():
        raise InputError(
            f"layer rule {text!r} is not GLOB: key=value, key=value with each key once; write for example "
            "--layer 'stages.3.*: weight_bits=4, activation_bits=4'."
        )
    return {"match": glob.strip(), **dict(pairs)}


def _assignment(text: str) -> tuple[str, Any]:
    """Key and value of `key=value`, the value as TOML where it is TOML, else as text."""
    key, equals, value = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals or not key.isidentifier():
        raise InputError(f"--set {text!r} is not key=value; write for example --set weight_bits=4.")
    value = value.strip()
    if value.lower() in ("true", "false", "none"):
        return key, {"true": True, "false": False, "none": None}[value.lower()]
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _message(error: ValidationError) -> str:
    """One sentence per wrong key."""
    sentences: list[str] = []
    for fault in error.errors(include_url=False):
        key = str(fault["loc"][0]) if fault["loc"] else ""
        what = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        sentence = f"{key} = {fault['input']!r} should be {what}" if key else what
        if not any(key and other.startswith(f"{key} =") for other in sentences):
            sentences.append(sentence)
    return "; ".join(sentences) + "."


def _in(source: str) -> str:
    return f"{source}: " if source else ""
