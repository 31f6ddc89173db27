# The common part of these examples, which source it. Settings are environment variables (defaults in parentheses):
#
#   MODEL                checkpoint: a folder, a hub name, or demo                       (demo)
#   PYTHON               interpreter that has chiasm and vLLM installed                  (.venv-vllm of this tree)
#   PROXY_PORT           port for clients; the instances take the ports after it         (8000)
#   SHARED_STORAGE_PATH  folder for embeddings                                           (a temporary one in /dev/shm or /tmp)
#   LOG_PATH             folder for the logs of the processes                            (removed at the end)
#   TIMEOUT_SECONDS      maximum time until all instances are healthy                    (600)
#   QUESTION             question about the image                                        (What colour is the shape?)
#   VLLM_ARGS            more arguments for every `vllm serve`, separated by blanks      (none)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tree=$(cd "$here/../../.." && pwd)
PYTHON=${PYTHON:-$tree/.venv-vllm/bin/python}
MODEL=${MODEL:-demo}
PROXY_PORT=${PROXY_PORT:-8000}
TIMEOUT_SECONDS=${TIMEOUT_SECONDS:-600}
QUESTION=${QUESTION:-What colour is the shape?}
if [[ ! -x $PYTHON ]]; then
  echo "There is no $PYTHON. Run \`make vllm\`, or set PYTHON to an interpreter that has chiasm and vLLM installed." >&2
  exit 2
fi

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

# `demo` is a folder that comes with chiasm; vLLM needs its path.
model=$("$PYTHON" -c 'import sys; from chiasm.models import resolve_folder; print(resolve_folder(sys.argv[1]))' "$MODEL")

on_cpu=
if "$PYTHON" -c 'import importlib.metadata as m, sys; sys.exit("cpu" not in m.version("vllm"))'; then
  on_cpu=yes
  # vLLM would bind the threads of all instances to the same cores.
  export VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

# Arguments of every vLLM instance. With the middleware the proxy treats it like one of chiasm's own instances.
read -r -a more <<<"${VLLM_ARGS:-}"
common=(--served-model-name "$MODEL" --middleware chiasm.integrations.vllm.middleware.ChiasmMiddleware)
if [[ -n $on_cpu ]]; then common+=(--enforce-eager --dtype float32 --max-model-len 1024 --kv-cache-memory-bytes 256M); fi

ec_transfer() { # ec_producer or ec_consumer; embeddings go through a folder, as between chiasm's own instances
  printf '{"ec_connector": "ChiasmECConnector", "ec_connector_module_path": "chiasm.integrations.vllm.ec_connector", '
  printf '"ec_role": "%s", "ec_connector_extra_config": {"shared_storage_path": "%s"}}' "$1" "$SHARED_STORAGE_PATH"
}

start_vllm() { # NAME PORT DEVICES ARGUMENT...
  local name=$1 port=$2 devices=$3
  shift 3
  local device=()
  if [[ -z $on_cpu ]]; then device=(CUDA_VISIBLE_DEVICES="$devices"); fi
  env "${device[@]}" "$(dirname "$PYTHON")/vllm" serve "$model" --host 127.0.0.1 --port "$port" \
    "${common[@]}" "$@" "${more[@]}" >"$LOG_PATH/$name.log" 2>&1 &
  pids+=($!)
}

start_proxy() { # ARGUMENT...
  "$PYTHON" -m chiasm proxy --port "$PROXY_PORT" "$@" >"$LOG_PATH/proxy.log" 2>&1 &
  pids+=($!)
}

fail() { # MESSAGE
  echo "$1" >&2
  tail -n 20 "$LOG_PATH"/*.log >&2
  exit 1
}

wait_until_healthy() { # COUNT of instances
  local healthy=0
  until ((healthy == $1)); do
    for pid in "${pids[@]}"; do
      kill -0 "$pid" 2>/dev/null || fail "A process has ended. The last lines of the logs:"
    done
    if ((SECONDS > TIMEOUT_SECONDS)); then fail "Not ready after $TIMEOUT_SECONDS seconds. The last lines of the logs:"; fi
    sleep 0.5
    # Through a file: bash 5.2 can miss the trap if Ctrl-C arrives while it reads $(...).
    "$PYTHON" - "$proxy_url/health" >"$work/healthy" <<'EOF'
import json, sys, urllib.error, urllib.request

try:
    answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1], timeout=5)
except urllib.error.HTTPError as error:
    answer = error
except OSError:
    sys.exit(print(0))
print(sum(one["state"] == "healthy" for one in json.load(answer)["instances"]))
EOF
    read -r healthy <"$work/healthy"
  done
  echo "Ready: $proxy_url"
}

ask_about_an_image() { # draws an image and asks about it as any OpenAI client does
  echo "Image:    a red circle"
  echo "Question: $QUESTION"
  "$PYTHON" - "$proxy_url/v1/chat/completions" "$QUESTION" <<'EOF'
import base64, io, json, sys, urllib.error, urllib.request
from PIL import Image, ImageDraw

image = Image.new("RGB", (224, 224), (248, 248, 246))
ImageDraw.Draw(image).ellipse((62, 62, 162, 162), fill=(215, 38, 40))
file = io.BytesIO()
image.save(file, "PNG")
url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": sys.argv[2]}]
body = {"messages": [{"role": "user", "content": content}], "max_tokens": 32, "temperature": 0}
request = urllib.request.Request(sys.argv[1], json.dumps(body).encode(), {"Content-Type": "application/json"})
try:
    answer = json.load(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request))
except urllib.error.HTTPError as error:
    sys.exit(f"Error: {error.read().decode()}")
print("Answer:  ", answer["choices"][0]["message"]["content"])
EOF
}
