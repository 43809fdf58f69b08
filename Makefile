# Every target builds .venv first when it is missing or out of date, so each can be the first command in a fresh clone.
#   make hessian     measure the structure, derive rules, write out/hessian/index.html
#   make test        the test suite
#   make interop     every trainer and launcher for real, in an environment of its own; docs/integrations.md
# A CPU build of torch is installed. For a GPU: make setup TORCH=cu128 (any tag of PyTorch's wheel index), or TORCH=pypi;
# later targets keep the choice.

PYTHON  ?= python3
TORCH   ?= $(or $(firstword $(patsubst .venv/.ready-%,%,$(wildcard .venv/.ready-*))),cpu)
PROFILE ?= cpu
WORKERS ?= 2
RESULTS ?= results
OUT     ?= out/hessian
FIGURES ?= paper_figures/out

VENV  := .venv
PY    := $(VENV)/bin/python
READY := $(VENV)/.ready-$(TORCH)
PEERS := $(VENV)/peers/.ready-0.18.0
INTEROP := $(VENV)/interop
FACTORY := $(VENV)/llamafactory
PIP   := $(PY) -m pip install --quiet --disable-pip-version-check
INTEROP_PIP := $(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check
FACTORY_PIP := $(FACTORY)/bin/python -m pip --quiet --disable-pip-version-check
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_INDEX   := https://download.pytorch.org/whl/$(TORCH)

.DEFAULT_GOAL := help
.PHONY: help setup hessian test interop lint fuzz bench bench-quick sanitize ablation kills figures coverage scaling low-bit clean

help:
	@sed -n 's/^#   //p' Makefile; echo "also: setup lint fuzz bench bench-quick ablation [PROFILE=cpu|smoke] kills figures coverage scaling clean"

setup: $(READY)

# torch first and alone, so that nothing else can pull in a CUDA build: a wheel at hand (PIP_FIND_LINKS) if there is
# one, else PyTorch's own index. The published adam-mini stays out of the import path: its name is ours, too.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@echo "building $(VENV) (once, some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
ifeq ($(TORCH),pypi)
	@$(PIP) torch==$(TORCH_VERSION)
else
	@{ [ "$(TORCH)" = cpu ] && $(PIP) --no-index --no-deps torch==$(TORCH_VERSION) 2>/dev/null; } || \
		$(PIP) --no-deps --force-reinstall --index-url $(TORCH_INDEX) torch==$(TORCH_VERSION) || \
		{ echo "no torch $(TORCH_VERSION) for TORCH=$(TORCH); try TORCH=pypi (the default build, several GB)"; exit 1; }
endif
	@$(PIP) --constraint constraints.txt --editable ".[dev]"
	@$(PIP) --no-deps pyhessian==0.1
	@$(PIP) --no-deps --upgrade --target $(VENV)/published adam-mini==1.1.1
	@rm -f $(VENV)/.ready-*; touch $(READY)

hessian: $(READY)
	$(PY) -m experiments.studies.hessian_maps --out $(OUT)
	$(PY) -m paper_figures.hessian $(OUT)

# Tests of one group share processes that are expensive to start, so they run in one worker. A single file needs no
# workers: .venv/bin/python -m pytest tests/optimizer/test_update.py
test: $(READY)
	$(PY) -m pytest -n $(WORKERS) --dist loadgroup

# DeepSpeed is built from source against the torch that is there, so what it is built with comes first. torchtitan asks for
# an older datasets than the others (and wandb); what it needs is among the requirements.
$(INTEROP)/.ready: tests/interop/requirements.txt constraints.txt pyproject.toml
	@echo "building $(INTEROP) (once, some minutes)"
	@rm -rf $(INTEROP) && $(PYTHON) -m venv $(INTEROP)
	@$(INTEROP_PIP) --no-index --no-deps torch==$(TORCH_VERSION) 2>/dev/null || \
		$(INTEROP_PIP) --no-deps --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH_VERSION)
	@$(INTEROP_PIP) --constraint constraints.txt torch==$(TORCH_VERSION) numpy setuptools wheel ninja
	@DS_BUILD_OPS=0 $(INTEROP_PIP) --constraint constraints.txt --no-build-isolation -r tests/interop/requirements.txt
	@$(INTEROP_PIP) --no-deps torchtitan==0.3.0
	@$(INTEROP_PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# LLaMA-Factory's pins exclude the others'. It imports torchaudio, whose wheel is linked against CUDA: without its
# libraries it is plain Python and imports. A distribution called adam-mini is what its argument parser asks for.
$(FACTORY)/.ready: tests/interop/llamafactory.txt tests/interop/llamafactory-sdist.txt examples/llamafactory/adam-mini/pyproject.toml constraints.txt
	@echo "building $(FACTORY) (once, some minutes)"
	@rm -rf $(FACTORY) && $(PYTHON) -m venv $(FACTORY)
	@$(FACTORY_PIP) install --no-index --no-deps torch==$(TORCH_VERSION) 2>/dev/null || \
		$(FACTORY_PIP) install --no-deps --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH_VERSION)
	@$(FACTORY_PIP) install torch==$(TORCH_VERSION) setuptools wheel -r tests/interop/llamafactory.txt
	@$(FACTORY_PIP) install --no-deps torchaudio==2.11.0
	@rm -f $(FACTORY)/lib/python*/site-packages/torchaudio/lib/*.so
	@$(FACTORY_PIP) download --no-deps --no-binary llamafactory --require-hashes -d $(FACTORY) -r tests/interop/llamafactory-sdist.txt
	@$(FACTORY_PIP) install --no-deps $(FACTORY)/llamafactory-0.9.5.tar.gz
	@$(FACTORY_PIP) install --no-deps --no-build-isolation --editable . ./examples/llamafactory/adam-mini
	@touch $@

# One part alone: make interop CHECK=tests/interop/check_ddp.py. The table is written also where a check fails.
CHECK ?= tests/interop
# DeepSpeed compiles its shared-memory operator at its first start; ranks that wait for it would give up.
interop: export TORCH_EXTENSIONS_DIR := $(abspath $(INTEROP))/extensions
interop: $(INTEROP)/.ready $(FACTORY)/.ready
	@rm -f $(TORCH_EXTENSIONS_DIR)/*/lock  # of a build that was killed
	@PATH=$(abspath $(INTEROP))/bin:$$PATH $(INTEROP)/bin/python -c 'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)'
	@$(INTEROP)/bin/python -m pytest -o python_files='check_*.py' -o python_functions='check_*' -o timeout=900 $(CHECK); status=$$?; \
		$(INTEROP)/bin/python -m tests.interop.matrix; exit $$status

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# torchao is a contestant of the bench and stays out of the import path: transformers would import it, too.
$(PEERS): $(READY)
	@rm -rf $(VENV)/peers && $(PIP) --no-deps --target $(VENV)/peers torchao==0.18.0 && touch $(PEERS)

# Random steps of every engine against the paper's transcription.
MINUTES ?= 30
fuzz: $(READY)
	$(PY) -m tests.fuzz --minutes $(MINUTES)

# The native loop's tests under ASan and UBSan, then TSan (the latter wants clang-16, libomp-16-dev, libclang-rt-16-dev).
sanitize: $(READY)
	PYTHON=$(PY) tests/optimizer/sanitize_native.sh address
	PYTHON=$(PY) tests/optimizer/sanitize_native.sh thread

# Few-bit first moments in training: hours; finished runs are kept.
low-bit: $(READY)
	$(PY) -m experiments.studies.low_bit_moments

bench: $(READY) $(PEERS)
	$(PY) -m benchmarks.dense_hessian
	$(PY) -m benchmarks.optimizer_step --peers $(VENV)/peers
	$(PY) -m benchmarks.report --docs docs/speed.md

bench-quick: $(READY) $(PEERS)
	$(PY) -m benchmarks.optimizer_step --quick --peers $(VENV)/peers

coverage: $(READY)
	$(PY) -m benchmarks.coverage
	$(PY) -m optimizer plan --table docs/memory.md

# docs/scaling.md; --check --ranks 2 3 counts what real ranks send.
scaling: $(READY)
	$(PY) -m benchmarks.scaling

# SWEEP: further options, e.g. SWEEP="--cluster slurm --partition night --time 120" (docs/training.md).
ablation: $(READY)
	$(PY) -m experiments.ablation --profile $(PROFILE) --workers $(WORKERS) --results $(RESULTS) $(SWEEP)

# Twenty SIGKILLs of a run of two FSDP2 ranks, some minutes.
kills: $(READY)
	$(PY) -m tests.experiments.kills --kills 20

figures: $(READY)
	$(PY) -m paper_figures.ablation --results results/ablation_cpu --out $(FIGURES) --prediction results/predicted_cost.json

clean:
	rm -rf $(VENV) out paper_figures/out build *.egg-info
