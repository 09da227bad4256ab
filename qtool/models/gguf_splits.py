"""The ways in which byte-level tokenizers split text before they merge, and llama.cpp's names of them.

A GGUF file selects the way by name (``tokenizer.ggml.pre``), and a ``tokenizer.json`` lists its steps; one table says
both.
"""

from typing import Any

from tokenizers import Regex, pre_tokenizers

# regular expressions that models split text by, written as in their tokenizer.json, to compare with it
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = WORDS + r"|\p{N}{1,3}" + REST
QWEN_2 = WORDS + r"|\p{N}" + REST
MARKS = WORDS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+")  # with combining marks
QWEN_35 = MARKS + r"|\p{N}" + REST.replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
BYTES, BYTES_OF_WORDS = ("ByteLevel", False), ("ByteLevel", True)  # True: also splits with GPT-2's regular expression
FALCON = (("Punctuation", "Contiguous"), BYTES_OF_WORDS, ("Split", "[0-9][0-9][0-9]"))
# pre-tokenizer steps, and whether whole words are looked up before merging -> llama.cpp's name
SPLITS: dict[tuple[tuple[tuple[str, Any], ...], bool], str] = {
    ((BYTES_OF_WORDS,), False): "gpt-2",
    ((("Digits", True), BYTES_OF_WORDS), False): "smollm",
    ((("Split", LLAMA_3), BYTES), True): "llama-bpe",
    ((("Split", LLAMA_3), BYTES), False): "smaug-bpe",
    ((("Split", QWEN_2), BYTES), False): "qwen2",
    ((("Split", QWEN_35), BYTES), False): "qwen35",
    (FALCON, False): "falcon",
}


def pre_tokenizer(name: str) -> tuple[pre_tokenizers.PreTokenizer, bool] | None:
    """Return the pre-tokenizer that llama.cpp calls ``name``, and whether whole words are looked up before merging.

    ``None`` if the name is not in ``SPLITS``.
    """
    found = next((key for key, value in SPLITS.items() if value == name), None)
    if found is None:
        return None
    steps = [_MADE[kind](value) for kind, value in found[0]]
    return (steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)), found[1]


_MADE: dict[str, Any] = {  # a step of the class, by its value in ``SPLITS``
    "ByteLevel": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
    "Digits": lambda single: pre_tokenizers.Digits(individual_digits=single),
    "Punctuation": lambda behavior: pre_tokenizers.Punctuation(behavior.lower()),
    "Split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
}
