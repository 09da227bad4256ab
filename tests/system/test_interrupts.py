"""Signals end a process once, cleanly, whenever they come; each test runs a small process of its own."""

import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest

import qtool

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def run(body: str, tmp_path: Path, ignored: tuple[signal.Signals, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``body`` in a process with the signals handled; ``send(number)`` sends itself a signal."""
    begin = """
    import os, signal, sys, time
    from pathlib import Path
    from qtool.system import interrupts, progress, scratch
    def send(number=signal.SIGINT):
        os.kill(os.getpid(), number)
    interrupts.install()
    """

    def prepare() -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN if each in ignored else signal.SIG_DFL)

    root = str(Path(qtool.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(begin) + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        preexec_fn=partial(prepare),
        check=False,
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_interrupts_and_a_second_one_lets_the_clean_up_end(number: signal.Signals, tmp_path: Path) -> None:
    done = run(
        f"""
        try:
            send({int(number)})
            print("not interrupted")
        except KeyboardInterrupt:
            send({int(number)})
            print("cleaned up")
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleaned up\n", "")


def test_a_third_signal_ends_at_once_but_a_closing_terminal_may_send_several(tmp_path: Path) -> None:
    three = """
        try:
            send({0})
        except KeyboardInterrupt:
            send({0}); send({0})
            print("still here", flush=True)
        """
    ended = run(three.format("signal.SIGINT"), tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
    assert run(three.format("signal.SIGHUP"), tmp_path).stdout == "still here\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_from_the_start_stays_ignored(number: signal.Signals, tmp_path: Path) -> None:
    assert run(f"send({int(number)}); print('went on')", tmp_path, ignored=(number,)).stdout == "went on\n"


def test_a_signal_that_other_code_swallows_ends_the_next_task(tmp_path: Path) -> None:
    done = run(
        """
        try:
            send()
        except BaseException:
            pass
        try:
            for item in progress.track([1, 2], "items", 2):
                print(item)
        except KeyboardInterrupt:
            print("interrupted")
        """,
        tmp_path,
    )
    assert done.stdout == "interrupted\n"


def test_a_deferred_signal_interrupts_at_the_end_of_the_block(tmp_path: Path) -> None:
    done = run(
        """
        try:
            with interrupts.deferred():
                send()
                print("whole")
            print("not interrupted")
        except KeyboardInterrupt:
            with interrupts.deferred():
                print("cleaned up")
            print("once")
        """,
        tmp_path,
    )
    assert done.stdout == "whole\ncleaned up\nonce\n"


def test_after_the_work_signals_no_longer_interrupt(tmp_path: Path) -> None:
    assert run("interrupts.finish(); send(); send(); print('printed whole')", tmp_path).stdout == "printed whole\n"


@pytest.mark.parametrize("when", ["inside", "while it is removed"])
def test_a_temporary_folder_goes_whenever_the_signal_comes(when: str, tmp_path: Path) -> None:
    done = run(
        f"""
        import shutil
        remove = shutil.rmtree
        def interrupted(*args, **keys):
            send()
            return remove(*args, **keys)
        try:
            with scratch.temporary_folder(Path(".")) as folder:
                (folder / "file").touch()
                if {when == "inside"}:
                    send()
                shutil.rmtree = interrupted
        except KeyboardInterrupt:
            print("interrupted", os.listdir("."))
        """,
        tmp_path,
    )
    assert (done.stdout, done.stderr) == ("interrupted []\n", "")
