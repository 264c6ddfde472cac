# make demo | test | lint | format | bench | clean        Needs python3 with venv, g++ and make; the rest comes as wheels.
PYTHON ?= python3
VENV = .venv
DEMO_OUT ?= runs/demo
BUILD := build/extension
MPICH_VENV ?= .venv-mpich
# Warnings are errors for who develops; not for who tries the demo, with whichever compiler.
WERROR ?= 1
demo: WERROR = 0
# Tests run two at a time, but one folder's jobs of several ranks do not; 0: all in one process, as a debugger wants.
PYTEST_WORKERS ?= 2
FUZZ_SECONDS ?= 60
SANITIZE_BUILD := build/sanitize
SANITIZED := ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 UBSAN_OPTIONS=print_stacktrace=1
ASAN_RUNTIMES = $(shell gcc -print-file-name=libasan.so) $(shell gcc -print-file-name=libubsan.so) \
    $(shell gcc -print-file-name=libstdc++.so)
SANITIZE_TESTS := $(addprefix tests/unit/test_, pack_gradients.py unpack_gradients.py squared_norms.py lars_update.py \
    sgd_update.py sample_layers.py project_probabilities.py update_probabilities.py malformed_calls.py) tests/fuzz

# CMake and pytest share the work out by themselves; two pips in one environment would spoil it.
.NOTPARALLEL:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.PHONY: help demo test build-tests test-cpp test-python test-faults test-mutations test-sanitize fuzz test-gpu bench-gpu
.PHONY: lint format bench clean clean-all
.DEFAULT_GOAL := help

# Of a path with a space abspath makes two.
VENV_PYTHON = $$(realpath -s $(VENV))/bin/python
export PATH := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(VENV)/bin/python -m pip install -qq -c constraints.txt
JOBS := $(shell nproc 2>/dev/null || echo 2)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)
unexport CMAKE_GENERATOR

NATIVE_SOURCES := $(shell find csrc jointspar_ext -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt cmake/cuda.cmake cmake/keep_log.sh
CPP_FILES = $(shell find csrc jointspar_ext tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

help:
	@echo "make demo     train with JointSpar-LARS on 2 MPI ranks, results in $(DEMO_OUT)"
	@echo "make test     build, then run the C++ and the Python tests"
	@echo "make test-faults     inject faults into jobs under Open MPI and MPICH (FAULTS_ARGS='--scale 0.1': a tenth)"
	@echo "make test-mutations  take checks out, one by one, and see that tests notice"
	@echo "make test-sanitize   C++ and operation tests under AddressSanitizer and UBSan"
	@echo "make fuzz     random arguments, headers and files for FUZZ_SECONDS=60"
	@echo "make lint     ruff, mypy, clang-format; changes nothing"
	@echo "make format   rewrite the sources as lint wants them"
	@echo "make bench    measure the operations, backward and whole iterations (bench/README.md)"
	@echo "make test-gpu, make bench-gpu    test or measure on a GPU, with PYTHON as it is: see CONTRIBUTING.md"
	@echo "make clean    remove builds and caches; keeps $(VENV) and runs/ (clean-all: not $(VENV))"

# --- set-up: each stamp stands for one finished step ------------------------------------------------------------------
# torch first and alone, so that no other requirement decides which build of it is taken.
$(VENV)/.stamp-base: constraints.txt
	@echo "== $(VENV): torch and the build tools"
	@$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) setuptools wheel pybind11 cmake ninja numpy
	@touch $@

$(VENV)/.stamp-project: $(VENV)/.stamp-base $(BUILD_FILES) $(NATIVE_SOURCES)
	@echo "== $(VENV): jointspar, compiled and installed editable, with MPI"
	@JOINTSPAR_BUILD_DIR="$(CURDIR)/$(BUILD)" JOINTSPAR_WERROR=$(WERROR) $(PIP) --no-build-isolation -e '.[mpi,train]'
	@touch $@

# The project is installed by now, so its extras resolve from it without another build.
$(VENV)/.stamp-extra-%: $(VENV)/.stamp-base pyproject.toml | $(VENV)/.stamp-project
	@echo "== $(VENV): packages of the extra [$*]"
	@$(PIP) 'jointspar[$*]'
	@touch $@

# --- what you came for ------------------------------------------------------------------------------------------------
demo: $(VENV)/.stamp-project
	@echo "== demo: training, results in $(DEMO_OUT)"
	@$(VENV)/bin/python -m jointspar.training.demo --out $(DEMO_OUT)

test: test-cpp test-python

# What the C++ tests are, and what Python tests load of them.
build-tests: $(VENV)/.stamp-project
	@echo "== C++ tests: compiled"
	@cmake -S . -B $(BUILD) -G Ninja -DJOINTSPAR_BUILD_TESTS=ON -DJOINTSPAR_WERROR=$(WERROR) \
	    -DPython_EXECUTABLE="$(VENV_PYTHON)" > /dev/null
	@cmake --build $(BUILD) --target cpp_tests -- --quiet

test-cpp: build-tests
	@echo "== C++ tests"
	@ctest --test-dir $(BUILD) --output-on-failure --no-tests=error | tail -n +2

test-python: build-tests $(VENV)/.stamp-extra-test
	@echo "== Python tests"
	@JOINTSPAR_REQUIRE_MPI=1 $(VENV)/bin/python -m pytest tests -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

# MPICH lives in an environment of its own, which sees the packages of the first one behind its own.
$(MPICH_VENV)/.stamp: $(VENV)/.stamp-project
	@echo "== $(MPICH_VENV): MPICH"
	@$(VENV)/bin/python -m venv $(MPICH_VENV)
	@$(MPICH_VENV)/bin/python -m pip install -qq -c constraints.txt mpi4py mpich
	@$(VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])' > \
	    "$$($(MPICH_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/first-environment.pth"
	@touch $@

test-faults: $(VENV)/.stamp-project $(VENV)/.stamp-extra-test
	@echo "== faults: checkpoints, Open MPI, MPICH; counts in tests/faults/REPORT.md"
	@$(VENV)/bin/python tests/faults/checkpoints.py $(FAULTS_ARGS)
	@$(VENV)/bin/python tests/faults/campaign.py --name "Open MPI" $(FAULTS_ARGS)
	@if $(MAKE) $(MPICH_VENV)/.stamp; then PATH="$$(realpath $(MPICH_VENV))/bin:$$PATH" $(MPICH_VENV)/bin/python \
	    tests/faults/campaign.py --name MPICH $(FAULTS_ARGS); \
	  else echo "== faults: MPICH skipped, since it could not be installed"; fi

test-mutations: $(VENV)/.stamp-project $(VENV)/.stamp-extra-test
	@$(VENV)/bin/python tests/faults/mutations.py --out tests/faults

# leaks are not looked for: the interpreter never frees all of its memory.
test-sanitize: $(VENV)/.stamp-project $(VENV)/.stamp-extra-test
	@echo "== C++ and operation tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@cmake -S . -B $(SANITIZE_BUILD) -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DJOINTSPAR_SANITIZE=address,undefined \
	    -DJOINTSPAR_BUILD_TESTS=ON -DJOINTSPAR_WERROR=ON -DJOINTSPAR_CUDA_EXT=0 -DPython_EXECUTABLE="$(VENV_PYTHON)" \
	    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$(CURDIR)/$(SANITIZE_BUILD)/jointspar_ext" > /dev/null
	@cmake --build $(SANITIZE_BUILD) -- --quiet
	@cp python/jointspar_ext/__init__.py $(SANITIZE_BUILD)/jointspar_ext
	@$(SANITIZED) ctest --test-dir $(SANITIZE_BUILD) --output-on-failure --no-tests=error | tail -n +2
	@$(SANITIZED) LD_PRELOAD="$(ASAN_RUNTIMES)" PYTHONPATH="$(CURDIR)/$(SANITIZE_BUILD)" JOINTSPAR_BACKEND=native \
	    $(VENV)/bin/python -m pytest -o pythonpath="$(SANITIZE_BUILD) python tests tests/fuzz" -p no:cacheprovider -q \
	    $(SANITIZE_TESTS) -k "not numba and not reference" $(PYTEST_ARGS)

fuzz: $(VENV)/.stamp-project
	@$(VENV)/bin/python tests/fuzz/fuzz.py --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

lint: $(VENV)/.stamp-project $(VENV)/.stamp-extra-dev $(VENV)/.stamp-extra-test
	@ruff check .
	@ruff format --check --quiet .
	@mypy
	@clang-format --dry-run -Werror $(CPP_FILES)
	@echo "== lint: clean"

format: $(VENV)/.stamp-extra-dev
	@ruff check --fix --quiet . || true
	@ruff format --quiet .
	@clang-format -i $(CPP_FILES)

bench: $(VENV)/.stamp-project $(VENV)/.stamp-extra-bench
	@for what in ops backward step; do $(VENV)/bin/python -m jointspar bench $$what || exit 1; done

# On a GPU: PYTHON as it is, nothing installed and nothing fetched; what it lacks may be wheels in the folder WHEELS.
test-gpu:
	@PYTHONPATH=.:$${PYTHONPATH:-} $(PYTHON) tests/cuda/run.py $(if $(WHEELS),--wheels '$(WHEELS)') $(GPU_ARGS)

bench-gpu:
	@$(PYTHON) -m bench.gpu.run $(if $(WHEELS),--wheels '$(WHEELS)') $(GPU_ARGS)

clean:
	@rm -rf build dist python/*.egg-info {python/,}jointspar_ext/_c*.so jointspar_ext/__pycache__ .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@rm -f $(VENV)/.stamp-project
	@find python tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean
	@rm -rf "$(VENV)" "$(MPICH_VENV)"
