# Two commands do everything: 'make demo' and 'make test'. Both set up .venv first.
PYTHON ?= python3
TEST_PROCESSES ?= 2
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check lint types clean

demo: $(READY)
	$(BIN)/kdpipe demo

test: $(READY)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

check: lint types test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kdpipe needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv demo-out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
