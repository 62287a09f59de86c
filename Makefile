# Everything a fresh clone needs is python3 (3.11 to 3.13) and make: each target sets up .venv by itself, once.
#
#   make demo     train three adapters, serve them in one batch, show the answers side by side
#   make test     the test suite                        make lint     format, lint, types, import contracts, protos
#   make kernels  the Triton kernels without a GPU: in its interpreter, and compiled for sm_80, sm_90 and sm_100
#   make bench    the benchmark (BENCH_ARGS="...")      make gpu      GPU tests and benchmark, with the machine's python
#   make base     train the embedded base models anew   make protos   regenerate protos/peftmux/v1
#
# PYTHON=python3.12        the interpreter that .venv is made with
# TORCH_INDEX=URL          one more package index, for torch alone (its CPU build, another CUDA build); read when .venv is
#                          made, so remove .venv to change torch's build
# PYTEST_ARGS="-k name"    passed to pytest by `make test`
# GPU_PYTHON=PATH          the interpreter of `make gpu` (nothing is installed into it)
# GPU_ARGS="--budget 300"   passed to benchmarks/gpu.py: --dry, --opponent NAME=PATH, ...

PYTHON ?= python3
GPU_PYTHON ?= python3
TORCH_INDEX ?=
# A file stays on one worker: what its tests share is made once, and what they prove together is proved on any machine.
PYTEST_ARGS ?= -n 2 --dist loadfile
BENCH_ARGS ?=
GPU_RESULTS ?= benchmarks/results
GPU_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Byte code is written when a module is first imported: most of torch never is, and installing takes 15 s less.
INSTALL := -m pip --disable-pip-version-check install --no-compile
# torch is the one long download: pip's bar shows where there is a terminal.
TORCH_QUIET := $(shell test -t 2 || echo -qq)

.DELETE_ON_ERROR:
.PHONY: demo test kernels lint lint-style lint-types lint-imports lint-protos bench gpu base protos dev clean

demo: $(VENV)/.run
	$(BIN)/peftmux demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

kernels: $(VENV)/.dev
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS) tests/triton
	$(BIN)/python -m peftmux.kernels.compile

lint: lint-style lint-types lint-imports lint-protos

lint-style: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

lint-types: $(VENV)/.dev
	$(BIN)/mypy

lint-imports: $(VENV)/.dev
	$(BIN)/lint-imports --no-logo

lint-protos: $(VENV)/.protos
	$(VENV)/protos/bin/python protos/generate.py --check

bench: $(VENV)/.dev
	$(BIN)/peftmux bench $(BENCH_ARGS)

base: $(VENV)/.run
	$(BIN)/python -m peftmux.demo.make_base --out runtime/peftmux/demo/base
	$(BIN)/python -m peftmux.demo.make_base --size small --out runtime/peftmux/demo/small

gpu:
	$(GPU_PYTHON) benchmarks/gpu.py --results $(GPU_RESULTS) $(GPU_ARGS)

protos: $(VENV)/.protos
	$(VENV)/protos/bin/python protos/generate.py

dev: $(VENV)/.dev

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist build

# Stamps: .python (the environment), .torch, .run (what demo needs), .dev (tests and lint as well), .protos.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else \
	    "expected Python 3.11 or newer, got %d.%d: choose another with PYTHON=..." % v)'
	@echo "environment: creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "expected a python3 with its venv module (Debian: python3-venv)"; exit 1; }
	@touch $@

$(VENV)/.torch: $(VENV)/.python constraints.txt
	@echo "environment: installing torch$(if $(TORCH_INDEX), (also from $(TORCH_INDEX))) - the largest part"
	@$(BIN)/python $(INSTALL) $(TORCH_QUIET) -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	@echo "environment: installing peftmux with what it runs and trains on"
	@$(BIN)/python $(INSTALL) -qq -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	@echo "environment: installing peftmux with its test and lint tools"
	@$(BIN)/python $(INSTALL) -qq -c constraints.txt -e '.[train,test,dev]'
	@touch $(VENV)/.run $@

# The generator is older than protobuf here on purpose (see protos/generate.py), so it has an environment of its own.
$(VENV)/.protos: $(VENV)/.python protos/generate.py
	@echo "environment: installing the proto generator"
	@$(PYTHON) -m venv --clear $(VENV)/protos
	@$(VENV)/protos/bin/python $(INSTALL) -qq grpcio-tools==$$(sed -n 's/^GENERATOR = "\(.*\)"$$/\1/p' protos/generate.py)
	@touch $@
