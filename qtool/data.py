"""Text as tokens: windows for calibration and for perplexity, and where their text comes from.

A data source is one row of ``SOURCES``. Files below :func:`data_dir` come first, the Hugging Face hub second.
``generated`` needs neither: the model writes the text itself (the recipe of LLM-QAT, arXiv 2305.17888).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qtool import progress
from qtool.config import DataConfig
from qtool.errors import InputError
from qtool.models import LoadedModel
from qtool.texts import READERS, UnreachableError, check_file, load_hub, read_file

GENERATED = "generated"
GENERATED_WINDOWS = 32  # of perplexity text, where no limit is given
CHARACTERS_PER_BATCH = 1 << 18
CACHE_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}


class Source(NamedTuple):
    """Named text: its file below ``data_dir()``, its repository and configuration on the hub, and how it is read."""

    file: str
    hub: tuple[str, str]
    streaming: bool
    joined: bool  # rows are lines of one text, joined by two newlines; otherwise each row is a document


SOURCES: dict[str, Source] = {
    "wikitext2": Source("wikitext2/{split}.jsonl", ("Salesforce/wikitext", "wikitext-2-raw-v1"), False, joined=True),
    "enwiki": Source("enwiki/{split}.txt.xz", ("wikimedia/wikipedia", "20231101.en"), True, joined=False),
    "c4": Source("c4/{split}.jsonl", ("allenai/c4", "en"), True, joined=False),
}


def data_dir() -> Path | None:
    """The folder with data kept on this machine: ``QTOOL_DATA_DIR``, else ``../shared/data`` where that exists.

    An empty ``QTOOL_DATA_DIR`` means that there is none.

    Raises:
        InputError: ``QTOOL_DATA_DIR`` names no folder.
    """
    chosen = os.environ.get("QTOOL_DATA_DIR")
    if chosen is not None:
        if chosen and not Path(chosen).is_dir():
            raise InputError(f"QTOOL_DATA_DIR is {chosen}, which is no folder; correct it, or set it to nothing")
        return Path(chosen) if chosen else None
    repository = Path(__file__).parents[1]
    return next((p for base in (Path(), repository) if (p := base / ".." / "shared" / "data").is_dir()), None)


def check_source(data: DataConfig) -> None:
    """Whether ``data.source`` can be: a known name, or a file that exists and has a known suffix.

    Raises:
        InputError: it cannot.
    """
    known = [GENERATED, *SOURCES]
    if data.source in known:
        return
    if Path(data.source).name.endswith(tuple(READERS)) or Path(data.source).exists():
        check_file(Path(data.source).expanduser())
        return
    near = get_close_matches(data.source, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(
        f"data.source: {data.source!r} is neither a known name ({', '.join(known)}) "
        f"nor a path that ends in {', '.join(READERS)}{hint}"
    )


def calibration_tokens(data: DataConfig, loaded: LoadedModel, seed: int) -> Tensor:
    """Calibration windows ``[num_samples, seq_len]`` int64, on the CPU.

    Documents are read in order, tokenized with the special tokens that the tokenizer adds by itself (or, where it adds
    none, followed by its end-of-text token), concatenated, and cut into disjoint consecutive windows. The first
    ``num_samples`` are used; ``seed`` shuffles their order.

    Raises:
        InputError: the source cannot be read or has too little text, or a window is longer than the model's context.
    """
    check_source(data)
    _check_length("data.seq_len", data.seq_len, loaded)
    if data.source == GENERATED:
        return generated_tokens(loaded, data.num_samples, data.seq_len, calibration_seed(seed))
    source = SOURCES.get(data.source)
    texts = read_file(Path(data.source).expanduser()) if source is None else _rows(data.source, "train")
    stream, num_texts = _token_stream(texts, source is not None and source.joined, loaded, data)
    num_windows = len(stream) // data.seq_len
    if num_windows < data.num_samples:
        raise InputError(_too_little(data, num_windows, len(stream), num_texts))
    windows = stream[: data.num_samples * data.seq_len].view(data.num_samples, data.seq_len)
    return windows[torch.randperm(data.num_samples, generator=torch.Generator().manual_seed(seed))]


def _too_little(data: DataConfig, num_windows: int, num_tokens: int, num_texts: int) -> str:
    if not num_texts:
        return f"data.source: {data.source} is empty: no text was found in it"
    advice = f"lower data.num_samples to {num_windows}, or " if num_windows else ""
    return (
        f"data.source: {data.source} has too little text: {num_windows} window(s) of {data.seq_len} tokens were found "
        f"({num_tokens} tokens in {num_texts} text(s)), and {data.num_samples} are needed "
        f"({data.num_samples * data.seq_len} tokens); {advice}lower data.seq_len, or give more text"
    )


def _check_length(key: str, length: int, loaded: LoadedModel) -> None:
    if length > loaded.max_length:
        raise InputError(
            f"{key} is {length}, and {loaded.path} was made for at most {loaded.max_length} tokens; "
            f"lower it to {loaded.max_length}"
        )


def _rows(name: str, split: str) -> Iterator[str]:
    """Rows of a named source: from its file below ``data_dir()``, else from the hub."""
    source = SOURCES[name]
    folder = data_dir()
    file = folder / source.file.format(split=split) if folder else None
    if file is not None and file.exists():
        yield from read_file(file)
        return
    try:
        yield from load_hub(*source.hub, split=split, streaming=source.streaming)
    except UnreachableError as error:
        raise UnreachableError(
            f"{name} is not on this machine, and {error}; put it at $QTOOL_DATA_DIR/{source.file.format(split=split)} "
            f"(QTOOL_DATA_DIR is {folder or 'not set'}), or use a file of your own as data.source"
        ) from error


def _joined(rows: Iterable[str], size: int) -> Iterator[str]:
    """Pieces of at least ``size`` characters of the rows joined by two newlines."""
    piece: list[str] = []
    length = 0
    for row in rows:
        piece.append(row)
        length += len(row)
        if length >= size:
            yield "\n\n".join(piece) + "\n\n"
            piece, length = [], 0
    if length:
        yield "\n\n".join(piece)


def _token_stream(texts: Iterator[str], joined: bool, loaded: LoadedModel, data: DataConfig) -> tuple[Tensor, int]:
    """Tokens of as many texts as are needed, and how many texts were read."""
    tokenizer = loaded.tokenizer
    adds_special = bool(tokenizer.num_special_tokens_to_add())
    end = [] if adds_special or joined or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    needed = data.num_samples * data.seq_len
    size = min(CHARACTERS_PER_BATCH, 5 * needed)  # a token is about four characters of English
    pieces = ([piece] for piece in _joined(texts, size)) if joined else _batches(texts, size)
    ids: list[int] = []
    num_texts = 0
    for batch in pieces:
        special = not (joined and num_texts)  # only the first piece begins a text
        for encoded in tokenizer(batch, add_special_tokens=special, verbose=False)["input_ids"]:
            ids += encoded
            ids += end
        num_texts += len(batch)
        if len(ids) >= needed:
            break
    return torch.tensor(ids[:needed], dtype=torch.int64), num_texts


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Texts in lists of about ``size`` characters, without those that are only white space."""
    batch: list[str] = []
    length = 0
    for text in texts:
        if not text.strip():
            continue
        batch.append(text)
        length += len(text)
        if length >= size:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def perplexity_windows(name: str, loaded: LoadedModel, context: int, limit: int | None, seed: int) -> Tensor:
    """Disjoint windows ``[n, t]`` int64 for perplexity; ``t`` is ``context``, or the model's maximum when that is less.

    ``wikitext2``: the test split joined by two newlines and tokenized once, as the papers do; a last part that does not
    fill a window is left out. ``generated``: text from ``loaded`` by another seed than the calibration text.

    Raises:
        UnreachableError: WikiText-2 is neither on this machine nor reachable on the hub.
        InputError: there is not one full window.
    """
    length = min(context, loaded.max_length)
    if name == GENERATED:
        return generated_tokens(loaded, limit or GENERATED_WINDOWS, length, evaluation_seed(seed))
    text = "\n\n".join(_rows(name, "test"))
    ids = torch.tensor(loaded.tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    num_windows = len(ids) // length
    if not num_windows:
        raise InputError(
            f"{name} has only {len(ids)} tokens here, less than one window of {length}; lower eval.context"
        )
    return ids[: num_windows * length].view(num_windows, length)[:limit]


def calibration_seed(seed: int) -> int:
    """The seed of generated calibration text; never one that :func:`evaluation_seed` gives."""
    return 2 * seed


def evaluation_seed(seed: int) -> int:
    """The seed of generated text that is only measured."""
    return 2 * seed + 1


@torch.inference_mode()
def generated_tokens(loaded: LoadedModel, num: int, length: int, seed: int) -> Tensor:
    """Text ``[num, length]`` int64 that the model writes itself, on the CPU.

    The first token is drawn from the vocabulary, the next 3 to 5 are the most likely ones, the rest are sampled at
    temperature 1. Special tokens, the end of text among them, are never drawn: a window then holds running text to
    its end, and nothing depends on what a model does after its end token, which many have never seen. Where the
    tokenizer begins every text with a token of its own, so does each window. The result depends on ``seed``, not on the
    global random state, and on the batch size only through rounding in the model.

    Raises:
        InputError: windows longer than the model's context.
    """
    _check_length("the window of generated text", length, loaded)
    tokenizer = loaded.tokenizer
    special = set(tokenizer.all_special_ids)
    size = min(len(tokenizer), loaded.model.config.get_text_config().vocab_size)  # either may be the larger
    allowed = torch.tensor([i for i in range(size) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.empty(num, length, dtype=torch.int64)
    start = allowed[torch.randint(len(allowed), (num,), generator=generator)]
    num_greedy = torch.randint(3, 6, (num,), generator=generator)
    uniform = torch.rand(num, length, generator=generator)
    begin = tokenizer("")["input_ids"][:1]
    prefix = begin if begin and begin[0] == tokenizer.bos_token_id else []
    tokens[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
    tokens[:, len(prefix)] = start
    batches = torch.arange(num).split(_batch_size(loaded, length))
    for rows in progress.track(batches, "generating text", len(batches)):
        draw = _sampler(uniform[rows], num_greedy[rows], allowed, loaded.device)
        tokens[rows] = _continued(loaded, tokens[rows], len(prefix) + 1, draw)
    return tokens


def _continued(loaded: LoadedModel, tokens: Tensor, given: int, draw: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """``tokens`` with all columns after the first ``given`` written by the model."""
    tokens = tokens.to(loaded.device)
    cache = DynamicCache(config=loaded.model.config)
    cache.layers = [_Preallocated(tokens.shape[1]) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    seen = 0
    for position in range(given, tokens.shape[1]):
        logits = loaded.model(tokens[:, seen:position], past_key_values=cache, use_cache=True).logits
        tokens[:, position] = draw(logits[:, -1], position, position - given)
        seen = position
    return tokens.cpu()


def _sampler(
    uniform: Tensor, num_greedy: Tensor, allowed: Tensor, device: torch.device
) -> Callable[[Tensor, int, int], Tensor]:
    """How to choose a token from logits ``[b, vocabulary]`` at a position: greedy at first, then by inverse CDF."""
    uniform, num_greedy, allowed = uniform.to(device), num_greedy.to(device), allowed.to(device)

    def draw(logits: Tensor, position: int, step: int) -> Tensor:
        logits = logits.float()[:, allowed]
        cdf = logits.softmax(-1).cumsum(-1)
        sampled = torch.searchsorted(cdf, uniform[:, position : position + 1] * cdf[:, -1:], right=True)[:, 0]
        chosen = sampled if step >= 5 else torch.where(num_greedy > step, logits.argmax(-1), sampled)
        return allowed[chosen.clamp_(max=len(allowed) - 1)]

    return draw


class _Preallocated(DynamicLayer):
    """A cache layer of known capacity: nothing is copied as it grows (three times faster on a CPU)."""

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        self.capacity = capacity
        self.length = 0

    # Any: the signature is transformers'
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.all_keys, self.all_values = (
                x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (key_states, value_states)
            )
        end = self.length + key_states.shape[2]
        self.all_keys[:, :, self.length : end] = key_states
        self.all_values[:, :, self.length : end] = value_states
        self.length = end
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values


def _batch_size(loaded: LoadedModel, length: int) -> int:
    """How many sequences' keys and values of ``length`` tokens fit the budget."""
    config = loaded.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token: int = 2 * config.num_hidden_layers * heads * head_dim * loaded.model.dtype.itemsize
    return max(1, CACHE_BYTES.get(loaded.device.type, CACHE_BYTES["cpu"]) // (per_token * length))


def token_hash(tokens: Tensor) -> str:
    """SHA-256 over the shape and the little-endian int64 bytes."""
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    digest.update(tokens.detach().cpu().to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
