"""The command line of every peer's program: `quantize` and `expand`, as `peers.py` calls them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def run(
    description: str | None,
    quantize: Callable[..., None],
    expand: Callable[..., None],
    more_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Call ``quantize`` or ``expand`` with the parsed arguments; ``more_options`` adds options to ``quantize``."""
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers(required=True)
    quantizing = commands.add_parser("quantize")
    quantizing.add_argument("model", type=Path)
    quantizing.add_argument("tokens", type=Path)
    quantizing.add_argument("output", type=Path)
    quantizing.add_argument("--num-bits", type=int, required=True)
    quantizing.add_argument("--group-size", type=int, required=True)
    more_options(quantizing)
    quantizing.set_defaults(function=quantize)
    expanding = commands.add_parser("expand")
    expanding.add_argument("folder", type=Path)
    expanding.add_argument("dense_file", type=Path)
    expanding.set_defaults(function=expand)
    arguments = vars(parser.parse_args())
    arguments.pop("function")(**arguments)
