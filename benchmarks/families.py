"""Export one network of each family, a row each: folds, coverage, parity, latency and the seconds of every stage.

    python benchmarks/families.py timm_families.txt --module timm_models.py --json families.json

The list names one network per line, after its family; `--module` is a file or package with a factory for each network
and, with `data_` before its name, its data. Every export is a process of its own, so that none can end the others; what
it prints is kept where it fails. The file of --json is complete after every row, and a second run goes on with it;
--again repeats the rows that did not pass.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accuracy_table import markdown
from runs import provenance

COLUMNS = (
    {"title": "family"},
    {"title": "network"},
    {"title": "result"},
    {"title": "folded"},
    {"title": "integer MACs", "format": "{:.4g} %"},
    {"title": "integer nodes", "format": "{:.4g} %"},
    {"title": "integer time", "format": "{:.3g} %"},
    {"title": "codes compared", "format": "{:,}"},
    {"title": "differ in kernels", "format": "{:,}"},
    {"title": "differ after float operators", "format": "{:,}"},
    {"title": "latency", "format": "{:.2f}x"},
    *({"title": f"{stage}, s", "format": "{:.0f}"} for stage in ("capture", "calibrate", "emit", "validate")),
)

RESULTS = {0: "pass", 1: "fail", 2: "refused", 3: "refused", 70: "internal error"}
"""Results by exit code."""

TIMED_OUT = 124


def families(path: Path) -> Iterator[tuple[str, str]]:
    """Yield family and network of each line of a list."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            family, network, *_ = line.split()
            yield family, network


def export(network: str, arguments: argparse.Namespace) -> tuple[int, dict[str, Any] | None, str]:
    """Export a network in a process of its own; return the exit code, the report if there is one, and the message."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "exporter", "export", f"{arguments.module}:{network}", "--quiet"]
        command += ["--data", f"{arguments.module}:data_{network}", "--out", str(out), *arguments.flags]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=arguments.limit, env=os.environ | {"COLUMNS": "1000"}
            )
        except subprocess.TimeoutExpired:
            return TIMED_OUT, None, f"took more than {arguments.limit} s"
        path = out / "report.json"
        report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return done.returncode, report, done.stderr.strip()


def row(family: str, network: str, arguments: argparse.Namespace) -> list[Any]:
    """Return the row of a network, and print why there are no figures in it."""
    code, report, message = export(network, arguments)
    result = RESULTS.get(code, "ended by a signal" if code < 0 else "out of time" if code == TIMED_OUT else str(code))
    if report is None:
        print(f"{network}: {result}: {message.splitlines()[-1] if message else ''}", file=sys.stderr, flush=True)
        return [family, network, result, *[None] * (len(COLUMNS) - 3)]
    if failed := [gate["expression"] for gate in report["gates"] if not gate["passed"]]:
        result = f"fail: {', '.join(failed)}"
    coverage, level, shares = report["coverage"], report["parity"]["optimized"], report.get("time_shares")
    return [
        family,
        network,
        result,
        report["fold"]["regions"],
        _percent(coverage["integer_macs"]),
        _percent(coverage["integer_nodes"] / max(1, coverage["compute_nodes"])),
        _percent(shares["integer"] if shares else None),
        level["values"],
        level["kernel_mismatched"],
        level["float_mismatched"],
        report["latency_ms"]["ratio"] if report["latency_ms"] else None,
        *(report["time_s"][stage] for stage in ("capture", "calibrate", "emit", "validate")),
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def save(path: Path, arguments: argparse.Namespace, rows: Sequence[Any]) -> None:
    """Write the table with its command and provenance."""
    content = {
        "title": "One network of each family",
        "command": shlex.join(["python", "benchmarks/families.py", *sys.argv[1:]]),
        "measured": provenance(),
        "methods": [],
        "notes": ["Weights are random, so that there is no accuracy to measure."] if arguments.random else [],
        "columns": COLUMNS,
        "rows": rows,
    }
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, help="text file: family and network per line")
    parser.add_argument("--module", required=True, help="file.py or package with factories and their data")
    parser.add_argument("--json", type=Path, required=True, help="file of the table")
    parser.add_argument("--again", action="store_true", help="repeat the rows that did not pass")
    parser.add_argument("--random", action="store_true", help="say that weights are random")
    parser.add_argument("--limit", type=int, default=1800, help="seconds for one network")
    parser.add_argument("--flags", type=shlex.split, default=[], help="further flags of `intact export`, in one text")
    arguments = parser.parse_args()
    before = json.loads(arguments.json.read_text(encoding="utf-8"))["rows"] if arguments.json.exists() else []
    known = {entry[1]: entry for entry in before if entry[2] == "pass" or not arguments.again}
    rows: list[Any] = []
    for family, network in families(arguments.list):
        rows.append(known.get(network) or row(family, network, arguments))
        save(arguments.json, arguments, [*rows, *(known[n] for n in known if n not in {r[1] for r in rows})])
    print(markdown(COLUMNS, rows))


if __name__ == "__main__":
    main()
