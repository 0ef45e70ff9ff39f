# gconv: build, test, demonstrate. `make help` lists the verbs.
#
# PYTHON (default python3) is used as it is when it imports torch >= 2.11; otherwise .venv is made with pinned
# versions (.ci/environment.py). gconv itself is installed into build/site, so neither needs to be writable.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
ARGS ?=
PART ?= all
BUILD := $(CURDIR)/build
REPORT := $(CURDIR)/gconv-report
# Found once, on first use: the interpreter's path, with the packages of the test suite or of the demo alone.
PY = $(eval PY := $(shell $(PYTHON) .ci/environment.py $(if $(filter demo bench bench-models,$(MAKECMDGOALS)),demo,test)))$(or $(PY),$(error no usable Python, see the line above))
# Two makes in one checkout take turns; flock is part of util-linux and absent elsewhere.
LOCK := $(if $(shell command -v flock),flock $(BUILD)/.lock)
# Run from build/: started in the checkout, Python would import ./gconv instead of the installed package.
INSTALLED = cd $(BUILD) && PYTHONPATH=$(BUILD)/site:$(BUILD)/deps
PYTEST = $(PY) -m pytest --rootdir=$(CURDIR) -c $(CURDIR)/pyproject.toml
# A process per core with one thread each, where pytest-xdist is there; tests that are about threads set their number.
WORKERS = $(shell $(INSTALLED) $(PY) -c "import xdist" 2>/dev/null && echo "-n auto --maxprocesses 4 --dist worksteal")

LINTERS = PATH=$$PATH:$(dir $(PY)); type ruff clang-format >/dev/null || { echo "gconv: pip install ruff clang-format"; exit 1; }

.PHONY: help build cuda-build develop demo test bench bench-models rivals sanitize aarch64-check triton-aot cuda-check gpu lint format clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build the extension and install gconv into build/site
	@mkdir -p $(BUILD)
	@echo "gconv: building with $(PY) (from nothing about three minutes on 2 cores)"
	@$(LOCK) .ci/install $(PY) $(BUILD)/site

cuda-build: ## build with the CUDA C++ kernels too, for every GPU or TORCH_CUDA_ARCH_LIST; needs nvcc, no GPU
	@GCONV_CUDA=1 $(MAKE) build
	@$(INSTALLED) $(PY) -c "import torch; from gconv import gpu; missing = gpu.missing_cuda(); \
	  print('gconv: beside torch', torch.__version__, '(CUDA', (torch.version.cuda or 'none') + '):', \
	  missing or 'gconv._cuda loads, for ' + ', '.join(gpu.architectures())); raise SystemExit(bool(missing))"

develop: ## install gconv into the Python in use in editable form, extension built in the checkout
	@mkdir -p $(BUILD)
	@$(LOCK) $(PY) -m pip install --no-build-isolation --no-deps -e .

demo: build ## train on real digits beside stock PyTorch, time the layers of ResNeXt-50, write one HTML page
	@$(INSTALLED) $(PY) -m gconv.bench demo --out $(REPORT) $(ARGS)

test: build ## run the whole test suite
	@$(INSTALLED) OMP_NUM_THREADS=1 $(PYTEST) $(WORKERS) $(ARGS) $(CURDIR)/tests

bench: build ## time the layers (ARGS passes options on)
	@$(INSTALLED) $(PY) -m gconv.bench layers --out $(REPORT) $(ARGS)

bench-models: build ## time whole networks: inference and training steps (ARGS passes options on)
	@$(INSTALLED) $(PY) -m gconv.bench models --out $(REPORT) $(ARGS)

rivals: ## add onnxruntime and OpenVINO to build/deps: the benchmark then compares with them too
	@mkdir -p $(BUILD)
	@$(PYTHON) .ci/environment.py rivals >/dev/null

sanitize: ## run the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@mkdir -p $(BUILD)
	@$(PY) tests/build_numpy_binding.py --sanitize --run $(ARGS)

aarch64-check: ## cross-compile the kernels for aarch64 and run their self-check under qemu
	@$(PYTHON) tests/aarch64_check.py

triton-aot: ## compile every configuration of the Triton kernels for sm_80 and sm_90, without a GPU
	@mkdir -p $(BUILD)
	@cd $(BUILD) && GCONV_FALLBACK=silent PYTHONPATH=$(CURDIR):$(BUILD)/deps $(PY) $(CURDIR)/tests/triton_aot.py $(ARGS)

cuda-check: ## compile the CUDA kernels for sm_80 and sm_90a with nvcc: registers, shared memory, spills; no GPU
	@mkdir -p $(BUILD)
	@cd $(BUILD) && GCONV_FALLBACK=silent PYTHONPATH=$(CURDIR):$(BUILD)/deps $(PY) $(CURDIR)/tests/cuda_check.py $(ARGS)

gpu: ## on a machine with a GPU: test the CUDA and Triton kernels, then time them (PART=tests|kernels|layers|models)
	@mkdir -p $(BUILD)
	@architectures=$${TORCH_CUDA_ARCH_LIST:-$$($(PYTHON) .ci/gpu.py check)}; test -n "$$architectures"; \
	  if command -v nvcc >/dev/null; then goal=cuda-build; else goal=build; fi; \
	  TORCH_CUDA_ARCH_LIST=$$architectures $(MAKE) $$goal PYTHON=$(PYTHON)
	@$(INSTALLED) $(PY) $(CURDIR)/.ci/gpu.py $(PART)

lint: ## check style with ruff and clang-format
	@$(LINTERS); ruff check . && ruff format --check .
	@$(LINTERS); clang-format --dry-run -Werror $$(git ls-files '*.h' '*.inc' '*.cpp' '*.cu')

format: ## rewrite the sources in the house style
	@$(LINTERS); ruff check --fix . && ruff format .
	@$(LINTERS); clang-format -i $$(git ls-files '*.h' '*.inc' '*.cpp' '*.cu')

clean: ## remove what was built (.venv stays)
	@rm -rf build dist *.egg-info gconv/*.so gconv-report
