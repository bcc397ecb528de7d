#!/usr/bin/env bash
# All that a GPU has to show, in one command and under 8 minutes on one: writes gpu*.json and memory.json to the folder
# that is named (default: here). Each piece has a time limit of its own; one that fails leaves the others' figures.
#
#     bash benchmarks/gpu.sh [FOLDER]
#
# PYTHON names the interpreter (default: .venv/bin/python, else python3). It needs torch with CUDA, transformers and
# coterie's other requirements. Opacus and opake stand beside ours where they are installed, as dp_step.py says how.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(mkdir -p "${1:-.}" && cd "${1:-.}" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || python=python3
export PYTHONPATH="$here/../src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
failed=0

piece() { # seconds, name, command...
    local limit=$1 name=$2 began=$SECONDS
    shift 2
    echo "== $name (at most $limit s)"
    timeout "$limit" "$@" || { echo "$name: ended with $?"; failed=1; }
    echo "== $name took $((SECONDS - began)) s"
}

cd "$here"
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "torch finds no GPU here"; exit 1; }
piece 15 products "$python" gpu.py --only products --json "$out/gpu-products.json"
piece 90 exactness "$python" gpu.py --only exactness --json "$out/gpu-exactness.json"
piece 90 steps "$python" gpu.py --only steps --json "$out/gpu-steps.json"
piece 130 mellum "$python" gpu.py --only mellum --json "$out/gpu-mellum.json"
piece 80 "two ranks" "$python" gpu_ranks.py --json "$out/gpu-ranks.json"
piece 70 "memory of a party" "$python" memory.py --arms centralised experts --json "$out/memory.json"
exit $failed
