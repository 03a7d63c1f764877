# `make demo` and `make test` need Python 3.11 or later and a C++17 compiler; everything else is installed into .venv.
PYTHON ?= python3
# One version for everybody's tests; on a machine with a GPU any torch from 2.8 on will do: make TORCH=torch demo
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet
PEERS := llm-compressor auto-round hqq vision
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(wildcard csrc/*)
CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "Pennyweight needs Python 3.11 or later, and '$(PYTHON)' is not. Name another: make PYTHON=python3.12" >&2; exit 1; }

LLAMA := .venvs/llama.cpp
# llama.cpp without Intel's matrix instructions: of what it loads as shapes of their registers gcc 12 keeps eight bytes,
# and the first of them is illegal then.
NO_MATRICES := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
LLAMA_FLAGS = $(shell $(CXX) $(NO_MATRICES) -x c++ -E /dev/null > /dev/null 2>&1 && echo "$(NO_MATRICES)")
LLAMA_BUILD = CFLAGS="$(LLAMA_FLAGS)" CXXFLAGS="$(LLAMA_FLAGS)"
NEON_CXX ?= aarch64-linux-gnu-g++
NEON_EMULATOR ?= qemu-aarch64-static
NEON_FLAGS = -std=c++17 -O2 -DPENNYWEIGHT_NEON -ffp-contract=off -fno-math-errno -fno-trapping-math \
	-Wall -Wextra -Wconversion -Werror -Wno-psabi -Wno-maybe-uninitialized
NEON_OBJECTS := $(patsubst %,build/neon/%.o,products dispatch threads scalar packed_call packed_scalar packed_neon)

.PHONY: help demo test test-all lint format sanitize neon bench peers kernel-peers llama-cpp llama-tools clean distclean

help:
	@echo "make demo       quantize the small model that ships with Pennyweight and compare the two"
	@echo "make test       the fast tests            make test-all   also the slow ones"
	@echo "make lint       formatting, types, layers make format     mend the formatting"
	@echo "make sanitize   run the native part under the address and undefined-behaviour sanitizers"
	@echo "make neon       the kernels for NEON, compiled for another processor and run in an emulator"
	@echo "make bench      the quality table         make peers      environments of the tools we compare with"
	@echo "make kernel-peers  an environment with the kernels that 'python -m benchmarks.kernels' compares with"
	@echo "make llama-cpp  llama.cpp for the tests of GGUF files; builds it, which takes minutes"
	@echo "make llama-tools  its own quantizer, which 'python -m benchmarks.gguf' compares with"
	@echo "make clean      remove what was built     make distclean  and the environments"

demo: $(VENV)/.installed
	$(BIN)/pennyweight demo

test: $(VENV)/.developer
	$(BIN)/python -m pytest -q

test-all: $(VENV)/.developer
	$(BIN)/python -m pytest -q -m "not network"

lint: $(VENV)/.developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror csrc/* tests/neon/*

format: $(VENV)/.developer
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/* tests/neon/*

# The real reader of GGUF files, as the extra of that name has it; pip keeps the wheel that it builds.
llama-cpp: $(VENV)/.developer
	$(LLAMA_BUILD) $(PIP_INSTALL) "$$($(BIN)/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["llama-cpp"])')"

# Linux and gcc: python itself is not instrumented, so the sanitizer's library has to be loaded before it.
sanitize: $(VENV)/.installed
	$(PIP_INSTALL) --no-deps --upgrade --target build/sanitize . -Ccmake.build-type=Debug \
		-Ccmake.define.PENNYWEIGHT_SANITIZE=ON -Ccmake.define.PENNYWEIGHT_WERROR=ON -Cbuild-dir=build/sanitize-objects
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -I tests/native_exercise.py build/sanitize

# Debian has both tools: apt-get install g++-aarch64-linux-gnu qemu-user-static. The second processor has no dot products.
neon:
	@for tool in $(NEON_CXX) $(NEON_EMULATOR); do command -v $$tool > /dev/null || { \
		echo "make neon: skipped, there is no $$tool; on Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static"; \
		exit 0; }; done; $(MAKE) --no-print-directory build/neon/products && \
	$(NEON_EMULATOR) -cpu max build/neon/products neon scalar && \
	$(NEON_EMULATOR) -cpu cortex-a53 build/neon/products scalar

build/neon/products: $(NEON_OBJECTS)
	$(NEON_CXX) -static -pthread $^ -o $@

build/neon/packed_neon.o: NEON_FLAGS += -march=armv8.2-a+dotprod

build/neon/%.o: csrc/%.cc $(wildcard csrc/*.h)
	@mkdir -p $(@D)
	$(NEON_CXX) $(NEON_FLAGS) -c $< -o $@

build/neon/products.o: tests/neon/products.cc $(wildcard csrc/*.h)
	@mkdir -p $(@D)
	$(NEON_CXX) $(NEON_FLAGS) -c $< -o $@

bench: $(VENV)/.developer
	$(BIN)/python -m benchmarks.quality

peers: $(PEERS:%=.venvs/%/.installed)

kernel-peers: .venvs/kernels/.installed

llama-tools: $(LLAMA)/version

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .venvs

$(BIN)/python:
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip

$(VENV)/.installed: $(BUILD_INPUTS) | $(BIN)/python
	$(PIP_INSTALL) "$(TORCH)"
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.developer: $(BUILD_INPUTS) | $(BIN)/python
	$(PIP_INSTALL) "$(TORCH)"
	$(PIP_INSTALL) --editable ".[test,lint]"
	@touch $(VENV)/.installed $@

# Each peer has versions of its own of everything but torch.
define PEER_ENVIRONMENT
.venvs/$(1)/.installed: benchmarks/peers/$(subst -,_,$(1))/requirements.txt
	@$$(CHECK_PYTHON)
	$$(PYTHON) -m venv .venvs/$(1)
	.venvs/$(1)/bin/python -m pip install --quiet --upgrade pip
	.venvs/$(1)/bin/python -m pip install --quiet "torch==2.13.0"
	.venvs/$(1)/bin/python -m pip install --quiet --requirement $$<
	@touch $$@
endef
$(foreach peer,$(PEERS),$(eval $(call PEER_ENVIRONMENT,$(peer))))

# All in one, and Pennyweight with them, so that they can take turns. llama-cpp-python is wanted for its libraries alone.
.venvs/kernels/.installed: benchmarks/peers/kernels/requirements.txt $(BUILD_INPUTS)
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv .venvs/kernels
	.venvs/kernels/bin/python -m pip install --quiet --upgrade pip
	.venvs/kernels/bin/python -m pip install --quiet "torch==2.13.0"
	grep -v llama-cpp-python $< | .venvs/kernels/bin/python -m pip install --quiet --requirement /dev/stdin
	$(LLAMA_BUILD) .venvs/kernels/bin/python -m pip install --quiet --no-deps "$$(grep llama-cpp-python $<)"
	.venvs/kernels/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

# The package of sources holds those of llama.cpp. Its tools are linked as one piece each; nothing else is kept.
$(LLAMA)/version: benchmarks/peers/llama_cpp/requirements.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python -m pip install --quiet cmake ninja
	rm -rf $(LLAMA)/sources && mkdir $(LLAMA)/sources
	$(LLAMA)/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(LLAMA)/sources --requirement $<
	tar -xzf $(LLAMA)/sources/*.tar.gz --strip-components=1 -C $(LLAMA)/sources
	$(LLAMA_BUILD) PATH="$(abspath $(LLAMA)/bin):$$PATH" cmake -S $(LLAMA)/sources/vendor/llama.cpp -B $(LLAMA)/sources/build -G Ninja \
		-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
		-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
	PATH="$(abspath $(LLAMA)/bin):$$PATH" cmake --build $(LLAMA)/sources/build --target llama-quantize llama-imatrix
	cp $(LLAMA)/sources/build/bin/llama-quantize $(LLAMA)/sources/build/bin/llama-imatrix $(LLAMA)/bin
	mkdir -p $(LLAMA)/converter
	cp -r $(addprefix $(LLAMA)/sources/vendor/llama.cpp/,convert_hf_to_gguf.py conversion gguf-py) $(LLAMA)/converter
	$(LLAMA)/bin/python -m pip install --quiet --target $(LLAMA)/converter sentencepiece
	rm -rf $(LLAMA)/sources
	sed -n 's/^llama-cpp-python==//p' $< > $@
