"""Model cards, made from measured numbers only."""

from pathlib import Path

from huggingface_hub import ModelCardData

from qtool.reports.report import Report
from qtool.system.version import __version__


def loading_code(name: str) -> str:
    """Python that loads the native checkpoint in the folder ``name``."""
    return "\n".join(
        [
            "import qtool  # teaches transformers to read this folder; without it, loading stops at a size mismatch",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        ]
    )


def write(folder: Path, report: Report, manifest: str) -> None:
    """Write ``README.md`` of a native checkpoint; ``manifest`` is the name of the file that holds its recipe."""
    _write(
        folder,
        report.model,
        "transformers",
        [
            report.markdown().rstrip(),
            "",
            "## How to load it",
            "",
            "```python",
            loading_code(folder.name.removesuffix(".partial")),
            "```",
            "",
            "Weights stay packed in memory. `qtool export` writes it for other engines; "
            f"`{manifest}` holds the recipe.",
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
    differences: dict[str, float],
) -> None:
    """Write ``README.md`` of an export: how to load it, what to know, and what reading it back showed.

    ``base`` is the float model, ``label`` the grid, ``library`` and ``loading`` are what loads the format and how.
    """
    _write(
        folder,
        base,
        library,
        [
            f"# {base}, {label}, as {format}",
            "",
            *([loading, ""] if loading else []),
            *(f"* {note}." for note in notes),
            f"* Read back after writing: largest weight difference {differences['weight_difference']:.3g}, "
            f"largest logit difference {differences['logit_difference']:.3g} of the largest logit.",
            "",
            f"Exported by qtool {__version__} from integer codes; nothing was quantized again.",
        ],
    )


def _write(folder: Path, base: str, library: str, lines: list[str]) -> None:
    """Write the card: the header that the hub reads, then ``lines``."""
    is_hub_name = not base.startswith((".", "/", "~", "builtin:")) and not Path(base).exists()
    header = ModelCardData(base_model=base if is_hub_name else None, library_name=library, tags=["qtool"]).to_yaml()
    (folder / "README.md").write_text("\n".join(["---", header, "---", *lines]) + "\n", encoding="utf-8")
