# make demo   compress the embedded pipeline and show what was gained and lost
# make test   lint, types and tests
# Each alone makes .venv first (`make venv` does that alone): Python 3.11+ is all that must be there.

# The first interpreter that runs and is new enough; PYTHON=... on the command line chooses another.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
EXTRAS := compress,cpu,tensorrt-rtx,modelopt,dev
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint venv clean

demo: venv
	$(BIN)/diffpress demo

test: lint
	@: # a worker for each core; a library that took all cores in each would slow all of them
	@: # files as they come: those of few tests are the slow ones, and one would be left with them in the end
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: venv
	$(BIN)/ruff check
	$(BIN)/mypy

venv: $(STAMP)

# Written last: an install that was interrupted runs again, one that is complete runs only after a change of these files.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "diffpress needs Python 3.11 or newer: install one, or say make PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[$(EXTRAS)]" -c constraints.txt
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
