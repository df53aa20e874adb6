#!/bin/sh
# Export what a configuration describes, and prove the bundle again from its files:
#
#   ci/export.sh CONFIG.toml OUT [further arguments of intact export]
#
# OUT.md holds the verdict as Markdown; OUT/junit.xml has a test case for every gate. `intact` has to be on the PATH.
# Exit codes: 0 all gates passed; 1 a gate failed (the bundle says which); 2 bad input; 3 not exportable.
set -eu
config=${1:?usage: ci/export.sh CONFIG.toml OUT [arguments of intact export]}
out=${2:?usage: ci/export.sh CONFIG.toml OUT [arguments of intact export]}
shift 2

mkdir -p "$(dirname "$out")"
intact export --config "$config" --out "$out" --overwrite --quiet --summary "$out.md" "$@"
GITHUB_STEP_SUMMARY='' intact verify "$out" --quiet
