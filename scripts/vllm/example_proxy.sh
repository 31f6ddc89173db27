#!/usr/bin/env bash
# Puts vLLM's own example proxy for encoders, prefill and decode into vLLM's environment, as share/vllm/disagg_epd_proxy.py:
# tests and benchmarks run it beside chiasm's. install.sh calls it. It can be run again.
#
#   scripts/vllm/example_proxy.sh FOLDER
#
# Only vLLM's source distribution has the file, and pip is who knows where that is. pip unpacks it, and then stops, since what
# building vLLM takes isn't installed; that is far enough.
set -euo pipefail

VERSION=0.32.0
NAME=disagg_epd_proxy.py
SHA256=59c842c5b127f9008c64cc770c450a2d4b9a9f63c7139603bb20a95b80845460

folder=${1:?the virtual environment that vLLM is in}
target=$folder/share/vllm/$NAME
fits() { [ -f "$1" ] && echo "$SHA256  $1" | sha256sum --check --status; }

if fits "$target"; then exit 0; fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
TMPDIR=$scratch "$folder/bin/python" -m pip --disable-pip-version-check download --no-clean --no-deps --no-binary vllm \
  --no-build-isolation --dest "$scratch/out" "vllm==$VERSION" > "$scratch/log" 2>&1 || true
file=$(find "$scratch" -path "*/examples/*/$NAME" | head -n 1)
if ! fits "$file"; then
  cat "$scratch/log" >&2
  echo "vLLM's example proxy could not be had from the source distribution of vllm==$VERSION: see above" >&2
  exit 1
fi
mkdir -p "${target%/*}"
cp "$file" "$target"
