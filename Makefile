# Every target sets up what it needs: `make demo`, `make test` (minutes), `make test-all` (all there is, an hour),
# `make docs`, `make bench`, `make accuracy`, `make gpu` on a GPU machine, and `make gpu-rehearsal` before.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*)
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
#: object files, so that the tests of building do not compile again what the set-up has compiled
export TOKENOPS_BUILD_CACHE ?= $(CURDIR)/build/objects

.PHONY: demo test test-all check docs models mutants resources bench accuracy dist gpu gpu-rehearsal clean

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

docs: $(READY)
	$(BIN)/sphinx-build -W --keep-going --quiet -b html docs build/docs

# tries every architecture of tests/support/zoo with every method, and writes what became of it: supported.json of the
# package, and its section of docs/models.md; fails where something is open, or worked before
models: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m support.zoo

mutants: $(READY)
	$(BIN)/python tests/mutants/run.py --jobs $(WORKERS)

bench: $(READY)
	$(BIN)/python -m pytest -q benchmarks
	$(BIN)/python -m pytest -q benchmarks/bench_models.py --dtype bfloat16
	$(GPU) $(BIN)/python benchmarks/report.py

# Fashion-MNIST: hours; what is there already is not made again. ACCURACY=--quick: minutes
ACCURACY ?=
accuracy: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=benchmarks:examples $(BIN)/python -m accuracy $(ACCURACY)

# compiles every kernel for every architecture, on all cores and without a GPU; counts what the host does on a CPU
resources: $(READY)
	$(BIN)/python benchmarks/resources.py
	$(BIN)/python benchmarks/instructions.py

# the three files of a release in dist/, each tried in an empty environment; DIST_PYTHONS="/a/python /another/python"
# tries the wheels with those, of environments that have torch
DIST_PYTHONS ?=
dist: $(READY)
	PYTHONPATH=tests $(BIN)/python -m support.distributions $(DIST_PYTHONS)

# torch first, so that the compiled code is built against the one that runs it and is not fetched a second time
$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch>=2.11" numpy "setuptools>=70.1" wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

# On a GPU machine, offline, with the python and torch that are there: benchmarks/GPU.md. GPU_STEPS="facts smoke" runs
# some of its steps, GPU_RESUME=lines.jsonl leaves out what was found before.
GPU_PYTHON ?= python3
GPU_OUT ?= out/gpu
GPU_STEPS ?=
GPU_RESUME ?=
GPU_LIMIT ?= 560
GPU_COMMIT ?= $(shell git describe --always --dirty --abbrev=12 --match= 2>/dev/null)
GPU := PYTHONPATH=.:benchmarks:tests
gpu:
	$(GPU) $(GPU_PYTHON) -m gpu $(GPU_STEPS) --out $(GPU_OUT) --limit $(GPU_LIMIT) \
		$(addprefix --resume ,$(GPU_RESUME)) $(addprefix --commit ,$(GPU_COMMIT))

# the same on this machine's processor: interpreted, at tiny sizes, with ceilings that no machine has
gpu-rehearsal: $(READY)
	$(GPU) $(BIN)/python -m gpu $(GPU_STEPS) --out out/rehearsal --device cpu $(addprefix --resume ,$(GPU_RESUME))
	$(GPU) $(BIN)/python benchmarks/report.py --lines out/rehearsal/lines.jsonl

clean:
	rm -rf $(VENV) build dist out *.egg-info tokenops/*.so tokenops/_build_info.json
