"""Loading a tokenizer and calling it, with every error of it as an error of the input.

Tokenizers are programs of many kinds, and raise errors of many kinds for damaged files; those written in Rust may also
panic, which Python sees as an exception that is no ``Exception``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase, ProcessorMixin

from qtool.system.errors import InputError, first_line

FEW = 8  # most tokens of a tokenizer that was made without its files


def load_tokenizer(path: str, folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model's ``folder``, which a recipe calls ``path``.

    Raises:
        InputError: there is none, or it cannot be loaded.
    """
    found = (folder / "tokenizer.json").exists() or any(folder.glob("*.model")) or (folder / "vocab.json").exists()
    hint = "" if found else " (the folder has no tokenizer.json)"
    with _refused(f"{path}: its tokenizer cannot be loaded", hint):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not found and len(tokenizer) <= FEW:  # transformers makes one without its files, which knows no words
            raise ValueError("it has special tokens only")
    return tokenizer


def load_processor(path: str, folder: Path) -> ProcessorMixin:
    """Return the processor of a multimodal model's ``folder``, which a recipe calls ``path``.

    Raises:
        InputError: there is none, it reads no pictures, or it cannot be loaded; or the model has no folder.
    """
    if folder == Path():
        raise InputError(
            f"pictures are read by the processor in a model's folder, and {path} is in memory; give the folder, in a "
            "recipe or to qtool.quantize and qtool.evaluate"
        )
    hint = "; it needs preprocessor_config.json or processor_config.json, and of some models torchvision as well"
    with _refused(f"{path}: its processor of pictures cannot be loaded", hint):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise InputError(
            f"{path} has no processor of pictures (preprocessor_config.json, processor_config.json), so pictures in "
            "data.source cannot be read; use text, or copy these files from where the model was published"
        )
    return processor


def tokenized(tokenizer: PreTrainedTokenizerBase, text: str | list[str], place: str, **options: Any) -> BatchEncoding:
    """Return what ``tokenizer`` makes of ``text``, called with ``options``; ``place`` says where the text is from.

    Raises:
        InputError: the tokenizer cannot encode the text.
    """
    with _refused(f"{place}: the tokenizer of this model cannot encode it"):
        encoded: BatchEncoding = tokenizer(text, verbose=False, **options)
    return encoded


@contextmanager
def _refused(words: str, hint: str = "") -> Iterator[None]:
    """Turn any error inside the ``with`` block, a panic included, into an ``InputError``."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # an interruption
        raise InputError(f"{words}: {first_line(error).rstrip(':'):.300}{hint}") from error
