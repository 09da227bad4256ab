#!/bin/sh
# Quantize a model for llama.cpp, measure the GGUF file, and let llama.cpp write with it.
#
#     sh examples/ptq_to_llama_cpp.sh [MODEL [OUT [--set key=value ...]]]
#
# MODEL is a folder or a name on the hub; left out, it is the model that comes with qtool. Needs the packages qtool[gguf];
# the last step needs llama-cli of llama.cpp, and is left out where there is none.
set -eu
model=${1:-builtin:wiki-llama-3m}
out=${2:-out/for-llama.cpp}
shift $(($# < 2 ? $# : 2))

# GPTQ on the grids that llama.cpp calls Q4_K_M. The calibration text is written by the model itself.
qtool ptq gguf-q4_k_m --set model.path="$model" --set data.source=generated \
    --set eval.tasks='[generated, kl]' --set output.path="$out" "$@"

# The recipe says target: llama.cpp, so the run has written the GGUF file as well, beside the checkpoint. This measures
# the file itself, on text of the float model.
qtool eval "$out-gguf" --float-model "$model" --tasks generated --limit 4 --context 256

if command -v llama-cli >/dev/null; then
    llama-cli -m "$out-gguf/model.gguf" -p "The city lies on the banks of" -n 32 -no-cnv
else
    echo "llama-cli is not installed; with it: llama-cli -m $out-gguf/model.gguf"
fi
