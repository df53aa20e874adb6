"""Measure which releases of onnxruntime load which forms: the tables of runtime_tests/ort/versions.py.

    python benchmarks/ort_versions.py 1.19.2 1.23.2 1.32.0

Each release is downloaded into a folder (pip download --no-deps) and loads one file per form in a process of its own.
Releases before 1.19 need numpy 1: name a folder that has it in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import onnx

from runtime_tests.ort.versions import FORMS, IR_VERSIONS, OPSETS
from tests.support.onnx_forms import form_file, plain_file

LOAD = """
import json, pathlib, sys
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
found = {}
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.onnx")):
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found[path.stem] = True
    except Exception:
        found[path.stem] = False
print(json.dumps(found))
"""


def write_files(folder: Path) -> None:
    """Write one file for each row of the tables."""
    for opset in OPSETS:
        onnx.save(plain_file(opset=opset or 13, ir_version=8), folder / f"opset {opset or 13}.onnx")
    for ir_version in IR_VERSIONS:
        onnx.save(plain_file(opset=13, ir_version=ir_version or 8), folder / f"IR {ir_version or 8}.onnx")
    for index, form in enumerate(FORMS):
        onnx.save(form_file(form), folder / f"form {index} {form.op} {form.release}.onnx")


def loaded(release: str, files: Path, downloads: Path) -> dict[str, bool]:
    """Return for each file whether a release loads it."""
    place = downloads / release
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(place), f"onnxruntime=={release}"]
    subprocess.run(pip, check=True)
    (wheel,) = place.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place)
    path = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(files)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        check=True,
    )
    found: dict[str, bool] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("releases", nargs="+")
    with tempfile.TemporaryDirectory() as folder:
        files, downloads = Path(folder, "files"), Path(folder, "downloads")
        files.mkdir()
        write_files(files)
        columns = {release: loaded(release, files, downloads) for release in parser.parse_args().releases}
    print(f"{'':40}", *(f"{release:>8}" for release in columns))
    for name in next(iter(columns.values())):
        print(f"{name:40}", *(f"{'loads' if found[name] else '-':>8}" for found in columns.values()))


if __name__ == "__main__":
    main()
