#!/usr/bin/env bash
# Measure qtool on one CUDA machine, within ten minutes: GPTQ, Block-AP, LR-QAT, SignRound and decoding, on blocks of the
# shape of Llama-2 7B. Writes gpu-bench.json and gpu-bench.md into $OUT, or into ./gpu-bench. The CUDA path was never run.
#
#   scripts/bench/gpu.sh                 on the GPU
#   scripts/bench/gpu.sh --cpu --tiny    the same code on a tiny model on the CPU, in a minute or two
#
# PYTHON names the interpreter (python), AUTO_ROUND_PYTHON one that has auto-round (by default the same).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python}" "$root/scripts/bench/gpu.py" --output "${OUT:-gpu-bench}" "$@"
