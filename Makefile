# Everything starts from a fresh clone with Python 3.11 or newer and PyPI. `make help` says what there is.
SHELL  := /bin/bash
VENV   := .venv
BIN    := $(VENV)/bin
CLIP   ?=
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help demo test site export readme has-quarto clean

help:
	@echo 'make demo                 install, then encode and decode Big Buck Bunny in both modes; results in demo/'
	@echo 'make demo CLIP=my.mp4     the same with your clip'
	@echo 'make test                 install, then check notebooks, modules and tests'
	@echo 'make export               write the modules from the notebooks, clean the notebooks, write README.md'
	@echo 'make site                 render the documentation into _docs/ (needs quarto)'
	@echo 'make clean                remove all that make has made, .venv too'

# One environment for all; `.venv/installed-X` stands for "extra X is in it", and is renewed when the requirements change.
$(VENV)/installed-%: settings.ini setup.py pyproject.toml
	@test -n '$(PYTHON)' || { echo 'No Python 3.11 or newer found: install one, or name it: make PYTHON=/path/to/python3'; exit 2; }
	@echo 'Installing into $(VENV) (once; about 7 GB, most of it PyTorch; a few minutes) ...'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -e '.[$*]' </dev/null
	@touch $@

demo: $(VENV)/installed-demo
	$(BIN)/cmvc demo $(if $(CLIP),'$(CLIP)') -o demo/

# First the cheapest check; nbdev_test runs two notebooks at a time, each on one thread.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q tests/test_repo.py -k in_step
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python -m pytest -q --durations=10

export: $(VENV)/installed-dev
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/readme.py

readme: $(VENV)/installed-dev
	$(BIN)/python tests/readme.py

# README.md is touched so that nbdev leaves it alone: ours comes from tests/readme.py
site: has-quarto $(VENV)/installed-dev
	touch README.md
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 nbdev_docs --n_workers 2

has-quarto:
	@command -v quarto >/dev/null || { echo 'quarto is missing: install it from https://quarto.org, then run make site again'; exit 2; }

clean:
	rm -rf $(VENV) _proc _docs build dist *.egg-info demo .hypothesis .pytest_cache
	find cmvc_nb tests nbs -name __pycache__ -prune -exec rm -rf {} +
