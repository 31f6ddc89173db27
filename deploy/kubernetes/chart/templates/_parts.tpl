{{/* What selects the pods of one component: (dict "root" $ "component" NAME). */}}
{{- define "chiasm.selector" -}}
app.kubernetes.io/name: chiasm
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "chiasm.labels" -}}
{{ include "chiasm.selector" . }}
app.kubernetes.io/part-of: chiasm
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- with include "chiasm.role" .component }}
llm-d.ai/role: {{ . }}
{{- end }}
{{- end }}

{{/* The name that llm-d has for a role; empty for the proxy. */}}
{{- define "chiasm.role" -}}
{{- get (dict "encoder" "encode" "pd" "prefill-decode" "prefill" "prefill" "decode" "decode") . -}}
{{- end }}

{{- define "chiasm.pod" -}}
automountServiceAccountToken: {{ eq .component "proxy" }}
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "chiasm.selector" . | nindent 8 }}
{{- end }}

{{- define "chiasm.container" -}}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* Kubernetes gives the files to the group of fsGroup, which may read them. */}}
{{- define "chiasm.fleetKeyVolume" -}}
- name: fleet-key
  secret:
    secretName: {{ .Values.fleetKeySecret | quote }}
    defaultMode: 0440
{{- end }}

{{- define "chiasm.tmpVolume" -}}
- name: tmp
  emptyDir:
    medium: Memory
    sizeLimit: 64Mi
{{- end }}

{{/* All pods of the release, as peers of a network policy. */}}
{{- define "chiasm.fleet" -}}
- podSelector:
    matchLabels:
      app.kubernetes.io/name: chiasm
      app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* What all processes may reach: the fleet, and DNS. */}}
{{- define "chiasm.egress" -}}
- to:
    {{- include "chiasm.fleet" . | nindent 4 }}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
{{- end }}

{{- define "chiasm.scaleDown" -}}
# The figure has had its calm while already. A proxy that was restarted has forgotten its load, and learns it in a minute.
stabilizationWindowSeconds: 60
policies:
  - {type: Pods, value: 1, periodSeconds: 60}
{{- end }}
