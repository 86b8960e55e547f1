#!/usr/bin/env bash
# Everything that needs a GPU, in order of value: build, tests, peak memory, sanitizers, determinism, benchmarks.
#
#   [OUT=folder] [PYTHON=python3] [WHEELS=folder] benchmarks/gpu_all.sh [PART...]
#
# PART: only the parts whose name begins so, e.g. `build tests` or `bench_ema`. Each part runs in its own process with a
# time limit; a part that fails is reported and the next one runs. Logs, JSON and the summary go to OUT (default
# benchmarks/results). No internet is needed: torch, triton, numpy, pytest, pybind11, ninja and nvcc must be there, and
# peft, transformers and diffusers for the real models; WHEELS holds wheels of what is missing, made by
# `pip download --only-binary :all: -d wheels diffusers ...`. The status is the number of failed parts.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=$PWD/benchmarks/results
OUT=$(mkdir -p "${OUT:-$RESULTS}" && cd "${OUT:-$RESULTS}" && pwd)
LOGS=$OUT/logs
SUMMARY=$OUT/gpu_summary.txt
mkdir -p "$LOGS" "$RESULTS"
: >"$SUMMARY"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Triton 3.9 changes its default in 3.10; the launches say what they want, torch.compile's do not.
export TRITON_DEFAULT_FP_FUSION=${TRITON_DEFAULT_FP_FUSION:-1}
failed=0
PARTS=("$@")

# chosen NAME: whether this part was asked for.
chosen() {
    local part
    [ ${#PARTS[@]} = 0 ] && return 0
    for part in "${PARTS[@]}"; do [[ $1 == "$part"* ]] && return 0; done
    return 1
}

note() { printf '%-34s %-28s %5ss\n' "$1" "$2" "$3" | tee -a "$SUMMARY"; }

# part NAME SECONDS COMMAND...: runs a command with a time limit, its output in a log of that name.
part() {
    local name=$1 limit=$2 start=$SECONDS status=0
    chosen "$name" || return 0
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$LOGS/$name.log" 2>&1 || status=$?
    case $status in
        0) note "$name" ok $((SECONDS - start)) ;;
        5) note "$name" "no test was chosen" $((SECONDS - start)) ;;
        124 | 137) note "$name" "FAILED: over $limit s" $((SECONDS - start)); failed=$((failed + 1)) ;;
        *) note "$name" "FAILED: status $status" $((SECONDS - start)); failed=$((failed + 1)); tail -n 15 "$LOGS/$name.log" ;;
    esac
    return $status
}

# gpu NAME ...: like part, but reported as left out on a machine without a CUDA device.
gpu() {
    chosen "$1" || return 0
    if [ "$HAS_GPU" = 1 ]; then part "$@"; else note "$1" "left out: no CUDA device" 0; fi
}

HAS_GPU=$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))' 2>/dev/null || echo 0)
command -v nvidia-smi >/dev/null && nvidia-smi >"$LOGS/nvidia_smi.log" 2>&1
"$PYTHON" -c 'import sys, torch, triton; print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)' | tee -a "$SUMMARY"

if [ -n "${WHEELS:-}" ]; then
    part wheels 120 "$PYTHON" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
fi
part build 300 "$PYTHON" setup.py build_ext --inplace
part table 60 "$PYTHON" -m twinflow_kernels
TESTS=("$PYTHON" -m pytest -p no:cacheprovider -q)
gpu tests_kernels 420 "${TESTS[@]}" tests/kernels -m "gpu and not slow" --maxfail=20
gpu tests_objective 420 "${TESTS[@]}" tests --ignore=tests/kernels --ignore=tests/gpu/test_memory.py \
    --ignore=tests/gpu/test_training.py -m "gpu and not slow" --maxfail=20
gpu tests_training 300 "${TESTS[@]}" tests/gpu/test_training.py -m gpu
gpu tests_memory 590 "${TESTS[@]}" tests/gpu/test_memory.py -m gpu

# Planned against measured peaks. A part that runs out of time has its finished lines in its log.
MEMORY=("$PYTHON" benchmarks/a100_1024.py --skip kernels training inference --batches 4 --steps 2)
gpu memory_qwen-image_depth6 590 "${MEMORY[@]}" --model qwen-image --depth 6
gpu memory_qwen-image 590 "${MEMORY[@]}" --model qwen-image --cap-gb 84.5 --recipes partition \
    --presets 80gb published checkpoint
gpu memory_qwen-image_40gb 590 "${MEMORY[@]}" --model qwen-image --cap-gb 42 --presets 40gb --recipes partition all_terms
gpu memory_qwen-image_24gb 590 "${MEMORY[@]}" --model qwen-image --cap-gb 25 --presets 24gb --recipes partition all_terms
gpu memory_sd3.5-large 590 "${MEMORY[@]}" --model sd3.5-large --cap-gb 25 --recipes partition \
    --presets checkpoint attention published 80gb
gpu memory_sana-1.6b 590 "${MEMORY[@]}" --model sana-1.6b

# compute-sanitizer on the CUDA C++ kernels (ids `cuda-cuda`); status 99 is its own finding.
SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1 || true)
for tool in memcheck racecheck; do
    if [ -z "$SANITIZER" ]; then
        chosen "sanitizer_$tool" && note "sanitizer_$tool" "left out: not installed" 0
    else
        gpu "sanitizer_$tool" 300 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool "$tool" --error-exitcode 99 \
            --target-processes all "${TESTS[@]}" tests/kernels -m "gpu and not slow" -k "cuda-cuda and not compile"
    fi
done

# The same bits in two processes.
for run in 1 2; do
    gpu "determinism_$run" 120 "$PYTHON" benchmarks/determinism.py --device cuda --out "$OUT/determinism_$run.json"
done
if [ "$HAS_GPU" = 1 ]; then part determinism_equal 10 cmp "$OUT/determinism_1.json" "$OUT/determinism_2.json"; fi

for file in benchmarks/bench_*.py; do
    stem=$(basename "$file" .py)
    gpu "$stem" 300 "$PYTHON" "$file" --device cuda --seconds 1
done
# One process a model, so that one which runs out of time or memory costs the others nothing.
for model in sana-0.6b sd3.5-medium sana-1.6b; do
    gpu "a100_1024_$model" 400 "$PYTHON" benchmarks/a100_1024.py --model "$model" --skip kernels memory
done
gpu a100_1024_qwen-image 590 "$PYTHON" benchmarks/a100_1024.py --model qwen-image --skip kernels memory --batches 4 --steps 2

if [ "$OUT" != "$RESULTS" ]; then cp -f "$RESULTS"/*.json "$RESULTS"/*.md "$RESULTS"/*.png "$OUT" 2>/dev/null; fi
echo "$failed parts failed; logs in $LOGS" | tee -a "$SUMMARY"
exit $failed
