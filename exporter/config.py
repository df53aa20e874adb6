"""Everything that decides what an export does, as one frozen value: from a TOML file, flags and `--set`, checked once.

Must not know: models, data, methods (which check their own options), torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from calibrators.errors import InputError, UnknownNameError
from calibrators.mixed_precision.budgets import parse_budgets
from calibrators.placement.layer_rules import LEAST_BLOCK, SETTINGS, LayerRule

__all__ = ["ExportConfig", "load_config", "make_config"]

Width = Annotated[int, Field(ge=2, le=8)]
Positive = Annotated[int, Field(ge=1)]
Storage = Literal["auto", "int8", "int4", "int2"]
Channels = Annotated[tuple[float, ...], Field(min_length=1, max_length=3)]

NO_EFFECT = frozenset(
    {"cache_gib", "explain", "sensitivity", "gates", "openvino", "parity_samples", "latency_runs", "threads"}
)
"""Settings that change how an export is computed, proved and told, and nothing in the model."""

DEVICE = re.compile(r"cpu|cuda(:\d+)?", re.ASCII)


class ExportConfig(BaseModel):
    """One export. A field's description is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=False)

    target: str = Field("ort-cpu", description="integer runtime to export to")
    method: str = Field("mse", description="calibration method")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the method")
    weight_bits: Width = Field(8, description="bits of weights, 2 to 8")
    activation_bits: Width = Field(8, description="bits of what layers with weights read, 2 to 8; others have 8")
    first_last_bits: Width | None = Field(8, description="bits of the first and last layer; none: as all others")
    per_tensor_weights: bool = Field(False, description="one weight scale per tensor instead of per channel")
    weight_only: bool = Field(False, description="linear layers: quantized weights, float inputs, float kernels")
    block_size: int | None = Field(None, description="inputs per weight scale of weight-only layers; none: per channel")
    reduce_range: bool = Field(False, description="7-bit weights, for CPUs that saturate 16-bit sums")
    weight_storage: Storage = Field(
        "auto", description="weights of few bits in the file: packed where they fit, or int8"
    )
    wide_taps: bool = Field(True, description="8 bits for the taps of identity branches that low bits cannot hold")
    include: tuple[str, ...] = Field((), description="quantize only what these name, module or op patterns match")
    exclude: tuple[str, ...] = Field((), description="keep in float what these name, module or op patterns match")
    layers: tuple[LayerRule, ...] = Field((), description="rules for single layers, later ones win")
    prepare: tuple[str, ...] = Field((), description="rewrites of the float graph that come first: cle, absorb")
    bias_correction: bool = Field(False, description="shift biases by the mean error of each layer")
    simplify: bool = Field(True, description="simplify the ONNX graph where that provably changes nothing")
    seed: int = Field(0, ge=0, description="seed of everything random")
    device: str = Field("cpu", description="where methods that train or search compute: cpu, cuda or cuda:N")
    cache_gib: float = Field(
        4.0, gt=0, description="memory of the device for cached activations; what does not fit goes to disk"
    )
    explain: bool = Field(False, description="compute and draw what explains the method's choice")
    budget: tuple[str, ...] = Field((), description="limits within which every layer gets bits of its own")
    sensitivity: bool = Field(False, description="measure and draw what the bits of each layer cost")
    gates: tuple[str, ...] = Field((), description="conditions that decide the verdict")
    batch_size: Positive = Field(64, description="samples per batch where the data comes without batches")
    image_size: Positive | tuple[Positive, Positive] | None = Field(None, description="height and width of images")
    mean: Channels | None = Field(None, description="mean per channel of images in 0..1")
    std: Channels | None = Field(None, description="standard deviation per channel of images in 0..1")
    calibration_batches: Positive | None = Field(None, description="use only the first batches; none: all")
    openvino: bool = Field(False, description="prove the model in OpenVINO too, kernel by kernel")
    parity_samples: Positive = Field(256, description="samples whose integers are compared with the runtime")
    latency_runs: int = Field(50, ge=0, description="timed runs per model; 0: no timing")
    threads: Positive = Field(1, description="threads of the runtime while timing")

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
        """How data without batches is cut, and what images become (exporter.inputs.data.open_both)."""
        return {"batch": self.batch_size, "image_size": self.image_size, "mean": self.mean, "std": self.std}

    def digest(self) -> str:
        """sha256 of the canonical JSON of all fields but those without effect on the model."""
        values = self.model_dump(mode="json", exclude=set(NO_EFFECT))
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_config(
    file: Path | None = None, flags: Mapping[str, Any] | None = None, sets: Iterable[str] = ()
) -> ExportConfig:
    """The configuration of a TOML file, overridden by flags, overridden by `key=value` texts.

    file:  keys are fields (dashes or underscores), the method's options stand in a table `[options]`, each rule for
           layers in a table `[[layers]]`.
    flags: None values are flags that were not given; `layers` come behind those of the file, for later rules win.
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
