"""Measure what glibc's allocator costs an export: with its own thresholds, and with those of calibrators.allocator.

    python benchmarks/allocator.py imagenet.py:lite1 --data imagenet.py:calibration [intact export options ...]

Each export is a process of its own; the files that it writes must be the same.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WAYS = {
    "glibc's own": {"GLIBC_TUNABLES": "glibc.malloc.check=0"},  # a setting of the user's, which changes nothing
    "raised": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    arguments, options = parser.parse_known_args()
    digests = set()
    print(f"{'thresholds':12} {'user':>8} {'system':>8} {'page faults':>12} {'peak':>10}")
    for name, variables in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "exporter", "export", arguments.model, "--data", arguments.data]
            environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
            process = subprocess.Popen([*command, "--out", f"{folder}/out", "--quiet", *options], env=environment)
            _, status, used = os.wait4(process.pid, 0)
            if os.waitstatus_to_exitcode(status):
                raise SystemExit("the export failed")
            digests.add(hashlib.sha256(Path(folder, "out/model.onnx").read_bytes()).hexdigest())
        faults, peak = used.ru_minflt + used.ru_majflt, used.ru_maxrss / 1024
        print(f"{name:12} {used.ru_utime:6.1f} s {used.ru_stime:6.1f} s {faults:12,} {peak:6.0f} MiB", flush=True)
    print("same bytes" if len(digests) == 1 else "OTHER BYTES")


if __name__ == "__main__":
    main()
