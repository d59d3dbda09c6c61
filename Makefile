# make demo [AUDIO=/any/folder]    set up, pretrain a tiny model for MINUTES (4), write the report
# make test                        set up, check lint and types, run all the tests
# make test-machines [TESTS=...]   run them as other processors would: four kernels of OpenBLAS, three of PyTorch, one and two threads
# make types                       check the types alone
# make lint                        mend what ruff can mend
# make gpu [OUT=gpu-results]       on a machine with a GPU: tests, benchmarks and a profile within ten minutes
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-machines gpu types lint setup clean

setup: $(READY)

# torch first: packages that merely ask for "torch" would otherwise bring another build of it
$(READY): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "installing into $(VENV) ..."
	@$(BIN)/pip install --quiet --quiet --disable-pip-version-check -c constraints.txt torch numpy
	@$(BIN)/pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# AUDIO is read from the environment, so that any name of a folder survives. Both kinds of demo train from shards that `ssast prepare` wrote.
demo: $(READY)
	@if [ -n "$$AUDIO" ]; then \
		name="demo-$$(basename -- "$$AUDIO" | tr -c 'A-Za-z0-9._\n-' '-')"; audio="$$AUDIO"; \
	else \
		$(BIN)/ssast synth data/demo || exit; name=demo; audio=data/demo/manifest.csv; \
	fi; \
	if [ -f "$$audio/dataset.json" ]; then shards="$$audio"; else \
		shards="data/$$name-shards"; $(BIN)/ssast prepare "$$audio" --out "$$shards" || exit; \
	fi; \
	time="train.steps=null train.minutes=$${MINUTES:-4} train.warmup_steps=null train.valid_every=null train.checkpoint_every=null"; \
	ranks="$${RANKS:-$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count() or 2)')}"; \
	$(BIN)/ssast pretrain demo --ranks "$$ranks" $$time "run.name=$$name" "data.train=$$shards" && \
	$(BIN)/ssast profile demo --ranks "$$ranks" --steps 20 $$time "run.name=$$name" "data.train=$$shards" && \
	$(BIN)/ssast report "runs/$$name"

test: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	@$(MAKE) --no-print-directory types
	@$(BIN)/pytest -q -n 2 --dist loadfile
	@$(BIN)/python tests/machines.py --quick

TESTS ?=
test-machines: $(READY)
	@$(BIN)/python tests/machines.py $(TESTS)

# with the Python of the machine, which has torch for its GPU
OUT ?= gpu-results
gpu:
	@PYTHON="$(PYTHON)" bash benchmarks/gpu.sh "$(OUT)"

# mypy sees the rooms under their import names through four links: the editable install is a finder, which it cannot follow
types: $(READY)
	@mkdir -p build/typing/ssast && for room in engine kernels benchmarks configs; do ln -sfn ../../../$$room build/typing/ssast/$$room; done
	@cd build/typing && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p ssast

lint: $(READY)
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis
