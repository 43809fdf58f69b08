# Every target first builds .venv if it is missing or out of date, so each can be the first command in a fresh clone.
#   make hessian     measure the structure, derive rules, write out/hessian/index.html
#   make report      write out/report/index.html, a site of all committed results
#   make test        run the test suite
#   make interop     run every supported trainer and launcher in a separate environment; see docs/integrations.md
# The default is a CPU build of torch. For a GPU, use make setup TORCH=cu128 (any tag of PyTorch's wheel index) or
# TORCH=pypi. Later targets use the same build.

PYTHON  ?= python3
TORCH   ?= $(or $(firstword $(patsubst .venv/.ready-%,%,$(wildcard .venv/.ready-*))),cpu)
PROFILE ?= cpu
WORKERS ?= 2
RESULTS ?= results
OUT     ?= out/hessian
FIGURES ?= paper_figures/out
REPORT  ?= out/report

VENV  := .venv
PY    := $(VENV)/bin/python
READY := $(VENV)/.ready-$(TORCH)
PEERS := $(VENV)/peers/.ready-0.18.0
HESSIAN_PEERS := $(VENV)/peers-hessian
INTEROP := $(VENV)/interop
FACTORY := $(VENV)/llamafactory
REAL := $(VENV)/real-model
WORKLOADS := $(VENV)/workloads
PIP   := $(PY) -m pip install --quiet --disable-pip-version-check
HESSIAN_PEERS_PIP := $(HESSIAN_PEERS)/bin/python -m pip install --quiet --disable-pip-version-check
INTEROP_PIP := $(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check
WORKLOADS_PIP := $(WORKLOADS)/bin/python -m pip install --quiet --disable-pip-version-check
REAL_PIP := $(REAL)/bin/python -m pip install --quiet --disable-pip-version-check
FACTORY_PIP := $(FACTORY)/bin/python -m pip --quiet --disable-pip-version-check
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_INDEX   := https://download.pytorch.org/whl/$(TORCH)

.DEFAULT_GOAL := help
.PHONY: help setup hessian test interop lint fuzz bench bench-quick bench-peers bench-deepspeed sanitize ablation kills figures report report-check coverage scaling low-bit role-study real-model paper-hessian peers setup-workloads workloads check-workloads gpu-check gpu-dry-run clean

help:
	@sed -n 's/^#   //p' Makefile; echo "also: setup lint fuzz bench bench-quick bench-peers bench-deepspeed ablation [PROFILE=cpu|smoke] kills figures report report-check coverage scaling real-model paper-hessian peers workloads check-workloads gpu-check clean"

setup: $(READY)

# torch is installed first, so that no other package can install a CUDA build as its dependency. The wheel comes from
# PIP_FIND_LINKS if it is there, and otherwise from PyTorch's index. The published adam-mini is installed outside the
# import path, because this project has a module of the same name.
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
test: $(READY) $(PEERS)
	$(PY) -m pytest -n $(WORKERS) --dist loadgroup

# DeepSpeed is built from source against the installed torch, so torch and the build tools are installed first.
# torchtitan is installed without dependencies, because it requires an older datasets than the others, and wandb; the
# packages that it needs are in requirements.txt.
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

# LLaMA-Factory's pins conflict with those of the others, so it has a separate environment. It imports torchaudio, whose
# libraries are linked against CUDA; without them, torchaudio can be imported on a CPU. Its argument parser requires an
# installed distribution named adam-mini.
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

# To run one check: make interop CHECK=tests/interop/check_ddp.py. The table is written even if a check fails.
CHECK ?= tests/interop
# DeepSpeed compiles its shared-memory operator at its first start. It is compiled before the checks, because ranks that
# wait for the compilation would time out.
interop: export TORCH_EXTENSIONS_DIR := $(abspath $(INTEROP))/extensions
interop: $(INTEROP)/.ready $(FACTORY)/.ready
	@rm -f $(TORCH_EXTENSIONS_DIR)/*/lock  # left by builds that were killed
	@PATH=$(abspath $(INTEROP))/bin:$$PATH $(INTEROP)/bin/python -c 'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)'
	@$(INTEROP)/bin/python -m pytest -o python_files='check_*.py' -o python_functions='check_*' -o timeout=900 $(CHECK); status=$$?; \
		$(INTEROP)/bin/python -m tests.interop.matrix; exit $$status

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# torchao takes part in the benchmark, and as an arm of the ablation. It is installed outside the import path, because transformers imports it if it can.
peers: $(PEERS)

$(PEERS): $(READY)
	@rm -rf $(VENV)/peers && $(PIP) --no-deps --target $(VENV)/peers torchao==0.18.0 && touch $(PEERS)

# Compare random steps of every engine with the transcription of the paper.
MINUTES ?= 30
fuzz: $(READY)
	$(PY) -m tests.fuzz --minutes $(MINUTES)

# Run the native loop's tests under ASan and UBSan, then under TSan, which needs clang-16, libomp-16-dev and
# libclang-rt-16-dev.
sanitize: $(READY)
	PYTHON=$(PY) tests/optimizer/sanitize_native.sh address
	PYTHON=$(PY) tests/optimizer/sanitize_native.sh thread

# Train with few-bit first moments. This takes hours; finished runs are not repeated.
low-bit: $(READY)
	$(PY) -m experiments.studies.low_bit_moments

# Train with one role shared at a time, and rank what predicts the cost. This takes about an hour; finished runs are kept.
role-study: $(READY)
	$(PY) -m experiments.studies.role_study
	$(PY) -m experiments.studies.role_study --criteria
	$(PY) -m paper_figures.role_study --docs docs/role_study.md

# What reads the GGUF file of a language model, in an environment of its own. torch is installed first, as above.
$(REAL)/.ready: pyproject.toml constraints.txt
	@echo "building $(REAL) (once, a minute)"
	@rm -rf $(REAL) && $(PYTHON) -m venv $(REAL)
	@$(REAL_PIP) --no-index --no-deps torch==$(TORCH_VERSION) 2>/dev/null || \
		$(REAL_PIP) --no-deps --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH_VERSION)
	@$(REAL_PIP) --constraint constraints.txt --editable ".[real-model]"
	@touch $@

# Measure the Hessian of SmolLM2-135M-Instruct. This takes more than an hour; finished samples are not repeated.
real-model: $(READY) $(REAL)/.ready
	$(REAL)/bin/python -m experiments.studies.real_model
	$(PY) -m paper_figures.real_model --docs docs/real_model.md

# The libraries of the workloads, in an environment of their own. timm requires torchvision, and torchvision of the
# package registry a CUDA build of torch of several GB, so both are installed without dependencies.
$(WORKLOADS)/.ready: experiments/workloads/requirements.txt constraints.txt pyproject.toml
	@echo "building $(WORKLOADS) (once, some minutes)"
	@rm -rf $(WORKLOADS) && $(PYTHON) -m venv $(WORKLOADS)
	@$(WORKLOADS_PIP) --no-index --no-deps torch==$(TORCH_VERSION) 2>/dev/null || \
		$(WORKLOADS_PIP) --no-deps --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH_VERSION)
	@$(WORKLOADS_PIP) --constraint constraints.txt --editable ".[experiments,tracking,real-model]" \
		-r experiments/workloads/requirements.txt peft pytest pytest-timeout
	@$(WORKLOADS_PIP) --no-deps timm==1.0.31 torchvision==0.28.0
	@touch $@

setup-workloads: $(WORKLOADS)/.ready

# Tasks beyond small language models, one study each: make workloads PROFILE=smoke, or ONLY="resnet vit". What needs
# Debian's packages says so: apt-get install dataset-fashion-mnist wordnet-base.
ONLY ?=
workloads: $(WORKLOADS)/.ready
	$(WORKLOADS)/bin/python -m experiments.workloads --profile $(PROFILE) --workers $(WORKERS) --results $(RESULTS) \
		$(if $(ONLY),--only $(ONLY))

# Checks of the workloads that need their libraries.
check-workloads: $(WORKLOADS)/.ready
	$(WORKLOADS)/bin/python -m pytest -o python_files='check_*.py' -o python_functions='check_*' -o timeout=900 tests/workloads

# The paper's Hessian experiments. This takes about an hour; finished cells are kept. STUDY="--dry-run" prints the plan. For
# the CNN's images: apt-get install dataset-fashion-mnist.
STUDY ?=
paper-hessian: $(READY)
	$(PY) -m experiments.studies.paper_hessian $(STUDY)
	$(PY) -m paper_figures.paper_hessian --docs docs/paper_hessian.md

bench: $(READY) $(PEERS)
	$(PY) -m benchmarks.dense_hessian
	$(PY) -m benchmarks.optimizer_step --peers $(VENV)/peers
	$(PY) -m benchmarks.report --docs docs/speed.md

bench-quick: $(READY) $(PEERS)
	$(PY) -m benchmarks.optimizer_step --quick --peers $(VENV)/peers

# Other libraries' Hessian products and spectra, in an environment of their own.
$(HESSIAN_PEERS)/.ready: benchmarks/hessian_peers.txt constraints.txt
	@echo "building $(HESSIAN_PEERS) (once, a minute)"
	@rm -rf $(HESSIAN_PEERS) && $(PYTHON) -m venv $(HESSIAN_PEERS)
	@$(HESSIAN_PEERS_PIP) --no-index --no-deps torch==$(TORCH_VERSION) 2>/dev/null || \
		$(HESSIAN_PEERS_PIP) --no-deps --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH_VERSION)
	@$(HESSIAN_PEERS_PIP) --constraint constraints.txt torch==$(TORCH_VERSION) numpy scipy
	@$(HESSIAN_PEERS_PIP) --no-deps -r benchmarks/hessian_peers.txt
	@touch $@

bench-peers: $(HESSIAN_PEERS)/.ready
	$(HESSIAN_PEERS)/bin/python -m benchmarks.hessian_peers
	$(HESSIAN_PEERS)/bin/python -m benchmarks.hessian_peers --docs docs/hessian_peers.md

bench-deepspeed: export TORCH_EXTENSIONS_DIR := $(abspath $(INTEROP))/extensions
bench-deepspeed: $(INTEROP)/.ready
	PATH=$(abspath $(INTEROP))/bin:$$PATH $(INTEROP)/bin/python -m benchmarks.deepspeed_adam
	PATH=$(abspath $(INTEROP))/bin:$$PATH $(INTEROP)/bin/python -m benchmarks.deepspeed_zero

coverage: $(READY)
	$(PY) -m benchmarks.coverage
	$(PY) -m optimizer plan --table docs/memory.md

# Write the tables of docs/scaling.md. To count what real ranks send: python -m benchmarks.scaling --check --ranks 2 3.
scaling: $(READY)
	$(PY) -m benchmarks.scaling

# SWEEP has further options, for example SWEEP="--cluster slurm --partition night --time 120" (docs/training.md).
ablation: $(READY)
	$(PY) -m experiments.ablation --profile $(PROFILE) --workers $(WORKERS) --results $(RESULTS) $(SWEEP)

# What a machine with a GPU runs first: every engine against the reference, times, and a training run, on one page
# (out/gpu_check.md). Without a CUDA device it fails. Build the environment with make setup TORCH=cu128.
gpu-check: $(READY)
	$(PY) -m benchmarks.gpu_check

# The plan of the paper's recipes: runs, tokens, memory per device. Nothing is started.
gpu-dry-run: $(READY)
	$(PY) -m experiments.ablation --profile gpu --dry-run $(SWEEP)

# Kill a run of two FSDP2 ranks with SIGKILL twenty times. This takes some minutes.
kills: $(READY)
	$(PY) -m tests.experiments.kills --kills 20

figures: $(READY)
	$(PY) -m paper_figures --out $(FIGURES)

# A site of the committed results. It reads results and computes nothing, so it takes seconds.
report: $(READY)
	$(PY) -m paper_figures.report --out $(REPORT)

# Click through the site in a browser; screenshots go to out/report-shots. The browser is the system's Chromium.
CHROMIUM ?= $(or $(shell command -v chromium),$(shell command -v chromium-browser))
report-check: $(READY)
	@[ -n "$(CHROMIUM)" ] || { echo "make report-check needs Chromium: apt-get install chromium, or CHROMIUM=/path/to/chromium"; exit 1; }
	@$(PY) -c 'import playwright' 2>/dev/null || $(PIP) --constraint constraints.txt --editable ".[browser]"
	CHROMIUM=$(CHROMIUM) $(PY) -m pytest -rs -o python_files='check_*.py' -o python_functions='check_*' -o timeout=900 tests/browser

clean:
	rm -rf $(VENV) out paper_figures/out build *.egg-info
