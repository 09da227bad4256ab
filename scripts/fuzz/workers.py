"""Runs of many inputs in worker processes, each under a limit of CPU time, and the count of how they ended.

An input is right (the command accepts it), refused (an error of qtool, which says what to do), or one of the faults: a
traceback, a message that says "bug in qtool", or more than ``CPU_SECONDS``. CPU time is measured and not wall time, so
that a busy machine makes no faults; a worker that waits, say for a FIFO, is ended after ``WALL_SECONDS``.
"""

import argparse
import multiprocessing
import multiprocessing.pool
import os
import resource
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import NamedTuple

CPU_SECONDS = 5.0  # limit of one input
WALL_SECONDS = 120.0  # patience with a worker that uses no CPU
MEMORY = 12 * 2**30  # bytes of address space of a worker
RIGHT, REFUSED, TRACEBACK, BUG, SLOW = "right", "refused", "tracebacks", '"bug in qtool"', "over 5 s of CPU"
FAULTS = (TRACEBACK, BUG, SLOW)

Try = Callable[[int], Callable[[], str]]  # makes the input of a number; the result runs it: RIGHT or REFUSED


class Ended(NamedTuple):
    """The end of one input: its number, one of the words above, and for a fault what was seen."""

    number: int
    how: str
    seen: str = ""


class BugError(Exception):
    """The code under test said that it has a bug; the message is what it said."""


class TooSlowError(BaseException):
    """The CPU time of an input is used up; no ``except Exception`` of the code under test may catch it."""


def arguments(count: int, what: str) -> argparse.Namespace:
    """Return the parsed command line: seed, count, first index, processes."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--seed", type=int, default=0, help="seed of all inputs")
    parser.add_argument("--count", type=int, default=count, help="number of inputs")
    parser.add_argument("--start", type=int, default=0, help="index of the first input, to run one again")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    return parser.parse_args()


def run(prepare: Callable[[Path], Try], indices: range, jobs: int = 1) -> Counter[str]:
    """Run the inputs, print each fault and a closing line, and return how many ended how.

    ``prepare`` is called once in each worker, with a folder of its own that is also the working folder.
    """
    counts: Counter[str] = Counter()
    parts = [indices[number::jobs] for number in range(jobs)]
    with multiprocessing.pool.ThreadPool(jobs) as threads:
        for ends in threads.imap_unordered(lambda part: list(_part(prepare, part)), parts):
            for ended in ends:
                counts[ended.how] += 1
    shown = ", ".join(f"{counts[how]} {how}" for how in (RIGHT, REFUSED, *FAULTS))
    print(f"{sum(counts.values())} inputs: {shown} (limit {CPU_SECONDS:g} CPU seconds each)")
    return counts


def _part(prepare: Callable[[Path], Try], indices: range) -> Iterator[Ended]:
    """Run the inputs of one worker after another; a worker that hangs or dies is replaced by the next."""
    left = list(indices)
    context = multiprocessing.get_context("fork")
    while left:
        here, there = context.Pipe()
        with tempfile.TemporaryDirectory() as folder:
            worker = context.Process(target=_work, args=(prepare, left, Path(folder), there))
            worker.start()
            there.close()
            try:
                here.recv()  # the worker is ready
                while left:
                    if not here.poll(WALL_SECONDS):
                        raise EOFError
                    ended: Ended = here.recv()
                    left.remove(ended.number)
                    yield _shown(ended)
            except EOFError:
                yield _shown(Ended(left.pop(0), SLOW, "the worker waits, or has died"))
            worker.kill()
            worker.join()


def _shown(ended: Ended) -> Ended:
    if ended.how in FAULTS:
        print(f"--- input {ended.number}: {ended.how}\n{ended.seen}", flush=True)
    return ended


def _work(prepare: Callable[[Path], Try], indices: list[int], folder: Path, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, _too_slow)
    os.chdir(folder)
    attempt = prepare(folder)
    pipe.send(None)
    for index in indices:
        pipe.send(_one(attempt, index))


def _one(attempt: Try, index: int) -> Ended:
    made = attempt(index)
    try:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            return Ended(index, made())
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except TooSlowError:
        return Ended(index, SLOW, traceback.format_exc()[:3000])
    except BugError as error:
        return Ended(index, BUG, str(error))
    except BaseException:  # any end is a result
        return Ended(index, TRACEBACK, traceback.format_exc()[-3000:])


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlowError
