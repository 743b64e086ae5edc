# make train: set up once, then train a small model on real text.  make test: set up once, then test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.PHONY: setup train test test-more coverage test-unit test-dist test-e2e test-slurm test-matrix test-docker lint audit format wheel clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) must be Python 3.11 or newer; try make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "setting up $(VENV) (2 to 3 minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

train: $(READY)
	$(BIN)/kalmagrove train experiment=quickstart $(ARGS)

# Speed of the tests: unit tests share the cores, tests that start processes of their own run alone.
test: lint
	$(BIN)/python -m pytest tests/unit tests/kernels $(addprefix --ignore=,$(MORE)) -n 2 $(ARGS)
	$(BIN)/python -m pytest tests/dist tests/e2e tests/golden tests/gpu $(addprefix --ignore=,$(MORE)) --durations=12 $(ARGS)

# Tests of single commands, and kernels compiled in every form, that `test` leaves out for time: about seventeen minutes.
MORE := $(addprefix tests/dist/test_,faults.py faults_more.py retrofit.py) $(addprefix tests/e2e/test_,doctor.py evaluate.py report.py search.py sweep.py two_machines.py) tests/kernels/test_compile_more.py
test-more: $(READY)
	$(BIN)/python -m pytest $(filter-out tests/kernels/%,$(MORE)) --durations=12 $(ARGS)
	$(BIN)/python -m pytest $(filter tests/kernels/%,$(MORE)) -n 2 $(ARGS)

# Coverage slows the tests down by two thirds; of Triton's interpreter and started processes it sees nothing.
coverage: $(READY)
	$(BIN)/coverage erase
	$(BIN)/python -m pytest tests/unit -n 2 --cov --cov-report=term:skip-covered $(ARGS)

test-unit: $(READY)
	$(BIN)/python -m pytest tests/unit tests/kernels $(addprefix --ignore=,$(MORE)) -n 2 $(ARGS)

test-dist: $(READY)
	$(BIN)/python -m pytest tests/dist $(ARGS)

MATRIX := $(addprefix tests/dist/test_,matrix.py reshape.py attention_parallel.py ffn_parallel.py traffic.py)

# Every layout of tensor, expert and context parallelism at every ZeRO stage: about an hour on two idle cores.
test-matrix: $(READY)
	KALMAGROVE_MATRIX=1 $(BIN)/python -m pytest $(MATRIX) $(ARGS)

# A real Slurm of two loopback nodes, started and ended by tests/cluster/slurm.sh: needs root and Debian. About fifteen minutes.
test-slurm: $(READY)
	KALMAGROVE_SLURM=1 $(BIN)/python -m pytest tests/cluster --durations=12 $(ARGS)

test-e2e: $(READY)
	$(BIN)/python -m pytest tests/e2e tests/golden $(ARGS)

# The steps of docker/install.sh from nothing: every package is downloaded and installed once more.
test-docker: $(READY)
	KALMAGROVE_DOCKER=1 $(BIN)/python -m pytest tests/e2e/test_docker.py -k from_nothing --durations=1 $(ARGS)

# Known vulnerabilities of the pinned packages, from a public vulnerability service. Not part of `test`, which needs no network.
# The auditor has an environment of its own: it is not among what it looks at.
audit:
	@test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && \
	  $(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1; }
	@$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r requirements.lock || \
	  { echo "make audit: not passed: what is known to be vulnerable is listed above; where it says" \
	    "'could not be audited' or a connection failed, nothing is known, because that service was not reached" >&2; exit 1; }

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(READY)
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage* .pytest_cache .ruff_cache .mypy_cache
