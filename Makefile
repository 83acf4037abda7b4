# Every target sets up what it needs: `make demo`, `make test`, `make bench`, `make accuracy`, and `make gpu` on a GPU machine.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cuh csrc/*/*)
WORKERS ?= 2

.PHONY: demo test check mutants bench accuracy gpu clean

demo: $(READY)
	$(BIN)/python -m tokenops demo

test: $(READY) check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests

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
