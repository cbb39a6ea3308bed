# Everything runs in a virtual environment of its own, .venv, made on the first call.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = pyproject.toml constraints.txt

.PHONY: help demo bench bench-all test test-oldest test-newest test-ui test-vllm test-lmms lint docs wheel train clean

help:
	@echo "make demo         answer questions on images, unpruned and pruned side by side, and write a page to look at"
	@echo "make test         run the tests"
	@echo "make test-oldest  run those that lean on transformers on its oldest supported version"
	@echo "make test-newest  the same on the newest release of transformers"
	@echo "make test-ui      run the tests of plphp ui, with gradio, and with Chromium where there is one"
	@echo "make test-vllm    run the tests of serving, in an environment with vLLM's CPU build (3.5 GB)"
	@echo "make test-lmms    run the tests of lmms-eval, in an environment that looks into .venv for the rest"
	@echo "make bench        time and memory on this machine, beside transformers' own cache"
	@echo "make bench-all    the same for all sizes, with results files"
	@echo "make lint         ruff and mypy"
	@echo "make docs         build the site of the documents into site/, strict about links"
	@echo "make wheel        build the wheel and try it in a clean environment"
	@echo "make train        train the bundled model again (hours on 2 CPU cores)"

demo: $(VENV)/.plphp
	$(BIN)/python examples/demo.py

# A small set that ends within five minutes on 2 CPU cores; the scripts' defaults measure more.
bench: $(VENV)/.plphp
	$(BIN)/python benchmarks/decode.py --batch 1 8 --vision-tokens 2000 --retention 1.0 0.4 --steps 10
	$(BIN)/python benchmarks/prefill.py --vision-tokens 2000 --retention 0.4 --rounds 2
	$(BIN)/python benchmarks/capacity.py --memory 1 --retention 1.0 0.4
	$(BIN)/python benchmarks/end_to_end.py --images 2 --new-tokens 64 --retention 0.4 --rounds 1

# All of it, with results files: make bench-all DEVICE=cuda.
DEVICE ?= cpu
bench-all: $(VENV)/.plphp
	for script in decode ragged prefill scaling capacity end_to_end; do \
		$(BIN)/python benchmarks/$$script.py --device $(DEVICE) \
			--out benchmarks/results/$${script}_$(DEVICE).json || exit 1; \
	done

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Of the tests those that lean on transformers: no kernels, no bundled tasks, no commands, no training.
LEANING = $(addprefix tests/, families engines/hf serving/test_served_families.py serving/test_chat_server.py \
	studies/test_query_bank.py test_custom_generate.py test_invariants.py test_stage_invariants.py)

test-oldest: $(VENV)/.dev
	$(call other_transformers,.venv-oldest,transformers==5.17.0)
	.venv-oldest/bin/python -m pytest -n auto $(LEANING)

# Whatever the newest release is today.
test-newest: $(VENV)/.dev
	$(call other_transformers,.venv-newest,transformers<6)
	.venv-newest/bin/python -m pytest -n auto $(LEANING)

# gradio takes no pillow 13, which all else is tested with. Its server leaves sockets to the garbage collector.
test-ui: $(VENV)/.dev
	$(call other_transformers,.venv-ui,gradio==6.31.0)
	.venv-ui/bin/python -m pytest -W default -p no:unraisableexception tests/ui

# An environment $(1) that looks into $(VENV) for all but what the requirement $(2) names and needs.
define other_transformers
	test -d $(1) || $(PYTHON) -m venv $(1)
	echo "import site; site.addsitedir('$$($(abspath $(BIN))/python -c $(PURELIB))')" \
		> "$$($(1)/bin/python -c $(PURELIB))/base.pth"
	grep -vE '^(transformers|huggingface_hub|tokenizers|pillow)==' constraints.txt > $(1)/constraints.txt
	$(1)/bin/pip install -q -U -c $(1)/constraints.txt "$(2)"
endef
PURELIB = 'import sysconfig; print(sysconfig.get_path("purelib"))'

# Each engine is a process of some 2 GB. Without those that take longest: make test-vllm SELECTED='-m "not thorough"'.
SELECTED ?=
test-vllm: .venv-vllm/.dev
	.venv-vllm/bin/python -m pytest -n 2 --dist worksteal $(SELECTED) tests/engines/vllm tests/engines/test_vllm_reading.py

test-lmms: .venv-lmms/.dev
	.venv-lmms/bin/python -m pytest -n 2 --dist worksteal tests/lmms

docs: .venv-docs/.docs
	.venv-docs/bin/python docs/make_site.py

# The wheel has to work, with its bundled model, where nothing of this folder is.
wheel: $(VENV)/.dev
	rm -rf dist .venv-wheel
	$(BIN)/pip wheel -q --no-deps -w dist .
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install -q -c constraints.txt dist/*.whl
	cd / && $(CURDIR)/.venv-wheel/bin/plphp doctor
	cd / && $(CURDIR)/.venv-wheel/bin/plphp generate --compare \
		--image "$(CURDIR)/examples/images/$$(ls $(CURDIR)/examples/images | grep png | head -n 1)" \
		--prompt "What is in row 1?"
	rm -rf .venv-wheel

train: $(VENV)/.dev
	$(BIN)/python -m training.train_all --out training/runs/reference --resume

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-ui .venv-vllm .venv-lmms .venv-docs .venv-wheel dist build site .cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.plphp: $(VENV)/bin/python $(SOURCES)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.plphp
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# The site is built from the sources as text: neither plphp nor torch is installed for it.
.venv-docs/.docs: docs/requirements.txt
	test -d .venv-docs || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install -q -r docs/requirements.txt
	touch $@

.venv-vllm/.dev: $(SOURCES) tests/engines/vllm/environment.sh tests/engines/vllm/declare_operators.py
	PYTHON="$(PYTHON)" tests/engines/vllm/environment.sh .venv-vllm
	touch $@

.venv-lmms/.dev: $(VENV)/.dev tests/lmms/environment.sh tests/lmms/requirements.txt
	PYTHON="$(PYTHON)" tests/lmms/environment.sh .venv-lmms $(VENV)
	touch $@
