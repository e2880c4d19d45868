# Needs python3 >= 3.11, pip and make. Everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# Long tests that say nothing about how moesim was installed, and those of the checkout's notebooks.
SAME := $(addprefix --ignore=tests/,policies sim test_conformance.py test_laws.py test_notebooks.py \
	real/test_account.py real/test_again.py real/test_engine.py real/test_forward.py \
	traces/test_fit.py traces/test_fuzz.py)

.PHONY: replay test bench lint format notebooks wheel clean

replay: $(VENV)/.run  ## replay the trace that ships with moesim
	$(BIN)/moesim replay --policy dali --cache-ratio 0.25 $(ARGS)

test: $(VENV)/.dev  ## run the tests; compiled code then checks its indices, too
	NUMBA_BOUNDSCHECK=1 $(BIN)/python -m pytest -n auto $(ARGS)

bench: $(VENV)/.dev  ## run the benchmarks, which assert counts and print times
	$(BIN)/python -m pytest -m bench -s benchmarks $(ARGS)

lint: $(VENV)/.dev  ## style, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests $(wildcard benchmarks examples)
	$(BIN)/lint-imports

format: $(VENV)/.dev  ## repair what can be repaired
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .

notebooks: $(VENV)/.dev  ## run the notebooks, and render them as pages of docs/notebooks
	rm -rf build/notebooks
	$(BIN)/python -m nbconvert --execute --to markdown --output-dir build/notebooks \
		--NbConvertBase.display_data_priority="['image/png', 'text/plain']" notebooks/*.ipynb
	rm -rf docs/notebooks
	mv build/notebooks docs/notebooks

wheel: $(VENV)/.dev  ## test what we ship: sdist -> wheel -> fresh venv, away from the checkout
	rm -rf build
	$(BIN)/python -m build --outdir build/dist .
	$(BIN)/python -m venv --without-pip build/venv
	$(BIN)/python -m pip --python build/venv/bin/python install --quiet --constraint constraints.txt --group test build/dist/*.whl
	cp -R tests build/tests
	cd build && NUMBA_BOUNDSCHECK=1 venv/bin/python -m pytest -n auto -c ../pyproject.toml --rootdir . tests $(SAME)

clean:
	rm -rf $(VENV) build dist .hypothesis .*_cache

# On Debian without the package python3-venv, venv cannot install pip; pip itself can.
$(VENV)/.pip:
	@test -d src/moesim/sim || { echo "src/moesim/sim is no link: check out with git -c core.symlinks=true, or install the wheel" >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"moesim needs Python 3.11 or newer; {sys.executable} is {sys.version}")'
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --without-pip $(VENV)
	$(BIN)/python -m pip --version || $(PYTHON) -m pip --python $(BIN)/python install pip
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"  # the first that knows --group
	touch $@

$(VENV)/.run: pyproject.toml $(VENV)/.pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: constraints.txt $(VENV)/.run
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@
