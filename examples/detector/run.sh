#!/usr/bin/env bash
# Export the detector to the folder $1 (default: out/detector of the working folder), then run it in onnxruntime.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
out=${1:-out/detector}

intact export "$here/detector.py:build" --data "$here/detector.py:calibration" --out "$out" --overwrite \
    --gate 'integer_macs>=0.99' --gate 'mismatched==0'
python "$here/decode.py" "$out/model.onnx"
