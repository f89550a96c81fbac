# `make demo` and `make test` set up all they need in .venv. The backend of the demo is KERAS_BACKEND, JAX by default.

PYTHON ?= python3
KERAS_BACKEND ?= jax
BACKENDS := jax tensorflow torch
EXAMPLES := $(foreach name,movie_reviews every_layer small_memory many_tasks to_peft,$(addprefix example-$(name)-,$(BACKENDS)))
BIN := .venv/bin
# A test runs a function once or twice: compiling it well takes longer than that. What counts XLA's work turns this off.
# Two jobs run at a time: the threads of torch would wait for one another. TensorFlow turns oneDNN off on some CPUs, and then
# has no dilated transposed convolution. JAX compiles the same small functions in many tests, and keeps them in .cache.
JAX_CACHE := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
QUICKLY := JAX_DISABLE_MOST_OPTIMIZATIONS=1 OMP_NUM_THREADS=1 TF_ENABLE_ONEDNN_OPTS=1 $(JAX_CACHE)
PIP := $(BIN)/pip --disable-pip-version-check install --quiet

.PHONY: demo test lint docs bench clean $(addprefix test-,$(BACKENDS)) $(addprefix own-,$(BACKENDS)) $(EXAMPLES)

demo: .venv/demo-$(KERAS_BACKEND)
	KERAS_BACKEND=$(KERAS_BACKEND) $(BIN)/python examples/movie_reviews.py $(DEMO)

test: lint
	$(MAKE) --jobs=2 --output-sync=target --keep-going $(addprefix test-,$(BACKENDS)) $(addprefix own-,$(BACKENDS))
	$(MAKE) --jobs=2 --output-sync=target $(EXAMPLES)

$(EXAMPLES): example-%: .venv/tests
	OMP_NUM_THREADS=1 KERAS_BACKEND=$(word 2,$(subst -, ,$*)) $(BIN)/python examples/$(word 1,$(subst -, ,$*)).py --quick

lint: .venv/tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(addprefix test-,$(BACKENDS)): test-%: .venv/tests
	$(QUICKLY) KERAS_BACKEND=$* $(BIN)/python -m pytest --quiet -p no:cacheprovider tests

# Keras's own tests of its layers, on adapted ones.
$(addprefix own-,$(BACKENDS)): own-%: .venv/tests
	cd tests && $(QUICKLY) KERAS_BACKEND=$* ../$(BIN)/python -m pytest --quiet -p no:cacheprovider -p keras_own_tests -c /dev/null --rootdir=/

docs: .venv/tests
	$(BIN)/mkdocs build --strict --quiet --site-dir .cache/site

bench: .venv/bench
	$(BIN)/python benchmarks/run.py $(BENCH)

clean:
	rm -rf .venv .cache

.venv/package: pyproject.toml requirements/package.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements/package.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

.venv/demo-%: .venv/package requirements/%.txt requirements/no-deps.txt examples/requirements.txt
	$(PIP) -r requirements/$*.txt -r examples/requirements.txt
	$(PIP) --no-deps -r requirements/no-deps.txt
	touch $@

.venv/bench: .venv/tests requirements/bench.txt
	$(PIP) -r requirements/bench.txt
	touch $@

.venv/tests: .venv/package $(wildcard requirements/*.txt) examples/requirements.txt
	$(PIP) -r requirements/tests.txt
	$(PIP) --no-deps -r requirements/no-deps.txt -r requirements/tests-no-deps.txt
	touch $@
