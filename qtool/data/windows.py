"""Windows of tokens for calibration and for perplexity.

Windows of plain text are cut from one sequence of tokens: a document ends with the EOS token (or the next one begins
with the BOS token), it may go on in the next window, and tokens attend to the documents before theirs in a window.
Windows of conversations have labels, and none goes on in the next; ``conversations.py`` says how they are packed. Text
that the model writes itself comes from ``generated.py``. Token files are used unchanged (``token_files.py``).
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtool.config.sections import IGNORED, DataConfig
from qtool.data import conversations
from qtool.data.conversations import is_conversation, pack
from qtool.data.drawn_windows import C4, c4_windows
from qtool.data.generated import check_length, generated_tokens
from qtool.data.picture_windows import Inputs, pack_pictures
from qtool.data.pictures import has_pictures
from qtool.data.readers import read_file, read_records
from qtool.data.sources import GENERATED, SOURCES, check_source, source_path, source_records, source_texts
from qtool.data.token_files import SUFFIXES, read_windows
from qtool.data.vocabulary import check_ids
from qtool.models.auto_class import is_multimodal
from qtool.models.loaded import LoadedModel
from qtool.models.tokenizer import load_processor, tokenized
from qtool.system import progress
from qtool.system.errors import InputError

GENERATED_WINDOWS = 32  # windows of generated text for perplexity, if no limit is given
CHARACTERS_PER_BATCH = 1 << 18  # characters that are tokenized at once
LOOKED_AT = 32  # first rows of a file that are looked at for pictures
MOST_TOKENS = 1 << 32  # most tokens of all windows: 32 GiB as int64


def rendering(data: DataConfig, loaded: LoadedModel) -> str | None:
    """Return how conversations with labels were written as text; ``None`` for a file of tokens, which has its own."""
    path = source_path(data)
    return None if data.source not in SOURCES and path.suffix in SUFFIXES else conversations.rendering(loaded.tokenizer)


class Calibration(NamedTuple):
    """Calibration windows ``[n, t]`` int64, on the CPU.

    ``labels`` hold the token itself where it is learned, and -100 elsewhere; ``None``: every token is learned. Methods
    that do not train on next tokens ignore them. ``pictures`` has what the model reads of each window besides tokens,
    such as pixel values; it is empty for text.
    """

    tokens: Tensor
    labels: Tensor | None = None
    pictures: tuple[Inputs, ...] = ()

    @property
    def num_learned(self) -> int | None:
        """The number of tokens that are learned; ``None``: all of them."""
        return None if self.labels is None else int((self.labels != IGNORED).sum())


def calibration(data: DataConfig, loaded: LoadedModel, seed: int) -> Calibration:
    """Return calibration windows ``[num_samples, seq_len]``.

    Documents are read in order, tokenized with the special tokens that the tokenizer adds by itself (or, if it adds
    none, followed by its EOS token), concatenated, and cut into disjoint consecutive windows. The first ``num_samples``
    are used; ``seed`` shuffles their order. Conversations are packed instead (``conversations.pack``), and a token file
    is used in its own order.

    Raises:
        InputError: the source cannot be read or has too little text, or a window is longer than the model's context.
    """
    check_source(data)
    check_length("data.seq_len", data.seq_len, loaded)
    if data.source == GENERATED:
        _refuse_bos(data, "text that the model writes itself begins as its tokenizer begins texts")
        return Calibration(generated_tokens(loaded, data.num_samples, data.seq_len, calibration_seed(seed)))
    found = _from_text(data, loaded, seed)
    check_ids(found.tokens, loaded, f"data.source: {data.source}")
    return found


def _bos(wanted: bool, loaded: LoadedModel, key: str) -> list[int]:
    """Return the tokens that begin every window: the BOS token, or none unless ``wanted``.

    Raises:
        InputError: the tokenizer has no BOS token.
    """
    if not wanted:
        return []
    if loaded.tokenizer.bos_token_id is None:
        raise InputError(f"{key}: the tokenizer of {loaded.path} has no BOS token; set {key} to false")
    return [loaded.tokenizer.bos_token_id]


def _begun(windows: Tensor, bos: list[int]) -> Tensor:
    """Return ``windows`` ``[n, t]`` with the tokens ``bos`` before each."""
    return torch.cat([windows.new_tensor(bos).expand(len(windows), -1), windows], 1)


def _from_text(data: DataConfig, loaded: LoadedModel, seed: int) -> Calibration:
    """Return the windows of a named source or a file, their tokens not yet compared with the embedding table."""
    source, path = SOURCES.get(data.source), source_path(data)
    if source is None and path.suffix in SUFFIXES:
        _refuse_bos(data, "windows of tokens are used as they are")
        return Calibration(*read_windows(path, (data.num_samples, data.seq_len), loaded.num_embeddings))
    order = torch.randperm(data.num_samples, generator=torch.Generator().manual_seed(seed))
    if source is None and _holds(path, has_pictures, LOOKED_AT):
        if is_multimodal(loaded.model.config):
            _refuse_bos(data, "rows with pictures begin as the model's processor begins them")
            return _with_pictures(data, loaded, order)
        progress.note(f"{loaded.path} reads text only: the pictures in {data.source} are left out")
    if source.rows == "conversations" if source else _holds(path, is_conversation):
        _refuse_bos(data, "conversations begin as the chat template begins them")
        records = source_records(data.source, "train") if source else read_records(path)
        packed = pack(records, loaded.tokenizer, data.num_samples, data.seq_len)
        if len(packed.tokens) < data.num_samples:
            raise InputError(_too_little(data, len(packed.tokens), None, packed.num_conversations))
        return Calibration(packed.tokens[order], packed.labels[order])
    texts = source_texts(data.source, "train") if source else read_file(path)
    bos = _bos(data.bos, loaded, "data.bos")
    length = data.seq_len - len(bos)
    needed = data.num_samples * length
    stream, num_texts = _token_stream(texts, source is not None and source.rows == "lines", loaded, data.source, needed)
    if len(stream) < needed:
        raise InputError(_too_little(data, len(stream) // length, len(stream), num_texts))
    return Calibration(_begun(stream.view(data.num_samples, length)[order], bos))


def _refuse_bos(data: DataConfig, reason: str) -> None:
    """Refuse ``data.bos`` for windows that are not cut from plain text."""
    if data.bos:
        raise InputError(f"data.bos is true, but {reason} (data.source: {data.source}); leave data.bos out")


def _check_count(key: str, num: int, length: int) -> None:
    """Refuse more tokens than memory can hold anywhere; ``key`` is the recipe key that asks for the windows."""
    if num * length > MOST_TOKENS:
        raise InputError(
            f"{key} is {num}: so many windows of {length} tokens are more than the {MOST_TOKENS} tokens that a run can "
            f"hold; lower it to {MOST_TOKENS // length} or less"
        )


def _holds(path: Path, what: Callable[[dict[str, Any]], bool], count: int = 1) -> bool:
    """Return whether one of the first ``count`` rows of a file is ``what`` is asked for."""
    return any(what(row) for _, row in islice(read_records(path), count))


def _with_pictures(data: DataConfig, loaded: LoadedModel, order: Tensor) -> Calibration:
    """Return windows with pictures, in the given order."""
    path = source_path(data)
    processor = load_processor(loaded.path, loaded.folder)
    found = pack_pictures(read_records(path), processor, data.num_samples, data.seq_len, path.parent)
    if len(found.tokens) < data.num_samples:
        raise InputError(_too_little(data, len(found.tokens), None, found.num_conversations))
    return Calibration(found.tokens[order], None, tuple(found.pictures[index] for index in order.tolist()))


def _too_little(data: DataConfig, num_windows: int, num_tokens: int | None, num_texts: int) -> str:
    if not num_texts:
        return f"data.source: {data.source} is empty: no text was found in it; give a file with text"
    advice = f"lower data.num_samples to {num_windows}, or " if num_windows else ""
    found = f"in {num_texts} conversation(s)" if num_tokens is None else f"({num_tokens} tokens in {num_texts} text(s))"
    return (
        f"data.source: {data.source} has too little text: {num_windows} window(s) of {data.seq_len} tokens were found "
        f"{found}, and {data.num_samples} are needed "
        f"({data.num_samples * data.seq_len} tokens); {advice}lower data.seq_len, or give more text"
    )


def _joined(rows: Iterable[str], size: int) -> Iterator[str]:
    """Join rows by two newlines, and yield the text in pieces of at least ``size`` characters."""
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


def _token_stream(
    texts: Iterator[str], joined: bool, loaded: LoadedModel, source: str, needed: int
) -> tuple[Tensor, int]:
    """Return ``needed`` tokens of texts of ``source``, in one row, and the number of texts that were read.

    All tokens are returned if there are fewer.
    """
    tokenizer = loaded.tokenizer
    adds_special = bool(tokenizer.num_special_tokens_to_add())
    end = [] if adds_special or joined or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    size = min(CHARACTERS_PER_BATCH, 5 * needed)  # a token is about four characters of English
    pieces = ([piece] for piece in _joined(texts, size)) if joined else _batches(texts, size)
    parts: list[Tensor] = []  # tensors: a list of all ids would take five times the memory
    num_tokens = num_texts = 0
    for batch in pieces:
        special = not (joined and num_texts)  # only the first piece begins a text
        place = f"data.source: {source}"
        encoded = tokenized(tokenizer, batch, place, add_special_tokens=special)["input_ids"]
        parts.append(torch.tensor([i for ids in encoded for i in (*ids, *end)], dtype=torch.int64))
        num_tokens += len(parts[-1])
        num_texts += len(batch)
        if num_tokens >= needed:
            break
    return torch.cat(parts)[:needed] if parts else torch.empty(0, dtype=torch.int64), num_texts


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield lists of texts of about ``size`` characters in all; texts of white space are left out."""
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


def perplexity_windows(
    name: str, loaded: LoadedModel, context: int, limit: int | None, seed: int, begin: bool = False
) -> Tensor:
    """Return windows ``[n, t]`` int64 for perplexity; ``t`` is ``context``, or the model's context if smaller.

    With ``begin``, the first of the ``t`` tokens is the BOS token, except in ``generated`` text.

    ``wikitext2``: the test split joined by two newlines and tokenized once, as the papers do, in disjoint windows; a
    last part that does not fill a window is left out. ``c4``: windows drawn at random from long documents
    (``drawn_windows.py``). ``generated``: text of ``loaded`` with another seed than that of calibration text.

    Raises:
        UnreachableError: the text is neither on this machine nor reachable on the hub.
        InputError: there is not one full window, or no BOS token.
    """
    length = min(context, loaded.max_length)
    if name == GENERATED:
        _check_count("eval.limit", limit or GENERATED_WINDOWS, length)
        return generated_tokens(loaded, limit or GENERATED_WINDOWS, length, evaluation_seed(seed))
    bos = _bos(begin, loaded, "eval.bos")
    length -= len(bos)
    found = c4_windows(loaded, length, limit) if name == C4 else _disjoint(name, loaded, length, limit)
    found = _begun(found, bos)
    check_ids(found, loaded, f"the text of {name}")
    return found


def _disjoint(name: str, loaded: LoadedModel, length: int, limit: int | None) -> Tensor:
    """Return consecutive windows ``[n, length]`` of the test split of ``name``, at most ``limit``."""
    text = "\n\n".join(source_texts(name, "test"))
    ids = torch.tensor(tokenized(loaded.tokenizer, text, name)["input_ids"], dtype=torch.int64)
    num_windows = len(ids) // length
    if not num_windows:
        raise InputError(f"{name} has only {len(ids)} tokens, less than one window of {length}; lower eval.context")
    return ids[: num_windows * length].view(num_windows, length)[: min(limit or num_windows, num_windows)]


def calibration_seed(seed: int) -> int:
    """Return the seed of generated calibration text, which is never one of :func:`evaluation_seed`."""
    return 2 * seed


def evaluation_seed(seed: int) -> int:
    """Return the seed of generated text for perplexity."""
    return 2 * seed + 1


def token_hash(tokens: Tensor, labels: Tensor | None = None, pictures: Sequence[Inputs] = ()) -> str:
    """Return the SHA-256 of the shape and the little-endian int64 bytes of ``tokens``, and of ``labels`` if given.

    The names, shapes and bytes of ``pictures`` are added in the order of their names.
    """
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    for each in (tokens,) if labels is None else (tokens, labels):
        digest.update(each.detach().cpu().to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    for window in pictures:
        for name, tensor in sorted(window.items()):
            digest.update(repr((name, tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
