#!/bin/sh
# Install intact into a virtual environment: ci/install.sh VENV [SOURCE]
#
# Every requirement has the version and the SHA-256 that ci/requirements.txt pins (Python 3.11 on x86-64 Linux). SOURCE is
# what pip installs as intact without its requirements: a wheel, a folder, by default the folder above this one.
#
# PYTHON       interpreter that makes the environment  [python3]
# TORCH_INDEX  index of CPU builds of torch; empty: none besides pip's own sources  [https://download.pytorch.org/whl/cpu]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:?usage: ci/install.sh VENV [SOURCE]}
source=${2:-$here/..}
index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}

"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check --require-hashes ${index:+--extra-index-url "$index"} \
    --requirement "$here/requirements.txt"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "$source"
"$venv/bin/intact" --version
