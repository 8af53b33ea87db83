# make demo    sets up .venv and runs the main job on the embedded model
# make test    sets up .venv and runs every test that needs no GPU
# make check   format, lint, types, import arrows, torch-free imports, stub drift
# make bench   prints the CPU budgets
# make soak    ten minutes of requests while engines, peers and stores are killed; SOAK_SECONDS=60 for less
# make test-gpu, make bench-gpu    the same on a machine with a CUDA device, with the Python of PYTHON
# make bench-gpu ARGUMENTS="--peer vllm"    beside vLLM, where that is installed

SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUBS := .venv-stubs
SOAK_SECONDS ?= 600
PROTOS := protos/inference.proto protos/cache_store.proto

.PHONY: demo test check bench soak test-gpu bench-gpu stubs clean

demo: $(VENV)/.ready
	@$(BIN)/mobula demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest

check: $(VENV)/.ready $(STUBS)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_imports.py
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT \
	  && $(STUBS)/bin/python -m grpc_tools.protoc -I. --python_out=$$scratch --pyi_out=$$scratch --grpc_python_out=$$scratch $(PROTOS) \
	  && for stub in $$scratch/protos/*; do diff -q "$$stub" "protos/$$(basename $$stub)" || { echo "stubs are stale: run make stubs"; exit 1; }; done \
	  && echo "stubs are up to date"

bench: $(VENV)/.ready
	$(BIN)/python -m tests.bench

soak: $(VENV)/.ready
	$(BIN)/python -m tests.soak --seconds $(SOAK_SECONDS)

test-gpu:
	$(PYTHON) -m pytest tests/gpu -s

bench-gpu:
	$(PYTHON) -m tests.bench.gpu_bench $(ARGUMENTS)
	$(PYTHON) -m tests.bench.gpu_serve_bench
	$(PYTHON) -m tests.bench.gpu_experts

stubs: $(STUBS)/.ready
	$(STUBS)/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once; a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

$(STUBS)/.ready: Makefile
	$(PYTHON) -m venv $(STUBS)
	$(STUBS)/bin/pip install --quiet --disable-pip-version-check grpcio-tools==1.80.0
	@touch $@

clean:
	rm -rf $(VENV) $(STUBS)
