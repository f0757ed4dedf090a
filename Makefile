PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install test test-all demo demo-int8 check clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt hatch_build.py calibrate/runtime/kernels.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test: install
	$(BIN)/python -m pytest

test-all: install
	$(BIN)/python -m pytest -m 'not gpu and not npu'

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

demo: install
	rm -rf demo-out && mkdir demo-out
	$(BIN)/octavo capture demo demo-out/captured --limit 8
	$(BIN)/octavo calibrate demo-out/captured demo-out/w8a8
	$(BIN)/octavo inspect demo-out/w8a8
	$(BIN)/octavo compare demo demo-out/w8a8 --limit 16 --output demo-out/report.html

# the bundled integers: pipelines/demo/int8
demo-int8: install
	rm -rf demo-out && mkdir demo-out
	$(BIN)/octavo capture demo demo-out/captured --limit 16
	$(BIN)/octavo calibrate demo-out/captured demo-out/int8 --accuracy balanced --dtype float16 --format diffusers
	chmod u+w pipelines/demo/int8/* && cp demo-out/int8/*.json demo-out/int8/*.safetensors pipelines/demo/int8/ && chmod 644 pipelines/demo/int8/*

clean:
	rm -rf $(VENV) build demo-out
