# Two targets do everything: `make demo` and `make test`. Both make the environment first.

# Every rank would compile every module again where this is set.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

# As tests/conftest.py has it.
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/extensions
DEVICES ?= 2

.PHONY: demo test test-gpu lint types fast env extensions clean

demo: $(VENV)/.installed
	$(BIN)/torchweft run --accelerator cpu --devices $(DEVICES) --strategy ddp examples/digits/train.py

# Two at a time, those of a class or a module by one: they share what takes long to make.
test: lint types extensions
	$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder

# What needs a GPU; skipped with a reason where there is none.
test-gpu: $(VENV)/.installed
	$(BIN)/pytest -m gpu

# Without the tests that start many processes.
fast: $(VENV)/.installed
	$(BIN)/pytest -n 2 --dist loadscope tests/core tests/cuda tests/contract

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/mypy

env: $(VENV)/.installed

# DeepSpeed compiles its optimizer for the host at first use: once for an environment, and not while
# tests that wait for it are timed. Without a compiler they are skipped.
extensions: $(VENV)/.installed
	$(BIN)/python -m tests.deepspeed.locks
	$(BIN)/python -m tests.deepspeed.extensions

# torch comes first and pinned: whatever is installed after it must not pull another.
$(VENV)/.installed: pyproject.toml $(wildcard plugins/*/pyproject.toml) constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,examples]" \
		-e plugins/cuda -e plugins/deepspeed
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
