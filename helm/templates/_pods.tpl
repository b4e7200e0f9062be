{{/*
What all Ray pods share: "ellm.pod" with
  root       the chart's context
  component  head, router or worker
  placing    resources, nodeSelector, tolerations, affinity; gpus, gpuType and shmSize of workers
  model      of workers
*/}}
{{- define "ellm.pod" -}}
{{- $root := .root -}}
{{- $values := .root.Values -}}
{{- $head := eq .component "head" -}}
metadata:
  labels:
    {{- include "ellm.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- if .model }}
    ellm.dev/model: {{ include "ellm.slug" .model.name }}
    {{- end }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "ellm.serviceAccountName" $root }}
  enableServiceLinks: false # a service could be named like a setting
  automountServiceAccountToken: {{ and $head $values.autoscaler.enabled }}
  terminationGracePeriodSeconds: {{ include "ellm.terminationGracePeriodSeconds" $root }}
  {{- with $values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  securityContext:
    {{- toYaml $values.podSecurityContext | nindent 4 }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- include "ellm.placing" .placing | nindent 2 }}
  containers:
    - name: {{ $head | ternary "ray-head" "ray-worker" }}
      image: {{ include "ellm.image" $root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext:
        {{- toYaml $values.securityContext | nindent 8 }}
      ports:
        {{- include "ellm.ports" . | nindent 8 }}
      env:
        {{- include "ellm.env" $root | nindent 8 }}
      resources:
        {{- include "ellm.resources" .placing | nindent 8 }}
      {{- include "ellm.probes" . | nindent 6 }}
      {{- if not $head }}
      lifecycle:
        preStop: # what serves here is served elsewhere before this goes
          exec:
            command: [ellm, drain, --node, here, --timeout, {{ add $values.drainTimeoutSeconds 30 | quote }}]
      {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        - {name: models, mountPath: /var/cache/ellm}
        {{- if $values.auth.apiKeys.secretName }}
        - {name: keys, mountPath: /etc/ellm/keys, readOnly: true}
        {{- end }}
        {{- if and $values.grpc.enabled $values.grpc.tlsSecretName }}
        - {name: tls, mountPath: /etc/ellm/tls, readOnly: true}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ .placing.shmSize | default "512Mi" }}}
    - name: models
      {{- include "ellm.cacheVolume" $root | nindent 6 }}
    {{- with $values.auth.apiKeys.secretName }}
    - name: keys
      secret: {secretName: {{ . }}}
    {{- end }}
    {{- if and $values.grpc.enabled $values.grpc.tlsSecretName }}
    - name: tls
      secret: {secretName: {{ $values.grpc.tlsSecretName }}}
    {{- end }}
{{- end -}}

{{- define "ellm.placing" -}}
{{- $nodes := .nodeSelector | default dict -}}
{{- if .gpuType }}{{ $nodes = merge (dict "nvidia.com/gpu.product" .gpuType) $nodes }}{{ end -}}
nodeSelector:
  {{- toYaml $nodes | nindent 2 }}
tolerations:
  {{- toYaml .tolerations | nindent 2 }}
affinity:
  {{- toYaml .affinity | nindent 2 }}
{{- end -}}

{{- define "ellm.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if .gpus -}}
{{- $limits := get $resources "limits" | default dict -}}
{{- $_ := set $resources "limits" (merge (dict "nvidia.com/gpu" (int .gpus)) $limits) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "ellm.ports" -}}
{{- if eq .component "head" -}}
- {name: gcs-server, containerPort: 6379}
- {name: dashboard, containerPort: 8265}
- {name: client, containerPort: 10001}
{{ end -}}
- {name: serve, containerPort: {{ .root.Values.service.port }}}
- {name: metrics, containerPort: 8080}
{{- if and .root.Values.grpc.enabled (eq .component "router") }}
- {name: grpc, containerPort: {{ .root.Values.grpc.port }}}
{{- end }}
{{- end -}}

{{/* Ray's and Serve's settings are those of `ellm serve` (deploy/ray_cluster.py, router/ingress.py). */}}
{{- define "ellm.env" -}}
{{- $deadline := dig "router" "limits" "request_deadline_s" 3600 .Values.config -}}
{{- $receive := dig "router" "limits" "receive_timeout_s" 60 .Values.config -}}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_worker_niceness, value: "0"}
- {name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO, value: "0"}
- {name: RAY_TRAIN_V2_ENABLED, value: "0"}
- {name: RAY_task_events_max_num_task_in_gcs, value: "1000"}
- {name: MALLOC_ARENA_MAX, value: "1"}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
- {name: RAY_SERVE_HAPROXY_NBTHREAD, value: "2"}
- {name: RAY_SERVE_HAPROXY_METRICS_ENABLED, value: "0"}
- {name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S, value: {{ add (ceil $deadline) 5 | quote }}}
- {name: RAY_SERVE_HAPROXY_BALANCE_ALGORITHM, value: {{ printf "leastconn\n    timeout http-request %ds" (int (ceil $receive)) | toJson }}}
- {name: RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S, value: "3"}
- {name: RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S, value: "0.1"}
- {name: ELLM_CLUSTER__LOG_FORMAT, value: {{ .Values.logFormat }}}
- {name: HF_HOME, value: /var/cache/ellm}
{{- if .Values.persistence.offline }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- with .Values.hfToken }}
{{- if .secretName }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .secretName }}, key: {{ .secretKey }}}
{{- end }}
{{- end }}
{{- with .Values.auth.adminKey }}
{{- if .secretName }}
- name: ELLM_ROUTER__ADMIN_KEY
  valueFrom:
    secretKeyRef: {name: {{ .secretName }}, key: {{ .secretKey }}}
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/*
Startup and liveness ask Ray's agent of the pod: a model that loads for an hour is no reason to kill it, and a worker
that makes no step is ended and replaced by its supervisor, long before Kubernetes would. Readiness asks what serves:
200 means that a worker takes requests and has finished a step recently, or has nothing to do.
*/}}
{{- define "ellm.probes" -}}
{{- $values := .root.Values -}}
startupProbe:
  {{- include "ellm.rayProbe" . | nindent 2 }}
  {{- toYaml $values.startupProbe | nindent 2 }}
livenessProbe:
  {{- include "ellm.rayProbe" . | nindent 2 }}
  {{- toYaml $values.livenessProbe | nindent 2 }}
readinessProbe:
  {{- if eq .component "head" }}
  {{- include "ellm.rayProbe" . | nindent 2 }}
  {{- else if and (eq .component "router") $values.grpc.enabled (not $values.grpc.tlsSecretName) }}
  grpc: {port: {{ $values.grpc.port }}} # grpc.health.v1 of this pod's router, by the same rule
  {{- else }}
  httpGet: {path: /health/ready, port: serve}
  {{- end }}
  {{- toYaml $values.readinessProbe | nindent 2 }}
{{- end -}}

{{- define "ellm.rayProbe" -}}
httpGet: {path: {{ eq .component "head" | ternary "/api/healthz" "/api/local_raylet_healthz" }}, port: 52365}
{{- end -}}
