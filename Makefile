# make demo [AUDIO=/any/folder]    set up, pretrain a tiny model, write the report
# make test                        set up, run all the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint setup clean

setup: $(READY)

# torch first: packages that merely ask for "torch" would otherwise bring another build of it
$(READY): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "installing into $(VENV) ..."
	@$(BIN)/pip install --quiet --quiet --disable-pip-version-check -c constraints.txt torch numpy
	@$(BIN)/pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# AUDIO is read from the environment, so that any name of a folder survives
demo: $(READY)
	@if [ -n "$$AUDIO" ]; then \
		name="demo-$$(basename -- "$$AUDIO" | tr -c 'A-Za-z0-9._\n-' '-')"; data="$$AUDIO"; \
	else \
		$(BIN)/ssast synth data/demo || exit; name=demo; data=data/demo/manifest.csv; \
	fi; \
	ranks="$${RANKS:-$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count() or 2)')}"; \
	$(BIN)/ssast pretrain demo --ranks "$$ranks" "run.name=$$name" "data.train=$$data"

test: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	@$(BIN)/python -m pytest -q

lint: $(READY)
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis
