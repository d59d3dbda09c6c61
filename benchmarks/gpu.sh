#!/usr/bin/env bash
# All that needs a GPU, inside ten minutes and without a network: bash benchmarks/gpu.sh OUT [PART ...]
#
# Parts: tests (kernels compiled on the card), kernels (each beside PyTorch), step (the training step over batch sizes and backends),
# profile (where a step's time goes). A part that is done leaves OUT/PART.done and is not repeated. What a deadline cut off is kept, and the
# step goes on after the cases that it has: run the same command again. Rows, pictures and traces go to OUT; one table comes last. PYTHON and WHEELS (a folder of wheels to install first, offline) may be set.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: bash benchmarks/gpu.sh OUT [tests kernels step profile]" >&2; exit 2; }
mkdir -p "$1" && OUT="$(cd "$1" && pwd)" || exit 2
shift
PARTS=("${@:-tests}")
[ $# -ge 1 ] || PARTS=(tests kernels step profile)
cd "$(dirname "$0")/.." || exit 2
PYTHON="${PYTHON:-python3}"

# seconds of each part: together under ten minutes, starting and installing included
declare -A LIMIT=([tests]=100 [kernels]=110 [step]=180 [profile]=95)

if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || exit 2
fi
"$PYTHON" -c 'import torch; assert torch.cuda.is_available()' || { echo "gpu.sh: no GPU here" >&2; exit 2; }
if ! "$PYTHON" -c 'import ssast.kernels' 2>/dev/null; then # not installed: the four rooms as they lie here
    mkdir -p "$OUT/site/ssast"
    for room in engine kernels benchmarks configs; do ln -sfn "$PWD/$room" "$OUT/site/ssast/$room"; done
    export PYTHONPATH="$OUT/site${PYTHONPATH:+:$PYTHONPATH}"
fi
ENGINE=deepspeed
"$PYTHON" -c 'import deepspeed' 2>/dev/null || { ENGINE=ddp; echo "DeepSpeed is not installed: steps run on the plain engine"; }
"$PYTHON" -c 'import nvidia.dali' 2>/dev/null || echo "DALI is not installed: loader rows are left out, steps are fed from memory"

part_tests() {
    SSAST_TEST_DEVICE=cuda timeout "$1" "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/kernels tests/benchmarks/test_on_gpu.py
}
part_kernels() {
    timeout $(($1 + 20)) "$PYTHON" -m ssast.benchmarks.kernels --out "$OUT/kernels.csv" --plot "$OUT/pictures" --deadline "$1"
}
part_step() {
    # compiling a backward pass cannot be interrupted: some grace
    timeout $(($1 + 45)) "$PYTHON" -m ssast.benchmarks.step --engine "$ENGINE" --out "$OUT/step.csv" --deadline "$1"
}
part_profile() {
    timeout "$1" "$PYTHON" -m ssast.benchmarks.throughput.profile ssast-base-patch-400 --synthetic --no-baselines --steps 20 \
        --out "$OUT/profile" "step.engine=$ENGINE" deepspeed.train_batch_size=256
}

failed=()
for part in "${PARTS[@]}"; do
    [ -n "${LIMIT[$part]:-}" ] || { echo "gpu.sh: no part '$part'; there are ${!LIMIT[*]}" >&2; exit 2; }
    if [ -e "$OUT/$part.done" ]; then echo "== $part: done before"; continue; fi
    echo "== $part"
    began=$SECONDS
    "part_$part" "${LIMIT[$part]}" 2>&1 | tee "$OUT/$part.log"
    status=${PIPESTATUS[0]}
    echo "== $part: exit status $status after $((SECONDS - began)) s" | tee -a "$OUT/$part.log"
    case "$status" in
        0) touch "$OUT/$part.done" ;;
        3) [ "$part" = step ] || touch "$OUT/$part.done" ;; # the deadline came first, and what was measured is kept
        *) failed+=("$part") ;;
    esac
done

echo
[ -e "$OUT/step.csv" ] && "$PYTHON" -m ssast.benchmarks.tables --step "$OUT/step.csv"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]} (logs in $OUT)"; exit 1; }
