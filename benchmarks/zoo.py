"""Print one line per network for the README: accuracy, parity, coverage, size, latency and time of a whole export.

python benchmarks/zoo.py zoo.py:repvgg zoo.py:vit --data zoo.py:calibration --eval zoo.py:evaluation [--method mse]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from exporter import export
from exporter.frontend.load import load_model
from exporter.inputs.open import open_data

COLUMNS = (
    "network", "float", "runtime", "codes compared", "differ in kernels", "differ in float operators", "outputs",
    "integer MACs", "size", "latency", "time (calibration)",
)  # fmt: skip


def line(model: str, data: str, evaluation: str, method: str) -> str:
    """Export one network and return its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        report = export(
            load_model(model), open_data(data), eval_data=open_data(evaluation), out=Path(folder) / "out", method=method
        )
        seconds = time.perf_counter() - start
    accuracy, level = report["accuracy"], report["parity"]["optimized"]
    latency, size = report["latency_ms"], report["size"]
    assert accuracy is not None and latency is not None
    cells = [
        model.split(":")[-1],
        f"{accuracy['float']:.2%}",
        f"{accuracy['runtime']:.2%}",
        f"{level['values']:,}",
        f"{level['kernel_mismatched']:,}",
        f"{level['float_mismatched']:,} of {level['float_values']:,}",
        "identical" if level["outputs_identical"] else "differ",
        f"{report['coverage']['integer_macs']:.1%}",
        f"{size['bytes'] / size['float_bytes']:.2f}x",
        f"{latency['ratio']:.2f}x",
        f"{seconds:.0f} s ({report['time_s']['calibrate']:.0f} s)",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--method", default="mse")
    arguments = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for model in arguments.models:
        print(line(model, arguments.data, arguments.eval, arguments.method), flush=True)


if __name__ == "__main__":
    main()
