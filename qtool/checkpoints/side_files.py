"""The files that a model folder has beside its config and weights, copied byte for byte into every folder made of it.

They are the tokenizer, chat templates, processors of images and sound, the generation config, and the licence with
its notices, known by their names: a folder may hold anything else, which is nobody's to copy. A link is followed inside
the folder, and into the hub's cache of the same model, where every file is a link. Any other link is refused: the file
that it leads to may be private, and would be published with the checkpoint.
"""

import re
from collections.abc import Collection
from pathlib import Path

from qtool.models.folders import belongs
from qtool.system.errors import InputError
from qtool.system.reading import read_bytes

GENERATION = ("generation_config.json",)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",  # SentencePiece, under several names
    "tokenizer.model.v*",  # Mistral
    "*.tiktoken",
    "*.spm",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "normalizer.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "chat_templates/*.jinja",
)
PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
PATTERNS = (*GENERATION, *TOKENIZER, *PROCESSOR)  # patterns of the names of the files that readers compute with
# names of the licence and what must go with it, of any case
LEGAL = re.compile(
    r"((MODEL|THIRD[-_]PARTY)[-_])?(LICEN[CS]ES?|NOTICES?|COPYING|COPYRIGHT|(ACCEPTABLE_)?USE_POLICY)"
    r"([-_](MODEL|CODE|DATA|WEIGHTS|AGREEMENT|APACHE|MIT))?(\.(txt|md|rst|html|pdf))?",
    re.IGNORECASE,
)
# patterns of the files whose hashes a manifest has: all that a reader computes with
HASHED = ("*.safetensors", "config.json", "model.safetensors.index.json", *PATTERNS)


def names(folder: Path) -> list[str]:
    """Return the names of such files of ``folder``, relative to it."""
    found = {file for pattern in PATTERNS for file in folder.glob(pattern) if not file.is_dir()}
    found |= {file for file in folder.iterdir() if LEGAL.fullmatch(file.name) and not file.is_dir()}
    return sorted(file.relative_to(folder).as_posix() for file in found)


def copy(folder: Path, out: Path, *, any_link: bool = False) -> Collection[str]:
    """Copy such files of ``folder`` into ``out``; return their names.

    With ``any_link`` links are followed wherever they lead: for a folder that nobody else sees.

    Raises:
        InputError: one is no regular file, is too large for such a file, or is a link that leads elsewhere.
    """
    copied = names(folder)
    for name in copied:
        file = folder / name
        if not any_link and not belongs(file.resolve(), folder.resolve()):
            raise InputError(
                f"{file} is a link to {file.resolve()}, which is outside the model's folder and so is not copied into "
                "another one; put the file itself in the place of the link"
            )
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(read_bytes(file))
    return copied
