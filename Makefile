# make demo    train a VAE on handwritten digits; says where the pictures are
# make test    the whole test suite
# Both make what they need: a virtual environment in .venv, torch, the extension.
#
# TORCH=torch==2.13.0 make test   chooses the torch; by default pip does.

PYTHON ?= python3
TORCH ?= torch>=2.10
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP_SOURCES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

.PHONY: demo test build torch lint format wheel sass gpu-check tsan clean
.NOTPARALLEL:
.DEFAULT_GOAL := test

demo: build-vae
	$(BIN)/fused-vae train --overwrite
	@echo; echo 'What it learned, and why it works, in a browser:'
	@$(BIN)/fused-vae report runs/mnist

test: build-test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

# An editable install with one of the extras of pyproject.toml. Run it again after a change of csrc/:
# only what changed is compiled. No build isolation: it would fetch a second torch for its headers.
build: build-test
build-%: torch
	@command -v $${CXX:-g++} >/dev/null || \
	  { echo "make: no C++ compiler. On Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	$(PIP) install --quiet --no-build-isolation --editable '.[$*]'
	@$(BIN)/python -m fused_elbo.env

torch: $(BIN)/python
	$(PIP) install --quiet '$(TORCH)' 'setuptools>=77'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: needs Python 3.10 or newer, and $(PYTHON) is not: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "make: $(PYTHON) lacks venv. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

lint: build-test,dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

format: build-test,dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

# build/lib* would carry modules that have been deleted since into the wheel.
wheel: torch
	rm -rf build/lib* build/bdist* dist
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist

# What the compilers make of the GPU kernels, and the share of the roofline that this allows.
sass: build-test
	$(BIN)/python benchmarks/sass.py

# For whoever has a GPU: the suite on it, CUDA graphs, compute-sanitizer, benchmarks, share of a copy's bandwidth.
# GPU_CHECK=--quick make gpu-check   within eight minutes
gpu-check: build-test,bench
	$(BIN)/python -m benchmarks.gpu_check $(GPU_CHECK)

# The emulated CUDA kernels with a thread per CUDA thread, under ThreadSanitizer. Takes a minute.
tsan: build-test
	FUSED_ELBO_TSAN=1 $(BIN)/python -m pytest tests/cuda/test_sanitizers.py

clean:
	rm -rf build dist *.egg-info kernels/fused_elbo/*.so kernels/fused_elbo/_build_info.json
