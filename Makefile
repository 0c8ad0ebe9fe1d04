# `make book` and `make test` are all a reader needs; they make the environment themselves.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
STAMP := _build/.executed
NOTEBOOKS := $(wildcard book/*.ipynb)
# Pages not written anew yet: `book/ruff.toml` leaves them out, they keep the root's width. What follows gets their names.
PENDING := $(BIN)/python tools/pages.py --pending | xargs -r
SOURCES := $(sort $(shell find mtlib -name '*.py' -o -name '*.js' -o -name '*.css')) constraints.txt
# Tests that need the built book, or a fresh environment for each page: they have targets of their own.
APART := tests/test_book_built.py tests/test_door_built.py tests/test_figures_built.py tests/test_quiz_built.py tests/test_notebooks_alone.py
# Tests, and notebooks of the book, that run at a time; `make test JOBS=8` uses more cores.
JOBS ?= 2
# `make book SCALE=small`: every page in seconds, to look at its layout. Its numbers mean nothing.
SCALE ?= full

export MTLIB_PROGRESS := 0

PAGE ?=
# `make lab LAB="--no-browser --port 8890"`: more arguments for JupyterLab.
LAB ?=

.PHONY: help book pdf page lab test test-package test-pages test-device test-book test-alone benchmarks lint format address serve clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "this book needs Python 3.11 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.11" % v[:2])'
	@echo "making the environment .venv, once; this takes a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[book,test,text,vision]"
	@# A kernel warns that it talks without encryption, on this one machine; errors alone are worth a line.
	@mkdir -p .venv/etc/ipython
	@echo 'get_config().Application.log_level = "ERROR"' > .venv/etc/ipython/ipython_kernel_config.py
	@touch $@

# The cache runs a page again when the page's code changes. It knows nothing of the package, the versions, the scale
# and the place of the data: drop it when one of these changed, and Sphinx's own record of pages it has read.
.PHONY: fresh
fresh: $(READY)
	@mkdir -p _build
	@now="$(SCALE) data=$${MTLIB_DATA:-} offline=$${MTLIB_OFFLINE:-} $$(cksum $(SOURCES))"; \
	if [ "$$(cat $(STAMP) 2>/dev/null)" != "$$now" ]; then \
	  rm -rf _build/.jupyter_cache _build/.doctrees; echo "$$now" > $(STAMP); \
	fi

book: fresh  ## the book at its full scale -> _build/html/index.html, and its notebooks -> _build/notebooks
	MTLIB_SCALE=$(SCALE) $(BIN)/python tools/execute.py --jobs $(JOBS)
	@echo "now the pages are written, which takes one or two minutes"
	@# Sphinx warns of a page only when it reads it: after a failure, let it read all again.
	MTLIB_SCALE=$(SCALE) $(BIN)/jupyter-book build . -W -n --keep-going || { rm -rf _build/.doctrees; exit 1; }

# A small book: the page, the glossary and the references. Links to other pages are plain text there.
page: fresh  ## make page PAGE=background: this page alone -> _build/page/_build/html
	@[ -f "book/$(PAGE).ipynb" ] || { echo "expected the name of a page: make page PAGE=background"; exit 2; }
	@MTLIB_SCALE=$(SCALE) $(BIN)/python tools/execute.py --jobs 1 --page $(PAGE)
	@printf 'format: jb-book\nroot: book/%s\nchapters: [{file: book/glossary}, {file: book/references}]\n' $(PAGE) > _build/page.yml
	@MTLIB_SCALE=$(SCALE) $(BIN)/jupyter-book build . -qq --toc _build/page.yml --path-output _build/page > /dev/null
	@echo "_build/page/_build/html/book/$(PAGE).html"

lab: $(READY)  ## the notebooks in JupyterLab, with this environment; Ctrl-C stops it
	env -u MTLIB_PROGRESS $(BIN)/jupyter lab --notebook-dir=$(firstword $(wildcard _build/notebooks) book) $(LAB)

test: test-package test-pages test-device  ## the package's tests, then every notebook at the small scale

test-package: $(READY)  ## the package's tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile tests $(APART:%=--ignore=%)

test-pages: $(READY)  ## every notebook at the small scale
	OMP_NUM_THREADS=1 MTLIB_SCALE=small $(BIN)/pytest -n $(JOBS) --dist loadfile \
	  --nbval-lax --nbval-current-env --nbval-cell-timeout=300 $(NOTEBOOKS)

test-device: $(READY)  ## every notebook on a device that is not the CPU
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) tests/second_device/notebooks.py

test-book: $(READY)  ## the built book in a browser without a network
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(filter %_built.py,$(APART))

pdf: $(READY)  ## the built book as one PDF -> _build/book.pdf, by Chromium
	$(BIN)/python tools/pdf.py _build/html _build/book.pdf

test-alone: $(READY)  ## each notebook alone, in an empty folder with a fresh environment
	$(BIN)/pytest tests/test_notebooks_alone.py

benchmarks: $(READY)  ## time and memory beside other libraries, in pieces, kept in mtlib/book/results/benchmarks
	PYTHON=$(BIN)/python benchmarks/record.sh

lint: $(READY)  ## style and types
	$(BIN)/ruff check
	$(PENDING) $(BIN)/ruff check --config pyproject.toml
	$(BIN)/ruff format --check
	$(PENDING) $(BIN)/ruff format --check --config pyproject.toml
	$(BIN)/mypy mtlib

format: $(READY)  ## write the style
	$(BIN)/ruff check --fix
	$(PENDING) $(BIN)/ruff check --fix --config pyproject.toml
	$(BIN)/ruff format
	$(PENDING) $(BIN)/ruff format --config pyproject.toml

address:  ## make address ADDRESS=https://github.com/you/mtlib-book: write it in the sources; a build asks git itself
	$(PYTHON) tools/address.py $(ADDRESS)

serve:  ## the built book at http://localhost:8000
	$(PYTHON) -m http.server 8000 --bind 127.0.0.1 --directory _build/html

clean:  ## remove what was built, the caches and the environment
	rm -rf .venv _build build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
	find book \( -name .ipynb_checkpoints -o -name .ruff_cache \) -prune -exec rm -rf {} +
