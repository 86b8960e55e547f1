# From a fresh clone: `make demo` and `make test` set up .venv, build the native code and run. Only packages are downloaded.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -q --no-compile -c constraints.txt
SANITIZED := build/sanitize

.PHONY: demo test test-all bench lint sanitize venv build clean

demo: build  ## the digits example: a table, and the path of a picture
	$(PY) examples/digits.py

test: build  ## every lane but the slow cases; under ten minutes on two cores
	$(PY) tests/run_lanes.py

test-all: build  ## the slow cases too
	$(PY) tests/run_lanes.py --slow

bench: build  ## every kernel beside its peers, then the step and inference; writes benchmarks/results/
	@for file in benchmarks/bench_*.py benchmarks/host_overhead.py benchmarks/a100_1024.py; do $(PY) $$file || exit 1; done

lint: venv
	$(PY) -m ruff check .
	$(PY) -m mypy

# AddressSanitizer and UBSan: a build of its own, the tests of the C++ kernels against it; every finding is fatal.
sanitize: venv
	$(PY) tests/run_lanes.py --only sanitizers

venv: $(VENV)/installed

# torch comes first and pinned, so that nothing else chooses one; the native code is left to `build`.
$(VENV)/installed: constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit("make: Python 3.11 or newer is needed for the pinned versions (make PYTHON=python3.12), got " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) setuptools wheel pybind11 ninja
	TWINFLOW_BUILD_NATIVE=0 $(PIP) --no-build-isolation -e '.[dev]'
	touch $@

build: venv
	$(PY) setup.py -q build_ext --inplace

clean:
	rm -rf build dist *.egg-info twinflow_kernels/_C*.so
