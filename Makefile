# Every target sets up what it needs; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo study-digits study-fashion test lint types unit test-slow test-gpu bench bench-gpu format clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(READY)  ## create .venv and install the package with its development tools

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("cm-lightning needs Python >= 3.11, this is " + sys.version.split()[0] + " (set PYTHON=...)") if sys.version_info < (3, 11) else None'
	@echo "Setting up $(VENV) (a few minutes, once) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev,fd]'
	@touch $(READY)

demo: $(READY)  ## train SCT on digits (about 2 minutes on 2 cores) and draw samples
	@run=runs/demo; n=1; while [ -e "$$run" ]; do n=$$((n + 1)); run=runs/demo-$$n; done; \
	$(BIN)/cm-fit --config configs/sct_digits.yaml --run_dir $$run && \
	$(BIN)/cm-sample $$run --sigmas 80 --n 100 --grid --out $$run/pictures/1-step && \
	$(BIN)/cm-sample $$run --sigmas 80 0.821 --n 100 --grid --out $$run/pictures/2-step && \
	echo && echo "Done. Look at:" && \
	echo "  1-step grid  $$run/pictures/1-step/grid.png" && \
	echo "  2-step grid  $$run/pictures/2-step/grid.png" && \
	echo "  metrics      $$run/metrics.csv" && \
	echo "  config       $$run/config.yaml" && \
	echo "  Frechet distances (over features of a digit classifier; 0 is perfect):" && \
	$(BIN)/python -c "import json,sys; [print(f'    {k:<36}{v:.3f}') for k, v in json.load(open(sys.argv[1]))['results']['last'].items()]" $$run/run.json

test: lint types unit  ## lint, types and the fast test suite

lint: $(READY)  ## style and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell cm_lightning configs tests README.md CONTRIBUTING.md CHANGELOG.md

types: $(READY)  ## static types
	$(BIN)/mypy

unit: $(READY)  ## the fast tests, one process per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
		-m "not slow and not gpu"

test-slow: $(READY)  ## the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist load -m "slow"

test-gpu: $(READY)  ## what a CUDA device alone can show: speed changes no result, no step waits
	$(BIN)/python -m pytest -m "gpu"

study-digits: $(READY)  ## every regime on digits, three seeds, with intervals (half an hour to an hour on 2 cores)
	$(BIN)/cm-study configs/studies/digits8.yaml --jobs 2
	$(BIN)/cm-compare runs/digits8 --out runs/digits8/comparison

study-fashion: $(READY)  ## every regime on Fashion-MNIST at 32x32, for one GPU
	$(BIN)/cm-study configs/studies/fashion32.yaml --jobs 3
	$(BIN)/cm-compare runs/fashion32 --out runs/fashion32/comparison

bench: $(READY)  ## the benchmarks, short (a few minutes on 2 cores)
	@for what in "step --repeats 10" "references --repeats 10" "ema" "loader --images 10000" \
	  "sampling --repeats 3" "fid --images 500" "frechet --dims 512 --images 2000" "startup --repeats 1"; do \
	  echo "== $$what"; $(BIN)/python -m cm_lightning.bench $$what || exit 1; echo; \
	done

bench-gpu: $(READY)  ## the training step on a GPU: DDPM++ at 32x32, batches 128 and 512; ADM, EDM2-S at 64x64
	@for batch in 128 512; do \
	  $(BIN)/python -m cm_lightning.bench step --network ddpmpp --batch $$batch --images 50000 --repeats 5 \
	    --regimes ect sct --precisions 32-true bf16-mixed --compile no yes --device cuda || exit 1; \
	done
	@for network in adm edm2_s; do \
	  $(BIN)/python -m cm_lightning.bench step --network $$network --batch 64 --repeats 5 \
	    --regimes ect --precisions bf16-mixed --compile yes --device cuda || exit 1; \
	done

format: $(READY)  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches (runs are kept)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info
