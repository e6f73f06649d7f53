#!/usr/bin/env bash
# Everything that only a GPU can show, without a network: builds for the GPU that is there, runs the operators' tests on it,
# looks at the kernels with compute-sanitizer, measures every case, and writes it all down. Meant to take eight minutes;
# steps are stopped at limits that add up to 19. It has not run on a GPU yet.
#   bench/gpu.sh OUT_DIR
# Needs nvcc, compute-sanitizer, a CUDA build of torch, and what wsss_ops[test] lists. PYTHON names the interpreter.
# Each step has a log in OUT_DIR; summary.txt says how each ended. A step that fails does not stop the next ones, except
# the build; the exit status is 1 if any failed.
set -uo pipefail

python=${PYTHON:-python3}
[[ $# == 1 ]] || { echo "usage: bench/gpu.sh OUT_DIR" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.."
summary=$out/summary.txt failed=0

# step NAME SECONDS COMMAND...: runs it for at most so long, its output in NAME.log; the log's last line in the summary.
step() {
    local name=$1 limit=$2 began=$SECONDS status=0
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    [[ $status == 0 ]] || failed=1
    printf '%-12s %-12s %4d s  %s\n' "$name" "$([[ $status == 0 ]] && echo passed || echo "failed ($status)")" \
        $((SECONDS - began)) "$(grep -v '^ *$' "$out/$name.log" | tail -n 1)" | tee -a "$summary"
    return $status
}

: >"$summary"
step gpu 20 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader ||
    { echo "no GPU to be seen: nvidia-smi failed, see $out/gpu.log" >&2; exit 1; }
WSSS_OPS_CUDA=1 step build 240 "$python" setup.py build_ext --inplace || exit 1
step info 60 "$python" -m wsss_ops info
step tests 180 "$python" -m pytest python_tests -k "cuda" -q --ignore=python_tests/training --ignore=python_tests/test_emulation.py

# Every kernel at odd sizes, once. Without PyTorch's cache each tensor is an allocation whose end is watched.
sample="cuda and (test_matches_reference or test_dtypes)"
for tool in memcheck racecheck initcheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" -m pytest -q -x python_tests/test_patch.py python_tests/test_clip.py python_tests/test_deform.py \
        python_tests/test_ocr.py python_tests/test_prototype.py python_tests/test_sfc.py -k "$sample"
done

step bench 420 "$python" -m wsss_ops bench --device cuda --rounds 20 --no-compile --out "$out/bench.json" --plot "$out/bench.png"
cat "$summary"
exit $failed
