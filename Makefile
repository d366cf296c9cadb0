PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-quick faults coverage bench check docs package venv

demo: $(INSTALLED)  ## pre-train and fine-tune a small network three ways (about a minute)
	$(BIN)/python -m fts_examples.digits

test: $(INSTALLED)  ## all tests, two at a time
	$(BIN)/python -m pytest -n 2

test-quick: $(INSTALLED)  ## the core's tests and some of each other folder (under a minute)
	$(BIN)/python -m pytest -n 2 -m quick

faults: $(INSTALLED)  ## kill a run 100 times and resume it (up to 10 minutes)
	$(BIN)/python -m tests.faults.kill_loop --kills 100 --seconds 600

coverage: $(INSTALLED)  ## all tests with branch coverage: a report, with the lines and branches of the core that no test reaches
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n 2
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --omit='*/core/*'
	$(BIN)/python -m coverage report --include='*/core/*'

bench: $(INSTALLED)  ## measure every row of benchmarks/README.md and write its table again
	$(BIN)/python benchmarks/run.py

check: $(INSTALLED)  ## lint, format, types, import directions, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell

docs: $(INSTALLED)  ## the documentation, as docs/_build/index.html, and a look whether its links lead anywhere
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs docs/_build
	$(BIN)/linkchecker --no-status docs/_build/index.html

package:  ## sdist and wheel in dist/, the wheel tried in a fresh environment
	rm -rf dist build/tools build/trial
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet --disable-pip-version-check build
	build/tools/bin/pyproject-build
	$(PYTHON) -m venv build/trial
	build/trial/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	build/trial/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	cd build && trial/bin/python -W error -c "import finetuning_scheduler as package; print(package.__version__, package.PhaseRunner)"
	cd build && trial/bin/python -c "from finetuning_scheduler import FinetuningScheduler; print(FinetuningScheduler())"

venv: $(INSTALLED)

# torch comes first and by exact version, so that no other package's requirement can pick another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(PIP_INSTALL) --constraint constraints.txt --editable '.[dev,docs,examples]'
	touch $@
