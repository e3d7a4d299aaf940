# make demo: set up, then the main job.   make test: set up, then all tests.   make help: the rest.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   ?= runs/demo
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help setup demo test notebooks readme lab clean
help:
	@echo 'make setup      an environment with the tested versions, in $(VENV)'
	@echo 'make demo       set up, run active learning with diffusion augmentation on the phantom, draw the learning curves'
	@echo 'make test       set up, run nbdev_test and pytest'
	@echo 'make notebooks  export the library, clean the notebooks, rebuild README.md'
	@echo 'make lab        open JupyterLab'
	@echo 'make clean      remove $(DEMO) and the cache (prepared data and studies stay)'

$(VENV)/ready: constraints.txt settings.ini setup.py
	$(PYTHON) -c 'import sys; sys.exit("DiffusionAL-Med needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

setup: $(VENV)/ready

demo: $(VENV)/ready
	$(BIN)/dal_sweep nbs/experiments/demo.yaml $(DEMO)
	OMP_NUM_THREADS=2 $(BIN)/papermill nbs/analysis/learning_curves.ipynb $(DEMO)/learning_curves.ipynb -k python3 --no-progress-bar --log-level ERROR \
	    -p sweep $(DEMO) -p figure $(DEMO)/learning_curves -p resamples 300
	@echo
	@echo 'executed notebooks   $(DEMO)/notebooks and $(DEMO)/learning_curves.ipynb'
	@echo 'records              $(DEMO)/runs'
	@echo 'learning curves      $(DEMO)/learning_curves_balanced_accuracy.png'

# more workers than the usual two cores: tests that start other processes wait for them
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 3 --do_print
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 4 --dist worksteal tests

notebooks: $(VENV)/ready
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(MAKE) readme

readme: $(VENV)/ready
	$(BIN)/jupyter nbconvert --to markdown --log-level ERROR --TemplateExporter.exclude_input=True --output-dir . --output README nbs/index.ipynb
	sed -i.tmp "s#(\.\./#(#g" README.md && rm README.md.tmp

lab: $(VENV)/ready
	$(BIN)/jupyter lab nbs

clean:
	rm -rf $(DEMO) .cache/dal_med
