# `make demo` and `make test` set up all they need in .venv. The backend of the demo is KERAS_BACKEND, JAX by default.
#
#   make quick      one backend (torch, or KERAS_BACKEND), lint and types: after each change
#   make test       lint, types, the three backends, Keras's own layer tests, the examples in their quick form
#   make test-all   everything, the sweeps too: for releases and at night
#   make tutorials  the quick forms of the tutorials on one backend (torch, or KERAS_BACKEND)
#   make fuzz       damaged files for every reader; FUZZ="--reader peft --count 1000000 --seed 1" (tests/fuzz_results.md)
#   make mutants    seeded faults, one at a time: which tests notice each (tests/seeded_faults.md)
#   make release    everything about a release but its upload; RELEASE=--draft before its version has a date

PYTHON ?= python3
SPEED ?= test
BACKENDS := jax tensorflow torch
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet
# Runs one step and writes down its CPU seconds; `make cpu` prints them into CONTRIBUTING.md.
STEP := $(BIN)/python tests/cpu.py run
# A test runs a function once or twice: compiling it well takes longer than that. What counts XLA's work turns this off.
# Two jobs run at a time: the threads of torch would wait for one another. TensorFlow turns oneDNN off on some CPUs, and then
# has no dilated transposed convolution. JAX compiles the same small functions in many tests, and keeps them in .cache.
JAX_CACHE := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
QUICKLY := JAX_DISABLE_MOST_OPTIMIZATIONS=1 OMP_NUM_THREADS=1 TF_ENABLE_ONEDNN_OPTS=1 $(JAX_CACHE)
PYTEST := -m pytest --quiet -p no:cacheprovider --speed=$(SPEED)
# Each example runs on one backend; `make test-all` runs all of them on all three.
EXAMPLE_NAMES := movie_reviews every_layer small_memory many_tasks to_peft preference_tuning
EXAMPLES_jax := small_memory
EXAMPLES_tensorflow := every_layer
EXAMPLES_torch := movie_reviews many_tasks to_peft
examples_on = $(addprefix example-,$(addsuffix -$(1),$(if $(filter all,$(SPEED)),$(EXAMPLE_NAMES),$(EXAMPLES_$(1)))))
EXAMPLES := $(foreach backend,$(BACKENDS),$(call examples_on,$(backend)))
# The tutorials too. One process runs those of a backend, so that its imports are paid once. `make test-all` alone runs
# TUTORIALS_all, which build their model many times or need a larger one.
TUTORIAL_NAMES := text_classification callbacks custom_training_loop language_model preferences peft_adapter many_adapters
TUTORIALS_jax :=
TUTORIALS_tensorflow :=
TUTORIALS_torch := text_classification custom_training_loop
TUTORIALS_all := callbacks language_model preferences peft_adapter many_adapters
tutorials_on = $(if $(filter all,$(SPEED)),$(TUTORIAL_NAMES),$(TUTORIALS_$(1)))
TUTORIALS := $(foreach backend,$(BACKENDS),$(if $(call tutorials_on,$(backend)),tutorials-$(backend)))
ALL_TUTORIALS := $(addprefix tutorials-,$(BACKENDS))
ALL_EXAMPLES := $(foreach backend,$(BACKENDS),$(addprefix example-,$(addsuffix -$(backend),$(EXAMPLE_NAMES))))
SUITES := $(addprefix test-,$(BACKENDS))
OWN := $(addprefix own-,$(BACKENDS))

.PHONY: demo quick test test-all test-one-backend tutorials mutants fuzz cpu lint docs bench release clean $(SUITES) $(OWN) \
	$(ALL_EXAMPLES) $(ALL_TUTORIALS) $(addprefix examples-,$(BACKENDS))

demo: export KERAS_BACKEND ?= jax
demo:
	$(MAKE) .venv/demo-$(KERAS_BACKEND)
	$(BIN)/python examples/movie_reviews.py $(DEMO)

quick: export KERAS_BACKEND ?= torch
quick: lint
	$(MAKE) test-$(KERAS_BACKEND) SPEED=quick
	@$(BIN)/python tests/cpu.py report quick

test: .venv/tests
	rm -f .cache/cpu/test-* .cache/cpu/own-* .cache/cpu/example-* .cache/cpu/tutorials-*
	$(MAKE) lint
	$(MAKE) --jobs=2 --output-sync=target --keep-going $(SUITES) $(OWN) $(EXAMPLES) $(TUTORIALS)
	@$(BIN)/python tests/cpu.py report $(SPEED)

test-all:
	$(MAKE) test SPEED=all

# What someone has who installed one backend: no KerasHub, no PEFT. `make test-one-backend KERAS=3.15.0` for a certain Keras.
test-one-backend:
	$(PYTHON) -m venv .cache/one
	.cache/one/bin/pip --disable-pip-version-check install --quiet $(KERAS_WANTED) -r requirements/jax.txt \
		numpy rich safetensors pytest hypothesis
	.cache/one/bin/pip --disable-pip-version-check install --quiet --no-deps --editable .
	$(QUICKLY) KERAS_BACKEND=jax .cache/one/bin/python $(PYTEST) tests
KERAS_WANTED = $(if $(KERAS),$(if $(findstring git+,$(KERAS)),$(KERAS),keras==$(KERAS)),keras)

mutants: .venv/tests
	$(BIN)/python tests/mutants.py $(MUTANTS)

fuzz: .venv/tests
	KERAS_BACKEND=torch OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(FUZZ)
	$(BIN)/python tests/fuzz.py --report

cpu:
	$(MAKE) quick
	@$(BIN)/python tests/cpu.py report quick --write
	$(MAKE) test
	@$(BIN)/python tests/cpu.py report test --write

$(addprefix examples-,$(BACKENDS)): examples-%:
	$(MAKE) $(call examples_on,$*)

$(ALL_EXAMPLES): example-%: .venv/tests
	OMP_NUM_THREADS=1 KERAS_BACKEND=$(word 2,$(subst -, ,$*)) \
		$(STEP) $@ $(BIN)/python examples/$(word 1,$(subst -, ,$*)).py --quick

tutorials: export KERAS_BACKEND ?= torch
tutorials:
	$(MAKE) tutorials-$(KERAS_BACKEND) SPEED=all

$(ALL_TUTORIALS): tutorials-%: .venv/tests
	$(QUICKLY) KERAS_BACKEND=$* $(STEP) $@ $(BIN)/python docs/make_tutorials.py run --quick $(call tutorials_on,$*)

# The package has full types; in the examples and the benchmarks it is enough that what they call is there.
LOOSELY := --allow-untyped-defs --allow-incomplete-defs --allow-untyped-calls --allow-untyped-decorators \
	--allow-any-generics --no-warn-return-any --implicit-reexport
lint: .venv/tests
	$(STEP) lint sh -c '$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy \
		&& $(BIN)/mypy $(LOOSELY) examples benchmarks'

$(SUITES): test-%: .venv/tests
	$(QUICKLY) KERAS_BACKEND=$* $(STEP) $(if $(filter quick,$(SPEED)),quick-)$@ $(BIN)/python $(PYTEST) tests

# Keras's own tests of its layers, on adapted ones.
$(OWN): own-%: .venv/tests
	cd tests && $(QUICKLY) KERAS_BACKEND=$* ../$(BIN)/python cpu.py run $@ \
		../$(BIN)/python $(PYTEST) --noconftest -p conftest -p keras_own_tests -c /dev/null --rootdir=/

docs: .venv/docs
	$(BIN)/python docs/build.py

bench: .venv/bench
	$(BIN)/python benchmarks/run.py $(BENCH)

release: .venv/release
	$(BIN)/python tests/release.py $(RELEASE)

clean:
	rm -rf .venv .cache

.venv/package: pyproject.toml requirements/package.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements/package.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

.venv/docs: .venv/package requirements/docs.txt
	$(PIP) -r requirements/docs.txt
	touch $@

.venv/demo-%: .venv/package requirements/%.txt requirements/no-deps.txt examples/requirements.txt
	$(PIP) -r requirements/$*.txt -r examples/requirements.txt
	$(PIP) --no-deps -r requirements/no-deps.txt
	touch $@

.venv/bench: .venv/tests requirements/bench.txt
	$(PIP) -r requirements/bench.txt
	touch $@

.venv/release: .venv/tests requirements/release.txt
	$(PIP) -r requirements/release.txt
	touch $@

.venv/tests: .venv/package $(wildcard requirements/*.txt) examples/requirements.txt
	$(PIP) -r requirements/tests.txt
	$(PIP) --no-deps -r requirements/no-deps.txt -r requirements/tests-no-deps.txt
	touch $@
