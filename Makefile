# make demo   train, grow, prune, evaluate, fuse and verify a real detector on the CPU
# make test   lint and the test suite; make test-all adds the slow tests
# make docs   the documentation as a site: build/docs/index.html
# All set up .venv first; make cls sets up .venv-cls, for classification alone. Finished steps are not
# done again; `make clean` forgets them.

PYTHON ?= python3
PY := .venv/bin/python
JOBS := $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
export PYTHONPATH :=

.PHONY: setup cls demo lint test test-all soak zoo docs dist clean
.DELETE_ON_ERROR:

setup: .venv/.ready

# Without debug symbols, and optimized for a short compilation.
OPERATORS ?= -g0 -O1

.venv/.stack: requirements.txt requirements/build.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements/build.txt
	@echo "Installing mmcv, mmdet, mmseg and mmpretrain. mmcv compiles its operators, some 80 files, which takes"
	@echo "minutes. All that pip says is in .venv/stack.log."
	@{ CFLAGS="$(OPERATORS)" MAX_JOBS=$(JOBS) $(PY) -m pip install -v --no-build-isolation \
	    -c requirements/build.txt -r requirements.txt 2>&1; echo "ended with $$?"; } \
	    | tee .venv/stack.log | sh requirements/progress.sh
	touch $@

.venv/.ready: .venv/.stack requirements/test.txt setup.py
	$(PY) -m pip install -q -c requirements/build.txt -r requirements/test.txt
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# What needs no operators, as classification, in an environment of its own. Where torch is absent while
# mmcv is built, as in the isolated build of pip, its operators are left out. pip must not cache that
# wheel: it would pass for the whole one.
cls: .venv-cls/.ready

.venv-cls/.ready: requirements.txt requirements/build.txt setup.py
	$(PYTHON) -m venv .venv-cls
	.venv-cls/bin/python -m pip install -q -r requirements/build.txt
	.venv-cls/bin/python -m pip install -q --no-cache-dir -c requirements/build.txt -c requirements.txt \
	    onedl-mmengine onedl-mmcv onedl-mmpretrain
	.venv-cls/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# The demo, step by step: a file that is there is not made again.
DYREP := configs/demo/faster-rcnn_r50_fpn_dyrep_digits.py
PLAIN := configs/demo/faster-rcnn_r50_fpn_digits.py
STAGE_C := work_dirs/resnet50_digits/epoch_3.pth
STAGE_D := work_dirs/faster-rcnn_r50_fpn_dyrep_digits/iter_160.pth
DEMO := work_dirs/demo

# Threads that spin while they wait are slow on a busy machine.
demo: export GOMP_SPINCOUNT := 0
demo: $(DEMO)/comparison.txt $(DEMO)/report.html
	@cat $(DEMO)/comparison.txt
	@echo "What the run did, to open in a browser: $(DEMO)/report.html"

data/digits/digits.json: | .venv/.ready
	$(PY) tools/digits.py --out data/digits

$(STAGE_C): | data/digits/digits.json
	$(PY) tools/train.py configs/demo/resnet50_digits.py

$(STAGE_D): | $(STAGE_C)
	$(PY) tools/train.py $(DYREP)

$(DEMO)/fused.pth: | $(STAGE_D)
	mkdir -p $(DEMO)
	$(PY) tools/fuse.py $(DYREP) $(STAGE_D) $@

$(DEMO)/comparison.txt: | $(DEMO)/fused.pth
	$(PY) tools/compare.py $(DYREP) $(STAGE_D) $(PLAIN) $(DEMO)/fused.pth \
	    --work-dir $(DEMO) --tolerance 0.01 --out $@

$(DEMO)/report.html: | $(DEMO)/fused.pth
	$(PY) tools/report.py $(dir $(STAGE_D)) --out $@

lint: .venv/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# One torch thread in each process is faster than several in one.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Kills training processes, and edits models at random, for as long as you like.
KILLS ?= 100
SEQUENCES ?= 200
soak: .venv/.ready
	OMP_NUM_THREADS=1 DYREP_KILLS=$(KILLS) DYREP_SEQUENCES=$(SEQUENCES) $(PY) -m pytest -m "" \
	    --timeout 0 tests/engine/test_kill.py tests/surgery/test_sequences.py

# Every model of the zoos anew, and the page about them: about an hour of one core.
ZOO := work_dirs/zoo
zoo: .venv/.ready
	rm -rf $(ZOO)
	OMP_NUM_THREADS=1 DYREP_ZOO=$(ZOO) $(PY) -m pytest -n $(JOBS) -m "" tests/zoo
	PYTHONPATH=tests:. $(PY) -m support.compatibility $(ZOO) docs/compatibility.md

# A source archive, and the wheel that is built from it.
dist: .venv/.ready
	rm -rf dist
	$(PY) -m build --no-isolation --outdir dist
	$(PY) -m twine check --strict dist/*

# Its packages join the same .venv; nothing else needs them.
.venv/.docs: .venv/.ready requirements/docs.txt
	$(PY) -m pip install -q -c requirements/build.txt -r requirements/docs.txt
	touch $@

docs: .venv/.docs
	$(PY) -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "The site: build/docs/index.html"

clean:
	rm -rf .venv .venv-cls build/docs data/digits $(dir $(STAGE_C)) $(dir $(STAGE_D)) $(DEMO)
