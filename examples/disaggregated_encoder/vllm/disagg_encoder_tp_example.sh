#!/usr/bin/env bash
# On vLLM: starts two encoders, a prefill-and-decode instance (PD) whose model is split over two GPUs, and chiasm's proxy.
#
# The images of a request are spread over the encoders. Each rank of the PD loads an embedding to its own GPU. Settings are
# those of setup.sh, and ENCODER_0_DEVICES, ENCODER_1_DEVICES and PD_DEVICES: the GPUs of each (0, 1, "2,3"), and
# TENSOR_PARALLEL_SIZE of the PD (2).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

encoder_0_port=$((PROXY_PORT + 1))
encoder_1_port=$((PROXY_PORT + 2))
pd_port=$((PROXY_PORT + 3))

# 1. Start the four processes.
start_vllm encoder-0 "$encoder_0_port" "${ENCODER_0_DEVICES:-0}" --ec-transfer-config "$(ec_transfer ec_producer)"
start_vllm encoder-1 "$encoder_1_port" "${ENCODER_1_DEVICES:-1}" --ec-transfer-config "$(ec_transfer ec_producer)"
start_vllm pd "$pd_port" "${PD_DEVICES:-2,3}" --ec-transfer-config "$(ec_transfer ec_consumer)" --skip-mm-profiling \
  --tensor-parallel-size "${TENSOR_PARALLEL_SIZE:-2}"
start_proxy --encoder "http://127.0.0.1:$encoder_0_port" --encoder "http://127.0.0.1:$encoder_1_port" \
  --pd "http://127.0.0.1:$pd_port"
echo "Starting two encoders, a PD and the proxy ..."

# 2. Ask, and print the answer.
wait_until_healthy 3
ask_about_an_image
