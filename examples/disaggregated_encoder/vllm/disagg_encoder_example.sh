#!/usr/bin/env bash
# On vLLM: starts an encoder, a prefill-and-decode instance (PD) and chiasm's proxy, and asks one question about an image.
#
# Settings are those of setup.sh, and ENCODER_DEVICES and PD_DEVICES: the GPUs of each, which can be the same (0, 1).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

encoder_port=$((PROXY_PORT + 1))
pd_port=$((PROXY_PORT + 2))

# 1. Start the three processes, in any order: the proxy probes its instances until they answer. A vLLM that only produces
#    embeddings loads no language model. A PD never encodes, so it skips the profiling of its encoder.
start_vllm encoder "$encoder_port" "${ENCODER_DEVICES:-0}" --ec-transfer-config "$(ec_transfer ec_producer)"
start_vllm pd "$pd_port" "${PD_DEVICES:-1}" --ec-transfer-config "$(ec_transfer ec_consumer)" --skip-mm-profiling
start_proxy --encoder "http://127.0.0.1:$encoder_port" --pd "http://127.0.0.1:$pd_port"
echo "Starting an encoder, a PD and the proxy ..."

# 2. Ask, and print the answer.
wait_until_healthy 2
ask_about_an_image
