"""Check the settings of an export beyond their form, and its data, before any work begins.

Must not know: models, how anything is computed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from calibrators.errors import DataError, InputError, UnknownNameError, argument, counted
from calibrators.execution.ranks import ALONE, Ranks
from calibrators.methods import check_parallel, get_method, range_method
from calibrators.mixed_precision.budgets import ACCURACY
from calibrators.options import list_options
from calibrators.placement.place import check_widths
from calibrators.rewrites.prepare import check_preparations
from calibrators.targets import DEFAULT_TARGET, get_target
from exporter.config import ExportConfig
from exporter.emission.packing import STORAGES, first_release, ir_version_of, refused_opset
from exporter.inputs.data import Data, LabelError
from exporter.inputs.golden import check_golden
from exporter.reporting.gates import Gate, check_measurable, needs_labels, parse
from runtime_tests.ort.versions import parse_version, release_of
from runtime_tests.runtimes import available_runtimes, get_runtime

__all__ = ["adapted", "check_names", "check_settings", "checked_data"]


def check_settings(config: ExportConfig, ranks: Ranks = ALONE) -> None:
    """Check that every name is known, and that device, runtimes and weight storage can do what is asked.

    ranks:  the processes that share the work.
    raises: InputError.
    """
    check_names(config)
    check_parallel(get_method(config.method), ranks)
    check_widths(config, get_target(config.target))
    check_golden(config.golden)
    available_runtimes(config.proving_runtimes)
    _check_device(config.device)
    _check_portable(config)
    _check_storage(config)
    _check_min_ort(config)


def check_names(config: ExportConfig) -> None:
    """Check that there are the target, the methods with their options, the preparations and the metrics of the gates.

    raises: InputError.
    """
    get_target(config.target)
    _check_options(config)
    for rule in config.layers:
        if rule.method is not None:
            range_method(rule.method)
    check_preparations(config.prepare)
    for gate in config.gates:
        parse(gate)


def adapted(config: ExportConfig) -> tuple[ExportConfig, tuple[str, ...]]:
    """Return the settings as the target needs them, and warnings on what nothing here can prove.

    Files are also proved in the target's own runtime where that is available.
    """
    target = get_target(config.target)
    if not target.packed_weights and config.weight_storage == "auto":
        config = config.model_copy(update={"weight_storage": "int8"})
    if target.proof == "qdq":
        return config, (
            f"not proved on the device: {target.runtime} does not run here; onnxruntime computes what the QDQ text "
            "says, without integer kernels",
        )
    if not target.proved_in or target.proved_in in config.proving_runtimes:
        return config, ()
    runtime = get_runtime(target.proved_in)
    if reason := runtime.missing():
        if target.lowered_file:
            raise InputError(
                f"{target.lowered_file} of target {target.name!r} is made by {runtime.name}: {reason}; "
                f"{runtime.how_to_get}."
            )
        return config, (f"not proved in {runtime.name}: {reason}; {runtime.how_to_get}",)
    return config.model_copy(update={"prove_on": (*config.prove_on, runtime.name)}), ()


def _check_options(config: ExportConfig) -> None:
    """Raise InputError for options that the method does not have, or for a value that it does not allow."""
    known = {option.name for option in list_options(type(get_method(config.method)))}
    settings = ExportConfig.model_fields.keys() - {"options"}
    for name in config.options:
        if name not in known:
            raise UnknownNameError(f"setting or {config.method} option", name, known | settings)
    get_method(config.method, config.options)


def checked_data(
    data: Data, evaluation: Data | None, config: ExportConfig, gates: Iterable[Gate]
) -> tuple[Data, Data | None]:
    """Return the calibration data, with labels where method or budgets use them, and the evaluation data.

    raises: DataError for missing labels or data that can be read only once, InputError for a gate without its data.
    """
    has_metric, has_eval = config.metric is not None, evaluation is not None
    evaluation, has_labels = _with_usable_labels(evaluation, gates, has_metric=has_metric)
    has_baseline = config.baseline is not None
    check_measurable(gates, has_eval=has_eval, has_labels=has_labels, has_metric=has_metric, has_baseline=has_baseline)
    if has_metric and not has_eval:
        raise InputError(
            f"{argument('metric')} needs held-out data; give it with {argument('eval_data')}, or leave the metric out."
        )
    calibration = data.take(config.calibration_batches)
    if not has_eval and config.reference_samples != ExportConfig.model_fields["reference_samples"].default:
        calibration.noted(
            f"{argument('reference_samples')} has no effect without {argument('eval_data')}: nothing is scored"
        )
    required = getattr(get_method(config.method, config.options), "needs_labels", False)
    limits_accuracy = ACCURACY in (budget.quantity for budget in config.budget)
    if not (required or limits_accuracy):
        calibration = calibration.without_labels()
    elif calibration.example().labels is not None:
        calibration = calibration.with_labels()
    elif required:
        raise DataError(
            f"method {config.method!r} with these options needs labels, but {calibration.label} has none; yield "
            "(x, labels), or store them as 'labels' in the .npz file."
        )
    for opened in (calibration, evaluation):
        if opened is not None:
            opened.example()  # a second time: data that can be read only once is refused here
    return calibration, evaluation


def _with_usable_labels(
    evaluation: Data | None, gates: Iterable[Gate], *, has_metric: bool
) -> tuple[Data | None, bool]:
    """Return evaluation data, without labels that are not class indices, and whether it has labels.

    A metric of the user's gets any labels.

    raises: LabelError for such labels if a gate needs them.
    """
    if evaluation is None:
        return None, False
    try:
        return evaluation, evaluation.example().labels is not None
    except LabelError as error:
        if any(needs_labels(gate) for gate in gates):
            raise
        if has_metric:
            return evaluation.without_labels(), False
        return evaluation.without_labels(f"labels of {argument('eval_data')} are not used: {error}"), False


def _check_portable(config: ExportConfig) -> None:
    asked = "uint8" in [config.portable, *(rule.portable for rule in config.layers)]
    if asked and get_target(config.target).pair_sum is None:
        raise InputError(
            f"portable is 'uint8', but target {config.target!r} limits no pairs of weights, so that it would change "
            f"nothing; leave it out, or give {argument('target', DEFAULT_TARGET)}."
        )


def _check_storage(config: ExportConfig) -> None:
    packed, target = STORAGES[config.weight_storage], get_target(config.target)
    narrowest = min([config.weight_bits, *(rule.weight_bits for rule in config.layers if rule.weight_bits)])
    opset = refused_opset(config.weight_storage)
    if config.weight_storage != "auto" and packed and narrowest > max(packed):
        problem = (
            f"but no weight has {max(packed)} bits or fewer; give {argument('weight_bits', max(packed))}, or leave "
            f"{argument('weight_storage')} out"
        )
    elif packed and config.weight_storage != "auto" and not target.packed_weights:
        problem = f"but files for {target.name} hold weights as int8; leave {argument('weight_storage')} out"
    elif "openvino" in config.proving_runtimes and 2 in packed:
        problem = (
            f"but OpenVINO does not read its 2-bit types; give {argument('weight_storage', 'auto')}, or leave "
            f"{argument('openvino')} out"
        )
    elif opset is not None:
        problem = (
            f"which needs opset {opset}, but the installed onnxruntime does not load that; upgrade onnxruntime, "
            f"or give {argument('weight_storage', 'int8')}"
        )
    else:
        return
    raise InputError(f"weight_storage is {config.weight_storage!r}, {problem}.")


def _check_min_ort(config: ExportConfig) -> None:
    """Raise InputError where the oldest onnxruntime that has to load the file cannot load what is asked for."""
    if config.min_ort is None:
        return
    oldest, target = parse_version(config.min_ort), get_target(config.target)
    opset = target.opsets[0]
    if (first := max(release_of(opset, ir_version_of(opset)), parse_version(target.min_version))) > oldest:
        raise InputError(f"min_ort is {config.min_ort}, but files for {target.name} (opset {opset}) run in onnxruntime "
                         f"{first} and newer; give {argument('min_ort', str(first))}.")  # fmt: skip
    widths = STORAGES[config.weight_storage] if config.weight_storage != "auto" else ()
    for width in widths:
        if (first := first_release(width, reads_floats=config.weight_only)) > oldest:
            raise InputError(
                f"weight_storage is {config.weight_storage!r}, but {width}-bit weights load in onnxruntime {first} and "
                f"newer, and min_ort is {config.min_ort}; give {argument('weight_storage', 'auto')}, or "
                f"{argument('min_ort', str(first))}."
            )


def _check_device(name: str) -> None:
    kind, _, index = name.partition(":")
    found = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= found:
        devices = counted(found, "CUDA device") if found else "no CUDA device"
        raise InputError(
            f"device {name!r} is not available: torch {torch.__version__} finds {devices}; use "
            f"{argument('device', 'cpu')}."
        )
