# Each target sets up what it needs: `make demo` and `make test` work in a fresh clone.

PYTHON := .venv/bin/python
READY  := .venv/.ok

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak check format clean

help:
	@echo 'make demo [DATA=pairs.jsonl]   train, evaluate and serve a reward model, start to end'
	@echo 'make test                      all tests'
	@echo 'make soak [KILLS=20]           the tests that take minutes, then one run killed again and again, then the'
	@echo '          [MINUTES=10]         gateway under load'
	@echo 'make check                     format, lint, types and the tests that do not start Ray'
	@echo 'make format                    format and sort imports'
	@echo 'make clean                     remove caches and the virtual environment, never runs'

setup: $(READY)

# A python3.12 on the path may be a shim that only prints an error, so each candidate is run, not just found.
$(READY): pyproject.toml constraints.txt
	@if [ ! -x $(PYTHON) ]; then \
	  for candidate in python3.11 python3.12 python3; do \
	    if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then \
	      echo "Creating .venv with $$candidate"; $$candidate -m venv .venv; break; \
	    fi; \
	  done; \
	  if [ ! -x $(PYTHON) ]; then \
	    echo 'Eagleray needs Python 3.11 or 3.12 with its venv module; none of python3.11, python3.12 and python3 on' >&2; \
	    echo 'the PATH is one. Install it (Debian and Ubuntu: apt install python3.12-venv) and run make again.' >&2; exit 1; \
	  fi; \
	fi
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m ensurepip
	@echo 'Installing eagleray and what it needs into .venv (a few minutes the first time)'
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@# On all cores; pip would compile on one. What cannot be compiled is no use to anyone and no error here.
	@$(PYTHON) -m compileall -qq -j 0 .venv/lib || true
	@touch $@

demo: $(READY)
	$(PYTHON) -m eagleray.jobs.gram.demo $(if $(DATA),"data.pairs=$(DATA)" "run.dir=runs/demo-$(firstword $(subst ., ,$(notdir $(DATA))))")

# Two at a time: many tests wait for processes that start. A file stays together, as its tests share a cluster, and long
# files come first (tests/conftest.py).
test: $(READY)
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(READY)
	$(PYTHON) -m pytest -m soak -o faulthandler_timeout=3600
	PYTHONPATH=.:tests $(PYTHON) -m soak $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))
	PYTHONPATH=.:tests $(PYTHON) -m serve_soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

check: $(READY)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pyright
	$(PYTHON) -m pytest -n 2 -m 'not ray'

format: $(READY)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
