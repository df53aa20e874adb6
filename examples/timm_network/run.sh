#!/usr/bin/env bash
# Export the network to the folder $1 (default: out/timm_network of the working folder).
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
out=${1:-out/timm_network}

intact export "$here/network.py:network" --data "$here/network.py:calibration" --out "$out" --overwrite \
    --set parity_samples=16 --gate 'integer_macs>=0.9'
