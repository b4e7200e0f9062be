{{/*
The models as JSON, {"items": [...]}: values and defaults put together, and worked out from them

  where       what the values of this model are called in messages
  name        served as
  deployment  in Ray Serve (worker_deployment in deploy/tree.py)
  resource    of Ray: the nodes of its worker groups have it, its workers ask for it
  replicas, minReplicas, maxReplicas   workers
  groups      [{name, gpus, perPod, pods, minPods, maxPods, and how the pods are placed}]
*/}}
{{- define "ellm.models" -}}
{{- $root := . -}}
{{- $placing := pick .Values "replicaCount" "autoscaling" "gpus" "gpuType" "workersPerPod" "resources" "nodeSelector" "tolerations" "affinity" "shmSize" "groups" -}}
{{- $several := gt (len .Values.models) 1 -}}
{{- $items := list -}}
{{- range $index, $entry := (.Values.models | default (list dict)) -}}
{{- $model := mergeOverwrite (deepCopy $root.Values.model) (deepCopy $placing) (deepCopy $entry) -}}
{{- $where := $root.Values.models | empty | ternary "" (printf "models[%d]." $index) -}}
{{- $name := $model.name | default (splitList "/" (trimSuffix "/" $model.path) | last) | default "pydoc-5m" -}}
{{- if hasPrefix "simulated:" $model.path }}{{ $name = $model.name | default "simulated" }}{{ end -}}
{{- $_ := set $model "where" $where -}}
{{- $_ := set $model "name" $name -}}
{{- $_ := set $model "deployment" ($several | ternary (printf "Worker-%s" (regexReplaceAll "[^A-Za-z0-9._-]" $name "_")) "Worker") -}}
{{- $_ := set $model "resource" (printf "ellm_%s" (regexReplaceAll "[^A-Za-z0-9]+" $name "_")) -}}
{{- include "ellm.checkModel" $model -}}
{{- $groups := list -}}
{{- $sum := dict "replicas" 0 "minReplicas" 0 "maxReplicas" 0 -}}
{{- range $at, $given := ($model.groups | default (list dict)) -}}
{{- $group := mergeOverwrite (omit (deepCopy $model) "groups" "name") (deepCopy $given) -}}
{{- $_ := set $group "where" ($model.groups | empty | ternary $where (printf "%sgroups[%d]." $where $at)) -}}
{{- $suffix := $model.groups | empty | ternary "" (printf "-%s" (include "ellm.slug" ($given.name | default $group.gpuType | default (toString $at)))) -}}
{{- $_ := set $group "name" (printf "%s%s" (include "ellm.slug" $name) $suffix) -}}
{{- $groups = append $groups (include "ellm.group" (dict "group" $group "sum" $sum) | fromJson) -}}
{{- end -}}
{{- if lt (int $sum.minReplicas) 1 }}{{ fail (printf "%sautoscaling.minReplicas: a model keeps at least one worker" $where) }}{{ end -}}
{{- $_ := set $model "groups" $groups -}}
{{- $items = append $items (merge $model $sum) -}}
{{- end -}}
{{- include "ellm.checkNames" $items -}}
{{- dict "items" $items | toJson -}}
{{- end -}}

{{/* One worker group as JSON; its workers are added to `sum`. */}}
{{- define "ellm.group" -}}
{{- $group := .group -}}
{{- $tp := int $group.tensorParallelSize -}}
{{- $cuda := eq $group.device "cuda" -}}
{{- $gpus := kindIs "invalid" $group.gpus | ternary ($cuda | ternary $tp 0) $group.gpus | int -}}
{{- $_ := set $group "gpus" $gpus -}}
{{- include "ellm.checkGroup" $group -}}
{{- $perPod := $cuda | ternary (div $gpus $tp) $group.workersPerPod | int -}}
{{- $count := int $group.replicaCount -}}
{{- $least := $group.autoscaling.enabled | ternary $group.autoscaling.minReplicas $count | int -}}
{{- $most := $group.autoscaling.enabled | ternary $group.autoscaling.maxReplicas $count | int -}}
{{- $_ := set $group "perPod" $perPod -}}
{{- $_ := set $group "pods" (div (add $count $perPod -1) $perPod) -}}
{{- $_ := set $group "minPods" (div (add $least $perPod -1) $perPod) -}}
{{- $_ := set $group "maxPods" (div (add $most $perPod -1) $perPod) -}}
{{- $_ := set .sum "replicas" (add .sum.replicas $count) -}}
{{- $_ := set .sum "minReplicas" (add .sum.minReplicas $least) -}}
{{- $_ := set .sum "maxReplicas" (add .sum.maxReplicas $most) -}}
{{- toJson $group -}}
{{- end -}}
