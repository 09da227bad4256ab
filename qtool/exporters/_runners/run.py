"""Open a folder in one engine, and write what it computes to standard output: weights, logits, tokens of a text.

Run by the Python of the engine's environment, which needs numpy and the engine:

    python run.py RUNNER FOLDER [--needs PACKAGE ...] [--weights] [--tokens FILE.npy] [--texts FILE.json]
        [--float32]

RUNNER is a file beside this one, without ``.py``. Output is a sequence of records: a line of JSON, and where it has a
``shape``, the bytes of a float32 array. The first record has the versions of PACKAGEs; if one is not
installed it is the only one, and names it. All that engines print goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import IO, Any

sys.path.pop(0)  # this folder, where files have the names of packages
import numpy as np

PACKAGE = "qtool_runners"  # of the files in this folder


def main() -> None:
    """Do what the command line asks for."""
    args = _arguments()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    versions: dict[str, str] = {}
    for package in args.needs:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            _write(out, {"missing": package})
            return
    _write(out, {"python": platform.python_version(), "versions": versions})
    runner = _runner(args.runner)
    if args.weights:
        for name, array in runner.weights(args.folder):
            _write(out, {"weight": name}, array)
    options = {"float32": True} if args.float32 else {}
    model = runner.load(args.folder, **options) if args.tokens or args.texts else None
    if args.tokens:
        for index, tokens in enumerate(np.load(args.tokens)):
            _write(out, {"logits": index}, runner.logits(model, tokens))
    reads = getattr(runner, "text_tokens", None)
    for index, text in enumerate(json.loads(args.texts.read_text(encoding="utf-8")) if args.texts else ()):
        _write(out, {"text": index, "tokens": None if reads is None else list(map(int, reads(model, text)))})
    _write(out, {"done": True})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runner", help="a file beside this one, without .py")
    parser.add_argument("folder", type=Path, help="the folder of the export")
    parser.add_argument("--needs", nargs="*", default=[], metavar="PACKAGE", help="packages that must be installed")
    parser.add_argument("--weights", action="store_true", help="write the weight of each packed linear")
    parser.add_argument("--tokens", type=Path, metavar="FILE", help="a .npy of tokens [n, t]: write their logits")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="a JSON list of texts: write the engine's tokens")
    parser.add_argument("--float32", action="store_true", help="round no inputs, of an engine that does (llama.cpp)")
    return parser.parse_args()


def _runner(name: str) -> Any:
    """Import the file ``name`` beside this one, in a package whose name no other has."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules[PACKAGE] = package
    return import_module(f"{PACKAGE}.{name}")


def _write(out: IO[bytes], record: dict[str, Any], array: Any = None) -> None:
    found = None if array is None else np.ascontiguousarray(array, dtype="<f4")
    out.write(json.dumps(record | {"shape": None if found is None else found.shape}).encode() + b"\n")
    if found is not None:
        out.write(found.data)
    out.flush()


if __name__ == "__main__":
    main()
