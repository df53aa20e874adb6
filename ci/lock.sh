#!/bin/sh
# Write ci/requirements.txt: what pip would install for intact now, pinned by version and SHA-256.
#
# PYTHON  interpreter whose pip resolves the requirements  [python3]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
report=$(mktemp)
trap 'rm -f "$report"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --dry-run --ignore-installed --report "$report" "${TORCH:-torch}" "$here/.."
"${PYTHON:-python3}" - "$report" >"$here/requirements.txt" <<'PYTHON'
import json
import platform
import sys

with open(sys.argv[1], encoding="utf-8") as stream:
    found = json.load(stream)["install"]
print("# Written by ci/lock.sh for Python", platform.python_version(), "on", platform.machine(), platform.system())
for each in sorted(found, key=lambda each: each["metadata"]["name"].lower()):
    metadata, archive = each["metadata"], each["download_info"].get("archive_info")
    if archive:  # intact itself is a folder
        print(f"{metadata['name']}=={metadata['version']} --hash=sha256:{archive['hashes']['sha256']}")
PYTHON
