{{/* What Ray Serve is told (serveConfigV2), as YAML. */}}
{{- define "ellm.serveConfig" -}}
{{- $models := (include "ellm.models" . | fromJson).items -}}
{{- $args := deepCopy .Values.config -}}
{{- $cluster := dict "address" "auto" "host" "0.0.0.0" "port" .Values.service.port "worker_num_cpus" .Values.cpusPerRank "log_level" .Values.logLevel "log_format" .Values.logFormat -}}
{{- if .Values.grpc.enabled }}{{ $_ := set $cluster "grpc_port" .Values.grpc.port }}{{ end -}}
{{- $router := dict "num_replicas" .Values.router.replicaCount "drain_timeout_s" .Values.drainTimeoutSeconds -}}
{{- if .Values.auth.apiKeys.secretName }}{{ $_ := set $router "api_key_file" (printf "/etc/ellm/keys/%s" .Values.auth.apiKeys.secretKey) }}{{ end -}}
{{- if and .Values.grpc.enabled .Values.grpc.tlsSecretName -}}
{{- $_ := set $router "grpc" (dict "tls_cert" "/etc/ellm/tls/tls.crt" "tls_key" "/etc/ellm/tls/tls.key") -}}
{{- end -}}
{{- $worker := dict "drain_timeout_s" .Values.drainTimeoutSeconds -}}
{{- $args = mergeOverwrite $args (dict "cluster" $cluster "router" $router "worker" $worker) -}}
{{- $bundle := dict "CPU" 1 "ellm_router" 0.001 -}}
{{- $deployments := list (dict "name" "Router" "placement_group_bundles" (list $bundle) "placement_group_strategy" "PACK") -}}
{{- $entries := list -}}
{{- range $models -}}
{{- $entry := dict "device" .device "dtype" .dtype "tp" (int .tensorParallelSize) "workers" (int .replicas) "min_workers" (int .minReplicas) "max_workers" (int .maxReplicas) "served_model_name" .name -}}
{{- if .path }}{{ $_ := set $entry "model" .path }}{{ end -}}
{{- if .revision }}{{ $_ := set $entry "revision" .revision }}{{ end -}}
{{- if .maxModelLen }}{{ $_ := set $entry "max_model_len" (int .maxModelLen) }}{{ end -}}
{{- if .config }}{{ $_ := set $entry "worker" .config }}{{ end -}}
{{- $entries = append $entries $entry -}}
{{- $rank := dict "CPU" $.Values.cpusPerRank .resource 0.001 -}}
{{- if eq .device "cuda" }}{{ $_ := set $rank "GPU" 1 }}{{ end -}}
{{- $ranks := list -}}
{{- range until (int .tensorParallelSize) }}{{ $ranks = append $ranks $rank }}{{ end -}}
{{- $deployments = append $deployments (dict "name" .deployment "placement_group_bundles" $ranks "placement_group_strategy" "STRICT_PACK") -}}
{{- end -}}
{{- if eq (len $entries) 1 -}}
{{- $args = mergeOverwrite $args (first $entries) -}}
{{- else -}}
{{- $_ := set $args "models" $entries -}}
{{- end -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ .Values.service.port }}
logging_config:
  encoding: JSON
  log_level: {{ upper .Values.logLevel }}
  enable_access_log: false
applications:
  - name: ellm
    route_prefix: /
    import_path: ellm.deploy.app:build
    args:
      {{- toYaml $args | nindent 6 }}
    deployments:
      {{- toYaml $deployments | nindent 6 }}
{{- end -}}
