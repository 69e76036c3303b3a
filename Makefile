# Every target works first on a machine that has Python, pip and make: it makes .venv and installs what it needs.
# Versions are those of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Where it is set, every process of the tests compiles all of torch's Python anew: seconds each, minutes in all.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test test-slow lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       meta-train, evaluate and compare on packaged data; leaves demo-out/report.html"
	@echo "make test       lint, then the tests (WORKERS=$(WORKERS) processes)"
	@echo "make test-slow  the tests that take minutes; METAFIT_DATA names the benchmark data"
	@echo "make lint       ruff, mypy, import-linter"
	@echo "make clean      removes .venv and everything else that make or the tools made"
	@echo "PYTHON=python3.12 picks the Python (3.10 or newer) that .venv is made with."

demo: $(VENV)/text.stamp
	$(BIN)/metafit demo --out demo-out

test: lint
	@echo "pytest, $(WORKERS) processes ..."
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(VENV)/dev.stamp
	@echo "pytest, slow tests ..."
	@$(BIN)/python -m pytest -m slow --timeout 3600

lint: $(VENV)/dev.stamp
	@echo "ruff check ..."
	@$(BIN)/ruff check --quiet .
	@echo "ruff format --check ..."
	@$(BIN)/ruff format --check --quiet . || { echo "run $(BIN)/ruff format on the files it names" >&2; exit 1; }
	@echo "mypy ..."
	@$(BIN)/mypy --no-error-summary
	@echo "lint-imports ..."
	@$(BIN)/lint-imports >$(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log >&2; exit 1; }

clean:
	rm -rf $(VENV) build dist demo-out src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than what it was installed from, so an edit of either file installs again.
$(VENV)/text.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing metafit[text] into $(VENV): a few minutes the first time, torch is large ..."
	@$(BIN)/python -m pip install -qq --no-input --no-compile -c constraints.txt -e ".[text]"
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing metafit[dev] into $(VENV): a few minutes the first time, torch is large ..."
	@$(BIN)/python -m pip install -qq --no-input --no-compile -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/text.stamp

# Some systems ship Python without ensurepip: there the pip that is outside installs the one inside.
$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
		echo "metafit needs Python 3.10 or newer, and '$(PYTHON)' is not: try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install -qq --no-input pip; \
	} || { \
		rm -rf $(VENV); \
		echo "cannot make the virtual environment $(VENV) with '$(PYTHON)': see above; Debian and Ubuntu need the" >&2; \
		echo "package python3-venv, other systems a complete Python; or name one: make PYTHON=... $(MAKECMDGOALS)" >&2; \
		exit 1; }
