# make detect               detect on the CT and the MR image that pydicom ships
# make detect IMAGE=path    detect on a file or DICOM folder of yours
# make web                  open a study in the browser, without Slicer: from the page, or IMAGE=path
# make batch                detect on all images in IMAGE=folder, on two worker processes
# make pacs                 put a CT into an archive that speaks DICOMweb, and a batch's results beside it
# make test                 style, types, security and the whole test suite
# make package              the extension as an archive for Slicer's Extensions Manager, in dist/
# make clean                remove the environment, results and caches
#
# Nothing but Python (3.10 or newer) and make is needed; everything else goes into .venv and .venv-web, once.
# PYTHON=python3.12 chooses the interpreter, OUTPUT=folder where results go, OPTIONS="--all --axis axial"
# is passed on to `medanomalyclip detect`, `web` or `batch`. ARCHIVE=url is the DICOMweb service of `make pacs`, an Orthanc
# on this computer if nothing is said. PACKAGE="--os win --slicer-version 5.10" says which Slicer the archive
# is for.

PYTHON  ?= python3
OUTPUT  ?= results
IMAGE   ?=
OPTIONS ?=
ARCHIVE ?= http://localhost:8042/dicom-web
PACKAGE ?=

VENV := .venv
BIN  := $(VENV)/bin
# The page in the browser stands on another slicer-core than the tests.
WEB_VENV := .venv-web
WEB_BIN  := $(WEB_VENV)/bin
# One pip command for the whole environment: with torch installed before, pip would replace it.
# Python compiles what is used when it is first used, which is a part of it.
PIP := -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable
INSTALL := $(BIN)/python $(PIP)

# Files in their order: by themselves, files of few tests would come last, and those are the slow ones.
PYTEST := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help detect web batch pacs test checks web-if-possible package clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(BIN)/python $(WEB_BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' \
		|| { echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo "Python's venv module is missing: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)

# Installing for the tests installs what detection needs too.
$(VENV)/.for-detect: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); this takes some minutes, once."
	$(INSTALL) '.[codecs,dicom]'
	@touch $@

$(VENV)/.for-batch: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); this takes some minutes, once."
	$(INSTALL) '.[codecs,cluster,dicomweb]'
	@touch $@ $(VENV)/.for-detect

$(VENV)/.for-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); this takes some minutes, once."
	$(INSTALL) '.[test]'
	@touch $@ $(VENV)/.for-detect $(VENV)/.for-batch

$(WEB_VENV)/.for-web: pyproject.toml constraints.txt | $(WEB_BIN)/python
	@echo "Installing into $(WEB_VENV); this takes some minutes, once."
	$(WEB_BIN)/python $(PIP) '.[web]'
	@touch $@

# Found when the rule runs, after the environment is made.
PYDICOM_CT = $$($(BIN)/python -c 'from pydicom.data import get_testdata_file as f; print(f("CT_small.dcm"))')
PYDICOM_IMAGES = $$($(BIN)/python -c 'from pydicom.data import get_testdata_file as f; print(f("CT_small.dcm"), f("MR_small.dcm"))')

detect: $(VENV)/.for-detect
	@$(BIN)/medanomalyclip detect $(if $(IMAGE),"$(IMAGE)",$(PYDICOM_IMAGES)) \
		--output "$(OUTPUT)" --overwrite $(OPTIONS)

web: $(WEB_VENV)/.for-web
	@$(WEB_BIN)/medanomalyclip web $(if $(IMAGE),"$(IMAGE)") $(OPTIONS)

batch: $(VENV)/.for-batch
	@$(BIN)/medanomalyclip batch $(if $(IMAGE),"$(IMAGE)",$(PYDICOM_IMAGES)) \
		--output "$(OUTPUT)/batch" --workers 2 $(OPTIONS)

pacs: $(VENV)/.for-batch
	@$(BIN)/dicomweb_client --url "$(ARCHIVE)" store instances $(PYDICOM_CT)
	@$(BIN)/medanomalyclip batch --dicomweb "$(ARCHIVE)" --query ModalitiesInStudy=CT \
		--output "$(OUTPUT)/pacs" --dicom-seg --dicom-sr $(OPTIONS)

test: $(VENV)/.for-test
	@$(MAKE) --no-print-directory --jobs 2 checks web-if-possible
	$(BIN)/python -m pytest $(PYTEST)

checks: $(VENV)/.for-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive --severity-level medium MedAnomalyCLIP

# The environment of the page in the browser cannot be had everywhere; its tests say so then.
web-if-possible: $(VENV)/.for-test
	-@$(MAKE) --no-print-directory $(WEB_VENV)/.for-web

# Python alone is enough: nothing is compiled, nothing installed.
package:
	$(PYTHON) Testing/extension_package.py $(PACKAGE)

clean:
	rm -rf $(VENV) $(WEB_VENV) results build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
