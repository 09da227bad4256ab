"""Model cards, made from measured numbers only."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCardData

from qtool.config.engines import READS
from qtool.reports import model_index
from qtool.reports.base_card import BaseCard
from qtool.reports.document import Table, as_markdown, markdown_table
from qtool.reports.report import Report
from qtool.reports.verification import EngineCheck, ReaderCheck
from qtool.system.distribution import install
from qtool.system.printable import one_line, printable, redacted, shown
from qtool.system.reading import read_text
from qtool.system.version import __version__
from qtool.system.writing import write_text

# how to load a checkpoint that was made without the model's class
FREE_LOADING = (
    "It was made from the model's files alone (model.free). transformers loads it if it has a class whose linears are "
    "named as in these files; for other software, export it as compressed-tensors or dense."
)

HERE = (
    "Run the code in the folder of this file, or write that folder's path in place of the dot. From the hub, `hf "
    "download OWNER/NAME --local-dir FOLDER` makes such a folder."
)
# marks of the part of an export's card that qtool verify writes
BEGIN, END = "<!-- qtool verify: begin -->", "<!-- qtool verify: end -->"
SECTION = "## Load it with "  # heading of each engine in that part


class Way(NamedTuple):
    """A way to load an export, that was tried with folders of its format."""

    engine: str
    load: str
    """The command or the Python code; ``{folder}`` is the path of the folder."""
    language: str
    """console or python."""
    tried: str
    """The software, with its versions, with which it was tried."""
    note: str = ""


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
    task = "image-text-to-text" if report.multimodal else "text-generation"
    card = {"pipeline_tag": task, **report.base_card.keys()}
    found = model_index.results(report.shown())
    shared = report.model_copy(update={"recipe": None, "command": None})  # their paths are of one machine
    _write(
        folder,
        ModelCardData(
            **card,
            model_name=shown(name) if found else None,
            eval_results=found or None,
            library_name="transformers",
            quantized_by="qtool",
            tags=["qtool"],
        ),
        [
            shared.markdown().rstrip(),
            "",
            "## How to load it",
            "",
            *([FREE_LOADING, ""] if report.lock is not None and report.lock.model.get("free") else []),
            HERE,
            "",
            "```python",
            loading_code(".", report.multimodal),
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
    card: BaseCard,
    ways: Sequence[Way] = (),
    measured: Table | None = None,
) -> None:
    """Write ``README.md`` of an export: notes, the software that reads it, and what was compared after writing.

    ``base`` is the float model, ``label`` the quantization grid, ``library`` the software that loads the format,
    ``card`` what the checkpoint's card says of its origin, and ``measured`` the numbers of the checkpoint. ``ways``
    were tried with such folders; ``update_verified`` says which were tried with this one.
    """
    logits = differences["logit_difference"]
    compared = "logits not compared, since transformers has no class for the model"
    if logits is not None:
        compared = f"largest logit difference {logits:.3g} of the largest logit"
    numbers = [] if measured is None else ["Measured with the checkpoint that this was exported from:", ""]
    _write(
        folder,
        ModelCardData(**card.keys(), library_name=library, quantized_by="qtool", tags=["qtool"]),
        [
            f"# {as_markdown(one_line(f'{base}, {label}, as {format}'))}",
            "",
            *(f"* {one_line(note)}." for note in notes),
            f"* Read back after writing: largest weight difference {differences['weight_difference']:.3g}, {compared}.",
            "",
            *numbers,
            *([] if measured is None else [markdown_table(measured), ""]),
            *_readers(format, {way.engine for way in ways}),
            BEGIN,
            *_verified(None, (), [_untried(way) for way in ways]),
            END,
            "",
            f"Exported by qtool {__version__} from integer codes, without quantizing again.",
        ],
    )


def _readers(format: str, shown: Collection[str]) -> list[str]:
    """Return a list of the software that reads ``format``, and of how that is known, but for the engines ``shown``."""
    words = {
        "run": "tried by qtool with",
        "source": "as its source code says, of",
        "docs": "as its documentation says, of",
    }
    lines = []
    for row in READS:
        if row.format == format and row.engine not in shown:
            also = [each for each in row.packages if each not in ("qtool", row.engine)]
            name = f"{row.engine} with {' and '.join(also)}" if also else row.engine
            lines.append(f"* {name}, {words[row.how]} {row.versions}" + (f": {row.note}" if row.note else "") + ".")
    other = "Other software" if shown else "Software"
    return [f"{other} that reads {format}, if it reads these bits and groups:", "", *lines, ""] if lines else []


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
    begun, end, after = rest.partition(END)
    if not begin or not end:
        before, begun, after = f"{text.rstrip()}\n\n", "", "\n"
    done = {each.engine for each in engines}
    kept = [each.rstrip() for each in begun.split(f"\n{SECTION}")[1:] if each.partition("\n")[0] not in done]
    part = "\n".join([BEGIN, *_verified(against, engines, [SECTION + each for each in kept]), END])
    write_text(card, f"{before}{part}{after}")


def _verified(against: ReaderCheck | None, engines: Sequence[EngineCheck], others: Sequence[str]) -> list[str]:
    """Return the part of the card between its marks; ``others`` are sections of engines that were not tried here."""
    lines = []
    if against is not None and against.ok:
        lines += [f"* Weights as {against.by} reads them: {against.sentence()} ({against.date}).", ""]
    good = [each for each in engines if each.ok]
    if good or others:
        lines += [HERE, ""]
    for each in good:
        said = (
            f"Verified on {each.date} with {each.by}: logits differ from torch's with the same weights by "
            f"{each.logit_difference:.1e} (allowed: {each.logit_tolerance:g}), perplexity {each.perplexity:.4f} and "
            f"{each.torch_perplexity:.4f} ({each.text}, {each.windows} x {each.context} tokens)."
        )
        lines += [_section(each.engine, each.language, each.load, said), ""]
    if not good:
        lines += ["No engine has loaded this folder yet; `qtool verify FOLDER --engine NAME` tries one.", ""]
    for other in others:
        lines += [other, ""]
    return ["", *lines]


def _untried(way: Way) -> str:
    """Return the section of an engine that was tried with such folders, but not with this one."""
    note = f" Note: {way.note}." if way.note else ""
    said = f"Tried by qtool with {way.tried}, on other folders of this format.{note}"
    return _section(way.engine, way.language, way.load, said)


def _section(engine: str, language: str, load: str, said: str) -> str:
    code = load.replace("{folder}", ".")
    return "\n".join([f"{SECTION}{engine}", "", f"```{language}", code, "```", "", said])


def _write(folder: Path, data: ModelCardData, lines: list[str]) -> None:
    """Write the card: the YAML header for the Hugging Face hub, then ``lines``."""
    write_text(folder / "README.md", "\n".join(["---", data.to_yaml(), "---", *lines]) + "\n")
