{{- define "ellm.testPod" -}}
restartPolicy: Never
automountServiceAccountToken: false
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "ellm.testContainer" -}}
image: {{ include "ellm.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
resources:
  requests: {cpu: 100m, memory: 256Mi}
  limits: {memory: 256Mi}
{{- end -}}

{{- define "ellm.modelNames" -}}
{{- $names := list -}}
{{- range (include "ellm.models" . | fromJson).items }}{{ $names = append $names .name }}{{ end -}}
{{- toJson $names -}}
{{- end -}}
