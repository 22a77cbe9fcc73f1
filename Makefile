# Every target works in .venv, which `make setup` builds in this checkout from Python alone.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
ENV := $(VENV)/.installed
STUBS := phalanx/v1/__init__.py
MODEL := .phalanx/demo-model
API_BASELINE := protos/public.txtpb

comma := ,

.DEFAULT_GOAL := help
.PHONY: help setup demo up down test sim chaos lint api-baseline fmt generated bench bench-engine gpu-check profile clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(ENV) $(STUBS) ## Build .venv with everything in it

demo: setup ## Kill an engine during a stream, and compare its tokens with the undisturbed run
	$(BIN)/phalanx demo --model $(MODEL)

up: setup $(MODEL) ## Serve the demo model as `demo` from two replicas on this machine, until Ctrl-C
	$(BIN)/phalanx up --model $(MODEL) --name demo --replicas 2

down: setup ## Stop what `make up` or `phalanx up` started
	$(BIN)/phalanx down

test: lint ## Lint, then run every test, as many at a time as there are cores (PYTEST="-k name" ...)
	$(BIN)/python -m pytest -n logical $(PYTEST)

sim: setup ## Simulate a whole cluster, with faults, for SEEDS= seeds (20000) on all cores; find the planted bugs
	$(BIN)/python -m tests.sim --bugs --seeds $(or $(SEEDS),20000)

chaos: setup $(MODEL) ## Inject every fault into a cluster under load; figures in .phalanx/chaos (SEED=, REPETITIONS=)
	$(BIN)/python -m pytest -m long
	$(BIN)/python -m tests.chaos --model $(MODEL) --shuffle --seed $(or $(SEED),0) \
		--repetitions $(or $(REPETITIONS),3) --report .phalanx/chaos

lint: setup ## Style, types, import rules, protos; refuse a public API that breaks its clients
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf breaking --against $(API_BASELINE)

api-baseline: setup ## Accept the public API in protos/phalanx/v1: from now on `make lint` compares it with this version
	$(BIN)/buf build --path protos/phalanx/v1 --exclude-source-info --output $(API_BASELINE)

fmt: setup ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generated: $(ENV) ## Generate phalanx/v1 and phalanx/internal/v1 from protos/, compile the C++ of engine/kernels
	$(BIN)/python hatch_build.py

bench: setup ## List the measurements and how to run them
	@grep -l '__main__' bench/*.py | xargs awk -F '"""' 'FNR == 1 {split(FILENAME, part, /[\/.]/); \
		printf "  $(BIN)/python -m bench.%s: %s\n", part[2], $$2}'

bench-engine: setup ## Measure the engine beside transformers and vLLM (VLLM_PYTHON=...); TRACE=... adds mixed traffic
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -m bench.engine $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON))
	$(BIN)/python -m bench.engine --only phalanx phalanx@int8 phalanx@int4 --shapes 1.1b --batches 1 --prefill-prompts
	$(BIN)/python -m bench.pipeline --shapes 1.1b
	$(BIN)/python -m bench.products
	$(BIN)/python -m bench.quality
	$(BIN)/python -m bench.latency $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON))
	$(if $(TRACE),$(BIN)/python -m bench.mixed --trace $(TRACE) $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON)))

# GPU_PYTHON=python3 uses the torch and pytest of a host on which nothing can be installed.
GPU_RUN := $(or $(GPU_PYTHON),$(BIN)/python)
GPU_TESTS := $(if $(GPU_PYTHON),-c /dev/null --rootdir=. --confcutdir=tests/gpu --import-mode=importlib) \
	-o timeout=300 $(or $(TESTS),tests/gpu)

gpu-check: $(if $(GPU_PYTHON),,setup) ## On a GPU: check kernels and models in every layout, measure speed (GPU="--only decode ...")
	failed=0; $(GPU_RUN) -m pytest $(GPU_TESTS) || failed=1; $(GPU_RUN) -m bench.gpu $(GPU) && exit $$failed

profile: $(if $(GPU_PYTHON),,setup) ## Profile steps: a timeline and GB/s of each kernel in .phalanx/profile (PROFILE="--batch 1 ...")
	$(GPU_RUN) -m bench.profile $(PROFILE)
	$(if $(shell command -v nsys),nsys profile --force-overwrite=true -t cuda$(comma)nvtx -o .phalanx/profile/nsight \
		$(GPU_RUN) -m bench.profile --ranges-only $(PROFILE))

clean: ## Remove everything that the other targets made
	rm -rf $(VENV) .phalanx phalanx/v1 phalanx/internal/v1 engine/kernels/*.so

$(ENV): pyproject.toml hatch_build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Phalanx needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Building $(VENV): a minute or two'
	$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -e '.[dev]'
	@# Compile once, on all cores: every engine imports torch, even where PYTHONDONTWRITEBYTECODE is set.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@ $(STUBS)

$(STUBS): $(ENV) $(wildcard protos/phalanx/*/*.proto protos/phalanx/*/*/*.proto engine/kernels/*.cpp engine/kernels/*.h)
	$(BIN)/python hatch_build.py > /dev/null

$(MODEL): | $(ENV) $(STUBS)
	$(BIN)/phalanx demo-model $@
