#!/usr/bin/env bash
# The same stream by every plan that N GPUs allow: one JSON line and one picture of its time line each.
#   bench/multi_gpu.sh N [--precision fp8 bf16] [--vram 24] [--blocks 24] [--out FOLDER]
#   bench/multi_gpu.sh 4 --tiny          a toy model on the CPU, to try the script
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$here/multi_gpu.py" --gpus "$@"
