"""``qtool verify``: its options, and what it prints."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.arguments import Folder, Json, Quiet, path
from qtool.cli.output import print_either, print_json, show_table
from qtool.cli.session import running, starting


def verify(
    folder: Folder,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="FOLDER",
            help="Compare the weights of an export with this checkpoint bit by bit, as other software reads them; or "
            "with the float model.",
            parser=path,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="NAME",
            help="Load an export in this engine, and compare logits and perplexity with torch's: transformers, mlx, "
            "llama.cpp, onnxruntime, vllm, sglang, gptqmodel or auto-round.",
        ),
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option(
            "--python", metavar="FILE", help="The Python of an environment with the engine or reader.", parser=path
        ),
    ] = None,
    text: Annotated[
        str, typer.Option("--text", metavar="NAME|FILE", help="The engine's text: built-in, wikitext2, or a file.")
    ] = "built-in",
    limit: Annotated[int, typer.Option("--limit", min=1, metavar="N", help="Windows of text. Default: 4.")] = 4,
    context: Annotated[
        int, typer.Option("--context", min=2, metavar="N", help="Tokens of a window. Default: 512.")
    ] = 512,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Check a folder's files, and an export by other software."""
    with starting(quiet):
        from qtool.pipelines import verify as pipeline
        from qtool.pipelines.export_manifest import EXPORT_MANIFEST
        from qtool.pipelines.verify_engine import Text
        from qtool.reports.verification import Verification
    with running(quiet, None):
        found: pipeline.Verified | Verification
        if against is None and engine is None and not (folder / EXPORT_MANIFEST).exists():
            found = pipeline.verify(folder)
        else:
            what = Text(text, limit, context)
            found = pipeline.verify_export(folder, against=against, engine=engine, python=python, text=what)
    if not isinstance(found, Verification):
        print_either({"path": str(folder), **found._asdict()}, f"{folder}: {found} are as they were written", as_json)
        return
    if as_json:
        print_json({**found.model_dump(mode="json"), "ok": found.ok})
    else:
        show_table(found)
    if not found.ok:
        for fault in found.faults():
            print(f"error: {folder}: {fault}", file=sys.stderr)
        raise typer.Exit(1)
