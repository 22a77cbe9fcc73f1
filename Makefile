# Every target works in .venv, which `make setup` builds in this checkout from Python alone.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
ENV := $(VENV)/.installed
STUBS := phalanx/v1/__init__.py
MODEL := .phalanx/demo-model

.DEFAULT_GOAL := help
.PHONY: help setup demo up down test lint fmt generated bench clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(ENV) $(STUBS) ## Build .venv with everything in it

demo: setup ## Kill an engine under a stream and compare its tokens with the undisturbed run
	$(BIN)/phalanx demo --model $(MODEL)

up: setup $(MODEL) ## Serve the demo model from two replicas on this machine, until Ctrl-C
	$(BIN)/phalanx up --model $(MODEL) --replicas 2

down: setup ## Stop what `make up` or `phalanx up` started
	$(BIN)/phalanx down

test: lint ## Lint, then run every test
	$(BIN)/python -m pytest

lint: setup ## Style, types, import rules and protos
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint

fmt: setup ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generated: $(ENV) ## Make phalanx/v1 from protos/ and the libraries of engine/kernels
	$(BIN)/python hatch_build.py

bench: setup ## List the measurements and how to run them
	@awk -F '"""' 'FNR == 1 {printf "  %s %s: %s\n", "$(BIN)/python", FILENAME, $$2}' bench/*.py

clean: ## Remove what the targets above made
	rm -rf $(VENV) .phalanx phalanx/v1 engine/kernels/*.so

$(ENV): pyproject.toml hatch_build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Phalanx needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Building $(VENV): a minute or two'
	$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -e '.[dev]'
	@touch $@ $(STUBS)

$(STUBS): $(ENV) $(wildcard protos/phalanx/v1/*.proto engine/kernels/*.cpp engine/kernels/*.h)
	$(BIN)/python hatch_build.py > /dev/null

$(MODEL): | $(ENV) $(STUBS)
	$(BIN)/phalanx demo-model $@
