#!/usr/bin/env bash
# What there is to do on a machine with a GPU, in stages of some minutes:
#   bench/gpu_run.sh build
#   bench/gpu_run.sh test [pytest's arguments]     by default those of ops, kernels, models, doors
#   bench/gpu_run.sh sanitize [memcheck or racecheck]     the CUDA kernels under compute-sanitizer
#   bench/gpu_run.sh bench [gpu.py's options]
#   bench/gpu_run.sh all
# Results go to $OUT, by default bench/results/gpu. It needs torch with CUDA, triton, pytest,
# hypothesis, setuptools >= 77, pybind11, ninja, nvcc and a C++ compiler, but no network.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-$PWD/bench/results/gpu}

require_gpu() {
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "gpu_run.sh: torch sees no GPU here; bench/gpu.py --dry-run does without" >&2
        exit 2
    }
}

# From tests/ or bench/, never from here, where the checkout would hide what is installed.
build() {
    FASTATTN_CUDA=${FASTATTN_CUDA:-on} "$python" -m pip install --quiet --no-build-isolation --no-deps . 2>&1 | tee "$out/build.txt"
    (cd tests && "$python" -m fastattn info) | tee "$out/info.txt"
}

run_tests() {
    local status=0 parallel=() reports
    reports=$(mktemp -d)
    "$python" -c 'import xdist' 2> /dev/null && parallel=(-n 8)
    pytest() {
        (cd tests && "$python" -m pytest -q "${parallel[@]}" "$@") 2>&1 | tail -n 100
    }
    {
        pytest "${@:-ops}" -k "triton or cuda" --junitxml="$reports/ops.xml" || status=1
        [ $# -gt 0 ] || pytest kernels --junitxml="$reports/kernels.xml" || status=1
        [ $# -gt 0 ] || pytest test_devices.py --junitxml="$reports/devices.xml" || status=1
    } > "$out/tests.txt"
    tail -n 40 "$out/tests.txt"
    summary "$reports"/*.xml > "$out/tests.json"
    rm -r "$reports"
    return "$status"
}

summary() {
    "$python" - "$@" << 'END'
import json, pathlib, sys, xml.etree.ElementTree as tree

counts, failures = {}, []
for path in sys.argv[1:]:
    suite = tree.parse(path).getroot().find("testsuite")
    names = ("tests", "failures", "errors", "skipped", "time")
    counts[pathlib.Path(path).stem] = {name: float(suite.get(name)) for name in names}
    for case in suite.iter("testcase"):
        for fault in (*case.iter("failure"), *case.iter("error")):
            name = f"{case.get('classname')}.{case.get('name')}"
            failures.append({"test": name, "message": (fault.get("message") or "")[:500]})
print(json.dumps({"counts": counts, "failures": failures}, indent=1))
END
}

# Without torch's cache of memory, whose blocks are larger than what was asked for.
sanitize() {
    local tool status=0
    command -v compute-sanitizer > /dev/null || {
        echo "gpu_run.sh: compute-sanitizer is not on PATH: left out"
        return 0
    }
    [ $# -gt 0 ] || set -- memcheck racecheck
    for tool; do
        (cd tests && PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
            --error-exitcode 1 "$python" -m pytest -q ops -k "cuda and (packed or paged or band \
            or activations or dropout)") > "$out/$tool.txt" 2>&1 || status=1
        tail -n 20 "$out/$tool.txt"
    done
    return "$status"
}

bench() {
    (cd bench && PYTHONUNBUFFERED=1 "$python" gpu.py --out "$out/bench.json" "$@") 2>&1 |
        tee "$out/bench.txt"
}

stage=${1:-}
shift $(($# > 0))
case $stage in
    build | test | sanitize | bench | all) require_gpu ;;
    *)
        sed -n '2,/^set/{/^#/p}' "$0" >&2
        exit 2
        ;;
esac
mkdir -p "$out"
case $stage in
    build) build ;;
    test) run_tests "$@" ;;
    sanitize) sanitize "$@" ;;
    bench) bench "$@" ;;
    all)
        failed=0
        build
        run_tests || failed=1
        sanitize || failed=1
        bench || failed=1
        exit "$failed"
        ;;
esac
