# alphaprune: every result is a file, and this says what it is made from.
#
#   make reproduce-figures                 all experiments, figures, scorecard and one HTML report
#   make reproduce-figures PRESET=gpu      its network and images, three epochs a stage; drawn from the records in git
#   make reproduce-figures PRESET=report   the report's own rule, up to 400 epochs a stage
#   make help                              everything else

PRESET ?= quick
PYTHON ?= python3
# Notebooks that run at once. A GPU is best given to one at a time.
JOBS ?= $(if $(filter gpu report,$(PRESET)),1,2)
MAKEFLAGS += --no-builtin-rules --jobs=$(JOBS)
SHELL := /bin/bash
# Large pages for what glibc's malloc gives out: training steps take 3 to 10 % less time. Elsewhere nothing reads this.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
.DELETE_ON_ERROR:
.SUFFIXES:

UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
R := results/$(PRESET)
RUN := $(BIN)/python notebooks/execute.py --seal $(R)
CACHE := $(or $(ALPHAPRUNE_DATA),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/alphaprune)
CIFAR10 := $(CACHE)/cifar-10-batches-bin/test_batch.bin
DATA := $(if $(filter smoke,$(PRESET)),,$(CIFAR10))

# In an order that keeps two jobs busy to the end: while the first two run, make waits to start the last, which has no
# parent, and then comes back to fig3, the longest of those that have one.
EXPERIMENTS := week_before fig4 fig3 section21 fig2 fig1 earlier_run
# What is made depends on the content of its inputs and not on their times, which a checkout changes: on a hash of each,
# a file that is touched only where the content is another.
H := $(R)/.inputs
inputs = $(addprefix $(H)/,$(1))
LIBRARY := $(H)/library
EXECUTED := $(foreach e,pretrain $(EXPERIMENTS) pruned figures,$(R)/notebooks/$(e).ipynb)
PAGES := $(patsubst $(R)/notebooks/%.ipynb,$(R)/html/%.html,$(EXECUTED))
$(foreach name,preset jobs,$(if $(filter command,$(origin $(name))),$(error $(name)=$($(name)) is not read; write it in capitals, as PRESET=smoke or JOBS=1)))
PRESETS := $(patsubst params/%/preset.yaml,%,$(wildcard params/*/preset.yaml))
ifeq ($(filter $(PRESET),$(PRESETS)),)
$(error preset '$(PRESET)' is unknown; there are: $(PRESETS))
endif

.PHONY: best rounded mirrored pace verify audit benchmark benchmark-gpu benchmark-check skips own-network coverage cliff controls unfinished time-and-memory how-cost-grows why test-faults FORCE
.PHONY: reproduce-figures figures html pretrain experiments data lab test environment lock clean help $(EXPERIMENTS) pruned

MAKES := $(filter-out environment lock data lab test clean help why verify audit benchmark benchmark-gpu benchmark-check test-faults coverage,$(or $(MAKECMDGOALS),all))
ifneq ($(MAKES),)
# Before make decides what is old: what is not as it was written counts as old too, and is named.
ifneq ($(and $(wildcard $(READY)),$(wildcard $(R)/notebooks)),)
DAMAGED := $(shell $(BIN)/python notebooks/seals.py $(R))
endif
# When this call began: pages that are newer were made by it.
BEGUN := $(H)/begun
$(shell mkdir -p $(H); touch $(BEGUN))
endif
done = @for page in $(1); do [ $$page -nt $(BEGUN) ] && { echo "Done."; exit; }; done; echo "Nothing to do: $(or $(2),everything) is up to date."

reproduce-figures: $(R)/report.html $(PAGES)
	$(call done,$^)
	@echo "Report:    $(R)/report.html"
	@echo "Figures:   $(R)/figures/"
	@echo "Scorecard: $(R)/scorecard.csv"

help:
	@echo "make reproduce-figures   environment, data, every experiment, figures, scorecard, HTML report"
	@echo "make environment         .venv from requirements.lock, with the library in it"
	@echo "make test                environment, all checks"
	@echo "make lab                 JupyterLab on the notebooks"
	@echo "make figures             Figures 1 to 4 and the overview, PNG and SVG"
	@echo "make html                every executed notebook as a page, and the report"
	@echo "make fig4                one experiment; also: $(filter-out fig4,$(EXPERIMENTS)) pruned"
	@echo "make skips               ResNet-20: pruned through its skip connections, and without them"
	@echo "make own-network         a ResNet-18 on a folder of images, from load to bundle"
	@echo "make cliff               why accuracy falls at alpha 0, and ways around it, with the same images"
	@echo "make controls            against Torch-Pruning, training from scratch and the report's recipe"
	@echo "make pace                seconds of each method of make controls, one after another, to compare them by time"
	@echo "make best                the recipe that does best, with three seeds, folded and saved"
	@echo "make rounded             what channel counts in multiples of 4 cost in accuracy"
	@echo "make mirrored            what cropping the training images costs the narrowest networks"
	@echo "make unfinished          what brings on the models that Figures 1 to 3 left unfinished"
	@echo "make time-and-memory     original and pruned networks: latency, throughput, memory, what to deploy with"
	@echo "make how-cost-grows      a training step against width, keep_ratio, depth and image size"
	@echo "make coverage            fold every CNN of torchvision and write docs/coverage.md"
	@echo "make pretrain            train the pretrained network anew"
	@echo "make why                 the stages that would be trained, and which input changed"
	@echo "make test-faults         kill, damage, fill the disk: what is survived (10 minutes), into docs/faults.md"
	@echo "make data                fetch CIFAR-10 or check what is there"
	@echo "make verify              three smoke reproductions, compared: is the same command the same result?"
	@echo "make benchmark           how fast it is, against what it replaces, and the whole reproduction timed (22 minutes)"
	@echo "make benchmark-check     the same without that; fails where a ratio falls short of its target"
	@echo "make benchmark-gpu       on a GPU: training epochs, what is deployed, CUDA graphs, torch.compile (a few minutes)"
	@echo "make audit               known vulnerabilities of what requirements.lock names"
	@echo "make lock                resolve requirements.lock anew"
	@echo "make clean               remove results/$(PRESET) but for pretrained networks, widths and what is compared"
	@echo "Presets (PRESET=...):    $(PRESETS); now $(PRESET). Notebooks at once (JOBS=...): now $(JOBS)"

# ---- environment and data

# Compiled once: where Python may not write what it compiles, each of some forty processes would do it again.
environment: $(READY)
$(READY): requirements.lock pyproject.toml
	@echo "Making $(VENV) from requirements.lock"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "alphaprune: $(PYTHON) is too old; Python 3.11 or newer is needed (make PYTHON=python3.12)" >&2; exit 2; }
	@[ ! -L $(VENV) ] || { echo "alphaprune: $(VENV) is a link, and what it leads to would be cleared; remove the link, or touch $@ if that environment is right" >&2; exit 2; }
	@$(PYTHON) -m venv --clear $(VENV) || { echo "alphaprune: $(PYTHON) has no venv module; install it (Debian: python3-venv)" >&2; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

lock: | $(READY)
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --all-extras \
	  pyproject.toml requirements.in --output-file requirements.lock

data: | $(READY)
	@$(BIN)/python -m alphaprune.data
$(CIFAR10): | $(READY)
	@$(BIN)/python -m alphaprune.data

# A first hash is as old as its input: what was made before there were hashes is not made again for them.
hash = @mkdir -p $(@D); cat $(1) | sha256sum | cmp -s - $@ || { [ -e $@ ] || old=1; cat $(1) | sha256sum > $@; \
  [ -z "$$old" ] || touch -r "$$(ls -t $(1) | head -1)" $@; }
$(LIBRARY): FORCE
	$(call hash,$(wildcard lib/alphaprune/*.py))
$(H)/%: % FORCE
	$(call hash,$<)

# ---- experiments: a notebook each, with the right parents

experiments: $(foreach e,$(EXPERIMENTS) pruned,$(R)/notebooks/$(e).ipynb)
$(EXPERIMENTS): %: $(R)/notebooks/%.ipynb
	@echo "Notebook:  $<"
pruned: $(R)/notebooks/pruned.ipynb
	@echo "Notebook:  $<"

$(R)/notebooks/pretrain.ipynb: $(H)/notebooks/01_pretraining.ipynb $(H)/params/$(PRESET)/pretrain.yaml $(H)/params/$(PRESET)/preset.yaml | $(READY) $(DATA)
	@$(RUN) $(<:$(H)/%=%) $@ -f params/$(PRESET)/pretrain.yaml

pretrain: | $(READY) $(DATA)
	@$(RUN) notebooks/01_pretraining.ipynb $(R)/notebooks/pretrain.ipynb -f params/$(PRESET)/pretrain.yaml -p again true
	$(if $(filter full_size,$(BEST)),@$(RUN) notebooks/01_pretraining.ipynb $(R)/notebooks/pretrain_49500.ipynb -f params/$(PRESET)/pretrain_49500.yaml -p again true)

$(foreach e,$(EXPERIMENTS),$(R)/notebooks/$(e).ipynb): $(R)/notebooks/%.ipynb: $(H)/notebooks/02_alpha_decay.ipynb \
    $(H)/params/$(PRESET)/%.yaml $(H)/params/report/%.yaml $(H)/params/$(PRESET)/preset.yaml $(LIBRARY) \
    $(R)/notebooks/pretrain.ipynb $(call inputs,$(wildcard $(R)/pretrained/*.sha256))
	@$(RUN) $(<:$(H)/%=%) $@ -f params/$(PRESET)/$*.yaml

$(foreach e,fig1 section21 fig2 fig3,$(R)/notebooks/$(e).ipynb): $(R)/notebooks/week_before.ipynb

$(R)/notebooks/pruned.ipynb: $(H)/notebooks/03_fold_and_verify.ipynb $(H)/params/$(PRESET)/pruned.yaml $(H)/params/report/pruned.yaml $(R)/notebooks/fig4.ipynb
	@$(RUN) $(<:$(H)/%=%) $@ -f params/$(PRESET)/pruned.yaml

why: | $(READY)
	@$(BIN)/python -m alphaprune.experiment --why $(wildcard $(foreach e,pretrain $(EXPERIMENTS) pretrain_resnet20 resnet20_narrow resnet20_plain unfinished adaptive,params/$(PRESET)/$(e).yaml))
ifneq ($(PRESET),gpu)
	@$(BIN)/python -m alphaprune.comparison cliff controls rounded mirrored $(if $(filter report,$(PRESET)),full_size) $(if $(filter quick,$(PRESET)),small_batches ten_seeds roots ranked residual muon) $(PRESET) --why
	@$(BIN)/python -m alphaprune.comparison controls $(PRESET) --budgets --why
endif

# It has the report's experiments alone.
params/gpu/%.yaml params/%/gpu.yaml:
	@echo "alphaprune: the preset gpu has no $*; use PRESET=quick or PRESET=report" >&2; exit 2

# ---- beyond the report: notebooks of their own

skips: $(R)/html/skips.html
	$(call done,$<,$@)
	@echo "Page:      $<"
$(R)/notebooks/pretrain_resnet20.ipynb $(R)/notebooks/pretrain_49500.ipynb: $(R)/notebooks/pretrain_%.ipynb: $(H)/notebooks/01_pretraining.ipynb $(H)/params/$(PRESET)/pretrain_%.yaml $(H)/params/$(PRESET)/preset.yaml | $(READY) $(DATA)
	@$(RUN) $(<:$(H)/%=%) $@ -f params/$(PRESET)/pretrain_$*.yaml

$(R)/notebooks/skips.ipynb: $(H)/notebooks/06_skip_connections.ipynb $(LIBRARY) $(H)/params/$(PRESET)/preset.yaml \
    $(foreach e,resnet20_narrow resnet20_plain,$(H)/params/$(PRESET)/$(e).yaml $(H)/params/report/$(e).yaml) $(R)/notebooks/pruned.ipynb $(R)/notebooks/pretrain_resnet20.ipynb
	@$(RUN) $(<:$(H)/%=%) $@ -p preset $(PRESET)

own-network: $(R)/html/own_network.html
	$(call done,$<,$@)
	@echo "Page:      $<"
$(R)/notebooks/own_network.ipynb: $(H)/notebooks/07_your_own_network.ipynb $(H)/params/own_network/$(PRESET).yaml $(LIBRARY) | $(READY) $(DATA)
	@$(RUN) $(<:$(H)/%=%) $@ -f params/own_network/$(PRESET).yaml

cliff: $(R)/html/cliff.html
	$(call done,$<,$@)
	@echo "Page:      $<"
$(R)/notebooks/cliff.ipynb: $(H)/notebooks/08_the_cliff.ipynb $(H)/params/cliff.yaml $(foreach e,cliff adaptive,$(H)/params/$(PRESET)/$(e).yaml) $(H)/params/$(PRESET)/preset.yaml $(LIBRARY) $(R)/notebooks/pretrain.ipynb
	@$(RUN) $(<:$(H)/%=%) $@ -p preset $(PRESET) -p jobs $(JOBS)

controls: $(R)/html/controls.html
	$(call done,$<,$@)
	@echo "Page:      $<"
$(R)/notebooks/controls.ipynb: $(H)/notebooks/09_controls.ipynb $(H)/params/controls.yaml $(H)/params/published.yaml $(H)/params/$(PRESET)/controls.yaml $(H)/params/$(PRESET)/preset.yaml $(LIBRARY) $(R)/notebooks/pretrain.ipynb \
    $(call inputs,$(wildcard $(R)/pace/controls.json))
	@$(RUN) $(<:$(H)/%=%) $@ -p preset $(PRESET) -p jobs $(JOBS)

ifneq ($(filter pace,$(MAKECMDGOALS)),)
.NOTPARALLEL: # what ran beside it would be measured too
endif
pace: $(H)/params/$(PRESET)/controls.yaml $(R)/notebooks/pretrain.ipynb
	@$(BIN)/python -m alphaprune.pace controls $(PRESET)

best: $(R)/html/best.html
	$(call done,$<,$@)
	@echo "Page:      $<"
	@echo "Network:   $(R)/best/"
# Of the whole network, on nearly all images, another one, from an original of its own.
FULL_SIZE := alphaprune, folded at once, widths by sensitivity, distilled
BEST := $(if $(filter report,$(PRESET)),full_size,controls)
$(R)/notebooks/best.ipynb: $(H)/notebooks/13_best_recipe.ipynb $(H)/params/$(BEST).yaml $(H)/params/$(PRESET)/$(BEST).yaml $(H)/params/$(PRESET)/preset.yaml $(LIBRARY) $(R)/notebooks/pretrain$(if $(filter full_size,$(BEST)),_49500).ipynb \
    | $(if $(filter controls,$(MAKECMDGOALS)),$(R)/notebooks/controls.ipynb)
	@$(RUN) $(<:$(H)/%=%) $@ -p preset $(PRESET) -p jobs $(JOBS) $(if $(filter full_size,$(BEST)),-p comparison full_size -p method '$(FULL_SIZE)')

rounded: $(R)/html/rounded.html
	$(call done,$<,$@)
	@echo "Page:      $<"
$(R)/notebooks/rounded.ipynb: $(H)/notebooks/14_what_rounding_costs.ipynb $(foreach e,controls rounded,$(H)/params/$(e).yaml $(H)/params/$(PRESET)/$(e).yaml) $(H)/params/$(PRESET)/preset.yaml $(LIBRARY) $(R)/notebooks/pretrain.ipynb \
    | $(foreach e,controls best,$(if $(filter $(e),$(MAKECMDGOALS)),$(R)/notebooks/$(e).ipynb))
	@$(RUN) $(<:$(H)/%=%) $@ -p preset $(PRESET) -p jobs $(JOBS)

mirrored: $(R)/html/mirrored.html
	$(call done,$<,$@)
	@echo "Page:      $<"
$(R)/notebooks/mirrored.ipynb: $(H)/notebooks/15_what_cropping_costs.ipynb $(foreach e,controls mirrored,$(H)/params/$(e).yaml $(H)/params/$(PRESET)/$(e).yaml) $(H)/params/$(PRESET)/preset.yaml $(LIBRARY) $(R)/notebooks/pretrain.ipynb \
    | $(foreach e,controls best rounded,$(if $(filter $(e),$(MAKECMDGOALS)),$(R)/notebooks/$(e).ipynb))
	@$(RUN) $(<:$(H)/%=%) $@ -p preset $(PRESET) -p jobs $(JOBS)

unfinished: $(R)/html/unfinished.html
	$(call done,$<,$@)
	@echo "Page:      $<"
$(R)/notebooks/unfinished.ipynb: $(H)/notebooks/10_unfinished_models.ipynb $(H)/params/$(PRESET)/unfinished.yaml $(H)/params/report/unfinished.yaml $(foreach e,fig1 fig2 fig3,$(R)/notebooks/$(e).ipynb)
	@$(RUN) $(<:$(H)/%=%) $@ -p preset $(PRESET)

# Two that measure time would measure each other: asked for together, one waits for the other. Memory is measured as a network has it
# that no Makefile started.
time-and-memory: $(R)/html/time_and_memory.html
	$(call done,$<,$@)
	@echo "Page:      $<"
$(R)/notebooks/time_and_memory.ipynb: $(H)/notebooks/11_time_and_memory.ipynb $(H)/params/$(PRESET)/time_and_memory.yaml $(H)/params/$(PRESET)/controls.yaml $(H)/params/$(PRESET)/preset.yaml $(LIBRARY) $(R)/notebooks/pruned.ipynb
	@GLIBC_TUNABLES= $(RUN) $(<:$(H)/%=%) $@ -f params/$(PRESET)/time_and_memory.yaml

how-cost-grows: $(R)/html/how_cost_grows.html
	$(call done,$<,$@)
	@echo "Page:      $<"
$(R)/notebooks/how_cost_grows.ipynb: $(H)/notebooks/12_how_cost_grows.ipynb $(H)/params/$(PRESET)/how_cost_grows.yaml $(LIBRARY) \
    | $(READY) $(if $(filter time-and-memory,$(MAKECMDGOALS)),$(R)/notebooks/time_and_memory.ipynb)
	@GLIBC_TUNABLES= $(RUN) $(<:$(H)/%=%) $@ -f params/$(PRESET)/how_cost_grows.yaml

coverage: | $(READY)
	$(BIN)/python docs/coverage.py

# ---- figures, report, pages

figures: $(R)/notebooks/figures.ipynb
	@echo "Figures:   $(R)/figures/"
$(R)/notebooks/figures.ipynb: $(H)/notebooks/04_figures.ipynb $(H)/params/claims.yaml $(foreach e,$(EXPERIMENTS),$(R)/notebooks/$(e).ipynb)
	@$(RUN) $(<:$(H)/%=%) $@ -p preset $(PRESET)

# What is folded comes first: else it waits behind the pages until all figures are drawn, and the report behind it.
$(R)/notebooks/report.ipynb: $(H)/notebooks/05_report.ipynb $(H)/params/claims.yaml $(R)/notebooks/pruned.ipynb $(R)/notebooks/figures.ipynb
	@$(RUN) $(<:$(H)/%=%) $@ -p preset $(PRESET)

html: $(R)/report.html $(PAGES)
	@echo "Pages:     $(R)/html/"
$(R)/html/%.html: $(R)/notebooks/%.ipynb $(call inputs,notebooks/export.py notebooks/sanitise.py $(wildcard notebooks/offline/*))
	@$(BIN)/python notebooks/export.py $< $@ --seal $(R)
$(R)/report.html: $(R)/notebooks/report.ipynb $(call inputs,notebooks/export.py notebooks/sanitise.py $(wildcard notebooks/offline/*))
	@$(BIN)/python notebooks/export.py $< $@ --no-code --seal $(R)

# ---- people and checks

# Code that anyone may run who reaches it: from this machine alone, and with Jupyter's token, which is new at every start.
lab: $(READY)
	$(BIN)/jupyter lab $(LAB) --ip=127.0.0.1 --ServerApp.allow_remote_access=False --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

test: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

# Kills, damage, a full disk and bad input, in full; `make test` has a shorter form. Writes docs/faults.md.
test-faults: $(READY)
	@ALPHAPRUNE_FAULTS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=15 -o junit_family=xunit1 --junitxml=.pytest_cache/faults.xml \
	  tests/test_faults_make.py tests/test_bad_input.py tests/test_damage.py tests/test_faults.py; \
	  status=$$?; $(BIN)/python docs/faults.py .pytest_cache/faults.xml && exit $$status

verify: | $(READY)
	@$(BIN)/python notebooks/verify.py

benchmark: | $(READY)
	@$(BIN)/python notebooks/benchmark.py
benchmark-gpu: | $(READY)
	@$(BIN)/python notebooks/benchmark.py --gpu
benchmark-check: | $(READY)
	@$(BIN)/python notebooks/benchmark.py --check

audit: | $(READY)
	@$(BIN)/python notebooks/audit.py requirements.lock

# What is compared took hours, and is what the tables beside it say.
COMPARED := $(addprefix $(R)/stages/,controls cliff adaptive rounded mirrored small_batches ten_seeds roots ranked residual muon unfinished full_size) $(if $(filter gpu,$(PRESET)),$(wildcard $(R)/stages/*))
# Of gpu and report the pictures are in git, as their records are.
clean:
	rm -rf $(R)/.inputs $(R)/.seals $(R)/notebooks $(R)/html $(if $(filter gpu report,$(PRESET)),,$(R)/figures $(R)/scorecard.csv) $(filter-out $(COMPARED),$(wildcard $(R)/stages/*)) $(R)/bundle $(R)/own_images $(R)/own_network_stopped $(R)/report.html

.DEFAULT:
	@echo "alphaprune: nothing here makes '$@'; 'make help' lists what can be made" >&2; exit 2
