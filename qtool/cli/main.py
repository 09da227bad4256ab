"""Run the command line: exit codes, error messages, interrupts."""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import typer

from qtool.cli.app import app
from qtool.cli.output import explain_error
from qtool.cli.session import terminate
from qtool.system import distributed


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    command: Callable[..., Any] = typer.main.get_command(app).main
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, terminate)
    try:
        code = command(args or ["--help"], prog_name="qtool", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # typer turns Ctrl-C into this
            raise KeyboardInterrupt
        return (code if isinstance(code, int) else 0) if args else 2
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:
        kind, code, message = explain_error(error)
        if os.environ.get("QTOOL_DEBUG") == "1":
            import traceback

            traceback.print_exception(error)
        if code == 2 and not distributed.is_first():
            return code  # rank 0 prints the same message
        print(f"error: {message}" if kind != "interrupted" else message, file=sys.stderr)
        if context := getattr(error, "ctx", None):  # only a usage error has one
            print(f"{context.get_usage()}\nSee: {context.command_path} --help", file=sys.stderr)
        if "--json" in args:
            print(json.dumps({"error": message, "kind": kind, "exit_code": code}))
        return code
