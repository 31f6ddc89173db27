{{- /* The container of an instance of the built-in engine: (dict "root" $ "role" NAME "of" VALUES-OF-THE-ROLE). */}}
{{- define "chiasm.engine.chiasm.args" -}}
args:
  - instance
  - {{ .root.Values.model | quote }}
  - --role={{ .role }}
  - --host=0.0.0.0
  - --port=8000
  - --fleet-key-file=/etc/chiasm/fleet/fleet-key
  - --deadline-seconds={{ .root.Values.deadlineSeconds }}
  - --threads={{ .of.cpus }}
  {{- if ne .role "decode" }}
  - --connector=TcpConnector
  {{- end }}
  {{- if eq .role "encoder" }}
  - --ec-host=$(POD_IP)
  - --ec-port=8100
  - --ec-max-bytes={{ int64 .of.arenaMi }}MiB
  {{- else if not .of.gpus }}
  - --kv-cache-bytes={{ int64 .of.arenaMi }}MiB
  {{- end }}
  {{- if or (eq .role "prefill") (eq .role "decode") }}
  - --kv-connector=TcpConnector
  {{- end }}
  {{- if eq .role "prefill" }}
  - --kv-host=$(POD_IP)
  - --kv-port=8200
  {{- end }}
{{- end }}
