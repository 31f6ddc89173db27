#!/usr/bin/env bash
# Prints the option with which pip finds PyTorch's build for CPUs, on Linux without an NVIDIA GPU; otherwise it prints nothing.
#
#   pip install --no-deps $(scripts/cpu_index.sh) torch
#
# The default build for Linux brings 5.8 GB of packages for CUDA. --no-deps keeps pip from looking for all other packages at this
# index, too; they come with chiasm's extra. Where the index can't be reached, pip asks only its configured one, which may have a
# build for CPUs as well.
set -euo pipefail

URL=https://download.pytorch.org/whl/cpu

[ "$(uname -s)" = Linux ] || exit 0
if nvidia-smi -L >/dev/null 2>&1; then exit 0; fi
probe='import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)'
if "${PYTHON:-python3}" -c "$probe" "$URL/torch/" 2>/dev/null; then
  printf '%s\n' "--extra-index-url $URL"
else
  echo "$URL can't be reached; PyTorch comes from pip's configured index, perhaps with CUDA." >&2
fi
