# make detect               detect on the CT and the MR image that pydicom ships
# make detect IMAGE=path    detect on a file or DICOM folder of yours
# make test                 style, types, security and the whole test suite
# make package              the extension as an archive for Slicer's Extensions Manager, in dist/
# make clean                remove the environment, results and caches
#
# Nothing but Python (3.10 or newer) and make is needed; everything else goes into .venv, once.
# PYTHON=python3.12 chooses the interpreter, OUTPUT=folder where results go, OPTIONS="--all --axis axial"
# is passed on to `medanomalyclip detect`. PACKAGE="--os win --slicer-version 5.10" says which Slicer the archive
# is for.

PYTHON  ?= python3
OUTPUT  ?= results
IMAGE   ?=
OPTIONS ?=
PACKAGE ?=

VENV := .venv
BIN  := $(VENV)/bin
# One pip command for the whole environment: with torch installed before, pip would replace it.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help detect test package clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' \
		|| { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo "Python's venv module is missing: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Installing for the tests installs what detection needs too.
$(VENV)/.for-detect: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); this takes some minutes, once."
	$(INSTALL) '.[codecs,dicom]'
	@touch $@

$(VENV)/.for-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); this takes some minutes, once."
	$(INSTALL) '.[test]'
	@touch $@ $(VENV)/.for-detect

# Found when the rule runs, after the environment is made.
PYDICOM_IMAGES = $$($(BIN)/python -c 'from pydicom.data import get_testdata_file as f; print(f("CT_small.dcm"), f("MR_small.dcm"))')

detect: $(VENV)/.for-detect
	@$(BIN)/medanomalyclip detect $(if $(IMAGE),"$(IMAGE)",$(PYDICOM_IMAGES)) \
		--output "$(OUTPUT)" --overwrite $(OPTIONS)

test: $(VENV)/.for-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive --severity-level medium MedAnomalyCLIP
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# Python alone is enough: nothing is compiled, nothing installed.
package:
	$(PYTHON) Testing/extension_package.py $(PACKAGE)

clean:
	rm -rf $(VENV) results build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
