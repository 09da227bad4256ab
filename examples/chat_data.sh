#!/bin/sh
# Train a model at 3 bits on your own conversations: only the answers are learned.
#
#     sh examples/chat_data.sh [MODEL [DATA [OUT [--set key=value ...]]]]
#
# MODEL is a folder or a name on the hub; left out, it is the model that comes with qtool. DATA is a file with one
# conversation in each line, in any of these forms; left out, it is examples/chat.jsonl.
#
#     {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
#     {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
#     {"instruction": "...", "input": "...", "output": "..."}
set -eu
model=${1:-builtin:wiki-llama-3m}
data=${2:-$(dirname "$0")/chat.jsonl}
out=${3:-out/chat}
shift $(($# < 3 ? $# : 3))

# Conversations are written with the model's chat template (the built-in model has none: "### User:", "### Assistant:")
# and packed into windows of data.seq_len tokens. The loss ce learns the answers; kl, the default, learns what the float
# model predicts in their place.
qtool qat lsq-w3g64 --set model.path="$model" --set data.source="$data" --set data.num_samples=8 --set data.seq_len=128 \
    --set method.loss=ce --set eval.tasks='[generated, kl]' --set output.path="$out" "$@"

# A model without a chat template continues the text that it is given.
qtool chat "$out" --prompt "Which river flows through Vienna?" --max-new-tokens 16
