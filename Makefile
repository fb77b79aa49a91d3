# demo and test make an environment in .venv with the versions of constraints.txt; nothing else is
# needed than Python 3.10 to 3.13, a C++ compiler and make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

SUITABLE := import ensurepip, os, sys, sysconfig; include = sysconfig.get_path("include"); \
	sys.exit(not ((3, 10) <= sys.version_info[:2] <= (3, 13) and os.path.exists(include + "/Python.h")))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c '$(SUITABLE)' 2> /dev/null && command -v $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := setup.py pyproject.toml $(shell find csrc fastattn kernels -name '*.py' -o -name '*.cpp' \
	-o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.typed' -o -name '*.pyi')
CXX_SOURCES := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) $(wildcard $(addprefix tests/*/*,.cpp .h))

.PHONY: demo test lint format aot cuda bench bench-cpu sanitize sanitize-threads clean

# Run from inside .venv: here, the checkout's own fastattn would hide the installed one.
demo: $(VENV)/demo
	cd $(VENV) && bin/python -m fastattn demo --out '$(CURDIR)/fastattn-demo'

test: $(VENV)/dev
	cd tests && '$(CURDIR)/$(BIN)/pytest' -n auto --dist worksteal .

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# The Triton kernels, compiled for GPUs of every kind that CI holds them to: none is needed.
aot: $(VENV)/dev
	cd $(VENV) && bin/python -m fastattn.kernels.aot

# The CUDA kernels alike, by the system's nvcc or, where there is none, PyPI's.
cuda: $(VENV)/dev
	test -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" || command -v nvcc > /dev/null || \
		$(PIP) install -c constraints.txt 'fastattn[nvcc]'
	$(BIN)/python tests/cuda_report.py

bench: $(VENV)/dev
	cd bench && '$(CURDIR)/$(BIN)/pytest' .

bench-cpu: $(VENV)/dev
	cd bench && '$(CURDIR)/$(BIN)/python' cpu.py

# The ops' tests on kernels built with AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZERS := -fsanitize=address,undefined
sanitize: $(VENV)/dev
	CXXFLAGS='$(SANITIZERS) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1' \
		LDFLAGS='$(SANITIZERS)' $(BIN)/python setup.py -q build --build-base build/sanitize \
		--build-lib build/sanitize/lib
	cd tests && ASAN_OPTIONS=detect_leaks=0 PYTHONPATH='$(CURDIR)/build/sanitize/lib' \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		'$(CURDIR)/$(BIN)/python' -m pytest -s ops -k 'cpu and not compile and not opcheck'

# Every op from several threads, on kernels built with ThreadSanitizer. clang's OpenMP runtime tells
# it of its barriers (by libarcher); gcc's does not. Needs clang and its libomp-dev.
sanitize-threads: $(VENV)/dev
	CXX=clang++ CXXFLAGS='-fsanitize=thread -O1 -g1 -fno-omit-frame-pointer' \
		$(BIN)/python setup.py -q build \
		--build-base build/sanitize-threads --build-lib build/sanitize-threads/lib
	cd tests && TSAN_OPTIONS=ignore_noninstrumented_modules=1 OMP_NUM_THREADS=4 \
		OMP_TOOL_LIBRARIES="$$(dirname $$(realpath \
		$$(command -v clang++)))/../lib/libarcher.so" PYTHONPATH='$(CURDIR)/build/sanitize-threads/lib' \
		LD_PRELOAD="$$(c++ -print-file-name=libtsan.so)" \
		'$(CURDIR)/$(BIN)/python' -m pytest -s ops/test_threads.py -k 'not forked'

clean:
	rm -rf build dist *.egg-info $(VENV)

$(VENV)/made:
	@test -n '$(PYTHON)' || { echo "fastattn: make needs Python 3.10 to 3.13 with venv and its" \
		"headers (python3-venv, python3-dev) on PATH, or PYTHON=/path/to/python." >&2; exit 1; }
	'$(PYTHON)' -m venv $(VENV)
	touch $@

# The package first, by itself: a missing compiler shows before the large downloads.
$(VENV)/package: $(VENV)/made $(SOURCES)
	rm -rf build/lib* build/bdist*
	$(PIP) install --no-deps .
	touch $@

$(VENV)/demo: $(VENV)/package pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt 'fastattn[demo]'
	touch $@

$(VENV)/dev: $(VENV)/package pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt 'fastattn[dev]'
	touch $@ $(VENV)/demo
