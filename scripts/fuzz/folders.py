"""Folders of somebody else with random faults, given to the commands that read them.

    python scripts/fuzz/folders.py --seed 0 --count 500

A float model, native checkpoints, an export, a report and a sweep are made from the built-in model. In each input one
of them is changed: bytes flipped, files truncated, replaced by FIFOs and links, keys removed or of other types, numbers
huge, JSON nested deeply. Exit code 1 if any command says "bug in qtool", ends in a traceback or takes too long.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import values
import workers

EVAL = ("--tasks", "generated", "--limit", "1", "--context", "8", "--quiet")
COMMANDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "float": (("eval", "float", *EVAL), ("ptq", "float.yaml", "--quiet"), ("verify", "float")),
    "native": (
        ("verify", "native"),
        ("eval", "native", *EVAL),
        ("export", "native", "-f", "dense", "-o", "made", "-q"),
        ("export", "native", "-f", "compressed-tensors", "-o", "made", "-q"),
        ("export", "native", "-f", "gptq", "-o", "made", "-q"),
        ("compare", "native", "other"),
        ("bench", "native", "--repeats", "1", "--new-tokens", "1", "--prompt-tokens", "2", "-q"),
        ("reproduce", "native", "-q"),
    ),
    "export": (("eval", "export", *EVAL), ("verify", "export")),
    "sweep": (("sweep", "sweep.yaml", "-o", "sweep", "-q"), ("compare", "sweep/seed=1", "other")),
    "partial": (("ptq", "partial.yaml", "--quiet"),),
}
RECIPE = """\
model: {path: %s}
method: {name: rtn}
quant: {num_bits: 4, group_size: 64}
output: {path: %s}
eval: {tasks: [generated], limit: 1, context: 8}
"""
SWEEP = """\
recipe: {model: {path: builtin:wiki-llama-3m}, method: {name: rtn}, quant: {group_size: 64}}
set: {eval: {tasks: [generated], limit: 1, context: 8}}
grid: {seed: [1]}
"""
ODD_NAMES = (
    *("config.json", "qtool.json", "report.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "model.safetensors.index.json", "chat_template.jinja", "adapter_config.json"),
    *("model.safetensors", "x.safetensors", "tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt"),
)


def make(folder: Path) -> None:
    """Make the folders to change below ``folder``."""
    from qtool.models.folders import BUILTIN

    shutil.copytree(BUILTIN / "wiki-llama-3m", folder / "float")
    for name, model, out in (("native", "builtin:wiki-llama-3m", "native"), ("float", "float", "made")):
        (folder / f"{name}.yaml").write_text(RECIPE % (model, out))
    (folder / "partial.yaml").write_text(RECIPE % ("builtin:wiki-llama-3m", "p"))
    (folder / "sweep.yaml").write_text(SWEEP)
    for command in (
        ("ptq", "native.yaml", "-q"),
        ("ptq", "native.yaml", "-q", "--set", "output.path=other", "--set", "seed=1"),
        ("export", "native", "-f", "compressed-tensors", "-o", "export", "-q"),
        ("sweep", "sweep.yaml", "-o", "sweep", "-q"),
    ):
        done = subprocess.run([sys.executable, "-m", "qtool", *command], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    state = folder / "p.partial" / "state"
    state.mkdir(parents=True)
    (folder / "p.partial" / "qtool.lock").touch()
    manifest = json.loads((folder / "native" / "qtool.json").read_text())
    (state / "lock.json").write_text(json.dumps(manifest["lock"]))
    (state / "block-00000.json").write_text(json.dumps({"sha256": "0" * 64, "figures": {}, "weight_errors": {}}))
    (state / "plan.json").write_text("{}")
    (folder / "partial").symlink_to("p.partial")


def change(folder: Path, random: Random) -> str:
    """Change one file of ``folder`` at random; return what was done, in words."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = random.choice([each for each in files if each.suffix in (".json", ".safetensors")] or files)
    what = random.choice(("value", "value", "value", "text", "bytes", "header", "end", "special", "remove", "add"))
    data = _json(file)
    if what == "value" and data is not None:
        for _ in range(random.choice((1, 1, 3))):
            data = values.changed(data, random) if isinstance(data, dict | list) else data
        file.write_bytes(json.dumps(data).encode("utf-8", "surrogatepass"))
    elif what == "text" and data is not None:
        file.write_bytes(values.changed_text(file.read_text(), random).encode("utf-8", "surrogatepass"))
    elif what == "header" and file.suffix == ".safetensors":
        with contextlib.suppress(ValueError):  # another change broke the header before
            file.write_bytes(_other_header(file.read_bytes(), random))
    elif what in ("special", "add"):
        if what == "add":
            file = file.with_name(random.choice(ODD_NAMES))
        _special(file, random)
    elif what == "remove":
        file.unlink()
    elif what == "end" or file.stat().st_size > 2**25:
        os.truncate(file, random.randrange(file.stat().st_size + 1))
    elif content := bytearray(file.read_bytes()):
        for _ in range(random.choice((1, 8, 200))):
            content[random.randrange(min(len(content), random.choice((2000, len(content)))))] = random.randrange(256)
        file.write_bytes(content)
    return f"{file}: {what}"


def _json(file: Path) -> Any:
    """Return the value in a JSON file; ``None`` if it is none, perhaps by a change before."""
    try:
        return json.loads(file.read_bytes()) if file.suffix == ".json" and file.stat().st_size < 2**25 else None
    except (ValueError, RecursionError):
        return None


def _other_header(content: bytes, random: Random) -> bytes:
    """Return a safetensors file with a change in its header."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    changed = values.changed(
        header, random, ("F64", "F8_E4M3", "BOOL", "I8", "U8", "F4", [1], [0], [-1, 2], [2**40, 2**40])
    )
    text = json.dumps(changed).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _special(file: Path, random: Random) -> None:
    """Put something that is no file of its kind in the place of ``file``."""
    file.unlink(missing_ok=True)
    match random.choice(
        ("fifo", "zero", "null", "loop", "nothing", "folder", "deep", "list", "empty", "huge", "number")
    ):
        case "fifo":
            os.mkfifo(file)
        case "zero":
            file.symlink_to("/dev/zero")
        case "null":
            file.symlink_to("/dev/null")
        case "loop":
            file.symlink_to(file.name)
        case "nothing":
            file.symlink_to("nothing")
        case "folder":
            file.mkdir()
        case "deep":
            file.write_text('{"a":' + "[" * 200_000 + "]" * 200_000 + "}")
        case "list":
            file.write_text(random.choice(("[]", "[1]", "null", "1", '"x"', "{}", '{"x": 1}')))
        case "huge":
            with file.open("wb") as opened:
                opened.truncate(2**33)
        case "number":
            file.write_text('{"a": ' + "9" * 5000 + "}")
        case _:
            file.touch()


def prepare(seed: int, made: Path) -> Any:
    """Return the function that a worker calls once, which returns the function that runs one input."""

    def ready(folder: Path) -> workers.Try:
        from qtool.cli.main import main as qtool
        from qtool.pipelines import quantize

        def stop(*_: object) -> None:
            raise KeyboardInterrupt  # the checks of a run are done; its work is not of interest here

        quantize.run_method = stop  # type: ignore[assignment]  # in this process only
        work = folder / "work"

        def fresh() -> None:
            os.chdir(folder)
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(made, work, symlinks=True)
            os.chdir(work)

        def attempt(index: int) -> Callable[[], str]:
            random = Random(f"{seed} {index}")
            kind = random.choice(sorted(COMMANDS))
            command = random.choice(COMMANDS[kind])
            fresh()
            done = [change(work / kind, random) for _ in range(random.choice((1, 1, 2)))]
            return lambda: _ended(qtool, list(command), done)

        for commands in COMMANDS.values():
            for command in commands:
                fresh()
                _ended(qtool, list(command), [])
        return attempt

    return ready


def _ended(qtool: Any, command: list[str], done: list[str]) -> str:
    """Run a command in this process; return how it ended, or raise with what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = qtool(command)
    if "bug in qtool" in said.getvalue():
        raise workers.BugError(f"{done}\nqtool {' '.join(command)}\n{said.getvalue()[-2000:]}")
    return workers.RIGHT if code in (0, 130) else workers.REFUSED


def main() -> int:
    """Run the inputs that the command line asks for; return the exit code."""
    asked = workers.arguments(500, str(__doc__).partition("\n")[0])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "QTOOL_DEBUG": "1"}
    with tempfile.TemporaryDirectory() as made:
        make(Path(made))
        ready = prepare(asked.seed, Path(made))
        counts = workers.run(ready, range(asked.start, asked.start + asked.count), asked.jobs)
    return int(any(counts[how] for how in workers.FAULTS))


if __name__ == "__main__":
    sys.exit(main())
