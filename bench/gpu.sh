#!/usr/bin/env bash
# Everything that only a GPU can show, without a network. It has not run on a GPU yet; the times are estimates.
#   bench/gpu.sh OUT_DIR [STEP...]       without a STEP all of them, in this order:
#     build      for the GPU that is there, about a minute
#     tests      the operators' tests on it, a minute
#     bench      the ceilings of the machine, every case, CUDA graphs, training steps: four to five minutes
#     sanitize   a sample of the tests under compute-sanitizer's four tools, two to three minutes
#     compiled   patch, ocr and prototype again beside torch.compile'd references, three minutes
# Needs what bench/machine.py looks for, first of all. PYTHON names the interpreter.
# Where a call may last ten minutes: build tests bench, then build sanitize, then build compiled, with one OUT_DIR.
# summary.txt tells how each part ended and has the tables, log.txt all output; bench.json is valid after each case. What
# fails or is stopped at its limit stops nothing else, except the build; the exit status is 1 if anything failed.
set -uo pipefail

python=${PYTHON:-python3}
usage="usage: bench/gpu.sh OUT_DIR [build|tests|bench|sanitize|compiled...]"
[[ $# -ge 1 ]] || { echo "$usage" >&2; exit 2; }
steps=${*:2}
steps=${steps:-build tests bench sanitize compiled}
for name in $steps; do
    [[ $name =~ ^(build|tests|bench|sanitize|compiled)$ ]] || { echo "$usage" >&2; exit 2; }
done
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
[[ -x ${CUDA_HOME:-}/bin/nvcc ]] || unset CUDA_HOME # some machines have it name a folder of libraries alone
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin PYTHONUNBUFFERED=1
summary=$out/summary.txt failed=0

# part NAME SECONDS COMMAND...: runs it for at most so long; the end of its output goes to the summary.
part() {
    local name=$1 limit=$2 log=$out/$1.log began=$SECONDS status=0 verdict
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$log" 2>&1 || status=$?
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict="stopped ($status)" ;;
        *) verdict="failed ($status)" ;;
    esac
    printf '%-24s %-13s %4d s  %s\n' "$name" "$verdict" $((SECONDS - began)) \
        "$(grep -v '^ *$' "$log" | tail -n 2 | cut -c 1-150 | paste -s -d '|')" | tee -a "$summary"
    { echo "==== $name: $*"; cat "$log"; } >>"$out/log.txt"
    rm "$log"
    return $status
}

# Waits for parts that were started side by side.
together() {
    local job
    for job in "$@"; do
        wait "$job" || failed=1
    done
}

build() {
    WSSS_OPS_CUDA=1 part build 240 "$python" setup.py build_ext --inplace || exit 1
    part info 60 "$python" -m wsss_ops info || failed=1
}

# A process for each file: after an illegal access nothing else works in a process. Tests that only a GPU can run are
# not named after a backend.
tests() {
    local selected="cuda or graph or second_gpu or left_on_the_cpu"
    local file jobs=()
    for file in python_tests/test_{clip,deform*,ocr*,patch*,prototype*,sampler,sfc}.py; do
        CUBLAS_WORKSPACE_CONFIG=:4096:8 TORCHINDUCTOR_COMPILE_THREADS=1 WSSS_TESTS_SECONDS=150 \
            part "$(basename "$file" .py)" 180 "$python" -m pytest -q -rfE -p no:cacheprovider "$file" -k "$selected" &
        jobs+=($!)
    done
    together "${jobs[@]}"
}

# bench_part NAME SECONDS OPERATOR...: adds their cases to bench.json.
bench_part() {
    local name=$1 limit=$2 op operators=()
    shift 2
    for op in "$@"; do
        operators+=(--op "$op")
    done
    part "$name" "$limit" "$python" -m wsss_ops bench --device cuda --rounds 12 --no-compile \
        --out "$out/bench.json" --add "${operators[@]}" || failed=1
}

# table NAME: of NAME.json, to the summary; and a plot.
table() {
    [[ -e $out/$1.json ]] || return
    "$python" -m wsss_ops bench --show "$out/$1.json" >>"$summary" 2>&1 || failed=1
    "$python" -c 'import matplotlib' 2>/dev/null || return 0
    "$python" -m wsss_ops bench --show "$out/$1.json" --plot "$out/$1.png" >/dev/null 2>>"$summary" || failed=1
}

bench() {
    rm -f "$out/bench.json"
    bench_part bench-operators 180 ceilings patch ocr prototype
    bench_part bench-deform 270 deform
    bench_part bench-graphs 90 graphs
    bench_part bench-steps 180 esol ppl sfc
    table bench
}

# Every kernel, float32 and bfloat16, at odd sizes. Without PyTorch's cache each tensor is an allocation whose end is
# watched. Errors of API calls are left to those who call: libraries probe for what a driver lacks.
sanitize() {
    local sample="cuda and ((test_dtypes or test_class_prototypes) and (float32 or bfloat16 or dtype1 or dtype3) \
and not of_the_cam or (test_sfc or test_deform_product and dtype1) and test_matches_reference)"
    local tests=("$python" -m pytest -q -rfE -p no:cacheprovider
        python_tests/test_{patch,clip,deform,deform_product,ocr,prototype,sfc}.py -k "$sample")
    local options=(--report-api-errors no --show-backtrace no) reports=$out/initcheck.txt tool jobs=()
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 WSSS_TESTS_SECONDS=180
    for tool in memcheck racecheck synccheck; do
        part "$tool" 240 compute-sanitizer --tool "$tool" "${options[@]}" --kernel-name kns=wsss --error-exitcode 9 \
            "${tests[@]}" &
        jobs+=($!)
    done
    # It must see all kernels, or it takes what others write for unwritten; of its reports those on ours count.
    WSSS_TESTS_UNFILLED=1 part initcheck 240 compute-sanitizer --tool initcheck "${options[@]}" --print-limit 10000 \
        --log-file "$reports" "${tests[@]}" &
    jobs+=($!)
    together "${jobs[@]}"
    unset PYTORCH_NO_CUDA_MEMORY_CACHING WSSS_TESTS_SECONDS
    part initcheck-kernels 10 awk '/wsss/ {found = 1; print} END {if (!NR) print "no report"; exit found || !NR}' \
        "$reports" || failed=1
}

compiled() {
    part compiled 270 "$python" -m wsss_ops bench --device cuda --rounds 10 --op patch --op ocr --op prototype \
        --out "$out/compiled.json" || failed=1
    table compiled
}

echo "== $steps, $(date -u +%Y-%m-%dT%H:%M:%SZ)" | tee -a "$summary" >>"$out/log.txt"
part nvidia-smi 30 nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader || failed=1
part machine 120 "$python" bench/machine.py ||
    { echo "Nothing can be done here: the line of machine, above, tells what is missing." >&2; exit 1; }
for name in $steps; do
    "$name"
done
exit $failed
