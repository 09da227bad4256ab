"""On a terminal each finished task has one line, in order, and nothing of the running tasks stays."""

import io
import logging
import re
import sys
import threading
from contextlib import redirect_stderr
from pathlib import Path
from typing import TextIO, cast

import pytest
from helpers.terminals import Program, Terminal
from rich.console import Console

from qtool.cli import live_display
from qtool.cli.streams import Guarded
from qtool.system import progress

SIZES = [(80, 24), (120, 40)]
TIME = re.compile(r"  \d+\.\d s$")


def shown(work: str, columns: int = 80, rows: int = 24) -> list[str]:
    """Return the lines of a terminal on which ``work`` was written."""
    terminal = Terminal(columns, rows)
    terminal.feed(work.replace("\n", "\r\n").encode())
    return [TIME.sub("", line) for line in terminal.lines()]


def console(file: io.StringIO, columns: int = 80, rows: int = 24) -> Console:
    return Console(file=file, force_terminal=True, width=columns, height=rows)


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_every_finished_task_has_one_line_whenever_the_display_is_refreshed(
    columns: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_display, "REFRESH_SECONDS", 0.0005)
    screen = io.StringIO()
    expected = []
    with progress.use(live_display.Live(console(screen, columns, rows))), progress.stage("evaluating"):
        for task in range(8):
            with progress.stage(f"task {task}"):
                for _ in progress.track(range(3), "requests", 3):
                    with progress.stage("a step inside an item"):
                        pass
            progress.note(f"note {task}")
            print(f"a library says {task}", file=sys.stderr)
            expected += [f"    done  requests  3/3", f"  done  task {task}", f"note: note {task}"]  # noqa: F541
            expected += [f"a library says {task}"]
    assert shown(screen.getvalue(), columns, rows) == [*expected, "done  evaluating"]


def test_titles_wider_than_the_terminal_stay_in_their_line() -> None:
    screen = io.StringIO()
    name = "/a/very/long/folder" * 8
    live = live_display.Live(console(screen))
    with progress.use(live), progress.stage(f"writing {name}"), progress.stage(f"reading {name}"):
        pass
    lines = shown(screen.getvalue())
    assert [line[:26] for line in lines] == ["  done  reading /a/very/lo", "done  writing /a/very/long"]
    assert all(len(line) <= 80 and line.endswith("…") for line in lines)


def test_texts_of_others_reach_the_terminal_escaped() -> None:
    screen = io.StringIO()
    with progress.use(live_display.Live(console(screen))), progress.stage("loading \x1b[2J\nx"):
        progress.note("[red]\x9b31m http://u:secret@h")
        print("\x1b]0;owned\x07", file=sys.stderr)
        print("no end", file=sys.stderr, end="")
    assert shown(screen.getvalue()) == [
        r"note: [red]\x9b31m http://***@h",
        r"\x1b]0;owned\x07",
        r"done  loading \x1b[2J\nx",
        "no end",
    ]


def test_a_logger_that_knew_standard_error_before_prints_above_the_running_tasks() -> None:
    screen, errors = io.StringIO(), io.StringIO()
    with redirect_stderr(cast(TextIO, Guarded(errors))):
        handler = logging.StreamHandler()
        with progress.use(live_display.Live(console(screen))), progress.stage("loading"):
            handler.emit(logging.makeLogRecord({"msg": "a library warns"}))
        handler.emit(logging.makeLogRecord({"msg": "afterwards"}))
    assert shown(screen.getvalue()) == ["a library warns", "done  loading"]
    assert errors.getvalue() == "afterwards\n"


def test_the_display_ends_with_its_thread_and_gives_standard_error_back() -> None:
    before, threads = sys.stderr, threading.active_count()
    with progress.use(live_display.Live(console(io.StringIO()))):
        assert sys.stderr is not before
    assert sys.stderr is before
    assert threading.active_count() == threads


@pytest.mark.slow
@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_a_run_with_evaluation_leaves_one_line_for_each_task(columns: int, rows: int, tmp_path: Path) -> None:
    changes = [
        "data.num_samples=8",
        "data.seq_len=128",
        "eval.tasks=[generated, kl]",
        "eval.limit=2",
        "eval.context=64",
    ]
    args = ["ptq", "quickstart", *(part for change in changes for part in ("--set", change))]
    program = Program(Terminal(columns, rows), args, tmp_path)
    program.show()
    assert program.wait() == 0
    lines = program.terminal.lines()
    end = next(index for index, line in enumerate(lines) if line.startswith("done  evaluating"))
    assert [TIME.sub("", line) for line in lines[: end + 1] if line.lstrip().startswith("done")] == [
        "done  loading builtin:wiki-llama-3m",
        "  done  generating text, tokens  1016/1016",
        "done  reading calibration text: generated",
        "  done  quantizing embeddings  1/1",
        "  done  quantizing blocks  4/4",
        "done  quantizing with gptq, w4g64, embedding w8pc",
        "done  writing out/quickstart",
        "  done  generating text, tokens  126/126",
        "  done  reading generated  1/1",
        "    done  tokens  45/45",
        "    done  tokens  45/45",
        "  done  continuing 3 prompts",
        "done  evaluating",
    ]
    others = " ".join(line for line in lines[: end + 1] if not line.lstrip().startswith("done"))
    assert others.startswith("expected: 2 MB of weights (float: 7 MB); ")
    assert others.endswith("out/quickstart is complete; it is evaluated next")
    assert lines[end + 1] == "builtin:wiki-llama-3m, gptq w4g64, embedding w8pc"
    assert not any("━" in line or "peak " in line for line in lines if not line.startswith("  peak memory:"))


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_keeps_its_state(tmp_path: Path) -> None:
    program = Program(Terminal(80, 24), ["ptq", "quickstart", "--set", "data.seq_len=256"], tmp_path)
    program.show(until=lambda: any("quantizing blocks" in line and "1/4" in line for line in program.terminal.lines()))
    program.hang_up()
    assert program.wait() == 130
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"quickstart.partial"}
    assert (tmp_path / "out" / "quickstart.partial" / "state").is_dir()
