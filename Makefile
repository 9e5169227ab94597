# make demo      explain a photograph with a real network; figure and maps under out/demo/
# make gallery   every method on one photograph, in docs/gallery.jpg
# make bench     measure everything beside other libraries, and write the tables (20 minutes)
# make test      lint, types, tests, doctests and notebooks
# make test-all  the slow tests too
#
# Each sets up what it needs in .venv first, from nothing but Python 3.10 or later.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: bench demo gallery test test-all check
.DELETE_ON_ERROR:

demo: .venv/demo-ready
	$(BIN)/pullback explain "$$($(BIN)/python -c 'import skimage; print(skimage.data_dir)')/chelsea.png" \
		--method gradient,guided_backprop,integrated_gradients,grad_cam --targets top5 --out out/demo

gallery: .venv/demo-ready
	$(BIN)/python benchmarks/gallery.py --out docs/gallery.jpg

bench: .venv/bench-ready
	$(BIN)/python -m benchmarks --record

test: check
	$(PYTEST)

test-all: check
	$(PYTEST) -m ""

check: .venv/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# torch comes first, alone: what follows then finds it installed and fetches no other build of it.
.venv/torch-ready: Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --no-deps $(TORCHVISION)
	touch $@

.venv/demo-ready: .venv/torch-ready pyproject.toml
	$(PIP) --editable '.[demo]'
	touch $@

.venv/test-ready: .venv/torch-ready pyproject.toml
	$(PIP) --editable '.[test]'
	touch $@

.venv/bench-ready: .venv/test-ready
	$(PIP) --editable '.[bench]'
	$(PIP) --no-deps --no-build-isolation torchray
	touch $@
