# Every target makes what it needs in .venv first, with the versions of constraints.txt; the stamp is renewed when that
# file or setup.py changes.
#
#   make install      the environment alone
#   make quickstart   the main job on real input, on a CPU: documents -> training -> kill -> resume -> HF checkpoint;
#                     MODEL=vl2 with DeepSeek-VL2 for DeepSeek-VL
#   make test         the test suite, two files at a time (JOBS=8: eight)
#   make test-long    the tests that take a minute or more, one after another
#   make check        format, lint and the rules of the house
#   make clean        remove the environment and what the quickstart made
#
# PYTHON=python3.12 picks another interpreter to make .venv with.

PYTHON ?= python3
MODEL ?= vl
VENV := .venv
INSTALLED := $(VENV)/.installed

# The launchers are found there.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Several processes share the cores: one thread each.
export OMP_NUM_THREADS ?= 1
# Files of tests that run at the same time. A file may itself start up to eight ranks.
JOBS ?= 2
# Tests start up to eight ranks, over gloo; on a machine with as many GPUs, DS_ACCELERATOR=cuda runs them there.
export DS_ACCELERATOR ?= cpu

.PHONY: install quickstart test test-long check clean

install: $(INSTALLED)

quickstart: $(INSTALLED)
	python launch/quickstart.py --model $(MODEL)

test: $(INSTALLED)
	python -m pytest -q -m "not long" --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test-long: $(INSTALLED)
	python -m pytest -q -m long

check: $(INSTALLED)
	ruff format --check .
	ruff check .
	python -m pytest -q tests/house

clean:
	rm -rf $(VENV) data/quickstart runs/quickstart data/quickstart_vl2 runs/vl2_debug build *.egg-info

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[hf,dev]'
	touch $@
