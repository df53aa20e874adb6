"""Print the SHA-256 of the `model.onnx` of many small exports, to show that a refactoring changes no byte.

    python benchmarks/digests.py > before.json          # on the old code
    python benchmarks/digests.py --against before.json  # on the new code, same machine

What the metadata say about version, settings and where the file holds is left out: it may change without a change of
the model.
The keys of `report.json` are recorded too; a key that disappears is a failure. Digests depend on the processor and on
the versions of the libraries, so compare only files from one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx
import torch

from exporter import export
from tests.support.architectures import ARCHITECTURES, construct
from tests.support.networks import NETWORKS, build

Settings = dict[str, Any]

FEW = {"iters": 12, "batch": 8}
LEFT_OUT = ("version", "config_sha256", "min_onnxruntime", "exact_on")

CASES: dict[str, tuple[str, Settings]] = {
    **{f"{name}-w8a8": (name, {}) for name in ("densenet", "pools", "paddings", "gpt", "vit", "odd", "slices", "half")},
    "shufflenet-minmax-w4a4": ("shufflenet", {"method": "minmax", "weight_bits": 4, "activation_bits": 4}),
    "efficientnet-percentile": ("efficientnet", {"method": "percentile", "prepare": ("cle", "absorb")}),
    "mobilenetv3-entropy": ("mobilenetv3", {"method": "entropy", "bias_correction": True}),
    "detector-aciq-tensor": ("detector", {"method": "aciq", "per_tensor_weights": True}),
    "two-inputs-lp-w4": ("two-inputs", {"method": "lp", "weight_bits": 4, "first_last_bits": None}),
    "unet-mae-reduced": ("unet", {"method": "mae", "reduce_range": True}),
    "arithmetic-rules": ("arithmetic", {"layers": ["*: weight_bits=4, activation_bits=6"], "weight_storage": "int8"}),
    "encoder-weight-only": ("encoder", {"weight_only": True, "block_size": 16, "weight_bits": 4}),
    "residual-budget": ("residual", {"budget": ("avg_weight_bits<=4",), "first_last_bits": None, "sensitivity": True}),
    "residual-bops": ("residual", {"budget": ("bops<=2M",), "first_last_bits": None}),
    "transformer-gptq-w4": ("transformer", {"method": "gptq", "weight_bits": 4}),
    "transformer-gptq-blocks": (
        "transformer",
        {"method": "gptq", "weight_only": True, "block_size": 16, "weight_bits": 4},
    ),
    "residual-lapq-w4a4": ("residual", {"method": "lapq", "weight_bits": 4, "activation_bits": 4, "explain": True}),
    "residual-adaround-w4": ("residual", {"method": "adaround", "weight_bits": 4, "options": FEW}),
    "residual-brecq-w4a4": (
        "residual",
        {"method": "brecq", "weight_bits": 4, "activation_bits": 4, "options": FEW},
    ),
    "pooled-qdrop-w2a4": ("pooled", {"method": "qdrop", "weight_bits": 2, "activation_bits": 4, "options": FEW}),
    "transformer-pdquant-w4a4": (
        "transformer",
        {"method": "pdquant", "weight_bits": 4, "activation_bits": 4, "options": FEW},
    ),
    "residual-mrecg-w4a4": ("residual", {"method": "mrecg", "weight_bits": 4, "activation_bits": 4, "options": FEW}),
    "pooled-repapq-w4a4": ("pooled", {"method": "repapq", "weight_bits": 4, "activation_bits": 4, "options": FEW}),
    "demo-repapq-w3a3": (
        "demo",
        {"method": "repapq", "weight_bits": 3, "activation_bits": 3, "options": {**FEW, "batch": 32}},
    ),
    "demo-qdrop-w4a4": ("demo", {"method": "qdrop", "weight_bits": 4, "activation_bits": 4, "options": FEW}),
}


def network(name: str) -> tuple[Any, list[Any]]:
    """Return a network with seeded random weights, or the demo network, and two calibration batches."""
    if name == "demo":
        from exporter.demo.model import calibration
        from exporter.demo.model import network as demo

        return demo(), list(calibration())[:2]
    if name in NETWORKS:
        model, x = build(name, batch=16)
        return model, [x[:8], x[8:]]
    assert name in ARCHITECTURES
    model, inputs = construct(name, batch=16)
    halves = [tuple(x[part] for x in inputs) for part in (slice(8), slice(8, 16))]
    if len(inputs) == 1:
        return model, [x for (x,) in halves]
    names = list(model.forward.__code__.co_varnames[1 : 1 + len(inputs)])
    return model, [dict(zip(names, half, strict=True)) for half in halves]


def keys(value: object, path: str = "") -> set[str]:
    """Return the dotted paths of all keys of a JSON document; entries of a list share one path."""
    if isinstance(value, dict):
        return {path, *(k for key, item in value.items() for k in keys(item, f"{path}.{key}"))}
    if isinstance(value, list):
        return {path, *(k for item in value for k in keys(item, f"{path}[]"))}
    return {path}


def digest(name: str, settings: Settings) -> dict[str, Any]:
    """Export one case and return the digest of its file and the keys of its report."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (what a user's own code may read)
    model, batches = network(name)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        export(model, batches, eval_data=batches, out=out, latency_runs=0, **settings)
        proto = onnx.load(out / "model.onnx")
        kept = [entry for entry in proto.metadata_props if entry.key.rpartition(".")[2] not in LEFT_OUT]
        del proto.metadata_props[:]
        proto.metadata_props.extend(kept)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {
        "sha256": hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest(),
        "verdict": report["verdict"],
        "keys": sorted(keys(report)),
    }


def main() -> int:
    """Print the digests, or compare them with an earlier print; exit 1 where something changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run (default: all)")
    parser.add_argument("--against", type=Path, help="an earlier output to compare with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = json.loads(arguments.against.read_text()) if arguments.against else {}
    found: dict[str, Any] = {}
    changed = 0
    for case in arguments.cases or CASES:
        found[case] = digest(*CASES[case])
        if not before:
            print(case, found[case]["verdict"], found[case]["sha256"][:16], file=sys.stderr, flush=True)
            continue
        same = found[case]["sha256"] == before[case]["sha256"] and found[case]["verdict"] == before[case]["verdict"]
        lost = sorted(set(before[case]["keys"]) - set(found[case]["keys"]))
        changed += not same or bool(lost)
        print(f"{case}: {'same bytes' if same else 'CHANGED'}{f'; lost keys {lost}' if lost else ''}", flush=True)
    if not before:
        print(json.dumps(found, indent=1))
    return int(changed > 0)


if __name__ == "__main__":
    sys.exit(main())
