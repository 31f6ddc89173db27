#!/usr/bin/env bash
# On vLLM: starts an encoder, a prefill instance (P), a decode instance (D) and chiasm's proxy, and asks about an image.
#
# Embeddings go from the encoder to P through a folder, the prompt's KV from P to D through vLLM's NixlConnector. D
# reads an embedding only when it runs out of KV blocks and computes a prompt again. Settings are those of setup.sh, and
# ENCODER_DEVICES, PREFILL_DEVICES and DECODE_DEVICES: the GPUs of each (0, 1, 2).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

encoder_port=$((PROXY_PORT + 1))
prefill_port=$((PROXY_PORT + 2))
decode_port=$((PROXY_PORT + 3))

kv_transfer() { # kv_producer or kv_consumer
  printf '{"kv_connector": "NixlConnector", "kv_role": "%s"}' "$1"
}

# 1. Start the four processes. P and D each have a port of their own for NIXL's handshake.
start_vllm encoder "$encoder_port" "${ENCODER_DEVICES:-0}" --ec-transfer-config "$(ec_transfer ec_producer)"
VLLM_NIXL_SIDE_CHANNEL_PORT=$((PROXY_PORT + 4)) start_vllm prefill "$prefill_port" "${PREFILL_DEVICES:-1}" \
  --ec-transfer-config "$(ec_transfer ec_consumer)" --kv-transfer-config "$(kv_transfer kv_producer)" --skip-mm-profiling
VLLM_NIXL_SIDE_CHANNEL_PORT=$((PROXY_PORT + 5)) start_vllm decode "$decode_port" "${DECODE_DEVICES:-2}" \
  --ec-transfer-config "$(ec_transfer ec_consumer)" --kv-transfer-config "$(kv_transfer kv_consumer)" --skip-mm-profiling
start_proxy --encoder "http://127.0.0.1:$encoder_port" \
  --prefill "http://127.0.0.1:$prefill_port" --decode "http://127.0.0.1:$decode_port"
echo "Starting an encoder, a prefill instance, a decode instance and the proxy ..."

# 2. Ask, and print the answer.
wait_until_healthy 3
ask_about_an_image
