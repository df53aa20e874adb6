"""A complete report of a made-up network, every optional block present: the tests change copies of it."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any


def _histograms(index: int) -> dict[str, Any]:
    """A bell whose centre and width depend on the layer, cut at the ends of the range, which has 64 bins."""
    centre, width = 14 + (index * 7) % 30, 4 + index % 9
    floats = [round(4000 * math.exp(-(((bin_ - centre) / width) ** 2) / 2)) for bin_ in range(-4, 68)]
    codes = [sum(floats[:5]), *floats[5:67], sum(floats[67:])]
    return {"floats": floats, "codes": codes, "clipped": (sum(floats[:4]) + sum(floats[68:])) / sum(floats)}


def layer(index: int, kind: str = "activation") -> dict[str, Any]:
    """One entry of report["layers"]."""
    hi = 1.5 + (index * 13 % 17) / 4
    lo = -hi if kind == "weight" else (0.0 if index % 3 else -0.4)
    return {
        "site": f"stages.{index // 4}.{index % 4}.conv.{kind}",
        "module": f"stages.{index // 4}.{index % 4}.conv",
        "op": "conv2d",
        "kind": kind,
        "bits": 8,
        "granularity": "channel" if kind == "weight" else "tensor",
        "symmetric": kind == "weight",
        **(
            {"input_bits": 4 + index % 5, "values": 4608 * (index + 1), "noise_added": 0.001 * (1 + index % 7)}
            if kind == "weight"
            else {}
        ),
        "scale_min": hi / 255 / (2 if kind == "weight" else 1),
        "scale_max": hi / 255,
        "zero_point": 0 if kind == "weight" else index % 3 * 5,
        "lo": lo,
        "hi": hi,
        "observed_lo": lo * 1.1 - 0.05,
        "observed_hi": hi * (1.0 + (index % 5) / 6),
        "sqnr_db": 44.0 - (index * 29 % 23) - index * 0.05,
        **_histograms(index),
    }


def _proved_on(runtime: str, processor: str, *, samples: int) -> dict[str, Any]:
    return {
        "values": 784 * samples,
        "mismatched": 0,
        "max_lsb": 0,
        "runtime": runtime,
        "version": "1.32.0",
        "processor": processor,
        "flags": ["avx2", "fma"],
        "samples": samples,
        "kernel_values": 784 * samples,
        "kernel_mismatched": 0,
        "float_values": 0,
        "float_mismatched": 0,
        "outputs_identical": True,
        "largest_difference": 0.0,
        "violations": 0,
        "worst": [],
    }


def _unit(index: int) -> dict[str, Any]:
    before = 0.2 / (index + 1)
    return {
        "name": f"stages.{index // 4}.{index % 4}",
        "weights": 1 + index % 3,
        "before": before,
        "after": before * (0.25 + index % 4 / 4),  # training left every fourth as it was
        "undecided": 0.001 * index,
        "seconds": 12.5 * (index + 1),
    }


def _lapq(size: int) -> dict[str, Any]:
    """A search on `size` activations; its parabola has the vertex 2.5."""
    powers = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)

    def bend(bits: int) -> dict[str, Any]:
        hessian = [[(-1.0) ** (i + j) * 4.0 ** -abs(i - j) / bits for j in range(size)] for i in range(size)]
        return {
            "p": 3.0,
            "hessian": hessian,
            "share": 0.4 / bits,
            "mean_diagonal": 4.0 / bits,
            "mean_off_diagonal": 1.6 / bits**2,
            "eigenvalues": [0.01 / bits, 1.75 / bits],
            "powers": [{"p": 3.0, "loss": 0.02}],
        }

    return {
        "optimizer": "cobyqa",
        "loss": "kl",
        "split": [{"weights": 2.0, "activations": 3.0, "loss": 0.019}],
        "samples": 512,
        "evaluations": 287.4,
        "seconds": 71.3,
        "powers": [{"p": p, "loss": 0.02 + 0.004 * (p - 2.5) ** 2} for p in powers],
        "parabola": {
            "coefficients": [0.004, -0.02, 0.045],
            "vertex": 2.5,
            "verdict": "accepted",
            "p": 2.5,
            "loss": 0.02,
        },
        "losses": {"minmax": 0.0812, "percentile": 0.0345, "mse": 0.0231, "init": 0.0198, "final": 0.0121},
        "multipliers": {layer(i)["site"]: 0.7 + i / 7 for i in range(size)},
        "landscape": {
            "sites": [layer(i)["site"] for i in range(size)],
            "samples": 64,
            "step": 0.02,
            "bits": {str(bits): bend(bits) for bits in (2, 4, 8)},
        },
    }


def _reading(loss: float) -> dict[str, Any]:
    return {"loss": loss, "sqnr_db": 20 - 10 * loss, "accuracy_drop": loss / 2}


def _sensitivity(size: int) -> dict[str, Any]:
    """`size` weights; every third has 3 bits, others 6."""
    scales = [
        {
            "site": layer(i, "weight")["site"],
            "kind": "weight",
            "bits": 3 if i % 3 == 0 else 6,
            "widths": [{"bits": bits, **_reading(0.01 + (i + 1) * 0.3 / 4.0**bits)} for bits in (2, 3, 4, 6, 8)],
            "values": 1000 * (i + 1),
            "spread": 2.5,
            "spike": None if i % 2 else 31.0,
        }
        for i in range(size)
    ]
    return {"loss": "kl", "samples": 256, "finest": _reading(0.01), "scales": scales}


def _mixed() -> dict[str, Any]:
    def choice(bits: float, loss: float) -> dict[str, Any]:
        sizes = {"weight_bytes": 125_000 * bits, "avg_weight_bits": bits, "bops": 1e9 * bits}
        return {**sizes, "predicted": loss - 0.01, **_reading(loss)}

    uniform = [choice(bits, 0.01 + 4.0 / 4**bits) | {"uniform": bits} for bits in (2, 3, 4, 8)]
    return {
        "budgets": ["avg_weight_bits<=4.25"],
        "axis": "avg_weight_bits",
        "samples": 512,
        "rank_correlation": 0.87,
        "found": choice(4.2, 0.0123),
        "front": [*(choice(bits, 0.01 + 2.0 / 4**bits) for bits in (2.0, 3.5, 5.0, 8.0)), *uniform],
        "seconds": 61.5,
    }


def _escape(layer: str, cost: float) -> dict[str, Any]:
    return {"layer": layer, "settings": {"weight_bits": 8, "activation_bits": 8}, "cost": cost}


def _figure(value: float, spread: float) -> dict[str, Any]:
    ends = {"low": value - spread, "high": value + spread / 2}
    return {"metric": "lowest_agreement", "value": value, **ends, "limit": 0.95}


def _ladder() -> dict[str, Any]:
    def rung(name: str, seconds: float, loss: float, agreement: float) -> dict[str, Any]:
        reached = agreement >= 0.95
        return {
            "name": name,
            "seconds": seconds,
            "loss": loss,
            "figures": [_figure(agreement, 0.04)],
            "reached": reached,
        }

    change = {"change": [0.51, 0.44, 0.6]}
    return {
        "loss": "kl",
        "calibrated": 768,
        "held_out": 256,
        "rungs": [
            rung("mse", 3.2, 0.21, 0.81),
            rung("gptq", 9.1, 0.107, 0.914) | change,
            rung("gptq, 1 layer finer", 9.3, 0.06, 0.957) | change,
        ],
        "chosen": "gptq, 1 layer finer",
        "stopped": "goal",
        "escapes": [_escape("stem.conv", 0.031)],
    }


def _costly_layers() -> dict[str, Any]:
    return {
        "samples": 128,
        "loss": "kl",
        "layers": [_escape("stages.1.2.conv", 0.03), _escape("stages.1.1.conv", 0.01), _escape("head", 0.004)],
        "figures": [_figure(0.91, 0.04)],
        "advised": 2,
        "better": [_figure(0.97, 0.03)],
    }


def _compute_node(index: int) -> dict[str, Any]:
    module = f"stages.{index // 4}.{index % 4}.conv"
    kernel = "LayerNormalization" if index % 7 == 6 else "QLinearConv"
    return {
        "name": f"{module}.Conv_token_{index}",
        "module": module,
        "kernel": kernel,
        "layer": f"{module}.Conv",
        "integer": kernel.startswith("QLinear"),
        "macs": 100_000 * (index + 1),
        "bytes": 2_000 * (index + 1),
        "reads": [f"{module}.weight"],
        "writes": f"{module}.activation",
    }


def _node(index: int) -> dict[str, Any]:
    kernel = "float:LayerNormalization" if index % 7 == 6 else "QLinearConv"
    mismatched = 3 if kernel.startswith("float") else 0
    return {
        "site": f"stages.{index // 4}.{index % 4}.conv.activation",
        "kernel": kernel,
        "reason": "layer_norm has no integer kernel" if kernel.startswith("float") else "",
        "legal": True,
        "values": 401_408,
        "mismatched": mismatched,
        "max_lsb": min(mismatched, 1),
        "end_to_end": {"values": 401_408, "mismatched": mismatched, "max_lsb": min(mismatched, 1)},
    }


def sample_report(layers: int = 9) -> dict[str, Any]:
    """A passing report with that many activation sites and as many weight sites."""
    nodes = [_node(index) for index in range(layers)]
    values, off = sum(node["values"] for node in nodes), sum(node["mismatched"] for node in nodes)
    float_values = sum(node["values"] for node in nodes if node["kernel"].startswith("float"))
    forced = {"values": values, "mismatched": off, "max_lsb": min(off, 1)}
    level = {
        **forced,
        "forced": forced,
        "outputs_identical": off == 0,
        "violations": 0,
        "unplanned": {},
        "outputs": [
            {
                "name": "logits",
                "exact": True,
                "legal": True,
                "identical": True,
                "per_node_identical": True,
                "max_abs": 0.0,
                "relative": 0.0,
            }
        ],
        "samples": 256,
        "kernels": dict(Counter(node["kernel"] for node in nodes)),
        "kernel_mismatched": 0,
        "kernel_values": values - float_values,
        "float_mismatched": off,
        "float_values": float_values,
        "worst": [node for node in nodes if node["mismatched"]][:5],
        "nodes": nodes,
    }
    plain = copy.deepcopy(level)
    plain.update(mismatched=41, max_lsb=1, outputs_identical=False, worst=plain["nodes"][:2])
    return {
        "schema": 1,
        "verdict": "pass",
        "target": "ort-cpu",
        "method": "mse",
        "bits": {"weight": 8, "activation": 8},
        "tool": {"name": "intact", "version": "0.1.0"},
        "model": {
            "source": "zoo.py:repvgg",
            "inputs": [{"name": "image", "shape": ["batch", 3, 64, 64], "dtype": "float32"}],
            "outputs": [{"name": "logits", "shape": ["batch", 10], "dtype": "float32"}],
            "parameters": 7_839_146,
            "dynamic_batch": True,
            "notes": ["dropout removed: the model is in eval mode"],
        },
        "environment": {
            "cpu": "A CPU @ 2.20GHz",
            "flags": ["avx2", "avx512f", "avx512_vnni"],
            "torch": "2.13.0",
            "onnxruntime": "1.31.0",
            "onnx": "1.20.0",
            "python": "3.11.7",
            "threads": 1,
        },
        "fold": {
            "regions": 14,
            "max_rel_error": 3.1e-15,
            "refused": [{"where": "stages.1.0.add", "why": "a ReLU stands between the branches"}],
            "folded": [
                {
                    "where": f"stages.0.{index}",
                    "nodes": 7,
                    "kernel": "3x3",
                    "rel_error": 3.1e-15 / (index + 1),
                    "macs_before": 4.19e7,
                    "macs_after": 3.77e7,
                    "norms": [
                        {
                            "where": f"stages.0.{index}.{branch}.bn",
                            "gain": gain,
                            "largest_gain": 3 * gain,
                            "least_variance": 0.02 / gain,
                        }
                        for branch, gain in (("dense", 0.8), ("point", 0.4), ("identity", 6.5))
                    ],
                }
                for index in range(3)
            ],
        },
        "accuracy": {
            "metric": "top1",
            "samples": 2000,
            "float": 0.9035,
            "reference": 0.9025,
            "runtime": 0.9025,
            "top5": {"float": 0.994, "reference": 0.9935, "runtime": 0.9935},
            "agreement": 0.991,
            "sqnr_db": 31.4,
            "mean_kl": 0.0021,
            "drop_ci": [-0.0012, 0.0032],
            "outputs": [
                {"name": "logits", "reference": 31.6, "runtime": 31.4, "agreement": 0.991},
                {"name": "index", "reference": None, "runtime": None, "agreement": None},
            ],
            "reference_samples": 512,
            "reference_drop": 0.001,
        },
        "metric": {"name": "mean_iou", "samples": 2000, "float": 0.71, "reference": 0.705, "runtime": 0.7},
        "sizes": {
            "axes": {"image": {"2": "height", "3": "width"}},
            "proved": [{"image": [3, 32, 32]}, {"image": [3, 49, 16]}],
        },
        "parity": {"unoptimized": plain, "optimized": level},
        "proved_on": [_proved_on("ort", "x86-vnni", samples=512), _proved_on("avx2", "x86-avx2", samples=16)],
        "coverage": {
            "integer_nodes": 14,
            "compute_nodes": 16,
            "macs": 123_456_789,
            "accuracy_level": None,
            "uncounted": [],
            "integer_macs": 0.9987,
            "weight_only_macs": 0.0,
            "float_nodes": [
                {
                    "name": "head.norm",
                    "op": "LayerNormalization",
                    "why": "the runtime has no integer kernel",
                    "macs": 5120,
                },
                {"name": "head.softmax", "op": "Softmax", "why": "kept in float by --exclude", "macs": 0},
            ],
            "by_op": {"QLinearConv": 13, "QGemm": 1, "LayerNormalization": 1, "Softmax": 1},
            "nodes": [_compute_node(i) for i in range(layers)],
        },
        "preparation": {
            "cle": {
                "pairs": [
                    {
                        "first": "stem.conv",
                        "second": "stages.0.0.conv",
                        "channels": 48,
                        "factor_lo": 0.7754,
                        "factor_hi": 24.52,
                        "precision_before": 0.1241,
                        "precision_after": 0.5406,
                    }
                ],
                "sweeps": 17,
                "skipped": [{"where": "stages.1.0.conv", "why": "its result has 2 readers"}],
            },
            "absorb": {
                "pairs": [
                    {
                        "first": "stages.0.1.conv",
                        "second": "stages.0.2.conv",
                        "channels": 48,
                        "absorbed": 5,
                        "largest": 3.217,
                        "exact": exact,
                        "worst": 0.0 if exact else 6.125,
                        "mean": 0.0 if exact else 0.000755,
                    }
                    for exact in (False, True)
                ],
                "skipped": [{"where": "stem.conv", "why": "the input of stages.0.0.conv is padded with zeros"}],
            },
            "migrate": {
                "values": [
                    {
                        "carrier": carrier,
                        "readers": ["head"],
                        "channels": 48,
                        "factor_lo": 0.125,
                        "factor_hi": 9.75,
                        "shifted": carrier is not None,
                        "error_before": 0.0321,
                        "error_after": 0.00456,
                    }
                    for carrier in ("stages.1.0.norm", None)
                ],
                "skipped": [{"where": "stages.1.0.conv", "why": "97% of the error would remain"}],
            },
        },
        "rules": [
            {
                "match": "first and last layer",
                "settings": {"weight_bits": 8, "activation_bits": 8},
                "layers": ["stem.conv", "head"],
            },
            {"match": "stages.*", "settings": {"granularity": "tensor", "symmetric": True}, "layers": []},
        ],
        "layers": [layer(i, kind) for kind in ("activation", "weight") for i in range(layers)],
        "reconstruction": {"units": [_unit(i) for i in range(layers)], "spilled_bytes": 3 * 2**30},
        "lapq": _lapq(layers),
        "sensitivity": _sensitivity(layers),
        "mixed_precision": _mixed(),
        "ladder": _ladder(),
        "size": {
            "float_bytes": 31_412_224,
            "bytes": 7_991_296,
            "by_type": {"INT8": 7_839_000, "INT32": 52_000, "FLOAT": 9_800},
        },
        "latency_ms": {
            "float": 12.41,
            "quantized": 3.92,
            "ratio": 0.3159,
            "runs": 200,
            "threads": 1,
            "batch": 1,
            "iqr": {"float": 0.31, "quantized": 0.12},
            "speedup": {"quantized": 3.17},
            "interval": {"float": [12.38, 12.46], "quantized": [3.91, 3.94]},
            "ratio_interval": [0.3147, 0.3171],
            "reliable": True,
            "stopped": "interval",
        },
        "time_shares": {
            "integer": 0.62,
            "float": 0.21,
            "quantizers": 0.12,
            "moves": 0.05,
            "runs": 5,
            "nodes": {f"stages.{i // 4}.{i % 4}.conv.Conv_token_{i}": (i + 1) / layers**2 for i in range(layers)},
            "slowest": [
                {
                    "op": "LayerNormalization",
                    "nodes": 1,
                    "share": 0.15,
                    "advice": "batch norm folds into the layer before it and costs nothing",
                },
                {"op": "Softmax", "nodes": 1, "share": 0.06, "advice": "the runtime has no integer kernel"},
            ],
        },
        "time_s": {"capture": 2.1, "fold": 0.8, "calibrate": 11.2, "emit": 1.4, "validate": 21.9},
        "saturation": {
            "safe_without_vnni": False,
            "affected_here": False,
            "layers": [{"name": "stages.0.0.conv", "worst": 61_200.0, "limit": 32_767.0}],
        },
        "limited_weights": [
            {
                "site": "stages.0.0.conv.weight",
                "channels": 57,
                "channels_total": 64,
                "factor_mean": 1.26,
                "factor_hi": 1.97,
                "sqnr_db": 38.25,
                "free_sqnr_db": 40.5,
            }
        ],
        "unsigned_weights": ["head.weight"],
        "settled": {
            "processors": ["x86-avx2", "arm64"],
            "kernels": 7,
            "moved": [{"site": "stages.1.0.add", "ulps": -23}],
            "left": [{"site": "stages.1.1.mul", "kernel": "mul", "differing": 31, "total": 65_536}],
        },
        "portability": {
            "samples": 128,
            "loss": "kl",
            "rounding": "method",
            "portable": {"loss": 0.00066, "sqnr_db": 27.31, "accuracy_drop": 0.0},
            "free": {"loss": 0.00065, "sqnr_db": 27.42, "accuracy_drop": 0.0},
        },
        "simplifier": {"applied": False, "why": "the number of DequantizeLinear nodes fell from 58 to 57"},
        "emission": {
            "opset": 20,
            "ir_version": 10,
            "nodes": {"QuantizeLinear": 30, "DequantizeLinear": 58, "Conv": 13, "Gemm": 1},
        },
        "lint": [{"rule": "bias-scale", "severity": "warning", "where": "fc", "message": "bias scale was widened"}],
        "warnings": ["2 channels of stages.0.0.conv are dead"],
        "gates": [
            {
                "name": "kernel_mismatched",
                "limit": 0.0,
                "value": 0.0,
                "passed": True,
                "expression": "kernel_mismatched==0",
            },
            {
                "name": "parity_violations",
                "limit": 0.0,
                "value": 0.0,
                "passed": True,
                "expression": "parity_violations==0",
            },
            {
                "name": "kernel_surprises",
                "limit": 0.0,
                "value": 0.0,
                "passed": True,
                "expression": "kernel_surprises==0",
            },
            {"name": "lint_errors", "limit": 0.0, "value": 0.0, "passed": True, "expression": "lint_errors==0"},
            {
                "name": "accuracy_drop",
                "limit": 0.01,
                "value": 0.001,
                "passed": True,
                "expression": "accuracy_drop<=0.01",
            },
        ],
        "config": {"seed": 0, "method": "mse", "options": {"grid": 80}, "exclude": []},
        "data": {
            "calibration": {"source": "zoo.py:calibration", "samples": 1024, "sha256": "ab" * 32},
            "evaluation": {"source": "zoo.py:evaluation", "samples": 2000, "sha256": "cd" * 32},
        },
    }


def with_openvino(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report with OpenVINO as a second runtime, which differs by a step in two sites and refuses nothing."""
    report = copy.deepcopy(report)
    level = copy.deepcopy(report["parity"]["optimized"])
    for node in level["nodes"][:2]:
        node |= {"kernel": "Convolution u8", "mismatched": 12, "max_lsb": 1, "rate": 1e-3}
    level |= {
        "mismatched": 911,
        "max_lsb": 2,
        "outputs_identical": False,
        "kernel_mismatched": 24,
        "worst": level["nodes"][:2],
        "runtime": "OpenVINO",
        "version": "2026.1",
        "executed": {"Convolution u8": 13, "FullyConnected u8": 1, "SoftMax f32": 1},
        "relative": 0.0123,
        "agreement": 0.9922,
    }
    report["parity"]["openvino"] = level
    report["proved_on"].append(_proved_on("openvino", "openvino", samples=16))
    return report


def failing() -> dict[str, Any]:
    """Return a report of three layers with two failed gates, one of which was not measured."""
    report = sample_report(3)
    report["verdict"] = "fail"
    report["gates"] = [
        {"name": "accuracy_drop", "limit": 0.01, "value": 0.0341, "passed": False, "expression": "accuracy_drop<=0.01"},
        {"name": "agreement", "limit": 0.9, "value": None, "passed": False, "expression": "agreement>=0.9"},
    ]
    return report


def infected(value: Any, hostile: str, key: str = "") -> Any:
    """Return a part of a report in which every name and text ends in `hostile`."""
    if isinstance(value, dict):
        return {k: infected(v, hostile, k) for k, v in value.items()}
    if isinstance(value, list):
        return [infected(item, hostile, key) for item in value]
    fixed = key in ("verdict", "kind", "severity", "axis", "granularity", "loss", "rounding", "stopped")
    return value + hostile if isinstance(value, str) and not fixed else value
