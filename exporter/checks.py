"""Check the settings of an export beyond their form, before any work begins.

Must not know: models, data, how anything is computed.
"""

from __future__ import annotations

import torch

from calibrators.errors import InputError
from calibrators.methods import get_method, range_method
from calibrators.rewrites.prepare import check_preparations
from calibrators.targets import get_target
from exporter.config import ExportConfig
from exporter.emission.packing import STORAGES, refused_opset
from exporter.reporting.gates import parse
from runtime_tests.parity.openvino import check_installed

__all__ = ["check_settings"]


def check_settings(config: ExportConfig) -> None:
    """Check that every name is known, every gate can be parsed, and the device exists.

    raises: InputError.
    """
    get_target(config.target)
    get_method(config.method, config.options)
    for rule in config.layers:
        if rule.method is not None:
            range_method(rule.method)
    check_preparations(config.prepare)
    for expression in config.gates:
        parse(expression)
    if config.openvino:
        check_installed()
    _check_device(config.device)
    _check_storage(config)


def _check_storage(config: ExportConfig) -> None:
    asked = STORAGES[config.weight_storage]
    narrowest = min([config.weight_bits, *(rule.weight_bits for rule in config.layers if rule.weight_bits)])
    if config.weight_storage != "auto" and asked and narrowest > max(asked):
        raise InputError(
            f"weight_storage is {config.weight_storage!r} and no weight has {max(asked)} bits or fewer; give "
            f"--weight-bits {max(asked)}, or leave --weight-storage out."
        )
    if config.openvino and 2 in asked:
        raise InputError(
            f"weight_storage is {config.weight_storage!r}, whose 2-bit types OpenVINO does not read; give "
            "--weight-storage auto, or leave --openvino out."
        )
    opset = refused_opset(config.weight_storage)
    if opset is not None:
        raise InputError(
            f"weight_storage is {config.weight_storage!r}, whose types came with opset {opset}, which the installed "
            "onnxruntime does not load; upgrade onnxruntime, or give --weight-storage int8."
        )


def _check_device(name: str) -> None:
    kind, _, index = name.partition(":")
    found = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= found:
        devices = f"{found} CUDA device{'s' if found > 1 else ''}" if found else "no CUDA device"
        raise InputError(
            f"device {name!r} is not available: torch {torch.__version__} finds {devices}; use --device cpu."
        )
