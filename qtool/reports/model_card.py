"""Model cards, made from measured numbers only."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from qtool.config.engines import READS
from qtool.reports.document import as_markdown
from qtool.reports.report import Report
from qtool.reports.verification import EngineCheck, ReaderCheck
from qtool.system.distribution import install
from qtool.system.errors import InputError
from qtool.system.printable import one_line, printable, redacted
from qtool.system.reading import read_text
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

# marks of the part of an export's card that qtool verify writes
BEGIN, END = "<!-- qtool verify: begin -->", "<!-- qtool verify: end -->"


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
            f"# {install()}",
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
    notes: list[str],
    differences: Mapping[str, float | None],
    licence: Mapping[str, str],
) -> None:
    """Write ``README.md`` of an export: notes, the software that reads it, and what was compared after writing.

    ``base`` is the float model, ``label`` the quantization grid, and ``library`` the software that loads the format. No
    way of loading it is named before it was tried: ``update_verified`` adds those. ``licence`` is what ``licence_of``
    returned.
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
            *(f"* {one_line(note)}." for note in notes),
            f"* Read back after writing: largest weight difference {differences['weight_difference']:.3g}, {compared}.",
            "",
            *_readers(format),
            BEGIN,
            *_verified(None, ()),
            END,
            "",
            f"Exported by qtool {__version__} from integer codes, without quantizing again.",
        ],
    )


def licence_of(folder: Path) -> dict[str, str]:
    """Return the keys ``license``, ``license_name`` and ``license_link`` of the model card in ``folder``, if any."""
    try:
        text = read_text(folder / "README.md")
    except (FileNotFoundError, InputError):
        return {}
    header = HEADER.match(text)
    return {} if header is None else dict(LICENCE.findall(header[1]))


def _readers(format: str) -> list[str]:
    """Return a list of the software that reads ``format``, and of how that is known."""
    words = {
        "run": "tried by qtool with",
        "source": "as its source code says, of",
        "docs": "as its documentation says, of",
    }
    lines = []
    for row in READS:
        if row.format == format:
            also = [each for each in row.packages if each not in ("qtool", row.engine)]
            name = f"{row.engine} with {' and '.join(also)}" if also else row.engine
            lines.append(f"* {name}, {words[row.how]} {row.versions}" + (f": {row.note}" if row.note else "") + ".")
    return [f"Software that reads {format}, if it reads these bits and groups:", "", *lines, ""] if lines else []


def update_verified(folder: Path, against: ReaderCheck | None, engines: Sequence[EngineCheck]) -> None:
    """Write what was verified of an export into its model card; without a card, do nothing.

    Only the part between two marks is changed, or added at the end: the rest may have been edited.
    """
    card = folder / "README.md"
    try:
        text = read_text(card)
    except FileNotFoundError:
        return
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        before, after = f"{text.rstrip()}\n\n", "\n"
    part = "\n".join([BEGIN, *_verified(against, engines), END])
    write_text(card, f"{before}{part}{after}")


def _verified(against: ReaderCheck | None, engines: Sequence[EngineCheck]) -> list[str]:
    """Return the part of the card between its marks."""
    lines = []
    if against is not None and against.ok:
        lines += [f"* Weights as {against.by} reads them: {against.sentence()} ({against.date}).", ""]
    good = [each for each in engines if each.ok]
    for each in good:
        lines += [
            f"## Load it with {each.engine}",
            "",
            f"```{each.language}",
            each.load.replace("{folder}", "."),
            "```",
            "",
            f"Verified on {each.date} with {each.by}: logits differ from torch's with the same weights by "
            f"{each.logit_difference:.1e} (allowed: {each.logit_tolerance:g}), perplexity {each.perplexity:.4f} and "
            f"{each.torch_perplexity:.4f} ({each.text}, {each.windows} x {each.context} tokens).",
            "",
        ]
    if not good:
        lines += ["No engine has loaded this folder yet; `qtool verify FOLDER --engine NAME` tries one.", ""]
    return ["", *lines]


def _write(folder: Path, base: str, library: str, licence: Mapping[str, str], lines: list[str]) -> None:
    """Write the card: the YAML header for the Hugging Face hub, then ``lines``."""
    is_hub_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", base, re.ASCII) and not Path(base).exists()
    data: dict[str, Any] = {"base_model": base if is_hub_name else None, **licence}
    header = ModelCardData(**data, library_name=library, tags=["qtool"]).to_yaml()
    write_text(folder / "README.md", "\n".join(["---", header, "---", *lines]) + "\n")
