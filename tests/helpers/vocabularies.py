"""Small tokenizers of every kind that llama.cpp has a name for, and a text that tells them apart."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.tiny import PROSE, VOCABULARY
from qtool.exporters.gguf.tokenizer import LLAMA_3, QWEN_2

TEXT = (
    "She wrote 1234567 stones in the OLD town; we'll see, WE'LL see: they've gone.\n\n\n"
    "  Two  spaces,\ttabs\r\n and caf\u00e9s \u2014 na\u00efve \u4f60\u597d \U0001f642!? "
    "Every stone of the wall... 3rd,4th \n"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(kind: str) -> Tokenizer:
    """Return byte-level BPE that splits text as ``kind`` does, and adds a beginning of text if the real one does."""
    whole_words = kind == "llama-bpe"
    bpe = Tokenizer(models.BPE(ignore_merges=whole_words))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
    before = {
        "smollm": pre_tokenizers.Digits(individual_digits=True),
        "llama-bpe": pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
        "qwen2": pre_tokenizers.Split(Regex(QWEN_2), "isolated"),
    }.get(kind)
    bpe.pre_tokenizer = split if before is None else pre_tokenizers.Sequence([before, split])
    bpe.decoder = decoders.ByteLevel()
    if kind == "qwen2":
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


def sentencepiece() -> Tokenizer:
    """Return Llama 2's kind of tokenizer: BPE on characters with byte fallback and SentencePiece's spaces."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False
    )
    bpe.train_from_iterator(PROSE, trainer)
    all_merges(bpe)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B:1", [("<s>", 1)])
    return bpe


KINDS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "sentencepiece")


def save(kind: str, folder: Path) -> PreTrainedTokenizerFast:
    """Replace the tokenizer in ``folder`` by one of ``kind``."""
    made = sentencepiece() if kind == "sentencepiece" else byte_level(kind)
    unknown = {"unk_token": "<unk>"} if kind == "sentencepiece" else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **unknown)
    tokenizer.save_pretrained(folder)
    return tokenizer
