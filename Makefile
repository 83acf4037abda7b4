# Every target sets up what it needs: `make demo`, `make test` (minutes), `make test-all` (all there is, an hour or more),
# `make bench`, `make accuracy`, and `make gpu` on a GPU machine.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cuh csrc/*/*)
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
#: object files, so that the tests of building do not compile again what the set-up has compiled
export TOKENOPS_BUILD_CACHE ?= $(CURDIR)/build/objects

.PHONY: demo test test-all check mutants resources bench accuracy gpu clean

demo: $(READY)
	$(BIN)/python -m tokenops demo

test: $(READY) check
	$(PYTEST) -m "not slow" tests

test-all: $(READY) check
	$(PYTEST) --durations=30 tests
	$(MAKE) mutants resources

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

mutants: $(READY)
	$(BIN)/python tests/mutants/run.py --jobs $(WORKERS)

bench: $(READY)
	$(BIN)/python -m pytest -q benchmarks
	$(BIN)/python benchmarks/report.py

accuracy: $(READY)
	$(BIN)/python benchmarks/accuracy.py

# compiles every kernel for every architecture, on all cores and without a GPU
resources: $(READY)
	$(BIN)/python benchmarks/resources.py

# torch first, so that the compiled code is built against the one that runs it and is not fetched a second time
$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.11" numpy "setuptools>=70.1" wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

# On a GPU machine, offline, with the python and torch that are there; `make gpu GPU_PARTS="build test"` runs a part.
GPU_PYTHON ?= python3
GPU_OUT ?= out/gpu
GPU_PARTS ?= build test sanitize bench
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py --out $(GPU_OUT) $(GPU_PARTS)

clean:
	rm -rf $(VENV) build dist out *.egg-info tokenops/*.so tokenops/_build_info.json
