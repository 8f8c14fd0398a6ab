# make demo    a virtual environment, the install, then the default recipe: pictures and a report at the end
# make test    everything that CI runs
# make lint    the checks alone, as pre-commit runs them
# make install the library and its report; make venv: the bare environment
#
# PYTHON=python3.12 chooses the interpreter; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu keeps CUDA out.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test lint venv install

demo: install
	@if [ -d $(DEMO) ]; then mv -v $(DEMO) $(DEMO)-$$(date +%Y%m%d-%H%M%S); fi
	$(BIN)/alignprop train --output $(DEMO)
	@echo "Open $(CURDIR)/$(DEMO)/report.html in a browser."

test: lint
	$(BIN)/pytest -n 2

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

venv: $(BIN)/python
install: $(VENV)/report.stamp

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp an extra: pip runs again only when what it would install has changed.
$(VENV)/%.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing alignprop[$*] into $(VENV): a few minutes the first time."
	$(PIP_INSTALL) -e ".[$*]"
	@touch $@
