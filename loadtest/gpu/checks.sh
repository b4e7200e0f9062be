#!/usr/bin/env bash
# The checks that need a GPU, for a machine with torch and pytest and without Ray or an index to install from.
#
#   OUT=results loadtest/gpu/checks.sh
#
# Checks every kernel against its torch twin, runs the golden tests that are marked `gpu` (models, holes, STRICT on
# CUDA), then times attention by every tile, fused attention, the other kernels, decode steps with and without CUDA
# graphs, the copies and streams of the host tier, every switch alone, STRICT in random mixes, the engine on random
# weights (beside vLLM where VLLM_PYTHON names an interpreter that has it), and the policies on a starved pool; each
# also checks what it times. Everything printed also goes to $OUT/checks.log. MODELS is where checkpoints of 18 GB are
# made. Exit code 1 where a check or a test failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT="${OUT:-loadtest/results/gpu}"
PYTHON="${PYTHON:-python3}"
MODELS="${MODELS:-.cache/gpu-models}"
mkdir -p "$OUT" .types/ellm
for folder in kernels worker cluster router loadtest deploy; do ln -sfn "../../$folder" ".types/ellm/$folder"; done
failed=0
# Runs one step, no longer than 9 minutes, and says how it ended.
step() {
  local name=$1 code=0
  shift
  timeout 540 "$@" || code=$?
  echo "$name: exit code $code"
  [ "$code" = 0 ] || failed=1
}
export PYTHONPATH="$PWD/.types:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=4
{
  "$PYTHON" -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name(0))'
  step kernels "$PYTHON" -m ellm.deploy.cli kernels check --quick
  step "golden tests on the GPU" "$PYTHON" -m pytest -q -m gpu tests/golden -p no:cacheprovider
  step attention "$PYTHON" -m ellm.loadtest.gpu.attention --out "$OUT/attention.json"
  for name in fusion kernels graphs host_copies steps; do
    step "$name" "$PYTHON" -m "ellm.loadtest.gpu.$name" --out "$OUT/$name.json"
  done
  for name in ablation strict starved; do
    step "$name" "$PYTHON" -m "ellm.loadtest.gpu.$name" --models "$MODELS" --out "$OUT/$name.json"
  done
  step "strict with every switch" "$PYTHON" -m ellm.loadtest.gpu.strict --models "$MODELS" --fused --graphs \
    --out "$OUT/strict-switches.json"
  for model in qwen3-0.6b llama-3-8b; do
    step "engine $model" "$PYTHON" -m ellm.loadtest.gpu.engine --models "$MODELS" --model "$model" \
      ${VLLM_PYTHON:+--vllm-python "$VLLM_PYTHON"} --out "$OUT/engine-$model.json"
  done
  [ "$failed" = 0 ]
} 2>&1 | tee "$OUT/checks.log"
