{{- define "peftmux.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "peftmux.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "peftmux.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "peftmux.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "peftmux.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "peftmux.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "peftmux.selectorLabels" -}}
app.kubernetes.io/name: {{ include "peftmux.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "peftmux.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "peftmux.selectorLabels" . }}
{{- end -}}

{{- define "peftmux.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{/* The command line of `peftmux serve`, one list item per word. */}}
{{- define "peftmux.args" -}}
- serve
- {{ required "model.name is required: a directory below /models or a hub id" .Values.model.name | quote }}
- --grpc
- {{ printf "0.0.0.0:%d" (int .Values.ports.grpc) | quote }}
- --metrics
- {{ printf "0.0.0.0:%d" (int .Values.ports.metrics) | quote }}
- --adapters
- /adapters
- --device
- {{ .Values.device }}
- --grace-seconds
- {{ .Values.shutdown.grace | quote }}
{{- if .Values.auth.existingSecret }}
- --auth-tokens
- {{ printf "/run/secrets/peftmux/%s" .Values.auth.key | quote }}
{{- end }}
{{- range $name, $path := .Values.adapters.preload }}
- --adapter
- {{ printf "%s=/adapters/%s" $name $path | quote }}
{{- end }}
{{- range .Values.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}
