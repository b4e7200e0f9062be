#!/usr/bin/env bash
# The checks that need a GPU, for a machine with torch and pytest and without Ray or an index to install from.
#
#   OUT=results loadtest/gpu/checks.sh
#
# Checks every kernel against its torch twin, runs the golden tests that are marked `gpu` (models, holes, STRICT on
# CUDA), then times attention by every tile, fused attention, the other kernels, decode steps with and without CUDA
# graphs, the copies and streams of the host tier, every switch alone, STRICT in random mixes, the engine on random
# weights (beside vLLM where VLLM_PYTHON names an interpreter that has it), the policies on a starved pool, and two
# ranks where there are two GPUs; each also checks what it times. At the end every aim is said to be met, missed or
# not measured, with the reason ($OUT/summary.json). Everything printed
# also goes to $OUT/checks.log. MODELS is where checkpoints of 18 GB are made. Exit code 1 where a check or a test
# failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT="${OUT:-loadtest/results/gpu}"
PYTHON="${PYTHON:-python3}"
MODELS="${MODELS:-.cache/gpu-models}"
mkdir -p "$OUT" .types/ellm
rm -f "$OUT"/*.json # of another run: none of them may count as this one's
for folder in kernels worker cluster router loadtest deploy; do ln -sfn "../../$folder" ".types/ellm/$folder"; done
KERNELS="rms_norm layer_norm silu_mul rotary kv_store rotary_store linear kv_copy sample logprobs paged_attention
  fused_attention"
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
  for name in $KERNELS; do
    step "kernel $name" "$PYTHON" -m ellm.deploy.cli kernels check --quick --kernel "$name"
  done
  step "golden tests on the GPU" "$PYTHON" -m pytest -q -c loadtest/gpu/pytest.ini --rootdir . --confcutdir . \
    -m gpu tests/golden
  step models "$PYTHON" -m ellm.loadtest.gpu.models --models "$MODELS" qwen3-0.6b llama-3-8b
  for name in attention fusion kernels graphs host_copies steps; do
    step "$name" "$PYTHON" -m "ellm.loadtest.gpu.$name" --out "$OUT/$name.json"
  done
  for name in ablation ranks strict; do
    step "$name" "$PYTHON" -m "ellm.loadtest.gpu.$name" --models "$MODELS" --out "$OUT/$name.json"
  done
  step "strict on a whole model" "$PYTHON" -m ellm.loadtest.gpu.strict --models "$MODELS" --model qwen3-0.6b \
    --dtype bfloat16 --out "$OUT/strict-model.json"
  step "strict with every switch" "$PYTHON" -m ellm.loadtest.gpu.strict --models "$MODELS" --fused --ahead \
    --graphs --out "$OUT/strict-switches.json"
  step "starved pool" "$PYTHON" -m ellm.loadtest.gpu.starved --models "$MODELS" --literal --limit-s 480 \
    --out "$OUT/starved.json"
  step "starved pool, sweep" "$PYTHON" -m ellm.loadtest.gpu.starved --models "$MODELS" --limit-s 480 \
    --policies full-recompute --out "$OUT/starved-sweep.json"
  for model in qwen3-0.6b llama-3-8b; do
    engine=("$PYTHON" -m ellm.loadtest.gpu.engine --models "$MODELS" --model "$model"
      --out "$OUT/engine-$model.json")
    step "engine $model" "${engine[@]}" --only ellm
    if [ "$model" = qwen3-0.6b ]; then
      step "engine $model with STRICT" "$PYTHON" -m ellm.loadtest.gpu.engine --models "$MODELS" --model "$model" \
        --only ellm --strict --batch 1 32 256 --rounds 1 --out "$OUT/engine-strict.json"
    fi
    if [ -n "${VLLM_PYTHON:-}" ]; then
      step "vLLM $model" "${engine[@]}" --only vllm --vllm-python "$VLLM_PYTHON"
    fi
  done
  step summary "$PYTHON" -m ellm.loadtest.gpu.summary "$OUT"
  [ "$failed" = 0 ]
} 2>&1 | tee "$OUT/checks.log"
