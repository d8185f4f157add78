{{/* The user of every container that does not mount. It has no name on the host and owns nothing there but the cache. */}}
{{- define "shoal.uid" -}}65532{{- end }}

{{- define "shoal.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "shoal.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "shoal.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "shoal.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Call with (list . "component"). */}}
{{- define "shoal.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "shoal.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "shoal.labels" -}}
{{- $root := index . 0 -}}
{{ include "shoal.selector" . }}
app.kubernetes.io/part-of: shoal
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "shoal.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* A pod without rights: no user but its own, no call to the kernel that the runtime's profile leaves out. */}}
{{- define "shoal.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ include "shoal.uid" . }}
runAsGroup: {{ include "shoal.uid" . }}
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "shoal.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* host:port of the controller, as nodes and clients reach it. */}}
{{- define "shoal.controllerHost" -}}
{{ include "shoal.fullname" . }}-controller.{{ .Release.Namespace }}.svc
{{- end }}

{{- define "shoal.endpoint" -}}
http://{{ include "shoal.controllerHost" . }}:7441
{{- end }}

{{/* Of a quantity, in its own unit. */}}
{{- define "shoal.fourFifths" -}}
{{- $number := regexFind "^[0-9.]+" . -}}
{{- printf "%.3f" (mulf $number 0.8) }}{{ trimPrefix $number . }}
{{- end }}

{{/* host:port to listen at. Call with (list . port). */}}
{{- define "shoal.listen" -}}
{{- $host := (index . 0).Values.listenHost -}}
{{- if contains ":" $host -}}[{{ $host }}]{{- else -}}{{ $host }}{{- end -}}:{{ index . 1 }}
{{- end }}

{{/* Credentials of origins: a Secret's keys as files, which kubelet keeps up to date. */}}
{{- define "shoal.originMounts" -}}
- name: origins
  mountPath: /etc/shoal/origins
  readOnly: true
{{- with .Values.origins.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "shoal.originVolumes" -}}
- name: origins
  secret:
    secretName: {{ .Values.origins.secretName }}
    optional: true
{{- with .Values.origins.volumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Replicas on different hosts and in different zones; another host is never waited for. */}}
{{- define "shoal.spread" -}}
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
- topologyKey: {{ . }}
  maxSkew: 1
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels:
      {{- include "shoal.selector" $ | nindent 6 }}
{{- end }}
{{- end }}

{{- define "shoal.gateSecret" -}}
{{- default (printf "%s-gate" (include "shoal.fullname" .)) .Values.gate.tls.secretName }}
{{- end }}

{{/* Peers of a NetworkPolicy: pods of this release. Call with (list . "component" "component" …). */}}
{{- define "shoal.peers" -}}
{{- $root := first . -}}
{{- range rest . }}
- podSelector:
    matchLabels:
      {{- include "shoal.selector" (list $root .) | nindent 6 }}
{{- end }}
{{- end }}
