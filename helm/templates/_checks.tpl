{{/* What the schema cannot say: values that contradict each other. Every message names the value. */}}

{{- define "ellm.checkModel" -}}
{{- $model := hasPrefix "models[" .where | ternary .where "model." -}}
{{- if and .path (not .revision) (not (hasPrefix "/" .path)) (not (hasPrefix "simulated:" .path)) -}}
{{- fail (printf "%srevision: give the commit of %s, or what is served changes when its owner changes it" $model .path) -}}
{{- end -}}
{{- if and .path .revision (not (regexMatch "^[0-9a-f]{40}$" .revision)) -}}
{{- fail (printf "%srevision: %s is no commit; git ls-remote https://huggingface.co/%s shows it: 40 hexadecimal digits" $model .revision .path) -}}
{{- end -}}
{{- if and (hasPrefix "models[" .where) (not .path) -}}
{{- fail (printf "%spath: required" .where) -}}
{{- end -}}
{{- if and (hasPrefix "simulated:" .path) (or (gt (int .tensorParallelSize) 1) (eq .device "cuda")) -}}
{{- fail (printf "%spath: a simulated model has one rank and no GPU" $model) -}}
{{- end -}}
{{- end -}}

{{- define "ellm.checkGroup" -}}
{{- $tp := int .tensorParallelSize -}}
{{- if and (eq .device "cuda") (or (lt .gpus 1) (ne (mod .gpus $tp) 0)) -}}
{{- fail (printf "%sgpus: pods with %d GPUs cannot hold workers of tensorParallelSize = %d; it must be a multiple" .where .gpus $tp) -}}
{{- end -}}
{{- if and (ne .device "cuda") (gt .gpus 0) -}}
{{- fail (printf "%sgpus: %d, but device is %s" .where .gpus .device) -}}
{{- end -}}
{{- range $kind := list "requests" "limits" -}}
{{- if hasKey (get $.resources $kind | default dict) "nvidia.com/gpu" -}}
{{- fail (printf "%sresources.%s: nvidia.com/gpu is set by gpus" $.where $kind) -}}
{{- end -}}
{{- end -}}
{{- $scale := .autoscaling -}}
{{- if and $scale.enabled (or (gt (int $scale.minReplicas) (int .replicaCount)) (lt (int $scale.maxReplicas) (int .replicaCount))) -}}
{{- fail (printf "%sreplicaCount: %d is not between autoscaling.minReplicas = %d and autoscaling.maxReplicas = %d" .where (int .replicaCount) (int $scale.minReplicas) (int $scale.maxReplicas)) -}}
{{- end -}}
{{- end -}}

{{- define "ellm.checkNames" -}}
{{- $names := dict -}}
{{- range $index, $model := . -}}
{{- if hasKey $names $model.resource -}}
{{- fail (printf "models[%d].name: %s is there twice, or too much like another" $index $model.name) -}}
{{- end -}}
{{- $_ := set $names $model.resource true -}}
{{- range .groups -}}
{{- if hasKey $names .name -}}
{{- fail (printf "%sname: two worker groups would be called %s" .where .name) -}}
{{- end -}}
{{- $_ := set $names .name true -}}
{{- end -}}
{{- end -}}
{{- if or (hasKey $names "routers") (hasKey $names "ellm_router") -}}
{{- fail "models: no model can be called router" -}}
{{- end -}}
{{- end -}}

{{- define "ellm.checks" -}}
{{- $least := add .Values.drainTimeoutSeconds 45 -}}
{{- if lt (include "ellm.terminationGracePeriodSeconds" . | int) (int $least) -}}
{{- fail (printf "terminationGracePeriodSeconds: %s is too short for drainTimeoutSeconds = %d; at least %d" (include "ellm.terminationGracePeriodSeconds" .) (int .Values.drainTimeoutSeconds) $least) -}}
{{- end -}}
{{- if and .Values.grpc.enabled (eq (int .Values.grpc.port) (int .Values.service.port)) -}}
{{- fail (printf "grpc.port: %d is the port of HTTP" (int .Values.grpc.port)) -}}
{{- end -}}
{{- if and .Values.persistence.hostPath .Values.persistence.existingClaim -}}
{{- fail "persistence.hostPath: give it or persistence.existingClaim" -}}
{{- end -}}
{{- if and .Values.ingress.enabled .Values.ingress.tlsSecretName (not .Values.ingress.host) -}}
{{- fail "ingress.host: required with ingress.tlsSecretName" -}}
{{- end -}}
{{- end -}}
