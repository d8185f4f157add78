{{/* Through the sidecar. Very patient: a restart of the driver's container ends what serves its mounts. */}}
{{- define "shoal.csiProbe" -}}
startupProbe:
  httpGet: {path: /healthz, port: 9808}
  periodSeconds: 2
  timeoutSeconds: {{ . }}
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: 9808}
  periodSeconds: 30
  timeoutSeconds: {{ . }}
  failureThreshold: 10
{{- end }}

{{/* Keeps the descriptors of /dev/fuse while the driver's container is restarted. It needs no right: it only holds. */}}
{{- define "shoal.fdstore" -}}
- name: fdstore
  image: {{ include "shoal.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args: [python, -m, shoal_csi.fdstore, --keep-for={{ .Values.csi.node.fdstore.keepFor }}]
  env:
    - name: SHOAL_RUN_DIR
      value: /run/shoal-mounts
    - name: SHOAL_LOG_FORMAT
      value: {{ .Values.logFormat }}
  securityContext:
    {{- include "shoal.containerSecurity" . | nindent 4 }}
  resources:
    {{- toYaml .Values.csi.node.fdstore.resources | nindent 4 }}
  volumeMounts:
    - name: run
      mountPath: /run/shoal-mounts
{{- end }}

{{/* Who may reach a pod of the driver: whoever scrapes. */}}
{{- define "shoal.scraped" -}}
{{- if and .Values.csi.metricsPort .Values.networkPolicy.prometheus }}
ingress:
  - from:
      {{- toYaml .Values.networkPolicy.prometheus | nindent 6 }}
    ports:
      - port: metrics
{{- else }}
ingress: []
{{- end }}
{{- end }}
