# Two commands do everything: `make demo` and `make test`. Both make .venv when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-fast test-extras site wheel dist release faults ranks test-lowest test-newest compare-audits lint format clean

demo: $(STAMP)
	$(BIN)/coterie demo $(ARGS)

# Three workers for two cores: a third of the tests' time is waiting, for deadlines and for processes that start.
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 3 $(ARGS)

# Under two minutes on two idle cores; tests/fast.txt says what.
test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not faults" $$(grep -v '^#' tests/fast.txt) $(ARGS)

# What needs the extras `eval`, `nvflare` and the trackers', which `make test` skips: lm-eval's figures beside
# log-likelihoods by hand, federations inside FLARE's simulator and its POC mode and around a hub that works against them, what trackers really
# keep. An environment of its own; nothing is skipped in it.
EXTRAS := .venv-extras

test-extras:
	test -x $(EXTRAS)/bin/python || $(PYTHON) -m venv $(EXTRAS)
	$(EXTRAS)/bin/python -m pip install --quiet -c constraints.txt torch
	$(EXTRAS)/bin/python -m pip install --quiet -c constraints.txt -e ".[dev,eval,nvflare,prometheus,wandb,mlflow]"
	$(EXTRAS)/bin/python -c "import lm_eval, mlflow, nvflare, prometheus_client, wandb"
	PYTHONPATH=src $(EXTRAS)/bin/python -m pytest -o faulthandler_timeout=0 -m "faults or not faults" tests/training/tasks tests/training/test_trackers.py tests/flare $(ARGS)

# The documentation, in build/site: a broken link or anchor stops it, and tests/docs see what Zensical does not.
site: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/zensical build --clean --strict

# The wheel in a fresh environment: `coterie --help` and a tiny private run.
wheel:
	PYTHON=$(PYTHON) .ci/wheel

# Wheel and sdist of the last commit with their hashes, in dist/; built twice, equal bit for bit.
dist:
	PYTHON=$(PYTHON) .ci/dist

# The checklist of a release, on a commit tagged v<version>: leaves in dist/ what may be published.
release:
	PYTHON=$(PYTHON) .ci/release

# Kills, frozen processes, cut lines, full disks, strangers, fuzzing, a soak: bounded, about half an hour on two idle
# cores. Writes docs/reliability.md. Network faults need root; without it they are skipped.
faults: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[faults]"
	$(BIN)/python -m pytest tests/faults -m "faults or not faults" -o faulthandler_timeout=0 $(ARGS)

# Every family by every method with experts over two ranks, tokens and layers travelling, beside one process; kills and
# freezes of ranks at every step of a round, in sessions and in parties: more than an hour on two idle cores.
ranks: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ranks -m "ranks or not ranks" $(ARGS)

# The models' tests on the lowest transformers that pyproject.toml names, in an environment of their own.
LOWEST := .venv-lowest
LOWEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)

test-lowest: $(LOWEST)/.installed-$(LOWEST_TRANSFORMERS)
	$(call versions,$(LOWEST))
	PYTHONPATH=src $(LOWEST)/bin/python -m pytest tests/models $(ARGS)

$(LOWEST)/.installed-$(LOWEST_TRANSFORMERS):
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet -c constraints.txt torch
	$(LOWEST)/bin/python -m pip install --quiet -e ".[dev]" "transformers==$(LOWEST_TRANSFORMERS).0"
	touch $@

# What touches torch and transformers most, on the newest of everything that pyproject.toml allows.
NEWEST := .venv-newest
NEWEST_TESTS := tests/models tests/dp tests/hf tests/contracts

test-newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e ".[dev]"
	$(call versions,$(NEWEST))
	PYTHONPATH=src $(NEWEST)/bin/python -m pytest $(NEWEST_TESTS) $(ARGS)

# The one-run bounds of the audit of epsilon beside jax-privacy's, in an environment of their own: it brings JAX.
BESIDE := .venv-audits

compare-audits:
	test -x $(BESIDE)/bin/python || $(PYTHON) -m venv $(BESIDE)
	$(BESIDE)/bin/python -m pip install --quiet -c constraints.txt torch
	$(BESIDE)/bin/python -m pip install --quiet -c constraints.txt -e ".[audits]"
	PYTHONPATH=benchmarks $(BESIDE)/bin/python benchmarks/audit_bounds.py $(ARGS)

# What docs/reference/versions.md says of a run.
versions = @$(1)/bin/python -m pip list --format=freeze | grep -E "^(torch|transformers|tokenizers|safetensors|peft|numpy|scipy|grpcio|pydantic|pyarrow)="

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and by itself: the constraint pins it before any other package can ask for a newer one.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) $(BESIDE) $(EXTRAS) coterie-demo build dist .cache *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
