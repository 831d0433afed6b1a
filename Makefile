# The two commands: `make run` and `make test`. Both set up what they need first.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
CMD ?=

.PHONY: setup run test vmtest soak fuzz lint bench clean
setup: $(VENV)/.ready
	@$(PY) -m kernel.native.build

# System packages first: a compiler for the C parts, and the programs that the demonstration and the tests run.
$(VENV)/.ready: pyproject.toml tools/system-packages
	@tools/system-packages
	@tools/make-venv $(VENV)
	@touch $@

run: setup
	@$(PY) -m sylvie.demo $(if $(CMD),-- $(CMD))

test: setup
	tools/run-tests $(PY)

# In an emulated machine with two NUMA nodes and the oldest kernel that Sylvie runs on.
vmtest: setup
	@tools/system-packages vm
	$(PY) tests/vm/run.py

soak: setup
	$(PY) -m pytest -m soak --timeout 3600

# The gateway's C half under random inputs, for so long; 0: without end. New inputs are kept in build/fuzz/corpus.
SECONDS ?= 60
fuzz: setup
	tests/fuzz/run $(SECONDS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: setup
	@$(PY) -c 'import matplotlib' 2>/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(PY) -m bench

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -f kernel/_sylvie*.so kernel/native/libsylvie.so kernel/native/sylvie-launch kernel/native/sylvie-keeper
