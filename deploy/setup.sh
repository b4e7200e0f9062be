#!/usr/bin/env bash
# Makes .venv and installs the project into it, with the pins of constraints.txt. Nothing to do: instant.
#   PYTHON=python3.12 deploy/setup.sh
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
VENV=.venv
STAMP=$VENV/.setup
LOG=$VENV/setup.log
EXTRAS=serve,jit,gpu,test,dev

fail() { echo "setup: $*" >&2; exit 1; }

wanted() { cat pyproject.toml constraints.txt deploy/setup.sh | cksum; }
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(wanted)" ] && [ -x "$VENV/bin/ellm" ]; then exit 0; fi

command -v "$PYTHON" >/dev/null || fail "$PYTHON not found; install it with: apt install python3 python3-venv"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || fail "$("$PYTHON" --version) is too old: Python 3.11 or newer is needed (set PYTHON=/path/to/python3.11)"

start=$SECONDS
# Runs one phase with its output in the log; says how long it takes, and on failure shows the log's end.
phase() {
  local title=$1; shift
  local began=$SECONDS shown=0 elapsed pid
  printf '%s' "$title"
  "$@" >>"$LOG" 2>&1 & pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2
    elapsed=$((SECONDS - began))
    if [ $((elapsed / 5)) -gt "$shown" ]; then shown=$((elapsed / 5)); printf '.'; fi
  done
  if ! wait "$pid"; then
    printf ' failed\n'
    tail -n 25 "$LOG" >&2
    fail "that did not work; the whole log is $LOG"
  fi
  printf ' %ds\n' $((SECONDS - began))
}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

if [ ! -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null \
    || fail "this Python cannot make a virtual environment with pip; run: apt install python3-venv"
  mkdir -p "$VENV"
  phase "[1/4] virtual environment in $VENV " "$PYTHON" -m venv "$VENV"
fi
: >"$LOG"
pip=("$VENV/bin/python" -m pip --disable-pip-version-check install -q -c constraints.txt)
phase "[2/4] PyTorch " "${pip[@]}" "$(grep '^torch==' constraints.txt)"
phase "[3/4] Ray, transformers, eLLM and its tools " "${pip[@]}" -e ".[$EXTRAS]"
# The first run on a machine compiles them, later ones find them in __pycache__; and it shows that all works.
phase "[4/4] CPU kernels " "$VENV/bin/ellm" generate --prompt 'A list is' --max-tokens 2
wanted >"$STAMP"
echo "Installed in $((SECONDS - start))s."
