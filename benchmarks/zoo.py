"""Whole exports, a row per network and bits: folds, accuracy, parity, coverage, cost, seconds of each step.

    python benchmarks/zoo.py zoo.py:repvgg zoo.py:vit --data zoo.py:calibration --bits 8/8 4/4 --json networks.json \
        --flags "--eval zoo.py:evaluation --prove-on avx2 --prove-on web"
    python benchmarks/zoo.py @families.txt --method mse --json families.json

A network is a factory that `intact export` takes, after the name of its family if it has one
("convnext nets.py:convnext_atto"); `@FILE` names a file of them, one a line. Without --data, the data of `nets.py:NAME`
are `nets.py:data_NAME`. Every export is a process of its own, so that none can end the others. The file of --json is
complete after every row and can be put into docs/results; a second run goes on with it, and keeps its title and notes.
A runtime of --prove-on has a column: the codes that differ end to end, and those of integer kernels that are fed with
the reference's codes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accuracy_table import markdown
from runs import provenance, write_table

Row = dict[str, Any]
"""Values by title of the column; no entry where there is none."""

COLUMNS = {
    "family": "{}",
    "network": "{}",
    "target": "{}",
    "inputs": "{}",
    "bits": "{}",
    "result": "{}",
    "folded": "{:,}",
    "float": "{:.2f} %",
    "in the runtime": "{:.2f} %",
    "codes compared": "{:,}",
    "differ in kernels": "{:,}",
    "differ after float operators": "{}",
    "outputs": "{}",
    "integer MACs": "{:.4g} %",
    "integer nodes": "{:.3g} %",
    "integer time": "{:.3g} %",
    "size": "{:.2f}x",
    "latency": "{:.2f}x",
} | {f"{step}, s": "{:.0f}" for step in ("capture", "fold", "calibrate", "emit", "validate")}
"""Formats by title; a proof in another runtime has a column of text after these."""

RESULTS = {0: "pass", 1: "fail", 2: "refused", 3: "refused", 70: "internal error"}
"""Results by exit code."""

TIMED_OUT = 124


def export(network: str, data: str, bits: str, out: Path, arguments: argparse.Namespace) -> tuple[int, str]:
    """Export a network to `out` in a process of its own; return the exit code and the message."""
    weight, activation = bits.split("/")
    command = [sys.executable, "-m", "exporter", "export", network, "--data", data, "--out", str(out), "--quiet"]
    command += ["--weight-bits", weight, "--activation-bits", activation, "--method", arguments.method]
    command += [text for target in arguments.targets for text in ("--target", target)]
    try:
        done = subprocess.run(
            [*command, *arguments.flags],
            capture_output=True,
            text=True,
            timeout=arguments.limit,
            env=os.environ | {"COLUMNS": "1000"},
        )
    except subprocess.TimeoutExpired:
        return TIMED_OUT, f"took more than {arguments.limit} s"
    return done.returncode, done.stderr.strip()


def rows_of(known: Row, model: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """Export a network and yield its row, one for each target; print why there are no figures in it."""
    file, _, network = model.rpartition(":")
    data = arguments.data or f"{file}:data_{network}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        code, message = export(model, data, known["bits"], out, arguments)
        result = RESULTS.get(
            code, "ended by a signal" if code < 0 else "out of time" if code == TIMED_OUT else str(code)
        )
        costs = {cost["target"]: cost for cost in (read(out / "targets.json") or [])}
        for target in arguments.targets or [""]:
            path = out / target if target in costs else out
            start = known | ({"target": target} if target else {})
            report, refused = read(path / "report.json"), costs.get(target, {}).get("refused")
            if report is not None:
                failed = [gate["expression"] for gate in report["gates"] if not gate["passed"]]
                verdict = f"fail: {', '.join(failed)}" if failed else "pass"
                yield start | {"result": verdict} | {title: x for title, x in figures(report) if x is not None}
                continue
            print(f"{network} {target}: {result}: {refused or message}", file=sys.stderr, flush=True)
            yield start | {"result": f"refused: {refused}" if refused else result}


def read(path: Path) -> Any:
    """Return what a file of JSON holds, None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def figures(report: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return titles and values of a report, None where something was not measured."""
    coverage, level, size = report["coverage"], report["parity"]["optimized"], report["size"]
    accuracy, shares, latency = (report.get(name) or {} for name in ("accuracy", "time_shares", "latency_ms"))
    floats = f"{level['float_mismatched']:,} of {level['float_values']:,}" if level["float_values"] else None
    inputs = ("x".join(map(str, each["shape"][1:])) for each in report["model"]["inputs"])
    return [
        ("inputs", ", ".join(inputs)),
        ("folded", report["fold"]["regions"]),
        ("float", _percent(accuracy.get("float"))),
        ("in the runtime", _percent(accuracy.get("runtime"))),
        ("codes compared", level["values"]),
        ("differ in kernels", level["kernel_mismatched"]),
        ("differ after float operators", floats),
        ("outputs", "identical" if level["outputs_identical"] else "differ"),
        ("integer MACs", _percent(coverage["integer_macs"])),
        ("integer nodes", _percent(coverage["integer_nodes"] / max(1, coverage["compute_nodes"]))),
        ("integer time", _percent(shares.get("integer"))),
        ("size", size["bytes"] / size["float_bytes"]),
        ("latency", latency.get("ratio")),
        *((f"{step}, s", seconds) for step, seconds in report["time_s"].items()),
        *((found["runtime"], proof(found)) for found in report.get("proved_on") or () if found["runtime"] != "ort"),
    ]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


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


def finished(content: dict[str, Any]) -> list[Row]:
    """Return the rows of a file, without their empty cells."""
    titles = [column["title"] for column in content.get("columns", ())]
    rows = (dict(zip(titles, cells, strict=True)) for cells in content.get("rows", ()))
    return [{title: value for title, value in each.items() if value is not None} for each in rows]


def tabled(rows: list[Row]) -> dict[str, Any]:
    """Return columns and rows of the table, without the columns that are empty in all rows."""
    used = dict.fromkeys(title for each in rows for title in each)
    titles = [*(title for title in COLUMNS if title in used), *(title for title in used if title not in COLUMNS)]
    columns = [{"title": title, "format": COLUMNS.get(title, "{}")} for title in titles]
    return {"columns": columns, "rows": [[each.get(title) for title in titles] for each in rows]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    parser.add_argument("models", nargs="+", help="file.py:factory, after its family if it has one; @FILE: one a line")
    parser.add_argument("--data", help="file.py:callable of the calibration batches of all networks")
    parser.add_argument("--bits", nargs="+", default=["8/8"], help="weights/activations")
    parser.add_argument("--method", default="gptq", help="method of all exports")
    parser.add_argument("--targets", nargs="+", default=[], help="targets of all exports, each with a row")
    parser.add_argument("--flags", type=shlex.split, default=[], help="further flags of `intact export`, in one text")
    parser.add_argument("--limit", type=int, default=1800, help="seconds for one export")
    parser.add_argument("--again", action="store_true", help="repeat the rows that did not pass")
    parser.add_argument("--json", type=Path, required=True, help="file of the table")
    arguments = parser.parse_args()
    content = read(arguments.json) or {}
    wanted = {}
    for model, bits in itertools.product(arguments.models, arguments.bits):
        family, _, name = model.rpartition(" ")
        wanted[name.rpartition(":")[2], bits] = (family, name)
    rows: dict[tuple[str, str], list[Row]] = {}
    for each in finished(content):
        rows.setdefault((each["network"], each["bits"]), []).append(each)
    if arguments.again:
        rows = {key: found for key, found in rows.items() if all(each["result"] == "pass" for each in found)}
    for (network, bits), (family, name) in wanted.items():
        if (network, bits) in rows:
            continue
        start = ({"family": family} if family else {}) | {"network": network, "bits": bits}
        rows[network, bits] = [*rows_of(start, name, arguments)]
        content = {
            "title": content.get("title", f"Whole exports with `{arguments.method}`"),
            "command": shlex.join(["python", "benchmarks/zoo.py", *sys.argv[1:]]),
            "measured": provenance(),
            "methods": [arguments.method],
            "notes": content.get("notes", []),
            **tabled([each for key in dict.fromkeys([*wanted, *rows]) for each in rows.get(key, ())]),
        }
        write_table(arguments.json, content)
    print(markdown(content["columns"], content["rows"]))


if __name__ == "__main__":
    main()
