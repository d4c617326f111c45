# `make` or `make help` lists the targets. Set-up runs once per environment: a stamp file in it records that.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
MINUTES ?= 9

BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
SETUP_FILES := pyproject.toml setup.py constraints.txt
CPU_LIBRARY := fastattn/libfastattn_cpu.so
CPU_SOURCES := csrc/cpu setup.py fastattn/backends/cpu/library.py
# Of several installs into an environment the first compiles the CPU library. The others find it, and nothing newer.
CPU_IS_THERE = $(if $(shell find $(CPU_SOURCES) -newer $(CPU_LIBRARY) 2>/dev/null || echo none),,FASTATTN_BUILD_CPU=0)
CPU_WHERE_POSSIBLE = $(if $(shell command -v c++ g++ clang++),$(CPU_LIBRARY))

# Two more Tritons, that of the oldest supported PyTorch and the newest, for ahead-of-time compilation only. They are not
# on the path, so that nothing imports them by accident; the compile tests find them through these variables.
export FASTATTN_TRITON_3_6 = $(CURDIR)/.cache/triton-3.6.0
export FASTATTN_TRITON_3_9 = $(CURDIR)/.cache/triton-3.9.0
# A wheel fits one Python version: the stamp names that version, so another one installs anew.
TRITON_STAMP := .stamp-$(shell $(PYTHON) -c 'import sys; print(sys.implementation.cache_tag)')
TRITONS := $(FASTATTN_TRITON_3_6)/$(TRITON_STAMP) $(FASTATTN_TRITON_3_9)/$(TRITON_STAMP)

.DEFAULT_GOAL := help
.PHONY: help env test quick demo demo-quick demo-dates demo-charlm lint types docs compile-report resources ext ext-cpu sanitize arm dist \
	hub bench-overhead gpu-first gpu-check gpu-bench gpu-tune clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

env: $(VENV)/.stamp-dev  ## make .venv with the package (editable), test, example and lint tools

test: $(VENV)/.stamp-test $(TRITONS) $(CPU_WHERE_POSSIBLE)  ## install what the tests need and run them all
# One thread in each of the two processes: more would compete for the same cores.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

QUICK := tests/operator/test_spec.py tests/operator/test_errors.py tests/operator/test_reference.py \
	$(addprefix tests/kernels/test_forward.py::test_,rows_with_nothing_allowed dropout everything_masked any_scale \
	causal_with_an_offset_per_batch_entry) \
	tests/kernels/test_backward.py::test_backward_of_a_batch_entry_does_not_depend_on_the_others \
	tests/kernels/test_decode.py::test_terms

quick: $(VENV)/.stamp-test $(CPU_WHERE_POSSIBLE)  ## spec, errors, reference and some cases of the kernels, in two minutes on a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(QUICK) $(PYTEST_ARGS)

demo: $(VENV)/.stamp-examples  ## install and run the forecasting example
	@echo "The forecasting example: about five minutes on two cores. make demo-quick takes about one."
	$(BIN)/python -m examples.forecast

demo-quick: $(VENV)/.stamp-examples  ## the same with one seed and two series, in about a minute
	@echo "The forecasting example, quick: about a minute on two cores."
	$(BIN)/python -m examples.forecast --quick

demo-dates: $(VENV)/.stamp-examples  ## install and run the date translation example
	@echo "Dates: about a minute on one core."
	$(BIN)/python -m examples.dates

demo-charlm: $(VENV)/.stamp-examples  ## install and run the character language model on Alice in Wonderland
	@echo "Characters: two models, about three minutes on one core."
	$(BIN)/python -m examples.charlm --steps 1000

lint: $(VENV)/.stamp-dev  ## ruff: rules and layout
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.stamp-dev  ## pyright over fastattn, kernels, benchmarks, tests and examples
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.stamp-docs  ## the documentation site, into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

compile-report: $(VENV)/.stamp-test $(TRITONS)  ## compile every kernel for every target, no GPU needed
	$(BIN)/python -m benchmarks.tools.compile_report

resources: $(VENV)/.stamp-test $(TRITONS)  ## renew the table of what every kernel needs of a GPU, after a change to kernels/
	$(BIN)/python -m benchmarks.tools.resources --memory .cache/compiled

ext-cpu: $(CPU_LIBRARY)  ## compile csrc/cpu with a C++ compiler, in place; an install does so by itself

sanitize: $(VENV)/.stamp-test  ## the CPU kernels under ASan, UBSan and TSan, against plain loops
	$(BIN)/python -m pytest -q tests/cpu/test_sanitizers.py -k sanitizers

arm: $(VENV)/.stamp-test  ## the CPU kernels compiled for 64-bit ARM, on an emulated processor, against plain loops
	@command -v aarch64-linux-gnu-g++ >/dev/null && { command -v qemu-aarch64-static || command -v qemu-aarch64; } >/dev/null || \
		{ echo "make arm: expected aarch64-linux-gnu-g++ and qemu-aarch64, as of Debian's g++-aarch64-linux-gnu and qemu-user"; exit 1; }
	$(BIN)/python -m pytest -q tests/cpu/test_sanitizers.py -k arm

dist: $(VENV)/.stamp-test  ## sdist, and from it a wheel with the CPU library, into dist/; for every Python and every system as old as this
	rm -rf dist
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" >/dev/null
	FASTATTN_BUILD_CPU=1 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--wheel-dir dist dist/*.tar.gz

hub: $(VENV)/.stamp-test  ## what Hugging Face's `kernels` library loads, into build/hub; Python and Triton alone
	$(BIN)/python -m benchmarks.tools.hub build/hub

ext: fastattn/libfastattn_cuda.so  ## compile csrc/ with nvcc, in place; the operator works without it

bench-overhead: $(VENV)/.stamp-test  ## what a call costs over PyTorch's own function on a tiny input
	$(BIN)/python -m benchmarks overhead

# On a GPU machine: from the bare checkout with its own Python, nothing is installed. Results go to OUT, if that is set.
gpu-first:  ## on a GPU, first: does it start, is it right, how fast are the most telling rows, within MINUTES
	$(PYTHON) -m benchmarks.tools.gpu_first --minutes $(MINUTES)

gpu-check:  ## on a GPU: parity of every feature, races, determinism, sanitizer, within MINUTES
	$(PYTHON) -m benchmarks.tools.gpu_check --minutes $(MINUTES)

gpu-bench:  ## on a GPU: every benchmark against every peer, within MINUTES
	$(PYTHON) -m benchmarks all --minutes $(MINUTES)

gpu-tune:  ## on a GPU: search launch configurations, within MINUTES
	$(PYTHON) -m benchmarks.tools.gpu_tune --minutes $(MINUTES)

clean:  ## remove the environment, caches and build output
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks fastattn/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CPU_LIBRARY): $(wildcard csrc/cpu/*.cpp csrc/cpu/*.h) setup.py fastattn/backends/cpu/library.py | $(VENV)/.stamp-test
	FASTATTN_BUILD_CPU=1 $(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# With the bare PYTHON, as on a GPU machine: nothing but setuptools is needed. nvcc's own cost is seconds.
fastattn/libfastattn_cuda.so: $(wildcard csrc/cuda/*.cu csrc/cuda/*.cuh) setup.py fastattn/backends/cuda.py
	FASTATTN_BUILD_CUDA=1 $(PYTHON) setup.py --quiet build_ext --inplace

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# .stamp-test, .stamp-examples, .stamp-docs, .stamp-dev: the package with the extras of that name
$(VENV)/.stamp-%: $(SETUP_FILES) | $(BIN)/python
	$(CPU_IS_THERE) $(PIP) --constraint constraints.txt --editable ".[$*]"
	touch $@

$(CURDIR)/.cache/triton-%/$(TRITON_STAMP): | $(BIN)/python
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) triton==$*
	touch $@
