{{- define "shoal.gateRules" -}}
- apiGroups: [""]
  resources: [pods]
  # list, watch: the pods that wait, by their label; patch: take the gate off. The policy of gate.yaml bounds what a patch may do.
  verbs: [list, watch, patch]
{{- end }}
