# `make` or `make help` lists the targets.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed
# One process for each core, each with one thread: more would wait for one another. A file is one
# process's, for the sake of its fixtures; in the order of their paths, the longest files come early.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo browser packages oldest check test fuzz damage kills diffusers-suite lint format docs train classifier card scenes scenes-autoencoder scenes-card plan fidelity evaluation performance scale models clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 21

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# setuptools warns of folders named as the package: here they are the package.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## Record, plan, optimise, export and sample the trained DiT; writes out/demo.png
	$(BIN)/python samples/fashion_dit/demo.py

browser: $(INSTALLED) samples/browser/node_modules/.package-lock.json ## Build and serve a page that samples the trained DiT in a browser
	$(BIN)/python samples/browser/build_page.py
	$(BIN)/python samples/browser/serve_page.py

packages: samples/browser/node_modules/.package-lock.json samples/node/node_modules/.package-lock.json ## Install the JavaScript packages of the samples

oldest: .oldest/.installed ## Install the oldest versions of ONNX Runtime that run the files, for their tests

.oldest/.installed:
	$(PYTHON) -m venv .oldest/float32
	.oldest/float32/bin/python -m pip install --quiet onnxruntime==1.18.1 'numpy<2'
	$(PYTHON) -m venv .oldest/float16
	.oldest/float16/bin/python -m pip install --quiet onnxruntime==1.20.1
	@touch $@

# Without their install scripts: onnxruntime-node's fetches CUDA libraries, which nothing here needs.
samples/%/node_modules/.package-lock.json: samples/%/package-lock.json
	npm ci --ignore-scripts --no-audit --no-fund --prefix samples/$*
	@touch $@

check: lint ## Check style, types and layers, and run every test that is not slow (minutes)
	$(PYTEST) -m "not slow"

test: $(INSTALLED) ## Run the whole test suite
	$(PYTEST)

fuzz: $(INSTALLED) ## Try N random models and plans (N=500: about an hour)
	PYTHONPATH=tests:samples:samples/fashion_dit OMP_NUM_THREADS=1 $(BIN)/python -m random_models.fuzz $(or $(N),500)

damage: $(INSTALLED) ## Damage files of every format in N ways and read them (N=2000: minutes)
	PYTHONPATH=tests:samples:samples/fashion_dit OMP_NUM_THREADS=1 $(BIN)/python -m damage.try_many $(or $(N),2000)

kills: $(INSTALLED) ## Kill saves at random moments and at every system call (strace; minutes)
	PYTHONPATH=tests:samples:samples/fashion_dit OMP_NUM_THREADS=1 $(BIN)/python -m damage.kills

# The tests of diffusers need two packages more, which are not installed beside what calicache has.
diffusers-suite: $(INSTALLED) ## Run diffusers' own tests of pipelines with optimised transformers (DIFFUSERS=checkout; hours; goes on where it stopped)
	$(BIN)/python -m pip install --quiet --no-deps --target out/diffusers_suite/packages parameterized==0.9.0 requests-mock==1.12.1
	PYTHONPATH=tests:samples:samples/fashion_dit:out/diffusers_suite/packages $(BIN)/python -m support.pipelines.suite $(DIFFUSERS) $(FILES)

lint: $(INSTALLED) ## Check style, types and the layers of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd .typecheck && "$(abspath $(BIN))/lint-imports" --no-cache --no-logo ../pyproject.toml

format: $(INSTALLED) ## Mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## Build the documentation into out/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

train: $(INSTALLED) ## Train the sample DiT (hours; goes on where it stopped)
	$(BIN)/python samples/fashion_dit/train.py

classifier: $(INSTALLED) ## Train the sample classifier (minutes)
	$(BIN)/python samples/fashion_dit/train_classifier.py

card: $(INSTALLED) ## Write the sample grid of the model card
	$(BIN)/python samples/fashion_dit/card.py

scenes-autoencoder: $(INSTALLED) ## Train the autoencoder of the scenes sample (minutes; goes on where it stopped)
	$(BIN)/python samples/scenes_dit/train_autoencoder.py

scenes: $(INSTALLED) ## Train the scenes DiT, which reads captions (days; goes on where it stopped)
	$(BIN)/python samples/scenes_dit/train_scenes.py

scenes-card: $(INSTALLED) ## Write the sample grid of the scenes DiT's model card
	$(BIN)/python samples/scenes_dit/scene_card.py

plan: $(INSTALLED) ## Search the plan that ships with the sample DiT (a minute)
	$(BIN)/python samples/fashion_dit/search_plan.py

fidelity: $(INSTALLED) ## Measure every method on 2,048 images; writes docs/fidelity.md (hours; goes on where it stopped)
	$(BIN)/python samples/fashion_dit/evaluate.py

evaluation: $(INSTALLED) ## Sample 50,000 images in full and under the released plan, two processes; writes docs/fidelity.md (hours; goes on where it stopped)
	$(BIN)/python samples/fashion_dit/evaluation.py out/fashion-mnist.npz
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2 -m calicache evaluate samples/fashion_dit/evaluation.py:fashion_dit samples/fashion_dit/plan -o out/evaluation --batch 20 --reference out/fashion-mnist.npz
	cp out/evaluation/evaluation.json docs/
	$(BIN)/python samples/fashion_dit/fidelity_report.py

performance: $(INSTALLED) ## Measure speed and memory of DiTs; writes docs/performance.md (half an hour)
	$(BIN)/calicache bench samples/fashion_dit/bench_model.py:fashion_dit dit-s dit-b dit-xl --docs docs

scale: $(INSTALLED) ## Measure what planning takes beside what `calicache cost` says; writes docs/scale.md (half an hour; goes on where it stopped)
	OMP_NUM_THREADS=1 $(BIN)/python samples/scale/scale_report.py

models: $(INSTALLED) ## Try every diffusion transformer of diffusers; writes docs/models.md (about an hour; goes on where it stopped)
	PYTHONPATH=tests:samples:samples/fashion_dit $(BIN)/python -m zoo.census

clean: ## Remove the virtual environment and all output
	rm -rf $(VENV) out build dist *.egg-info samples/*/node_modules
