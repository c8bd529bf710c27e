# Each target sets up all it needs inside .venv; stamp files there make the next run quick.
PYTHON ?= python3
# A plain version, so that it resolves to the CPU or the CUDA build, whichever is offered.
TORCH := 2.13.0
# The Triton that this PyTorch is made for (a CPU build of PyTorch brings none).
TRITON := 3.7.1
# Further arguments, for example: make test ARGS="-k gaussian"
ARGS :=

# Test files that run on Triton's interpreter as well, in place of the compiled kernels.
INTERPRETED := tests/test_operators.py tests/test_linear.py tests/test_consensus.py

VENV := .venv
RUN := $(VENV)/bin/python
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(RUN) -m pip install --constraint $(VENV)/constraints.txt
TORCH_STAMP := $(VENV)/.torch-$(TORCH)
# MTKD_NO_EXTENSION=1 leaves the compiled kernels out.
EXTENSION_STAMP := $(if $(filter-out 0,$(MTKD_NO_EXTENSION)),,$(VENV)/.extension)
# With the folders themselves, so that a removed file counts as a change.
SOURCES := $(wildcard csrc csrc/* csrc/*/*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: help demo demo-text test interpreted compile-check bench lint format docs clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.extra-demo $(EXTENSION_STAMP) ## Distil eleven real teachers into a small student
	@$(RUN) -m mtkd.demo $(ARGS)

demo-text: $(VENV)/.extra-text $(EXTENSION_STAMP) ## Distil MiniLM and five fitted teachers of text
	@$(RUN) -m mtkd.demo text $(ARGS)

test: interpreted $(VENV)/.extra-test $(EXTENSION_STAMP) ## Run every test; warnings are errors
	@$(RUN) -m pytest $(ARGS)

interpreted: $(VENV)/.extra-test ## Run Triton's kernels on a CPU against the formulas
	@TRITON_INTERPRET=1 $(RUN) -m pytest $(INTERPRETED) $(ARGS)

compile-check: $(VENV)/.extra-test ## Compile every GPU kernel; no GPU is needed
	@env -u TRITON_INTERPRET MTKD_NO_EXTENSION=1 $(RUN) tests/compile_check.py $(ARGS)

bench: $(VENV)/.extra-bench $(EXTENSION_STAMP) ## Run the benchmark cases
	@$(RUN) -m pytest benchmarks --benchmark-only $(ARGS)

lint: $(VENV)/.extra-lint ## Check style, types and C++ layout
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror

format: $(VENV)/.extra-lint ## Rewrite Python and C++ in the house style
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(CLANG_FORMAT) -i

docs: $(VENV)/.extra-docs ## Write the API reference to build/docs
	$(RUN) -m pdoc --docformat google --math -o build/docs mtkd

clean: ## Remove what was built, and caches
	rm -rf build *.egg-info mtkd/_C.*.so $(VENV)/.extension $(VENV)/.extra-*
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## Also remove the virtual environment
	rm -rf $(VENV)

CLANG_FORMAT = find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' \
	| xargs $(VENV)/bin/clang-format

# The environment: PyTorch and what the extension needs to build.
$(TORCH_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo \
		"mtkd needs Python 3.10 or newer, and '$(PYTHON)' is not: try make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo \
		"'$(PYTHON)' cannot make virtual environments: install its venv module (Debian: apt install python3-venv)" >&2; exit 1; }
	@echo "Setting up $(VENV) with PyTorch $(TORCH): once, a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@rm -rf $(VENV)/.torch-* $(VENV)/.extension build
	@printf 'torch==%s\n' $(TORCH) > $(VENV)/constraints.txt
	@printf 'triton==%s\n' $(TRITON) >> $(VENV)/constraints.txt
	@$(PIP) torch numpy "setuptools>=77.0.3" wheel ninja "pybind11>=2.13"
	@touch $@

# One extra of pyproject.toml and mtkd itself, in place; the extension is built by the next rule.
$(VENV)/.extra-%: $(TORCH_STAMP) pyproject.toml setup.py
	@echo "Installing mtkd[$*]"
	@MTKD_NO_EXTENSION=1 $(PIP) --quiet --no-build-isolation --editable ".[$*]"
	@touch $@

# Only what changed is compiled again. Without a compiler there is no stamp: it is tried next time.
# The build's log is long: shown are its warnings, or all of it when it fails.
$(VENV)/.extension: LOG = $(VENV)/extension.log
$(VENV)/.extension: $(TORCH_STAMP) setup.py $(SOURCES)
	@echo "Building the extension"
	@$(RUN) setup.py build_ext --inplace > $(LOG) 2>&1 || { cat $(LOG) >&2; exit 1; }
	@grep -E 'warning: |^mtkd: ' $(LOG) || true
	@ls mtkd/_C.*.so > $@ 2> /dev/null || rm -f $@
