"""Run the command line: exit codes, error messages, interrupts."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from qtool.cli.app import app
from qtool.cli.output import explain_error, fitted, json_text
from qtool.cli.streams import Guarded, guarded
from qtool.system import distributed, interrupts


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    with guarded() as (out, err):
        try:
            code = _run(args)
        except (Exception, KeyboardInterrupt) as error:
            interrupts.finish()
            code = _fail(error, args, out)
        out.flush()
        code = _unprinted(out, code)
        err.flush()
    return code


def _run(args: Sequence[str]) -> int:
    command: Callable[..., Any] = typer.main.get_command(app).main
    code = command(args or ["--help"], prog_name="qtool", standalone_mode=False)
    if code == interrupts.EXIT_CODE:  # typer turns Ctrl-C into this
        raise KeyboardInterrupt
    return (code if isinstance(code, int) else 0) if args else 2


def _fail(error: BaseException, args: Sequence[str], out: Guarded) -> int:
    """Print why the command ended, and return its exit code."""
    kind, code, message = explain_error(error)
    if os.environ.get("QTOOL_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    if code == 2 and not distributed.is_first():
        return code  # rank 0 prints the same message
    said = f"error: {message}" if kind != "interrupted" else message
    print(fitted(said, sys.stderr), file=sys.stderr)
    if context := getattr(error, "ctx", None):  # only a usage error has one
        print(f"{context.get_usage()}\nSee: {context.command_path} --help", file=sys.stderr)
    if "--json" in args and not out.written:
        print(json_text({"error": message, "kind": kind, "exit_code": code}))
    return code


def _unprinted(out: Guarded, code: int) -> int:
    """Return the exit code, which is not 0 if standard output is closed or full, and say so.

    A reader that left (``| head``) has read what it wanted: the exit code says how the work ended.
    """
    if out.fault is None or isinstance(out.fault, BrokenPipeError):
        return code
    print(
        f"error: standard output cannot be written ({out.fault.strerror}), so the result was not printed; files "
        "that the command wrote are complete"
        if not code
        else f"note: standard output cannot be written ({out.fault.strerror})",
        file=sys.stderr,
    )
    return code or 1
