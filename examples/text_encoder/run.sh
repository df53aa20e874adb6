#!/usr/bin/env bash
# Train the encoder, then export it to the folder $1 (default: out/text_encoder of the working folder).
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
out=${1:-out/text_encoder}

python "$here/train.py" "$out.work"
intact export "$here/encoder.py:build" --checkpoint "$out.work/encoder.safetensors" \
    --data "$out.work/calib.npz" --eval "$out.work/test.npz" --out "$out" --overwrite \
    --weight-bits 6 --layer 'layers.*.mlp: weight_bits=4' --gate 'accuracy_drop<=0.02'
