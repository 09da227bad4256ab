"""What a model card carries over from that of the float model: licence, language, task and origin."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from pydantic import Field

from qtool.reports.records import Record
from qtool.system import progress
from qtool.system.errors import first_line
from qtool.system.printable import one_line
from qtool.system.reading import read_text

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?", re.ASCII)
IN_CACHE = re.compile(r"models--(.+)")  # folder of a model in the hub's cache; -- is the slash of its name
TEXTS = ("license", "license_name", "license_link", "pipeline_tag", "base_model_relation")
LISTS = ("language", "base_model")


class BaseCard(Record):
    """Keys of a model card's header, as the hub names them; what a card does not say is null or empty."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    base_model: tuple[str, ...] = Field((), description="Names on the hub.")
    base_model_relation: str | None = Field(None, description="quantized, finetune, adapter or merge.")

    def keys(self) -> dict[str, Any]:
        """Return the keys that are known, for the header of a card."""
        found = self.model_dump(mode="json", exclude_defaults=True)
        return {key: each[0] if isinstance(each, list) and len(each) == 1 else each for key, each in found.items()}


def base_card(folder: Path, name: str, *, quantized: bool = True) -> BaseCard:
    """Return what the card of a model made from the one in ``folder``, which the user called ``name``, carries over.

    ``base_model`` is that model, and the relation ``quantized``, if it has a name on the hub; else both are those of
    its own card. With ``quantized=False`` the new model is the same one in another format, and they are its own too.
    """
    card = BaseCard(**_header(folder))
    hub = hub_name(folder, name) if quantized else None
    return card if hub is None else card.model_copy(update={"base_model": (hub,), "base_model_relation": "quantized"})


def hub_name(folder: Path, name: str) -> str | None:
    """Return the name on the hub of the model in ``folder``, which the user called ``name``; ``None``: unknown."""
    for parent in folder.parents[:2]:  # models--owner--name/snapshots/revision
        if found := IN_CACHE.fullmatch(parent.name):
            return found[1].replace("--", "/")
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def _header(folder: Path) -> dict[str, Any]:
    """Return the known keys in the header of the card in ``folder``; none, and a note, if it cannot be read."""
    try:
        text = read_text(folder / "README.md")
        if not text.lstrip().startswith("---"):
            return {}  # no header; the library would log that
        data = vars(ModelCard(text, ignore_metadata_errors=True).data)
    except FileNotFoundError:
        return {}
    except Exception as error:  # a card is the text of others, and its parser raises errors of many kinds
        progress.note(
            f"{folder / 'README.md'} has no readable header, so no licence is carried over: {first_line(error)}"
        )
        return {}
    texts = {key: one_line(data[key]) for key in TEXTS if isinstance(data.get(key), str)}
    lists = {key: [data[key]] if isinstance(data.get(key), str) else data.get(key) for key in LISTS}
    kept = {
        key: each for key, each in lists.items() if isinstance(each, list) and all(isinstance(x, str) for x in each)
    }
    return texts | {key: tuple(map(one_line, each)) for key, each in kept.items()}
