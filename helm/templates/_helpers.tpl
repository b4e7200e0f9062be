{{- define "ellm.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* KubeRay appends to it: 40 characters leave room. */}}
{{- define "ellm.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "ellm.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "ellm.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "ellm.selector" -}}
app.kubernetes.io/name: {{ include "ellm.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "ellm.labels" -}}
{{ include "ellm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* One image for all pods: every Ray node needs the same Python and Ray. */}}
{{- define "ellm.image" -}}
{{- $device := "cpu" -}}
{{- range (include "ellm.models" . | fromJson).items }}{{ if eq .device "cuda" }}{{ $device = "cuda" }}{{ end }}{{ end -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default (printf "%s-%s" .Chart.AppVersion $device)) -}}
{{- end -}}

{{- define "ellm.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "ellm.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Seconds. */}}
{{- define "ellm.terminationGracePeriodSeconds" -}}
{{- .Values.terminationGracePeriodSeconds | default (add .Values.drainTimeoutSeconds 60) | int -}}
{{- end -}}

{{/* KubeRay makes this service: HTTP, to the pods that are ready. */}}
{{- define "ellm.httpService" -}}
{{ include "ellm.fullname" . }}-serve-svc
{{- end -}}

{{- define "ellm.redisSecretName" -}}
{{- .Values.gcsFaultTolerance.passwordSecretName | default (printf "%s-redis" (include "ellm.fullname" .)) -}}
{{- end -}}

{{- define "ellm.cacheVolume" -}}
{{- if not .Values.persistence.enabled -}}
emptyDir: {}
{{- else if .Values.persistence.hostPath -}}
hostPath:
  path: {{ .Values.persistence.hostPath | quote }}
  type: DirectoryOrCreate
{{- else -}}
persistentVolumeClaim:
  claimName: {{ .Values.persistence.existingClaim | default (printf "%s-models" (include "ellm.fullname" .)) }}
{{- end -}}
{{- end -}}

{{/* A text as a part of a Kubernetes name. */}}
{{- define "ellm.slug" -}}
{{- regexReplaceAll "[^a-z0-9]+" (lower .) "-" | trunc 30 | trimAll "-" -}}
{{- end -}}
