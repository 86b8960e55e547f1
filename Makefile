# From a fresh clone: `make demo` and `make test` set up .venv, build the native code and run. Only packages are downloaded.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
INSTALL = $(PY) -m pip --disable-pip-version-check install -q --no-compile
CONSTRAINTS ?= constraints.txt
LIMIT ?= 0
TORCH ?= 2.14.1
unexport PYTHONDONTWRITEBYTECODE  # the tests start many processes: each would compile 5 s of imports anew
# $(call stage,WHAT,COMMAND): one line; what the command printed only where it failed.
stage = @echo "$(1)"; mkdir -p build; { $(2); } >build/setup.log 2>&1 || { cat build/setup.log; exit 1; }

.PHONY: demo test test-all test-torch bench lint sanitize venv build clean

demo: build  ## the digits example: a table, and the path of a picture
	@$(PY) examples/digits.py

test: build  ## every suite but the slow cases; eight minutes on two cores
	@$(PY) tests/run_suites.py --limit $(LIMIT)

test-all: build  ## the slow cases too
	@$(PY) tests/run_suites.py --slow

test-torch:  ## the CPU tests on another torch, in an environment of its own: make TORCH=2.14.1 test-torch
	@mkdir -p build
	@grep -v -E '^(torch|triton)==' constraints.txt >build/constraints-$(TORCH).txt
	@echo 'torch==$(TORCH)' >>build/constraints-$(TORCH).txt
	@$(MAKE) --no-print-directory VENV=.venv-$(TORCH) CONSTRAINTS=build/constraints-$(TORCH).txt build
	@.venv-$(TORCH)/bin/python tests/run_suites.py --only cpu

bench: build  ## every kernel beside its peers, then the step and inference; writes benchmarks/results/
	@for file in benchmarks/bench_*.py benchmarks/host_overhead.py benchmarks/a100_1024.py; do $(PY) $$file || exit 1; done

lint: venv
	$(PY) -m ruff check .
	$(PY) -m mypy

# AddressSanitizer and UBSan: a build of its own, the tests of the C++ kernels against it; every finding is fatal.
sanitize: venv
	@$(PY) tests/run_suites.py --only sanitizers

venv: $(VENV)/installed

# torch comes first and pinned, so that nothing else chooses one; the native code is left to `build`.
$(VENV)/installed: constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit("make: Python 3.11 or newer is needed for the pinned versions (make PYTHON=python3.12), got " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(call stage,$(VENV): torch,test -x $(PY) || $(PYTHON) -m venv $(VENV); $(INSTALL) -c $(CONSTRAINTS) $$(grep '^torch==' $(CONSTRAINTS)))
	$(call stage,$(VENV): what builds need,$(INSTALL) -c $(CONSTRAINTS) setuptools wheel pybind11 ninja)
	$(call stage,$(VENV): twinflow and its extras,TWINFLOW_BUILD_NATIVE=0 $(INSTALL) -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]')
	@touch $@

build: venv
	$(call stage,native code,$(PY) setup.py -q build_ext --inplace)

clean:
	rm -rf build dist *.egg-info twinflow_kernels/_C*.so
