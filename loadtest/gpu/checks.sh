#!/usr/bin/env bash
# The checks that need a GPU, for a machine with torch and pytest and without Ray or an index to install from.
#
#   OUT=results loadtest/gpu/checks.sh
#
# Runs the golden tests that are marked `gpu` (models, holes, host tier on CUDA), then times a decode step and the
# copies of the host tier. Everything it prints also goes to $OUT/checks.log.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT="${OUT:-loadtest/results/gpu}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT" .types/ellm
for folder in kernels worker cluster router loadtest deploy; do ln -sfn "../../$folder" ".types/ellm/$folder"; done
export PYTHONPATH="$PWD/.types:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=4
{
  "$PYTHON" -c 'import torch; print("torch", torch.__version__, torch.cuda.get_device_name(0))'
  "$PYTHON" -m pytest -q -m gpu tests/golden -p no:cacheprovider
  echo "golden tests on the GPU: exit code $?"
  "$PYTHON" -m ellm.loadtest.gpu.steps --out "$OUT/steps.json"
  echo "steps: exit code $?"
} 2>&1 | tee "$OUT/checks.log"
