"""Whole exports, a row per network and bits: accuracy, parity, coverage, size, latency, time, and proofs elsewhere.

    python benchmarks/zoo.py zoo.py:repvgg zoo.py:vit --data zoo.py:calibration --eval zoo.py:evaluation \
        --bits 8/8 4/4 --on avx2 arm64 web ort==1.19.2 --json networks.json

Codes are compared on the samples that `intact export` compares: 256, and 16 in emulated processors. With --on there is
a column for each runtime, in place of size and time: it counts the codes that differ end to end, and those of integer
kernels that are fed with the reference's codes. The file of --json is complete after every row, and can be put into
docs/results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accuracy_table import markdown
from runs import provenance

from calibrators.targets import DEFAULT_TARGET
from exporter import export
from exporter.frontend.load import load_model
from exporter.inputs.open import open_data

COLUMNS = (
    {"title": "network"},
    {"title": "bits"},
    {"title": "float", "format": "{:.2f} %"},
    {"title": "in the runtime", "format": "{:.2f} %"},
    {"title": "codes compared", "format": "{:,}"},
    {"title": "differ in kernels", "format": "{:,}"},
    {"title": "differ after float operators"},
    {"title": "outputs"},
    {"title": "integer MACs", "format": "{:.4g} %"},
)

COSTS = (
    {"title": "size", "format": "{:.2f}x"},
    {"title": "latency", "format": "{:.2f}x"},
    {"title": "time", "format": "{:.0f} s"},
    {"title": "of it calibration", "format": "{:.0f} s"},
)


def row(model: str, bits: str, arguments: argparse.Namespace) -> list[Any]:
    """Export one network and return its row."""
    weight, activation = map(int, bits.split("/"))
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        report = export(
            load_model(model),
            open_data(arguments.data),
            eval_data=open_data(arguments.eval),
            out=Path(folder) / "out",
            method=arguments.method,
            target=arguments.target,
            weight_bits=weight,
            activation_bits=activation,
            prove_on=tuple(arguments.on),
        )
        seconds = time.perf_counter() - start
    accuracy, level = report["accuracy"], report["parity"]["optimized"]
    latency, size = report["latency_ms"], report["size"]
    top1 = [None, None] if accuracy is None else [100 * accuracy["float"], 100 * accuracy["runtime"]]
    assert latency is not None
    cells = [
        model.split(":")[-1],
        bits,
        *top1,
        level["values"],
        level["kernel_mismatched"],
        f"{level['float_mismatched']:,} of {level['float_values']:,}" if level["float_values"] else None,
        "identical" if level["outputs_identical"] else "differ",
        None if report["coverage"]["integer_macs"] is None else 100 * report["coverage"]["integer_macs"],
    ]
    costs = [
        size["bytes"] / size["float_bytes"],
        latency["ratio"],
        seconds,
        report["time_s"]["calibrate"],
    ]
    by_name = {found["runtime"]: proof(found) for found in report["proved_on"] or ()}
    return [*cells, *([by_name[name] for name in arguments.on] or costs)]


def proof(found: dict[str, Any]) -> str:
    """Return what one runtime computed, in a few words."""
    if found.get("refused"):
        return f"refused: {found['refused']}"
    differing = f"{found['mismatched']:,} of {found['values']:,}"
    if found["mismatched"]:
        differing += f" ({found['kernel_mismatched']:,} in kernels)"
    if found["outputs_identical"]:
        return f"{differing}; same outputs"
    return f"{differing}; outputs differ by {found['largest_difference']:.2g}"


def save(path: Path, arguments: argparse.Namespace, columns: Sequence[dict[str, str]], rows: Sequence[Any]) -> None:
    """Write the table with its command and provenance."""
    content = {
        "title": f"Whole exports with `{arguments.method}`",
        "command": shlex.join(["python", "benchmarks/zoo.py", *sys.argv[1:]]),
        "measured": provenance(),
        "methods": [arguments.method],
        "notes": [],
        "columns": columns,
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="file.py:factory")
    parser.add_argument("--data", required=True, help="file.py:callable of calibration batches")
    parser.add_argument("--eval", required=True, help="file.py:callable of batches, with labels for top-1")
    parser.add_argument("--bits", nargs="+", default=["8/8"], help="weights/activations")
    parser.add_argument("--method", default="gptq", help="method of all exports")
    parser.add_argument("--target", default=DEFAULT_TARGET, help="target of all exports")
    parser.add_argument("--on", nargs="+", default=[], help="runtimes that prove the file, of `intact runtimes`")
    parser.add_argument("--json", type=Path, help="file of the table")
    arguments = parser.parse_args()
    columns, rows = [*COLUMNS, *([{"title": name} for name in arguments.on] or COSTS)], []
    for model, bits in itertools.product(arguments.models, arguments.bits):
        rows.append(row(model, bits, arguments))
        print(markdown(columns, rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        if arguments.json:
            save(arguments.json, arguments, columns, rows)
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
