#!/usr/bin/env bash
# Export the digits network to the folder $1 and prove the bundle again from its files. Further arguments go to export.
# Exit codes: 0 all gates passed; 1 a gate failed (the bundle says which); 2 bad input; 3 not exportable.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
out=$1
shift

intact export exporter.demo.model:network --data exporter.demo.model:calibration --eval exporter.demo.model:evaluation \
    --config "$here/intact.toml" --out "$out" --overwrite --quiet "$@"
intact verify "$out" --quiet
