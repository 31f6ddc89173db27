#!/usr/bin/env bash
# Copies vLLM's own example proxy for encoder, prefill and decode to share/vllm/disagg_epd_proxy.py in vLLM's environment, where
# tests and benchmarks compare it with chiasm's. install.sh calls it. It can be run again.
#
#   scripts/vllm/example_proxy.sh FOLDER
#
# Only vLLM's source distribution contains the file. pip finds and unpacks it, then fails because vLLM's build dependencies are not
# installed; by then the file is there.
set -euo pipefail

VERSION=0.32.0
NAME=disagg_epd_proxy.py
SHA256=59c842c5b127f9008c64cc770c450a2d4b9a9f63c7139603bb20a95b80845460

folder=${1:?Give the folder of the virtual environment that contains vLLM.}
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
  echo "Could not get vLLM's example proxy from the source distribution of vllm==$VERSION; see pip's output above." >&2
  exit 1
fi
mkdir -p "${target%/*}"
cp "$file" "$target"
