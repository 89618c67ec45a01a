# Everything below runs in .venv, which the first target you ask for sets up.
#   make lab PYTHON=python3.13 LAB_ARGS=--no-browser
#   make portable PYTHONS="python3.12 python3.13"    (those that tests/portable.py lists, where installed, if left out)
# `.venv/bin/python -m` stands everywhere, and paths are relative, so that the folder's name may hold a space.

PYTHON ?= python3
LAB_ARGS ?=
PYTHONS ?=
VENV := .venv
PY := $(VENV)/bin/python
BUILD_NOTEBOOKS := $(PY) -m workshop.build notebooks
BUILD_SITE := $(PY) -m workshop.website
BUILD_FIGURES := $(PY) -m minimoe.cli figures

# The stamp is the last thing a set-up writes: the folder it was made in. Without it .venv was never finished; with another
# folder in it, .venv has been moved; and a .venv can outlive its Python. Each of these is built again from nothing.
STAMP := $(VENV)/set-up-complete
WHOLE := $(shell test -x $(PY) && test "$$(cat $(STAMP) 2>/dev/null)" = "$$(pwd -P)" && echo yes)

# A lesson does not begin with JupyterLab's question whether one wants its news.
LAB_SETTINGS := $(VENV)/share/jupyter/lab/settings
NO_NEWS := {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}
# Slides as wide as a projector: `jupyter nbconvert --to slides` then has room for the longest line of code.
JUPYTER_CONFIG := $(VENV)/etc/jupyter
WIDE_SLIDES := {"SlidesExporter": {"reveal_width": "1440", "reveal_height": "810", \
    "exclude_input_prompt": true, "exclude_output_prompt": true}}

# torch goes first and alone: the pinned version is then in place before anything else can ask for another.
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt
INSTALL := $(PIP_INSTALL) $(shell grep '^torch==' constraints.txt) && \
    echo "Installing the rest: a minute or two, silent until done." && \
    $(PIP_INSTALL) --quiet --editable '.[test,dev,text,remote,site,fleet]' && \
    mkdir -p $(LAB_SETTINGS) $(JUPYTER_CONFIG) && echo '$(NO_NEWS)' > $(LAB_SETTINGS)/overrides.json && \
    echo '$(WIDE_SLIDES)' > $(JUPYTER_CONFIG)/jupyter_nbconvert_config.json

.PHONY: help setup lab test portable notebooks site figures clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## create .venv with the tested versions (every target below that needs it does this first)

lab: $(STAMP) ## open JupyterLab on the first notebook
	$(PY) -m jupyterlab $(LAB_ARGS) notebooks/00_start_here.ipynb

test: $(STAMP) ## run every check: style, unit tests, notebooks
	$(PY) tests/run_checks.py

portable: ## run the checks with other rounding, threads and Pythons, for an hour or more (PYTHONS="..." names these)
	@"$(PYTHON)" -m tests.portable $(PYTHONS)

notebooks: $(STAMP) ## execute the notebooks and keep their outputs; write the exercises from the solutions
	$(BUILD_NOTEBOOKS)

site: $(STAMP) ## write the course as static pages to site/
	$(BUILD_SITE)

figures: $(STAMP) ## draw every figure to a file
	$(BUILD_FIGURES)

clean: ## remove .venv, caches and build files; your own files stay
	rm -rf $(VENV) $(VENV)-* build dist site .pytest_cache .ruff_cache .hypothesis
	find . -type d '(' -name __pycache__ -o -name .ipynb_checkpoints ')' -prune -exec rm -rf {} +

ifeq ($(WHOLE),yes)
# Only older than the list of versions: brought up to date in place. A failure leaves the old stamp, so that it is tried again.
$(STAMP): pyproject.toml constraints.txt
	@$(INSTALL)
	@touch $@
else
.PHONY: $(STAMP)
$(STAMP):
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "minimoe needs Python 3.11 or newer, and '$(PYTHON)' is not that. Name one: make setup PYTHON=python3.13" >&2; \
	    exit 1; }
	@rm -rf $(VENV)
	@{ "$(PYTHON)" -m venv $(VENV) && $(INSTALL); } || { \
	    rm -rf $(VENV); echo "The set-up failed; the reason stands above. Run make again to retry." >&2; exit 1; }
	@pwd -P > $@
	@echo "Set up in $(VENV)."
endif
