# `make demo`, `make test` and `make test-xla` do everything. Each makes its environment first.

# Every rank would compile every module again where this is set.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

# As tests/conftest.py has it.
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/extensions
DEVICES ?= 2

# torch-xla needs another torch. The two and what tests need take 7 GB, which the checkouts of a user
# share; an environment of this checkout looks into it.
XLA_PINS  := $(shell { cat constraints-xla.txt; sed -n '/^dependencies/,/^.project.entry/p' \
	pyproject.toml; } | cksum | cut -d ' ' -f 1)
XLA_BASE  ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/torchweft/xla-$(XLA_PINS)
XLA_VENV  ?= .venv-xla

.PHONY: demo services test test-xla test-gpu lint types fast env env-xla extensions clean

demo: $(VENV)/.installed
	$(BIN)/torchweft run --accelerator cpu --devices $(DEVICES) --strategy ddp examples/digits/train.py

# Schedulers that tests start for themselves, from Debian's packages; as root.
services:
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends slurm-wlm munge openmpi-bin iproute2

# Two at a time, those of a class or a module by one: they share what takes long to make.
test: lint types extensions
	$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder

# What needs torch-xla; and the core beside the oldest torch that it serves, but for what compiles
# and runs the pages of the documentation.
test-xla: $(XLA_VENV)/.installed
	$(XLA_VENV)/with/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder tests/xla
	$(XLA_VENV)/without/bin/python -m pytest -n 2 --dist loadscope tests/core \
		--ignore tests/core/test_author_docs.py --ignore tests/core/test_cli_new.py

# What needs a GPU; skipped with a reason where there is none.
test-gpu: $(VENV)/.installed
	$(BIN)/pytest -m gpu

# Without the tests that start many processes.
fast: $(VENV)/.installed
	$(BIN)/pytest -n 2 --dist loadscope tests/core tests/cuda tests/contract

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=plugins/xla $(BIN)/lint-imports

types: $(VENV)/.installed
	$(BIN)/mypy

env: $(VENV)/.installed

env-xla: $(XLA_VENV)/.installed

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
		-e plugins/cuda -e plugins/deepspeed -e plugins/ray
	touch $@

# Named after what decides its content. Made aside and renamed: another checkout may make it too.
$(XLA_BASE)/.installed:
	mkdir -p $(dir $(XLA_BASE))
	rm -rf $(XLA_BASE).$$PPID && $(PYTHON) -m venv $(XLA_BASE).$$PPID
	$(XLA_BASE).$$PPID/bin/python -m pip install --quiet -c constraints-xla.txt torch torch-xla
	$(XLA_BASE).$$PPID/bin/python -m pip install --quiet -c constraints-xla.txt ".[dev]"
	$(XLA_BASE).$$PPID/bin/python -m pip uninstall --quiet --yes torchweft
	touch $(XLA_BASE).$$PPID/.installed
	rm -rf $(XLA_BASE) && mv $(XLA_BASE).$$PPID $(XLA_BASE)

# Two that look into it: with torchweft-xla, and without.
$(XLA_VENV)/.installed: | $(XLA_BASE)/.installed
$(XLA_VENV)/.installed: pyproject.toml $(wildcard plugins/*/pyproject.toml)
	for name in with without; do \
		$(PYTHON) -m venv $(XLA_VENV)/$$name && \
		echo $(XLA_BASE)/lib/python*/site-packages \
			> $$(echo $(XLA_VENV)/$$name/lib/python*/site-packages)/shared.pth && \
		$(XLA_VENV)/$$name/bin/python -m pip install --quiet --no-deps -e . -e plugins/cuda \
			&& { echo "#!$(abspath $(XLA_VENV))/$$name/bin/python"; \
			echo "if __name__ == '__main__':"; \
			echo "    import sys, pytest; sys.exit(pytest.main())"; } > $(XLA_VENV)/$$name/bin/pytest \
			&& chmod +x $(XLA_VENV)/$$name/bin/pytest || exit 1; \
	done
	$(XLA_VENV)/with/bin/python -m pip install --quiet --no-deps -e plugins/xla
	touch $@

clean:
	rm -rf $(VENV) $(XLA_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
