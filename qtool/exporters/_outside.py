"""Other software, run on a written folder: its Python is started with ``_runners/run.py``, and its results are read.

An engine may need an environment of its own. Its Python is given, or named by a variable such as ``QTOOL_MLX_PYTHON``,
or is the one that runs qtool. Weights and logits come through a pipe one at a time, so that memory does not grow with
their number.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qtool.system.errors import InputError, RunError

RUN = Path(__file__).with_name("_runners") / "run.py"
LAST_LINES = 5  # lines of the standard error of an engine that failed which a message shows


class Runner(NamedTuple):
    """A program below ``_runners``, and what it needs."""

    file: str
    """Its name, without ``.py``."""
    packages: tuple[str, ...]
    """Packages that must be installed in its environment; the first gives its name to the environment's variable."""
    install: str = ""
    """Arguments of ``pip install`` that install it; empty: its packages."""

    @property
    def how_to_install(self) -> str:
        """The command that installs its packages."""
        return f"pip install {self.install or ' '.join(self.packages)}"


class Record(NamedTuple):
    """A record of the output of ``run.py``."""

    keys: dict[str, Any]
    array: NDArray[np.float32] | None


def variable(name: str) -> str:
    """Return the name of the environment variable that names the Python of an engine or a reader."""
    return f"QTOOL_{re.sub('[^A-Z0-9]', '_', name.upper())}_PYTHON"


def python_for(name: str, given: Path | None) -> Path:
    """Return the Python that runs an engine or a reader: the one ``given``, that of its variable, or this one.

    Raises:
        InputError: there is no such file.
    """
    named = os.environ.get(variable(name))
    found = given or (Path(named) if named else Path(sys.executable))
    if not found.is_file():
        what = "--python" if given else variable(name)
        raise InputError(f"{what} names {found}, which is no file; give the Python of an environment with {name}")
    return found


def versions(runner: Runner, python: Path) -> dict[str, str] | None:
    """Return the versions of the packages that ``runner`` needs, or ``None`` if one is not installed."""
    if _is_this(python):
        try:
            return {package: metadata.version(package) for package in runner.packages}
        except metadata.PackageNotFoundError:
            return None
    code = "import json, sys; from importlib.metadata import version; print(json.dumps([*map(version, sys.argv[1:])]))"
    command = [str(python), "-c", code, *runner.packages]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(python), check=False)
    if done.returncode:
        return None
    return dict(zip(runner.packages, json.loads(done.stdout), strict=True))


@contextmanager
def running(
    name: str, runner: Runner, folder: Path, python: Path, *options: str
) -> Iterator[tuple[dict[str, Any], Iterator[Record]]]:
    """Run ``runner`` on ``folder``; give the versions that it found, and its records one by one.

    ``name`` is that of the engine or reader, for messages.

    Raises:
        InputError: a package that it needs is not installed; the message says how to install it.
        RunError: it failed; the message ends in its last lines.
    """
    command = [str(python), str(RUN), runner.file, str(folder.absolute()), "--needs", *runner.packages, *options]
    with tempfile.TemporaryFile() as errors:
        started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=_environment(python))
        assert started.stdout is not None
        try:
            records = _records(started.stdout)
            first = next(records, None)
            if first is not None and (missing := first.keys.get("missing")) is not None:
                raise InputError(_missing(name, runner, python, missing))
            done: list[bool] = []
            yield first.keys if first is not None else {}, _until_done(records, done)
            if not done:
                code = started.wait()
                raise RunError(f"{name} failed on {folder} (exit code {code}):\n{_last_lines(errors)}")
        finally:
            started.stdout.close()
            started.kill()
            started.wait()


def _until_done(records: Iterator[Record], done: list[bool]) -> Iterator[Record]:
    """Yield records up to the last one, which says that the program is done; note that it came in ``done``."""
    for record in records:
        if record.keys.get("done"):
            done.append(True)
            return
        yield record


def _records(stream: IO[bytes]) -> Iterator[Record]:
    """Yield the records of a stream, up to its end or to one that was cut off."""
    while line := stream.readline():
        try:
            keys = json.loads(line)
        except ValueError:
            return
        shape = keys.pop("shape")
        if shape is None:
            yield Record(keys, None)
            continue
        size = 4 * math.prod(shape)
        content = stream.read(size)
        if len(content) < size:
            return
        yield Record(keys, np.frombuffer(bytearray(content), dtype="<f4").reshape(shape))


def _missing(name: str, runner: Runner, python: Path, missing: str) -> str:
    return (
        f"{name} cannot be run here: {python} has no package {missing}; install it with: {runner.how_to_install}, or "
        f"name the Python of an environment that has it with --python, or in the variable {variable(name)}"
    )


def _last_lines(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-LAST_LINES:])


def _environment(python: Path) -> dict[str, str]:
    """Return the variables of the process: of another Python than this one, without this one's ``PYTHONPATH``."""
    same = _is_this(python)
    return {key: value for key, value in os.environ.items() if same or key != "PYTHONPATH"}


def _is_this(python: Path) -> bool:
    return python.absolute() == Path(sys.executable).absolute()
