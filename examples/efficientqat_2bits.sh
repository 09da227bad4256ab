#!/bin/sh
# Quantize a model to 2 bits twice, with GPTQ and with EfficientQAT, and compare the two.
#
#     sh examples/efficientqat_2bits.sh [MODEL [OUT [--set key=value ...]]]
#
# MODEL is a folder or a name on the hub; left out, it is the model that comes with qtool.
set -eu
model=${1:-builtin:wiki-llama-3m}
out=${2:-out/2bits}
shift $(($# < 2 ? $# : 2))

# The same text and the same grid for both. The text is written by the model itself; where you have text like that which
# the model will read, give its file: --set data.source=FILE
set -- --set model.path="$model" --set data.source=generated --set eval.tasks='[generated, kl]' "$@"

qtool ptq gptq-w2g64-asym --set output.path="$out/gptq" "$@"
qtool efficientqat efficientqat-w2g64-asym --set output.path="$out/efficientqat" "$@"

qtool compare "$out/gptq" "$out/efficientqat" -o "$out/compare" # the table here, and a page in this folder
