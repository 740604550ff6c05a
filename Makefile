PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# CI adds `benchmark`, `examples` and `translation`, whose tests are skipped without their packages
EXTRAS ?= digits,report,test
# one thread per process: two ranks share two cores
export OMP_NUM_THREADS ?= 1
# tests by the file, on two cores: one that fixtures are made for stays in one process
PYTEST := -m pytest -n 2 --dist loadfile

.PHONY: train validate digits-table flatness methods-table fashion-table normalization translation-table \
	test test-fast test-slow test-gpu test-newest test-python lint typecheck clean

# From a fresh clone to a trained model: two processes, SAM-ON, scikit-learn's digits as PNG files.
train: $(INSTALLED) data/digits
	$(BIN)/torchrun --standalone --nproc-per-node 2 train.py \
		-c hparams/digits/resnet10t_sam_on.yaml --data-dir data/digits

# What `make train` left last: in distribution, out of it, and under attack.
validate: $(INSTALLED) data/digits
	@run=$$(ls -td output/train/*-resnet10t-32 2>/dev/null | head -n 1); \
	if [ -z "$$run" ]; then echo "nothing to evaluate yet: make train" >&2; exit 1; fi; set -x; \
	$(BIN)/torchrun --standalone --nproc-per-node 2 validate.py --checkpoint $$run/model_best.pth.tar --device cpu \
		--workers 1 --batch-size 32 --eval validation=data/digits/validation blur=data/digits/shifted/blur \
		noise=data/digits/shifted/noise rotation=data/digits/shifted/rotation contrast=data/digits/shifted/contrast \
		--attack l2=0.5,1 linf=4/255,8/255 --attack-num-samples 64 --results-file $$run/evaluation --overwrite

# The paper's table in small: 258 runs. It can be stopped and started again; then the report.
digits-table: $(INSTALLED)
	$(BIN)/python benchmarks/digits_table.py --out output/digits_table

# Rows of the paper's Tables 1 and 3 on Fashion-MNIST (Debian: dataset-fashion-mnist), radii chosen on held-out images.
fashion-table: $(INSTALLED)
	$(BIN)/python -m timm_sam.paper run table1 table3 --preset small --set fashion --out output/fashion_table \
		--devices 2

# Does flatness tell? 14 runs on few and noisy digits, their evaluations and flatness cards, and the report on both.
FLAT := output/flatness
flatness: $(INSTALLED)
	[ -d data/digits-noisy ] || $(BIN)/python -m timm_sam.digits data/digits-noisy --train-size 300 --label-noise 0.4
	$(BIN)/python -m timm_sam.sweep -c hparams/digits/table/resnet10t.yaml --data-dir data/digits-noisy --plain \
		--grid sam_variant=sam sam_params=all,onlynorm sam_rho=0.1,0.3,0.5 --seeds 2 --devices 2 --out $(FLAT)
	$(BIN)/torchrun --standalone --nproc-per-node 2 validate.py --checkpoint $(FLAT)/runs/*/*/last.pth.tar --device cpu \
		--workers 0 --eval validation=data/digits-noisy/validation blur=data/digits-noisy/shifted/blur \
		noise=data/digits-noisy/shifted/noise rotation=data/digits-noisy/shifted/rotation \
		contrast=data/digits-noisy/shifted/contrast --results-file $(FLAT)/evaluation --skip-existing
	$(BIN)/torchrun --standalone --nproc-per-node 2 -m timm_sam.analyze card --checkpoint \
		$(FLAT)/runs/*/*/last.pth.tar --data-dir data/digits-noisy --device cpu --workers 0 --num-images 192 --sam-m 64 \
		--evaluations $(FLAT)/evaluation.json --out $(FLAT)/cards --skip-existing
	$(BIN)/python -m timm_sam.report $(FLAT)/runs --cards $(FLAT)/cards/card.json \
		--evaluations $(FLAT)/evaluation.json --out $(FLAT)/report

# Every method in small: accuracy over counted cost. 219 runs, the same way.
methods-table: $(INSTALLED)
	$(BIN)/python benchmarks/methods_table.py --out output/methods_table

# Vanilla, SAM and SAM-ON on a translator, 3 seeds each: not the paper's data. The Bibles are packages of Debian.
translation-table: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[translation]'
	[ -d data/bible_es_en ] || $(BIN)/python examples/translation/bible_es_en.py data/bible_es_en
	$(BIN)/python examples/translation/table.py data/bible_es_en --out output/translation_table --jobs 2

# What normalization does in SAM: a quadratic, a curve of minima, matrix sensing. `networks` is 78 runs, see its page.
normalization: $(INSTALLED)
	for name in quadratic drift sensing; do \
		$(BIN)/python benchmarks/normalization.py $$name --out output/normalization || exit; done

test: $(INSTALLED)
	$(BIN)/python $(PYTEST)

# plugin and unit tests: no whole runs, no recipes, one case of each test
test-fast: $(INSTALLED)
	$(BIN)/python $(PYTEST) -m "not slow and not gpu and not full" --ignore-glob="*/test_hparams*.py"

# What depends on Python itself, with another one in a venv of its own: make test-python PYTHON=python3.13
VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PYTHON_TESTS ?= tests/plugin/test_sam.py tests/plugin/test_sam_numerics.py tests/plugin/test_facade.py \
	tests/plugin/test_selection.py tests/cli tests/training/test_options.py tests/training/test_loggers.py \
	tests/training/test_train.py
test-python:
	$(MAKE) VENV=.venv-$(VERSION) .venv-$(VERSION)/installed
	.venv-$(VERSION)/bin/python $(PYTEST) $(PYTHON_TESTS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# on a machine with a CUDA device, which all other tests leave alone
test-gpu: $(INSTALLED)
	$(BIN)/python $(PYTEST) -m gpu

# What of train.py and validate.py is tied to timm, with the newest torch, torchvision and timm that go together, in a
# venv of its own; `make test-newest TESTS=tests` runs everything. Not in CI: it fails when timm has something new.
NEWEST := .venv-newest
TESTS ?= tests/training/test_newest_timm.py tests/training/test_losses.py tests/training/test_run_surface.py \
	tests/plugin/test_optimizers.py
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager torch torchvision timm \
		-e '.[digits,report,test]'
	$(NEWEST)/bin/python -m pip list 2>/dev/null | grep -E '^(torch|torchvision|timm) '
	$(NEWEST)/bin/python -m pytest $(TESTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .

typecheck: $(INSTALLED)
	$(BIN)/mypy

$(INSTALLED): setup.cfg setup.py constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "timm_sam needs Python >= 3.10: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

data/digits: | $(INSTALLED)
	$(BIN)/python -m timm_sam.digits $@

clean:
	rm -rf $(VENV) $(VENV)-* data/digits
