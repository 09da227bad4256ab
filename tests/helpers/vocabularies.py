"""Small tokenizers of every kind that llama.cpp has a name for, and a text that tells them apart."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.tiny import PROSE, VOCABULARY
from qtool.models.gguf_splits import LLAMA_3, QWEN_2, QWEN_35

TEXT = (
    "She wrote 1234567 stones in the OLD town; we'll see, WE'LL see: they've gone.\n\n\n"
    "  Two  spaces,\ttabs\r\n and caf\u00e9s \u2014 na\u00efve \u4f60\u597d \U0001f642!? "
    "Every stone of the wall... 3rd,4th \n"
)
# texts that split text in unlike ways: words, numbers, marks, spaces, code, scripts, emoji, control tokens
TEXTS = (
    TEXT,
    "",
    " ",
    "a",
    "Hello world",
    " Hello  world ",
    "The year 2024, 3.14159 and 1,234,567.89; 0x1F, 1e-10.",
    "12345678901234567890",
    "don't can't we'll I'M they'RE o'clock 's 'S",
    "for (int i = 0; i < n; ++i) {\n\treturn a[i] != b->c;\n}",
    "def f(x):\n    if x:\n        return None\n\n\nprint(f(1))  # done",
    "\n",
    "\n\n\n\n",
    "a\n b\n  c\n   d",
    "\t\ttabs\tand spaces   ",
    "line\r\nline\r\n\r\nline",
    "https://example.org/a?b=c&d=%20e#f",
    "e-mail: first.last@example.org; (see [1], {2}, <3>)",
    "!!!??? ... --- *** $$$ ### @@@ ^^^ ~~~ ``` ||",
    "caf\u00e9 na\u00efve \u00fcber stra\u00dfe \u0141\u00f3d\u017a",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f \uc548\ub155\ud558\uc138\uc694",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f642\U0001f44d\U0001f3fd \u2764\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "x\u00b2 + y\u00b3 = \u221e \u2264 \u03c0 \u00bd \u2167 \u0661\u0662\u0663",
    "\u00a0non\u2003breaking\u3000spaces\u200bzero",
    "A</s>B<s> C </s>\n<s>",
    "<|im_start|>user\nHi <|im_end|>\n<start_of_turn>model\n\n<end_of_turn> [multimodal]",
    "CamelCaseWordsAndSHOUTING mixedUP iPhone NASA's",
    "\u2581 lower one eighth block \u2581\u2581 twice",
    "The quick brown fox jumps over the lazy dog. " * 3,
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(kind: str) -> Tokenizer:
    """Return byte-level BPE that splits text as ``kind`` does, and adds a beginning of text if the real one does."""
    whole_words = kind == "llama-bpe"
    words = kind in ("gpt-2", "smollm", "falcon")
    bpe = Tokenizer(models.BPE(ignore_merges=whole_words))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    before = {
        "smollm": pre_tokenizers.Digits(individual_digits=True),
        "llama-bpe": pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
        "smaug-bpe": pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
        "qwen2": pre_tokenizers.Split(Regex(QWEN_2), "isolated"),
        "qwen35": pre_tokenizers.Split(Regex(QWEN_35), "isolated"),
        "falcon": pre_tokenizers.Punctuation("contiguous"),
    }.get(kind)
    steps: list[pre_tokenizers.PreTokenizer] = [split] if before is None else [before, split]
    if kind == "falcon":
        steps.append(pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else split
    bpe.decoder = decoders.ByteLevel()
    if kind in ("qwen2", "qwen35"):
        bpe.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*PROSE, TEXT], trainer)
    if whole_words:
        bpe.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B:1", [("<s>", 0)])
    return bpe


def all_merges(bpe: Tokenizer) -> None:
    """Let ``bpe`` merge any two tokens that make a token, as SentencePiece does."""
    vocab = bpe.get_vocab(with_added_tokens=False)
    merges = [
        (token[:at], token[at:])
        for token in sorted(vocab, key=vocab.__getitem__)
        if token not in BYTES
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    bpe.model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def sentencepiece(kind: str) -> Tokenizer:
    """Return Llama 2's or Gemma's kind: BPE on characters with byte fallback and SentencePiece's spaces."""
    gemma = kind != "sentencepiece"
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    if gemma:  # no space before the text, and user-defined tokens
        bpe.normalizer = normalizers.Replace(" ", "\u2581")
        bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    own = ("\n\n", "[multimodal]") if gemma else ()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(own), special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False
    )
    bpe.train_from_iterator(PROSE, trainer)
    all_merges(bpe)
    if kind == "gemma4":  # merges in another order than tokens, and some are missing
        model = json.loads(bpe.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        bpe.model = models.BPE(model["vocab"], merges[::-1][1:], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    if gemma:
        bpe.add_tokens([AddedToken(each, normalized=False) for each in own])
    bpe.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B:1", [("<s>", 1)])
    return bpe


KINDS = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "qwen35", "falcon", "sentencepiece", "gemma", "gemma4")


def save(kind: str, folder: Path) -> PreTrainedTokenizerFast:
    """Replace the tokenizer in ``folder`` by one of ``kind``."""
    pieces = kind in ("sentencepiece", "gemma", "gemma4")
    made = sentencepiece(kind) if pieces else byte_level(kind)
    unknown = {"unk_token": "<unk>"} if pieces else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **unknown)
    tokenizer.save_pretrained(folder)
    return tokenizer
