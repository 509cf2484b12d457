# Two commands do everything: 'make demo' and 'make test'. Both set up .venv first.
PYTHON ?= python3
TEST_PROCESSES ?= 2
BIN := .venv/bin
READY := .venv/.ready
READY_DOCS := .venv/.ready-docs
SITE := build/site

.PHONY: demo test check lint types docs clean

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

# The site, from docs/ and the code, without a network. Links to other sites are listed in build/external-links.txt.
docs: $(READY_DOCS)
	$(BIN)/python -m sphinx -b html -W --keep-going -n -q docs $(SITE)
	$(BIN)/python -m tools.check_site $(SITE) --external > build/external-links.txt || (cat build/external-links.txt; false)
	@echo "$(SITE)/index.html"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kdpipe needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

$(READY_DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $(READY_DOCS)

clean:
	rm -rf .venv demo-out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
