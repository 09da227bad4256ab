"""A Hugging Face tokenizer as metadata of a GGUF file, or the reason why llama.cpp would read text differently.

llama.cpp splits text before it merges, by built-in rules that a file selects by name (``tokenizer.ggml.pre``); a name
that does not fit gives other tokens in silence. So the ways of splitting that are known to have a name are listed here,
and any other is refused. The tokens that a tokenizer puts around a text (BOS, EOS) are found by encoding one.
"""

import json
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from qtool.models.gguf_splits import SPLITS
from qtool.models.tokenizer import load_tokenizer
from qtool.system.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's types of tokens
SPACE = "\u2581"  # the character that SentencePiece writes for a space


def description(folder: Path) -> dict[str, Any]:
    """Return the content of ``tokenizer.json``, with the ids ``around`` every text and those of ``special`` tokens.

    Of a tokenizer like SentencePiece's also the reason why llama.cpp would merge otherwise (``unmerged``, ``None`` if
    there is none), and whether each run of line breaks that is a token is read as that token (``whole_runs``).

    Raises:
        InputError: there is no tokenizer, it cannot be loaded, or it has no ``tokenizer.json``.
    """
    stamp = tuple((file.name, file.stat().st_mtime_ns) for file in sorted(folder.glob("tokenizer*")))
    return _description(folder, stamp)


@lru_cache(maxsize=2)  # called when an export is checked and when it is written; the stamp detects changed files
def _description(folder: Path, stamp: object) -> dict[str, Any]:
    tokenizer: Any = load_tokenizer(str(folder), folder)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{folder}: the tokenizer has no tokenizer.json, which a GGUF file is made from")
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    bare, whole = (tokenizer.backend_tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    found["around"] = whole[:start], whole[start + len(bare) :]
    found["special"] = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    if found["model"].get("byte_fallback") and _spaces(found) is not None:
        found["unmerged"] = _unmerged(found)
        runs = {token: index for token, index in _ids(found).items() if set(token) == {"\n"}}
        encode = partial(tokenizer.backend_tokenizer.encode, add_special_tokens=False)
        found["whole_runs"] = all(encode(token).ids == [index] for token, index in runs.items())
    return found


def _split(step: dict[str, Any]) -> tuple[str, Any]:
    """Return a step of a pre-tokenizer as ``SPLITS`` names it."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, step.get("use_regex", True)
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "Punctuation":
        return kind, step["behavior"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return kind, step["pattern"].get("Regex")
    return kind, None


def _steps(found: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer: none, one, or those under the key ``inside`` of a sequence."""
    if found is None:
        return []
    return list(found[inside]) if found["type"] == "Sequence" else [found]


def kind_of(found: dict[str, Any]) -> tuple[str, str] | None:
    """Return ``tokenizer.ggml.model`` and ``tokenizer.ggml.pre`` of a tokenizer; ``None`` if llama.cpp has none."""
    model = found["model"]
    normalizers = [step["type"] for step in _steps(found["normalizer"], "normalizers")]
    if model["type"] != "BPE":
        return None
    if model.get("byte_fallback") and _spaces(found) is not None:
        return ("gemma4", "gemma4") if found["unmerged"] and _by_rank(found) else ("llama", "default")
    steps = tuple(_split(step) for step in _steps(found["pre_tokenizer"], "pretokenizers"))
    name = SPLITS.get((steps, bool(model.get("ignore_merges"))))
    return None if name is None or normalizers not in ([], ["NFC"]) else ("gpt2", name)


def _by_rank(found: dict[str, Any]) -> bool:
    """Return whether llama.cpp reads text with the rules of Gemma 4 as the tokenizer does, which puts BOS before it.

    They merge by rank as any BPE does, but lines and runs of line breaks each by itself, and such a run that is a token
    at once.
    """
    vocab, bos = found["model"]["vocab"], found["special"]["bos"]
    alone = all(set(token) == {"\n"} for token in vocab if "\n" in token)
    whole = all(f"<0x{byte:02X}>" in vocab for byte in range(256)) and not found["model"].get("ignore_merges")
    return not _spaces(found) and found["around"][0] == [bos] and alone and whole and bool(found["whole_runs"])


# Gemma's step, which finds no space after a normalizer has replaced all
AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}


def _without_defaults(step: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in step.items() if (key, value) != ("invert", False)}


def _spaces(found: dict[str, Any]) -> bool | None:
    """Return whether a tokenizer like SentencePiece's puts a space before a text; ``None`` for any other tokenizer."""
    normalizers = _steps(found["normalizer"], "normalizers")
    steps = _steps(found["pre_tokenizer"], "pretokenizers")
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not steps and normalizers == [{"type": "Prepend", "prepend": SPACE}, replaced]:
        return True
    if normalizers == [replaced] and [_without_defaults(step) for step in steps] in ([], [AT_SPACES]):
        return False
    if not normalizers and len(steps) == 1 and steps[0]["type"] == "Metaspace" and steps[0]["replacement"] == SPACE:
        return {"first": True, "always": True, "never": False}.get(steps[0]["prepend_scheme"])
    return None


PHI_3 = ("</s>", "<unk>", "<s>", "<|endoftext|>")  # tokens that llama.cpp looks up in models that are named phi-3


def model_name(folder: Path, model_type: str) -> str:
    """Return a name for the model of ``folder``, by which llama.cpp chooses if control tokens take spaces after them.

    It does if the name contains ``phi-3`` or ``phi3``: all control tokens but the last three of ``PHI_3``.
    """
    found = description(folder)
    takes = {token["content"] for token in found["added_tokens"] if token["rstrip"]} & set(PHI_3)
    return "phi-3" if takes == {"</s>"} and _ids(found).keys() >= set(PHI_3) else model_type.replace("phi3", "phi 3")


def unstripped(folder: Path) -> list[str]:
    """Return the added tokens that take the spaces beside them, which llama.cpp leaves in the text."""
    phi = model_name(folder, "") == "phi-3"
    tokens = [
        token for token in description(folder)["added_tokens"] if token["lstrip"] or (token["rstrip"] and not phi)
    ]
    return [token["content"] for token in tokens]


def composes(folder: Path) -> bool:
    """Return whether the tokenizer of ``folder`` composes characters (Unicode NFC), which llama.cpp does not do."""
    return "NFC" in [step["type"] for step in _steps(description(folder)["normalizer"], "normalizers")]


def refuses(folder: Path, size: int) -> str | None:
    """Return the reason why llama.cpp would read text differently, or an embedding of ``size`` rows is too small.

    A tokenizer that cannot be loaded or has no ``tokenizer.json`` is one.
    """
    try:
        found = description(folder)
    except InputError as error:
        return str(error)
    if (highest := max(_ids(found).values())) >= size:
        return (
            f"its tokenizer has {highest + 1} tokens, and its embedding {size} rows; "
            "use the tokenizer that the model was trained with"
        )
    if kind_of(found) is None:
        return (
            "its tokenizer prepares text in a way that has no known name in llama.cpp, which would read other tokens; "
            f"known are byte-level BPE as in {', '.join(SPLITS.values())}, and SentencePiece's "
            "BPE; export dense instead"
        )
    before, after = found["around"]
    special = found["special"]
    if before not in ([], [special["bos"]]) or after not in ([], [special["eos"]]):
        return "its tokenizer puts more around a text than BOS and EOS, which GGUF cannot express; export dense instead"
    return found["unmerged"] if kind_of(found) == ("llama", "default") else None


def _unmerged(found: dict[str, Any]) -> str | None:
    """Return the reason why llama.cpp would merge otherwise than a tokenizer like SentencePiece's, or ``None``.

    llama.cpp merges any two tokens that make a token, by a score of that token.
    """
    vocab = found["model"]["vocab"]
    pairs = [tuple(pair if isinstance(pair, list) else pair.split(" ")) for pair in found["model"]["merges"]]
    made = [vocab["".join(pair)] for pair in pairs]
    if made != sorted(made):
        return (
            "its tokenizer's merges are not in the order of the tokens that they make, which llama.cpp relies on; "
            "export dense instead"
        )
    known, added = set(pairs), {token["content"] for token in found["added_tokens"]}
    # added tokens are found before texts are merged, but not where the normalizer makes them of spaces
    for token in vocab.keys() - added | {token for token in added if SPACE in token}:
        for at in range(1, len(token)):
            pair = token[:at], token[at:]
            if pair[0] in vocab and pair[1] in vocab and pair not in known:
                return (
                    f"its tokenizer does not merge {pair[0]!r} and {pair[1]!r}, and llama.cpp would, because it has "
                    f"{token!r}; export dense instead"
                )
    return None


def _ids(found: dict[str, Any]) -> dict[str, int]:
    return {**found["model"]["vocab"], **{added["content"]: added["id"] for added in found["added_tokens"]}}


def vocabulary(found: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return every token and its type, by id; rows of the embedding without a token get an unused one."""
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    ids = _ids(found)
    for token, index in ids.items():
        tokens[index], kinds[index] = token, NORMAL
    if found["model"].get("byte_fallback"):
        for index in (ids[f"<0x{byte:02X}>"] for byte in range(256) if f"<0x{byte:02X}>" in ids):
            kinds[index] = BYTE
    for added in found["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = ids.get(found["model"].get("unk_token") or "")
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    return tokens, kinds


def add(writer: Any, folder: Path, size: int) -> None:  # Any: the gguf package is optional
    """Write the tokenizer of ``folder`` for an embedding of ``size`` rows to ``writer``, a ``gguf.GGUFWriter``."""
    import gguf

    found = description(folder)
    kind = kind_of(found)
    assert kind is not None
    tokens, kinds = vocabulary(found, size)
    writer.add_tokenizer_model(kind[0])
    writer.add_tokenizer_pre(kind[1])
    writer.add_token_list(tokens)
    if kind[0] == "llama":
        writer.add_token_scores([-float(index) for index in range(size)])
        writer.add_add_space_prefix(bool(_spaces(found)))
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=kind[0] != "llama", n_vocab=size)
    before, after = found["around"]
    special.add_special_token |= {"bos": bool(before), "eos": bool(after)}
    special.add_to_gguf(writer, quiet=True)
