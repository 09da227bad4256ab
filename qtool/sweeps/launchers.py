"""Launchers: run the commands of a sweep as processes on this machine, or as cluster jobs through submitit or Ray.

:func:`execute` runs a command, wherever that is; a cluster job is that call and nothing else. All machines must see the
same folders under the same paths.
"""

import json
import os
import signal
import subprocess
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import IO, Any, NamedTuple

from qtool.config.sweep import LauncherConfig
from qtool.system import progress

POLL = 2.0  # seconds between checks of the cluster's jobs
PATIENCE = 60.0  # seconds between asking a process to end and killing it
LAST_LINES = 5  # lines of the log that are shown if a failed command printed no error


class Command(NamedTuple):
    """A command, the file that gets its standard error, and additions to its environment."""

    arguments: list[str]
    log: Path
    environment: dict[str, str]


class Ended(NamedTuple):
    """Standard output of a command, and an error message (empty on success)."""

    output: str
    error: str


Ends = Generator[tuple[int, Ended], None, None]  # the index of each command and its end, as it ends


def execute(command: Command, running: "set[subprocess.Popen[bytes]] | None" = None) -> Ended:
    """Run a command to its end; while it runs, its process is in ``running``.

    The process holds a lock on its log. So if a command outlives its sweep, for instance after ``kill -9``, the next
    sweep waits for it and does not run the same command beside it.
    """
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with command.log.open("ab") as log:
        _own(log, command.log)
        log.truncate(0)
        process = subprocess.Popen(
            command.arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | command.environment,
        )
        (running := set() if running is None else running).add(process)
        try:
            output = process.communicate()[0].decode(errors="replace")
        finally:
            running.discard(process)
    return Ended(output, _error(process.returncode, output, command.log))


def settle(log: Path) -> None:
    """Wait until no process of an earlier sweep writes to ``log`` any more."""
    if log.exists():
        with log.open("ab") as opened:
            _own(opened, log)


def _own(log: IO[bytes], path: Path) -> None:
    """Lock an open log; the lock lasts while this process, or one that inherits the file, has it open."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock, so a process of an earlier sweep goes unnoticed
        return
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress.say(f"waiting for a process of an earlier sweep, which still writes to {path}")
        fcntl.flock(log, fcntl.LOCK_EX)
    except OSError:
        progress.note(f"cannot lock {path}: do not run two sweeps into this folder at the same time")


def _error(code: int, output: str, log: Path) -> str:
    if code == 0:
        return ""
    with suppress(ValueError, IndexError, KeyError, TypeError):
        return str(json.loads(output.strip().splitlines()[-1])["error"])
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (" (perhaps the system was out of memory)" if name == "SIGKILL" else "")
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
    return "\n".join(said) or f"ended with exit code {code}"


def launch(config: LauncherConfig, commands: Sequence[Command], jobs: int | None, folder: Path) -> Ends:
    """Run ``commands``, at most ``jobs`` at once, and yield the index and end of each as it ends.

    ``jobs=None`` runs one at a time on this machine, and all at once on a cluster. ``folder`` is for files of the
    cluster software. If the generator is closed early, running commands are ended and waiting ones are not started.
    """
    start = {"local": _local, "submitit": _submitit, "ray": _ray}[config.name]
    limit = jobs or (1 if config.name == "local" else max(len(commands), 1))
    yield from start(config, commands, limit, folder)


def _local(config: LauncherConfig, commands: Sequence[Command], jobs: int, folder: Path) -> Ends:
    running: set[subprocess.Popen[bytes]] = set()
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="cell")
    waiting: dict[Future[Ended], int] = {pool.submit(execute, each, running): i for i, each in enumerate(commands)}
    try:
        while waiting:
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(done), done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
        for process in list(running):
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
        pool.shutdown()


def _submitit(config: LauncherConfig, commands: Sequence[Command], jobs: int, folder: Path) -> Ends:
    import submitit

    executor = submitit.AutoExecutor(folder=folder, cluster=config.cluster)
    executor.update_parameters(**config.parameters)
    yield from _polled(
        commands,
        jobs,
        submit=lambda command: executor.submit(execute, command),
        is_done=lambda job: job.done(),
        result=lambda job: job.result(),
        cancel=lambda job: job.cancel(),
    )


def _ray(config: LauncherConfig, commands: Sequence[Command], jobs: int, folder: Path) -> Ends:
    import ray

    ray.init(address=config.address, ignore_reinit_error=True, log_to_driver=False)
    task = ray.remote(execute)
    task = task.options(**config.parameters) if config.parameters else task
    yield from _polled(
        commands,
        jobs,
        submit=task.remote,
        is_done=lambda job: bool(ray.wait([job], timeout=0)[0]),
        result=ray.get,
        cancel=ray.cancel,
    )


def _polled(commands: Sequence[Command], jobs: int, *, submit: Any, is_done: Any, result: Any, cancel: Any) -> Ends:
    """Keep ``jobs`` commands submitted; the four functions are the cluster's (``Any``, as is the type of its jobs)."""
    left = list(enumerate(commands))[::-1]
    submitted: dict[int, Any] = {}
    try:
        while left or submitted:
            while left and len(submitted) < jobs:
                index, command = left.pop()
                submitted[index] = submit(command)
            finished = [index for index, job in submitted.items() if is_done(job)]
            for index in finished:
                yield index, _collected(submitted.pop(index), result)
            if not finished:
                sleep(POLL)
    finally:
        for job in submitted.values():
            cancel(job)


def _collected(job: Any, result: Any) -> Ended:
    try:
        ended: Ended = result(job)
    except Exception as error:  # any: the node failed, the time limit was reached, the job was cancelled
        return Ended("", f"the cluster's job failed: {error}".strip())
    return ended
