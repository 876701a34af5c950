# `make` lists the targets. Everything runs in .venv, which is made on first use and renewed when
# pyproject.toml or constraints.txt say something new.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# `mlflow models serve` and `mlflow run` start programs by name: they must find the environment's own.
RUN    := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python

# Small matrices, several tests at once: threads of one would wait for those of the others.
ALONE := OMP_NUM_THREADS=1

# More workers than processors: much of the time a server is waited for. Each has a part of the files, so that few of
# them start the same server, and who is done takes from the others.
WORKERS := -n 4 --dist worksteal

export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_OFFLINE := 1
unexport TOKENIZERS_PARALLELISM

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart test test-all lint types contracts bench bench-engine bench-gpu bench-triton bench-promotion bench-precision bench-tasks bench-attention support architectures clean

help: ## Lists the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: $(STAMP) ## Makes the environment in .venv

# The stamp holds the checksum of what was installed: a checkout gives files new times without changing them.
$(STAMP): pyproject.toml constraints.txt
	@wanted="$$(cksum pyproject.toml constraints.txt) $(CURDIR)"; \
	if [ "$$(cat $@ 2>/dev/null)" = "$$wanted" ]; then touch $@; exit 0; fi; \
	set -ex; rm -f $@; \
	$(PYTHON) -m venv $(VENV); \
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cpu,build,dev]'; \
	set +x; printf '%s\n' "$$wanted" > $@

quickstart: $(STAMP) ## Logs, registers, loads, serves and compares a small model
	$(RUN) examples/quickstart.py

test: $(STAMP) ## The tests that every change must pass
	$(ALONE) $(RUN) -m pytest $(WORKERS) -q

test-all: $(STAMP) ## The heavy real parts too
	$(ALONE) $(RUN) -m pytest $(WORKERS) -q -m "slow or not slow"

lint: $(STAMP) ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## Types
	$(BIN)/mypy

contracts: $(STAMP) ## Which layer may import which
	$(BIN)/lint-imports

bench: $(STAMP) ## Measures ours, the peers and the floor on this machine, and draws the picture of it
	$(RUN) -m benchmarks.text
	$(RUN) -m benchmarks.picture

bench-gpu: $(STAMP) ## Measures PyTorch, ONNX Runtime and TensorRT on this machine's GPU
	$(RUN) -m benchmarks.gpu

bench-precision: $(STAMP) ## Measures int8 within a budget beside fp32 and naive int8, on this machine
	$(RUN) -m benchmarks.precision

bench-tasks: $(STAMP) ## Measures every task of texts or images beside transformers' pipeline and its graph's floor
	$(RUN) -m benchmarks.tasks $(ARGS)

bench-attention: $(STAMP) ## Measures attention with relative positions as one operator beside its parts
	$(RUN) -m benchmarks.attention $(ARGS)

architectures: $(STAMP) ## Logs every task of 23 architectures, and writes docs/architectures.md
	$(RUN) -m benchmarks.architectures

support: $(STAMP) ## Tries every recipe on ten architectures, and writes docs/support.md
	$(RUN) -m benchmarks.support

bench-promotion: $(STAMP) ## Measures from an alias in the registry to an answer of a server, on this machine
	$(RUN) -m benchmarks.promotion $(ARGS)

bench-triton: $(STAMP) ## Measures one model on a Triton of this machine in several layouts, and MLflow's own server
	$(RUN) -m benchmarks.triton

bench-engine: $(STAMP) ## Builds TensorRT engines on this machine; needs no GPU
	$(RUN) -m benchmarks.engine

clean: ## Removes caches and outputs; .venv stays
	rm -rf build/lib dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .tmp quickstart-out
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
