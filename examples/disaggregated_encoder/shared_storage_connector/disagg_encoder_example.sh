#!/usr/bin/env bash
# Starts an encoder, a prefill-and-decode instance (PD) and the proxy, and asks one question about an image.
#
# Embeddings go from the encoder to the PD through a folder that both share. Settings are environment variables
# (defaults in parentheses):
#
#   MODEL                 checkpoint: a folder, a hub name, or demo            (demo)
#   PROXY_PORT            port for clients                                     (8000)
#   ENCODER_PORT, PD_PORT ports of the two instances                           (8001, 8002)
#   SHARED_STORAGE_PATH   folder for embeddings                                (a temporary one in /dev/shm or /tmp)
#   LOG_PATH              folder for the logs of the three processes           (removed at the end)
#   TIMEOUT_SECONDS       maximum time until all instances are healthy         (300)
#   QUESTION              question about the image                             (What colour is the shape?)
#   PYTHON                interpreter that has chiasm installed                (.venv of this tree, else python3)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tree=$(cd "$here/../../.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x $tree/.venv/bin/python ]]; then PYTHON=$tree/.venv/bin/python; fi
fi
if ! "$PYTHON" -m chiasm --version >/dev/null 2>&1; then
  echo "$PYTHON has no chiasm installed. Run \`make install\` in $tree, or set PYTHON to an interpreter that has it." >&2
  exit 2
fi
MODEL=${MODEL:-demo}
PROXY_PORT=${PROXY_PORT:-8000}
ENCODER_PORT=${ENCODER_PORT:-8001}
PD_PORT=${PD_PORT:-8002}
TIMEOUT_SECONDS=${TIMEOUT_SECONDS:-300}
QUESTION=${QUESTION:-What colour is the shape?}

proxy_url=http://127.0.0.1:$PROXY_PORT
work=$(mktemp -d)
storage_is_ours=
if [[ -z ${SHARED_STORAGE_PATH:-} ]]; then
  memory=/dev/shm
  if [[ ! -w $memory ]]; then memory=${TMPDIR:-/tmp}; fi
  SHARED_STORAGE_PATH=$(mktemp -d "$memory/disagg-encoder-XXXXXX")
  storage_is_ours=yes
fi
LOG_PATH=${LOG_PATH:-$work}
mkdir -p "$LOG_PATH"
pids=()

clean_up() {
  trap - EXIT INT TERM
  if ((${#pids[@]})); then
    kill "${pids[@]}" 2>/dev/null || true
    wait "${pids[@]}" 2>/dev/null || true
  fi
  rm -rf "$work"
  if [[ -n $storage_is_ours ]]; then rm -rf "$SHARED_STORAGE_PATH"; fi
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start() { # NAME ARGUMENT...
  local name=$1
  shift
  "$PYTHON" -m chiasm "$@" >"$LOG_PATH/$name.log" 2>&1 &
  pids+=($!)
}

get() { # URL
  if command -v curl >/dev/null; then
    curl --silent --noproxy '*' --max-time 5 "$1"
  else
    "$PYTHON" -c 'import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())' "$1"
  fi
}

post() { # URL FILE
  if command -v curl >/dev/null; then
    curl --silent --show-error --noproxy '*' --header 'Content-Type: application/json' --data-binary "@$2" "$1"
  else
    "$PYTHON" - "$1" "$2" <<'PYTHON'
import sys, urllib.error, urllib.request

request = urllib.request.Request(sys.argv[1], open(sys.argv[2], "rb").read(), {"Content-Type": "application/json"})
try:
    print(urllib.request.urlopen(request).read().decode())
except urllib.error.HTTPError as error:
    print(error.read().decode())
PYTHON
  fi
}

all_are_healthy() {
  # Through files: bash 5.2 can miss the trap if Ctrl-C arrives while it reads $(...).
  get "$proxy_url/health" >"$work/health" 2>/dev/null || return 1
  grep -o '"state":"healthy"' "$work/health" >"$work/healthy" || return 1
  mapfile -t healthy <"$work/healthy"
  ((${#healthy[@]} == 2))
}

# 1. Start the three processes, in any order: the proxy probes its instances until they answer.
storage=(--connector SharedStorageConnector --shared-storage-path "$SHARED_STORAGE_PATH")
cores=$(getconf _NPROCESSORS_ONLN)
threads=(--threads "$((cores > 1 ? cores / 2 : 1))") # the two share the machine
start encoder instance "$MODEL" --role encoder --port "$ENCODER_PORT" "${threads[@]}" "${storage[@]}"
start pd instance "$MODEL" --role pd --port "$PD_PORT" "${threads[@]}" "${storage[@]}"
start proxy proxy --port "$PROXY_PORT" \
  --encoder "http://127.0.0.1:$ENCODER_PORT" --pd "http://127.0.0.1:$PD_PORT"
echo "Starting an encoder, a PD instance and the proxy ..."

# 2. Wait until the proxy finds both instances healthy.
until all_are_healthy; do
  for pid in "${pids[@]}"; do
    if ! kill -0 "$pid" 2>/dev/null; then
      echo "A process has ended. The last lines of the logs:" >&2
      tail -n 20 "$LOG_PATH"/*.log >&2
      exit 1
    fi
  done
  if ((SECONDS > TIMEOUT_SECONDS)); then
    echo "Not ready after $TIMEOUT_SECONDS seconds. The last lines of the logs:" >&2
    tail -n 20 "$LOG_PATH"/*.log >&2
    exit 1
  fi
  sleep 0.5
done
echo "Ready: $proxy_url"

# 3. Draw an image and put it into an ordinary chat completion, as a data: URL.
"$PYTHON" - "$QUESTION" >"$work/request.json" <<'PYTHON'
import base64, io, json, sys
from PIL import Image, ImageDraw

image = Image.new("RGB", (224, 224), (248, 248, 246))
ImageDraw.Draw(image).ellipse((62, 62, 162, 162), fill=(215, 38, 40))
file = io.BytesIO()
image.save(file, "PNG")
url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sys.argv[1]}]
print(json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 32, "temperature": 0}))
PYTHON

# 4. Ask, and print the answer.
echo "Image:    a red circle"
echo "Question: $QUESTION"
post "$proxy_url/v1/chat/completions" "$work/request.json" >"$work/answer.json"
"$PYTHON" - "$work/answer.json" <<'PYTHON'
import json, sys

answer = json.load(open(sys.argv[1]))
if "choices" not in answer:
    sys.exit(f"Error: {answer.get('error', {}).get('message', answer)}")
print("Answer:  ", answer["choices"][0]["message"]["content"])
PYTHON
