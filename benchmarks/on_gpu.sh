#!/usr/bin/env bash
# All that wants a GPU, in under nine minutes: build, tests, sanitizers, benchmark.
#
#     bash benchmarks/on_gpu.sh OUT [--dry-run]
#
# Needs nvcc and a Python (PYTHON, else python3) with a CUDA build of PyTorch 2.11 or newer, pytest
# and hypothesis; downloads nothing. OUT receives log.txt, the results as one JSON, its plots, and
# `done`, a line for each part that succeeded: run again with the same OUT, only the other parts
# run, and of the benchmark only what has no result yet. A new state of the code wants a new OUT.
# --dry-run walks through it on a CPU, in tiny sizes.
set -euo pipefail

TOTAL=525 # seconds for everything

usage() {
    echo "usage: bash benchmarks/on_gpu.sh OUT [--dry-run]" >&2
    exit 2
}

out='' dry='' marks='' failed=()
for word in "$@"; do
    case $word in
        --dry-run) dry=1 ;;
        -*) usage ;;
        *)
            [[ -z $out ]] || usage
            out=$word
            ;;
    esac
done
[[ -n $out ]] || usage
mkdir -p "$out"
out=$(cd "$out" && pwd)
marks=$out/done${dry:+-dry-run}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PYTHONUNBUFFERED=1

say() { echo "$*" | tee -a "$out/log.txt"; }

# step NAME LIMIT COMMAND...: run a command for at most LIMIT seconds; a failure is noted.
step() {
    local name=$1 limit=$2 left=$((TOTAL - SECONDS)) status=0
    shift 2
    limit=$((limit < left ? limit : left))
    if ((limit < 5)); then
        failed+=("$name (no time left)")
        return 1
    fi
    say "== $name: at most $limit s"
    timeout --signal=INT --kill-after=10 "$limit" env --default-signal=INT "$@" 2>&1 |
        tee -a "$out/log.txt" || status=$?
    say "== $name: exit code $status, at $SECONDS s"
    case $status in
        0) return 0 ;;
        124 | 137) failed+=("$name (time limit)") ;;
        *) failed+=("$name") ;;
    esac
    return 1
}

# part NAME LIMIT COMMAND...: a step that is done once.
part() {
    if grep -qsx "$1" "$marks"; then
        say "== $1: done before"
    elif step "$@"; then
        echo "$1" >>"$marks"
    fi
}

# on_gpu HOW NAME LIMIT COMMAND...: a step or part that needs a GPU; a dry run only shows it.
on_gpu() {
    if [[ -z $dry ]]; then
        "$@" || true
    else
        say "== $2: would run: ${*:4}"
    fi
}

# Always asked for: this machine may be another one, and a build that is there takes seconds.
build() {
    local capability='CAPABILITY'
    if [[ -z $dry ]]; then
        capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    fi
    on_gpu step build 180 env TORCH_CUDA_ARCH_LIST="$capability" \
        "$python" setup.py build_ext --inplace
    on_gpu step kernels 30 "$python" -c 'from benchmarks.check import implementations as found
assert len(found("gaussian_nll", "cuda")) == 2, "expected compiled and Triton kernels"'
}

tests() {
    if [[ -n $dry ]]; then
        part tests 60 env TRITON_INTERPRET=1 \
            "$python" -m pytest -q tests/test_operators.py -k 'gaussian-tiny and triton'
        return
    fi
    # Deterministic algorithms, which poison fresh memory, want cuBLAS to have a fixed workspace.
    local arguments=(-q -k cuda --maxfail=40)
    if "$python" -c 'import xdist' 2>/dev/null; then # kernels are compiled meanwhile
        arguments+=(-n 8)
    fi
    part tests 130 env CUBLAS_WORKSPACE_CONFIG=:4096:8 "$python" -m pytest "${arguments[@]}"
}

sanitizers() {
    if [[ -z $dry ]] && ! command -v compute-sanitizer >/dev/null; then
        say "== memcheck, racecheck: left out, there is no compute-sanitizer here"
        return
    fi
    local check=("$python" -m benchmarks --device cuda --check)
    local sanitizer=(compute-sanitizer --error-exitcode 1 --tool)
    # Without a caching allocator every tensor is an allocation, whose bounds memcheck knows.
    on_gpu part memcheck 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "${sanitizer[@]}" memcheck --report-api-errors no "${check[@]}"
    on_gpu part racecheck 50 "${sanitizer[@]}" racecheck "${check[@]}" gaussian_nll
}

benchmark() {
    local how=(--device cuda) environment=()
    if [[ -n $dry ]]; then
        how=(--dry-run)
        environment=(TRITON_INTERPRET=1)
    fi
    # 15 s are left for the plots, which show whatever has been measured.
    part benchmark $((TOTAL - SECONDS - 15)) env "${environment[@]}" \
        "$python" -m benchmarks "${how[@]}" --out "$out"
    local file
    for file in "$out"/*.json; do
        [[ ! -e $file ]] || step plots 30 "$python" -m benchmarks --plots "$file" --out "$out" || true
    done
}

if [[ -z $dry ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    say "PyTorch of '$python' sees no GPU here; --dry-run walks through the steps without one"
    exit 1
fi
say "== $(date '+%F %T'): benchmarks/on_gpu.sh${dry:+, dry run}"
build
part report 30 "$python" -m mtkd
tests
sanitizers
benchmark
if ((${#failed[@]})); then
    say "== failed, after $SECONDS s:$(printf ' %s;' "${failed[@]}")"
    exit 1
fi
say "== all parts done, after $SECONDS s"
