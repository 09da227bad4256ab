"""Model cards, made from measured numbers only."""

from pathlib import Path

from qtool import __version__
from qtool.checkpoints.native import MANIFEST, Source
from qtool.config.sections import ExportConfig
from qtool.reports.report import Report

LOADING = {
    "dense": "Any software that reads Hugging Face folders loads it; nothing of qtool is needed.",
    "gptq": "Load it with `transformers` and `gptqmodel` (or `auto-round`) installed; vLLM and SGLang read 4 and 8 "
    "bits when symmetric.",
    "auto-round": "Load it with `transformers` and `auto-round` installed.",
    "mlx": "Load it with `mlx-lm`, on an Apple machine or any other that has MLX.",
    "gguf": "Load `model.gguf` with llama.cpp, or with software built on it.",
    "compressed-tensors": "Load it with vLLM, or with `transformers` and `compressed-tensors` installed.",
}


LIBRARIES = {"mlx": "mlx", "gguf": "gguf"}  # where it is not transformers


def _header(base: str, library: str = "transformers") -> list[str]:
    is_hub_name = not base.startswith((".", "/", "~", "builtin:")) and not Path(base).exists()
    return [
        "---",
        *([f"base_model: {base}"] if is_hub_name else []),
        f"library_name: {library}",
        "tags: [qtool]",
        "---",
    ]


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


def how_to_load(format_: str) -> str:
    """Which software reads an export of that format; empty where we have not tried any."""
    return LOADING.get(format_.removesuffix("-v2"), "")


def write(folder: Path, report: Report) -> None:
    """``README.md`` of a native checkpoint."""
    lines = [
        *_header(report.model),
        report.markdown().rstrip(),
        "",
        "## How to load it",
        "",
        "```python",
        loading_code(folder.name.removesuffix(".partial")),
        "```",
        "",
        f"Weights stay packed in memory. `qtool export` writes it for other engines; `{MANIFEST}` holds the recipe.",
        f"Made by qtool {__version__}.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_export(
    folder: Path, source: Source, config: ExportConfig, notes: list[str], differences: dict[str, float]
) -> None:
    """``README.md`` of an export: how to load it, what to know, and what reading it back showed."""
    manifest = source.manifest
    base = str(manifest["recipe"]["model"]["path"]) if manifest else source.folder.name
    how = how_to_load(config.format)
    lines = [
        *_header(base, LIBRARIES.get(config.format, "transformers")),
        f"# {base}, {manifest.get('label', 'quantized')}, as {config.format}",
        "",
        *([how, ""] if how else []),
        *(f"* {note}." for note in notes),
        f"* Read back after writing: largest weight difference {differences['weight_difference']:.3g}, "
        f"largest logit difference {differences['logit_difference']:.3g} of the largest logit.",
        "",
        f"Exported by qtool {__version__} from integer codes; nothing was quantized again.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
