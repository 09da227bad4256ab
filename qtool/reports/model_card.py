"""Model cards, made from measured numbers only."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from qtool.reports.document import as_markdown
from qtool.reports.report import Report
from qtool.system import reading
from qtool.system.errors import InputError
from qtool.system.printable import one_line, printable, redacted, shown
from qtool.system.version import __version__
from qtool.system.writing import write_text

HEADER = re.compile(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", re.S)  # the YAML header of a model card
# its lines with a licence; texts only, with or without quotes
LICENCE = re.compile(r"""^(license(?:_name|_link)?):[ \t]*["']?([\w.:/-][^\n"'#]*?)["']?[ \t]*$""", re.M)
# how to load a checkpoint that was made without the model's class
FREE_LOADING = (
    "It was made from the model's files alone (model.free). transformers loads it if it has a class whose linears are "
    "named as in these files; for other software, export it as compressed-tensors or dense."
)


def loading_code(name: str, multimodal: bool = False) -> str:
    """Return Python code that loads the native checkpoint in the folder ``name``."""
    model, text_to_tokens = (
        ("AutoModelForMultimodalLM", "AutoProcessor")
        if multimodal
        else (
            "AutoModelForCausalLM",
            "AutoTokenizer",
        )
    )
    text = printable(json.dumps(redacted(name), ensure_ascii=False))  # a string of Python too, whatever is in the name
    return "\n".join(
        [
            "import qtool  # lets transformers read this folder; without it, loading fails with a size mismatch",
            f"from transformers import {model}, {text_to_tokens}",
            "",
            f"model = {model}.from_pretrained({text})",
            f"{'processor' if multimodal else 'tokenizer'} = {text_to_tokens}.from_pretrained({text})",
        ]
    )


def write(folder: Path, report: Report, manifest: str, name: str) -> None:
    """Write ``README.md`` of a native checkpoint in ``folder``, which is or will be named ``name``.

    ``manifest`` is the name of the file with its recipe.
    """
    _write(
        folder,
        report.model,
        "transformers",
        report.licence,
        [
            report.markdown().rstrip(),
            "",
            "## How to load it",
            "",
            *([FREE_LOADING, ""] if report.lock is not None and report.lock.model.get("free") else []),
            "```python",
            loading_code(name, report.multimodal),
            "```",
            "",
            "The weights stay packed in memory. `qtool export` converts the checkpoint for other engines; "
            f"`{manifest}` contains the recipe.",
            f"Made by qtool {__version__}.",
        ],
    )


def write_export(
    folder: Path,
    *,
    base: str,
    label: str,
    format: str,
    library: str,
    loading: str,
    notes: list[str],
    differences: Mapping[str, float | None],
    licence: Mapping[str, str],
) -> None:
    """Write ``README.md`` of an export: how to load it, notes, and the differences found when it was read back.

    ``base`` is the float model, ``label`` the quantization grid, ``library`` the software that loads the format, and
    ``loading`` a text on how to load it; ``licence`` is what ``licence_of`` returned.
    """
    logits = differences["logit_difference"]
    compared = "logits not compared, since transformers has no class for the model"
    if logits is not None:
        compared = f"largest logit difference {logits:.3g} of the largest logit"
    _write(
        folder,
        base,
        library,
        licence,
        [
            f"# {as_markdown(one_line(f'{base}, {label}, as {format}'))}",
            "",
            *([shown(loading), ""] if loading else []),
            *(f"* {one_line(note)}." for note in notes),
            f"* Read back after writing: largest weight difference {differences['weight_difference']:.3g}, {compared}.",
            "",
            f"Exported by qtool {__version__} from integer codes, without quantizing again.",
        ],
    )


def licence_of(folder: Path) -> dict[str, str]:
    """Return the keys ``license``, ``license_name`` and ``license_link`` of the model card in ``folder``, if any."""
    try:
        text = reading.read_text(folder / "README.md")
    except (FileNotFoundError, InputError):
        return {}
    header = HEADER.match(text)
    return {} if header is None else dict(LICENCE.findall(header[1]))


def _write(folder: Path, base: str, library: str, licence: Mapping[str, str], lines: list[str]) -> None:
    """Write the card: the YAML header for the Hugging Face hub, then ``lines``."""
    is_hub_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", base, re.ASCII) and not Path(base).exists()
    data: dict[str, Any] = {"base_model": base if is_hub_name else None, **licence}
    header = ModelCardData(**data, library_name=library, tags=["qtool"]).to_yaml()
    write_text(folder / "README.md", "\n".join(["---", header, "---", *lines]) + "\n")
