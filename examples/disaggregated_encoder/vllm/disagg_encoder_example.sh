#!/usr/bin/env bash
# On vLLM: one encoder, one prefill-and-decode instance (PD) and chiasm's proxy, and one question about an image.
#
# Settings are in setup.sh; and ENCODER_DEVICES, PD_DEVICES: GPUs of each, which can be the same (0, 1).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

encoder_port=$((PROXY_PORT + 1))
pd_port=$((PROXY_PORT + 2))

# 1. The three processes, in any order: the proxy looks after its instances until they answer. As producer alone, vLLM loads no
#    language model; a PD never encodes, and has nothing to measure there.
start_vllm encoder "$encoder_port" "${ENCODER_DEVICES:-0}" --ec-transfer-config "$(ec_transfer ec_producer)"
start_vllm pd "$pd_port" "${PD_DEVICES:-1}" --ec-transfer-config "$(ec_transfer ec_consumer)" --skip-mm-profiling
start_proxy --encoder "http://127.0.0.1:$encoder_port" --pd "http://127.0.0.1:$pd_port"
echo "Starting an encoder, a PD and the proxy ..."

# 2. The question and the answer.
wait_until_healthy 2
ask_about_a_image
