{{/* What the controller is told about Kubernetes. */}}
{{- define "shoal.controllerOnKubernetes" -}}
- --kubernetes
- --namespace=$(POD_NAMESPACE)
- --identity=$(POD_NAME)
- --pod-ip=$(POD_IP)
- --lease-name={{ include "shoal.fullname" . }}-controller
{{- range .Values.controller.drainTaints }}
- --drain-taint={{ . }}
{{- end }}
{{- if .Values.gate.enabled }}
- --gate-listen={{ include "shoal.listen" (list . 7443) }}
- --gate-cert-dir=/etc/shoal/gate
{{- range .Values.gate.namespaces }}
- --gate-namespace={{ . }}
{{- end }}
{{- end }}
{{- end }}
