# make demo: set up, then finetune beside live decode. make test: set up, then run the tests;
# make test-all: those that take longer too; make chaos: faults injected into a live server.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
UV_VERSION := 0.13.8
REQUIREMENTS ?= requirements/cpu.txt

# Where pip is told of a folder of wheels, uv finds the CPU build of torch there; elsewhere at PyTorch's own index.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
else ifeq ($(REQUIREMENTS),requirements/cpu.txt)
export UV_TORCH_BACKEND ?= cpu
endif

.PHONY: setup demo test test-all chaos lint ui lock

setup: $(VENV)/.installed

$(VENV)/.installed: $(REQUIREMENTS) pyproject.toml
	test -x $(UV) || { $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --quiet uv==$(UV_VERSION); }
	$(UV) pip install --quiet --no-deps -r $(REQUIREMENTS) -e .
	touch $@

demo: setup
	$(BIN)/harli profile --model small --budget-minutes 1
	$(BIN)/harli train-predictor --trials 10
	$(BIN)/harli run --policy qos --model small --slo-tpot-ms 80 --requests-per-s 0.6 --duration 60

test: setup
	$(BIN)/pytest -m "not slow"

test-all: setup
	$(BIN)/pytest -m "not chaos"

chaos: setup
	$(BIN)/pytest -m chaos tests/chaos

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: setup
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlruns/mlflow.db

lock: setup
	$(UV) pip compile --quiet --no-annotate --no-header --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	    --extra cpu --extra dev --override requirements/overrides.txt pyproject.toml -o requirements/cpu.txt
	env -u UV_TORCH_BACKEND $(UV) pip compile --quiet --no-annotate --no-header --python-version 3.12 \
	    --python-platform x86_64-manylinux_2_35 --extra cuda --extra dev pyproject.toml -o requirements/cuda.txt
