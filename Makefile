# Two commands do everything on a fresh machine: `make run` and `make test`. `make help` lists the rest.

SHELL := /bin/bash
VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
BIN := $(abspath $(VENV))/bin
LOCK := requirements/all.txt
# Images: any Debian or Ubuntu with Python and venv is a base; the client must know BuildKit.
DOCKER ?= docker
BASE_IMAGE ?= python:3.11-slim
IMAGES ?= steps training serving serving-cuda
BUILD_FLAGS ?=
comma := ,

export PATH := $(BIN):$(PATH)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# No dependency calls home.
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := true
export GX_ANALYTICS_ENABLED := false

# Every stage of an experiment's seeds: package comes last; summarise needs all of them.
repro = dvc repro $(if $(word 2,$(2)),summarise@$(1)) $(foreach seed,$(2),package@$(1)-$(seed))

.DEFAULT_GOAL := help
.PHONY: help setup run test test-all test-gpu reproduce check check-rest check-types bench evidence lock clean images base-image kubeflow-local

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(VENV)/.ready  ## virtual environment with the locked dependencies

$(VENV)/.ready: $(LOCK) requirements/uv.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "cadx needs Python 3.11 or 3.12 with venv; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version): about 6 GB, once"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/uv.txt
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes $(LOCK)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

run: setup  ## the main job on the embedded synthetic chest X-rays, from raw files to a served, watched model
	$(call repro,phantom-xray,0 1 2)
	$(call repro,phantom-xray-pilot,0)
	@cadx rehearse phantom-xray
	@cadx show phantom-xray

reproduce: setup  ## one experiment: make reproduce EXPERIMENT=pneumoniamnist
	@test -n "$(EXPERIMENT)" || { echo "name one: make reproduce EXPERIMENT=phantom-xray" >&2; exit 1; }
	$(call repro,$(EXPERIMENT),0 1 2)
	@cadx show $(EXPERIMENT)

test: setup  ## every fast test
	python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not container and not browser"

test-all: setup  ## the slow, container and browser tests
	python -m pytest -rs -n 2 --dist loadfile -m "slow or container or browser"

test-gpu: setup  ## the tests that need an accelerator
	python -m pytest -rs -m gpu

check: check-rest check-types  ## style, types, layers, contract, manifests, dependency audit

check-rest: setup
	ruff check .
	ruff format --check .
	lint-imports
	python -m pytest tests/test_contract.py tests/test_manifests.py
	python .ci/audit.py

check-types: setup
	mypy

images:  ## container images and their sizes: make images BASE_IMAGE=python:3.11-slim@sha256:... IMAGES="steps serving"
	@for image in $(IMAGES); do \
		DOCKER_BUILDKIT=1 $(DOCKER) build --quiet --build-arg BASE_IMAGE=$(BASE_IMAGE) --target $$image --tag cadx/$$image \
			$(if $(SSL_CERT_FILE),--secret id=certificates$(comma)src=$(SSL_CERT_FILE)) $(BUILD_FLAGS) . >/dev/null || exit 1; \
	done
	@$(DOCKER) images --filter reference='cadx/*' --format 'table {{.Repository}}\t{{.Size}}\t{{.ID}}'

base-image:  ## a base image where no registry is reached: then make images BASE_IMAGE=cadx-base
	PYTHON=$(PYTHON) DOCKER=$(DOCKER) .ci/base-image cadx-base

kubeflow-local: EXPERIMENT ?= phantom-xray-pilot
kubeflow-local: setup  ## one experiment's Kubeflow pipeline in containers here, held against dvc repro's bytes
	$(MAKE) images IMAGES=steps
	$(call repro,$(EXPERIMENT),0 1 2)
	@cadx run-local $(EXPERIMENT)

bench: setup  ## every benchmark, as a table
	python -m benchmarks

evidence: setup  ## recompute what is committed: all experiments and seeds, the pages of results and coverage, the README's table
	dvc repro
	cadx results
	cadx benchmark
	python -m benchmarks coverage coverage_boxes coverage_tasks conformal statistics detection_statistics

lock: setup  ## pin the dependencies anew, hashed and without addresses, alike for every Python
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
		--no-emit-index-url --no-annotate --no-header --quiet --upgrade --output-file $(LOCK)
	for image in "steps" "serving --extra serving"; do set -- $$image; \
		uv pip compile pyproject.toml --extra search --extra tracking --extra registry --extra nodes $${@:2} --constraint $(LOCK) --universal \
			--python-version 3.11 --fork-strategy fewest --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet \
			--output-file requirements/$$1.txt || exit 1; \
	done
	uv pip compile - <<< "$$(grep -o '^uv==[0-9.]*' $(LOCK))" --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --no-header --quiet --output-file requirements/uv.txt

clean:  ## remove what was made, but neither the committed results nor the environment
	rm -rf data/work data/sources data/serving data/reports/*/serving .pytest_cache .mypy_cache .ruff_cache
	find data/reports -name "*.html" -delete -o -name "*.parquet" -delete -o -name training.jsonl -delete
