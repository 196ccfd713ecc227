# Every target makes its own .venv when there is none, from the pins in requirements.txt.
#
#   make demo      train and evaluate on the bundled crystals, figures; predict with a bundled checkpoint (minutes)
#   make test      all tests, and every notebook executed again and compared (pytest --nbval, in two processes)
#   make test-gpu  what runs on a GPU against the numbers of the CPU, and the table of speeds
#   make soak      a million steps of each sampler, an hour of fuzzing; SOAK_STEPS=10000 SOAK_SECONDS=60 for less
#   make train-perov5, make evaluate-perov5 (also mp20, mpts52; train-mp): the long jobs
#
# A machine without a GPU may save a large download with
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

SYSTEM_PYTHON := $(shell python3.11 -c "import sys; print(sys.executable)" 2>/dev/null || command -v python3)
BIN := $(CURDIR)/.venv/bin
INSTALLED := .venv/.installed
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile
SEED ?= 0
N_STRUCTURES ?= None
N_SAMPLES ?= 20
N_BASELINES ?= None
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
DATASETS := perov5 mp20 mpts52

# The kernel of a notebook is the python of .venv, and finds its programs first.
export PATH := $(BIN):$(PATH)
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONTSP_OUTPUT_DIR

PAPERMILL = $(BIN)/papermill --cwd notebooks --log-level WARNING

.PHONY: help venv demo test test-gpu soak lint bench notebooks clean $(DATASETS:%=train-%) $(DATASETS:%=evaluate-%) train-mp

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

venv: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(SYSTEM_PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	touch $@

demo: $(INSTALLED)
	mkdir -p demo
	$(PAPERMILL) notebooks/02_data.ipynb demo/02_data.ipynb -p output_dir $(CURDIR)/demo
	$(PAPERMILL) notebooks/03_train.ipynb demo/03_train.ipynb -p output_dir $(CURDIR)/demo
	for name in 04_csp_evaluation 05_displacement_energy; do \
	    $(PAPERMILL) notebooks/$$name.ipynb demo/$$name.ipynb -p output_dir $(CURDIR)/demo \
	        -p checkpoint $(CURDIR)/demo/prototypes.safetensors || exit 1; \
	done
	$(PAPERMILL) notebooks/06_predict.ipynb demo/06_predict.ipynb -p output_dir $(CURDIR)/demo
	@echo; echo "Figures:"; find demo -name '*.png' | sort | sed 's/^/  /'
	@echo "Crystals predicted, by chains and baselines:"; find demo -name '*.cif' | \
	    awk -F/ '{ n[$$2]++ } END { for (d in n) print "  demo/" d "/  (" n[d] " CIF files)" }' | sort
	@echo "Executed notebooks:"; ls demo/*.ipynb | sed 's/^/  /'

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest --nbval $(PYTEST_ARGS)

test-gpu: $(INSTALLED)
	$(BIN)/pytest -rs tests/test_gpu.py
	$(BIN)/pytest tests/benchmarks -o addopts= --benchmark-only -q

# Without atheris, which has no wheel for some machines, the readers are left out.
soak: $(INSTALLED)
	-$(BIN)/python -m pip install --disable-pip-version-check -q atheris==3.0.0
	$(BIN)/pytest -s -rs -m soak tests/test_soak.py

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m pytest tests/benchmarks -o addopts= --benchmark-only --benchmark-columns=min,median,stddev,rounds

notebooks: $(INSTALLED)
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False \
	    --ExecutePreprocessor.store_widget_state=False $(NOTEBOOKS)

$(DATASETS:%=train-%) train-mp: train-%: $(INSTALLED)
	$(BIN)/python -m contsp_core.training --dataset $* --seed $(SEED) --resume

$(DATASETS:%=evaluate-%): evaluate-%: $(INSTALLED)
	mkdir -p runs/$*
	$(PAPERMILL) notebooks/04_csp_evaluation.ipynb runs/$*/04_csp_evaluation.ipynb \
	    -p dataset $* -p checkpoint $* -p seed $(SEED) -p output_dir $(CURDIR)/runs/$* \
	    -p n_structures $(N_STRUCTURES) -p n_samples $(N_SAMPLES) -p n_baselines $(N_BASELINES)

# but for runs/, where trainings of hours may lie
clean:
	rm -rf demo build .browser .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
