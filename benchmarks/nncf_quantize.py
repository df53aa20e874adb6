"""Quantize an ONNX file with NNCF; run by the interpreter of the environment that NNCF is installed in.

python nncf_quantize.py FLOAT.onnx SAMPLES.npz OUT.onnx
"""

import json
import sys
from pathlib import Path

import nncf
import numpy as np
import onnx

sys.path.append(str(Path(__file__).parent))  # which an isolated interpreter leaves out

from metered import metered


def main() -> None:
    """Write the file; print seconds, memory and version as JSON."""
    source, samples, path = sys.argv[1:]
    with np.load(samples) as stored:
        arrays = {name: stored[name] for name in stored.files}
    count = len(next(iter(arrays.values())))
    feeds = [{name: values[i : i + 1] for name, values in arrays.items()} for i in range(count)]
    with metered() as spent:
        model = nncf.quantize(onnx.load(source), nncf.Dataset(feeds), subset_size=count)
        onnx.save(model, path)
    print(json.dumps(vars(spent) | {"tool": f"nncf {nncf.__version__}"}))


if __name__ == "__main__":
    main()
