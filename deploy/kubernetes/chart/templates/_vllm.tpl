{{- /* The container of an instance of vLLM: (dict "root" $ "role" NAME "of" VALUES-OF-THE-ROLE). What `chiasm serve --engine vllm`
     starts, in src/chiasm/launch/vllm.py; the tests compare the two. */}}
{{- define "chiasm.engine.vllm.args" -}}
{{- $vllm := .root.Values.vllm }}
{{- $isEncoder := eq .role "encoder" }}
{{- $extra := dict "wait_seconds" (int .root.Values.deadlineSeconds) }}
{{- if $vllm.embeddingsClaim }}
{{- $_ := set $extra "shared_storage_path" "/embeddings/chiasm" }}
{{- $_ := set $extra "max_bytes" (mul $vllm.embeddingsMi 1048576) }}
{{- else }}
{{- $_ := set $extra "connector" "TcpConnector" }}
{{- end }}
{{- if not $isEncoder }}
{{- $_ := set $extra "receive_bytes" (mul .of.arenaMi 1048576) }}
{{- else if not $vllm.embeddingsClaim }}
{{- $_ := set $extra "max_bytes" (mul .of.arenaMi 1048576) }}
{{- $_ := set $extra "host" "$(POD_IP)" }}
{{- $_ := set $extra "port" 8100 }}
{{- end }}
{{- $ec := dict "ec_connector" "ChiasmECConnector" "ec_connector_module_path" "chiasm.integrations.vllm.ec_connector" }}
{{- $_ := set $ec "ec_role" (ternary "ec_producer" "ec_consumer" $isEncoder) }}
{{- $_ := set $ec "ec_connector_extra_config" $extra -}}
command: [vllm]
args:
  - serve
  - {{ .root.Values.model | quote }}
  - --host=0.0.0.0
  - --port=8000
  {{- if hasPrefix "/" .root.Values.model }}
  - --served-model-name={{ base .root.Values.model }}
  {{- end }}
  - --shutdown-timeout=30
  - --middleware=chiasm.integrations.vllm.middleware.ChiasmMiddleware
  - --disable-access-log-for-endpoints=/health,/livez,/readyz,/metrics,/v1/models
  - {{ printf "--ec-transfer-config=%s" (toJson $ec) | squote }}
  {{- if and (not $vllm.embeddingsClaim) (eq (int .of.gpus) 1) }}
  # With both halves of the connector in one process, embeddings get to the GPU beside the steps.
  - --distributed-executor-backend=vllm.v1.executor.uniproc_executor.UniProcExecutor
  {{- end }}
  {{- if eq .role "prefill" }}
  - '--kv-transfer-config={"kv_connector":"NixlConnector","kv_role":"kv_producer"}'
  {{- else if eq .role "decode" }}
  - '--kv-transfer-config={"kv_connector":"NixlConnector","kv_role":"kv_consumer"}'
  {{- end }}
  {{- if $isEncoder }}
  - --no-enable-prefix-caching
  {{- else }}
  - --skip-mm-profiling
  {{- if $vllm.withoutTower }}
  - '--limit-mm-per-prompt={"image":0,"video":0}'
  - --enable-mm-embeds
  {{- end }}
  {{- end }}
  {{- if gt (int .of.gpus) 1 }}
  - --tensor-parallel-size={{ .of.gpus }}
  {{- end }}
{{- end }}

{{- define "chiasm.engine.vllm.env" -}}
- name: CHIASM_FLEET_KEY
  valueFrom:
    secretKeyRef: {name: {{ .root.Values.fleetKeySecret | quote }}, key: fleet-key}
- {name: HOME, value: /home/chiasm} # vLLM keeps there what it compiles
- {name: OMP_NUM_THREADS, value: {{ .of.cpus | quote }}}
- {name: VLLM_NO_USAGE_STATS, value: "1"}
{{- if hasPrefix "/" .root.Values.model }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- if gt (int .of.gpus) 1 }}
# The same for all ranks: they iterate over sets of modalities, and deadlock unless they do it in the same order.
- {name: PYTHONHASHSEED, value: "0"}
{{- end }}
{{- if or (eq .role "prefill") (eq .role "decode") }}
- name: VLLM_NIXL_SIDE_CHANNEL_HOST
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- {name: VLLM_NIXL_SIDE_CHANNEL_PORT, value: "8200"}
{{- end }}
{{- end }}
