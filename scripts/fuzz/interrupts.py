"""End commands at any of their operations on files, run them again, and compare with a run that nothing ended.

    python scripts/fuzz/interrupts.py --kind kill --count 100 --seed 0

Each trial starts a command in a folder of its own, ends it at one operation on files (a file opened for writing, a
rename, a folder made, anything removed), chosen evenly over the whole command, and runs the same command again. Kinds:

* ``kill``: SIGKILL at the operation; ``timed``: SIGKILL after a random time, which also falls between operations;
* ``hup``: SIGHUP at the operation, as from a terminal that is closed;
* ``full``: this and every later write finds the disk full; the command must say so and exit with 1.

The second start must exit with 0, and leave the same files, with the same bytes of weights, and nothing beside them: no
``*.partial``, no temporary folder. The last line counts the trials; the exit code is 1 if one failed.
"""

import argparse
import contextlib
import errno
import hashlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("kill", "timed", "hup", "full")
TEXT = "text.txt"
RECIPE = """\
model: {path: "builtin:wiki-llama-3m"}
method: {name: METHOD}
quant: {num_bits: 4, group_size: 64}
data: {source: text.txt, num_samples: 8, seq_len: 64}
eval: {tasks: [generated, kl], limit: 2, context: 64}
export: [{format: dense, path: dense}, {format: gptq, path: gptq}]
output: {path: out}
"""
SWEEP = """\
recipe:
  model: {path: "builtin:wiki-llama-3m"}
  method: {name: rtn}
  eval: {tasks: [generated], limit: 1, context: 32}
grid:
  quant.num_bits: [4, 8]
"""
TRAINED = "{name: lsq, steps: 3, save_every: 1}"


class Stage(NamedTuple):
    """A command to end, and the commands before it that make what it reads."""

    command: list[str]
    before: tuple[list[str], ...] = ()


QUANTIZE = ["ptq", "gptq.yaml", "-q"]
STAGES = {
    "quantize": Stage(QUANTIZE),
    "train": Stage(["qat", "lsq.yaml", "-q"]),
    "overwrite": Stage([*QUANTIZE, "--overwrite"], (QUANTIZE,)),
    "export": Stage(["export", "out", "-f", "mlx", "-o", "mlx", "-q"], (["ptq", "plain.yaml", "-q"],)),
    "eval": Stage(
        ["eval", "gptq", "--tasks", "generated", "--limit", "1", "--context", "32", "-o", "report", "-q"], (QUANTIZE,)
    ),
    "reproduce": Stage(["reproduce", "out", "-q"], (["ptq", "plain.yaml", "-q"],)),
    "sweep": Stage(["sweep", "s.yaml", "-o", "sweep", "-q"]),
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def prepare(folder: Path) -> None:
    """Write the recipes and the text that the commands read into ``folder``."""
    folder.mkdir(parents=True)
    (folder / "tmp").mkdir()
    (folder / TEXT).write_text(" ".join(map(str, range(4000))), encoding="utf-8")
    (folder / "gptq.yaml").write_text(RECIPE.replace("METHOD", "gptq"), encoding="utf-8")
    (folder / "lsq.yaml").write_text(RECIPE.replace("METHOD", "").replace("{name: }", TRAINED), encoding="utf-8")
    plain = [line for line in RECIPE.replace("METHOD", "gptq").splitlines() if not line.startswith(("eval", "export"))]
    (folder / "plain.yaml").write_text("\n".join(plain), encoding="utf-8")
    (folder / "s.yaml").write_text(SWEEP, encoding="utf-8")


def operations(at: Path, act: Callable[[int, str], None]) -> None:
    """Call ``act`` with the number and name of each operation on files below ``at``, for the rest of this process."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate"):
            path = args[0]
        else:
            return
        if not isinstance(path, str | bytes):
            return
        full = os.path.abspath(os.fsdecode(path))
        if full.startswith(str(at)) or not os.path.isabs(os.fsdecode(path)):
            count += 1
            act(count - 1, event)

    sys.addaudithook(hook)


def run(folder: Path, command: list[str], act: Callable[[int, str], None] | None = None) -> int:
    """Start ``qtool`` with ``command`` in a forked process in ``folder``; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(folder)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")
        log = os.open(folder / "tmp" / ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from qtool.cli import main
        from qtool.system import interrupts

        interrupts.install()
        if act is not None:
            operations(folder, act)
        code = main.main(command)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Return the exit code of a process; negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def found(folder: Path) -> dict[str, str]:
    """Return every path below ``folder``, with the hash of the files whose bytes are fixed."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or name == "tmp/.log":
            files[name] = "" if path.is_dir() else "log"
        else:
            fixed = path.suffix in (".safetensors", ".txt") or path.name in ("config.json", "tokenizer.json")
            files[name] = hashlib.sha256(path.read_bytes()).hexdigest() if fixed else "made"
    return {name: what for name, what in files.items() if not name.startswith("tmp/.log")}


def ended(number: int, kind: str) -> Callable[[int, str], None]:
    """Return the function that ends its process at operation ``number``."""

    def act(count: int, event: str) -> None:
        if kind == "full":
            if count >= number and event in ("open", "os.mkdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif count == number:
            os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGHUP)

    return act


class Trials:
    """The folders of all trials, and what undisturbed commands leave."""

    def __init__(self, at: Path, kind: str) -> None:
        """Keep the folders below ``at``."""
        self.at, self.kind = at, kind
        self.undisturbed: dict[str, tuple[int, float, dict[str, str]]] = {}

    def set_up(self, stage: str) -> Path:
        """Return a new folder in which the command of ``stage`` can start."""
        source = self.at / f"{stage}-before"
        if not source.exists():
            prepare(source)
            for command in STAGES[stage].before:
                if code := wait(run(source, command)):
                    raise SystemExit(f"{command} in {source} ended with {code}: {said(source)}")
        folder = self.at / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        return folder

    def whole(self, stage: str) -> tuple[int, float, dict[str, str]]:
        """Return the number of operations, the seconds and the files of the undisturbed command."""
        if stage not in self.undisturbed:
            folder = self.set_up(stage)
            counter = self.at / "count"
            counter.write_bytes(b"")
            opened = os.open(counter, os.O_WRONLY | os.O_APPEND)
            started = time.monotonic()

            def tick(count: int, event: str) -> None:
                os.write(opened, b".")

            if code := wait(run(folder, STAGES[stage].command, tick)):
                raise SystemExit(f"{stage} ended with {code}: {said(folder)}")
            lasts = time.monotonic() - started
            os.close(opened)
            self.undisturbed[stage] = counter.stat().st_size, lasts, found(folder)
        return self.undisturbed[stage]

    def trial(self, stage: str, share: float) -> str:
        """End the command of ``stage`` after ``share`` of it and run it again; return what is wrong, or ``""``."""
        count, lasts, expected = self.whole(stage)
        folder, command = self.set_up(stage), STAGES[stage].command
        if self.kind == "timed":
            child = run(folder, command)
            time.sleep(share * lasts)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        else:
            child = run(folder, command, ended(int(share * count), self.kind))
        code, place = wait(child), f"{stage} at {share:.3f} ({int(share * count)} of {count})"
        if re.search("Traceback|bug in qtool", said(folder)):
            return f"{place}: {last_words(folder)}"
        allowed = {"kill": (-9, 0), "timed": (-9, 0), "hup": (130, 0), "full": (1, 2, 0)}[self.kind]
        if code not in allowed:
            return f"{place}: exit code {code}: {last_words(folder)}"
        if second := wait(run(folder, command)):
            return f"{place}: the second start ended with {second}: {last_words(folder)}"
        left = found(folder)
        if left != expected:
            names = sorted(name for name in left.keys() | expected.keys() if left.get(name) != expected.get(name))
            return f"{place}: other files: {', '.join(names[:8])}"
        return ""


def said(folder: Path) -> str:
    """Return what the commands in ``folder`` printed."""
    log = folder / "tmp" / ".log"
    return log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else ""


def last_words(folder: Path) -> str:
    """Return the end of what the commands in ``folder`` printed, in one line."""
    return " | ".join(said(folder).splitlines()[-4:])[-400:]


def main() -> None:
    """Run the trials, and print what failed and a line that counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=KINDS, default="kill")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    options = parser.parse_args()
    os.environ |= {"HF_DEACTIVATE_ASYNC_LOAD": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    import qtool.cli.main
    import qtool.pipelines.evaluate
    import qtool.pipelines.quantize  # noqa: F401  (once, before the forks)

    draw = random.Random(options.seed)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="interrupts-") as temporary:
        trials = Trials(Path(temporary).resolve(), options.kind)
        for index in range(options.count):
            stage = options.stages[index % len(options.stages)]
            round_, rounds = index // len(options.stages), -(-options.count // len(options.stages))
            share = (round_ + draw.random()) / rounds  # evenly over the command
            if wrong := trials.trial(stage, share):
                failed += 1
                print(wrong, flush=True)
    print(f"{options.kind}: {options.count} trials over {', '.join(options.stages)}; {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
