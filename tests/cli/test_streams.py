"""A closed or full standard stream changes neither the work nor the exit code, unless the result was lost."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qtool
from qtool.cli import main
from qtool.cli.streams import Guarded, unescaped

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux: /dev/full")
STREAMS = (">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full")
LOST = "error: standard output cannot be written ({}), so the result was not printed; files that the command wrote are "
REASONS = {">&-": "it is closed", ">/dev/full": "No space left on device"}


def shell(streams: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``qtool`` with its standard streams changed by a shell."""
    root = str(Path(qtool.__file__).parents[1])
    return subprocess.run(
        ["sh", "-c", f'"$@" {streams}', "sh", sys.executable, "-m", "qtool", *args],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root, "QTOOL_DEBUG": ""} | environment,
        check=False,
    )


def check(done: subprocess.CompletedProcess[str], streams: str, code: int, *, prints: bool) -> None:
    """Check exit code and messages of a command that alone would end with ``code``, and print a result or not."""
    lost = prints and streams.startswith(">")
    assert done.returncode == (code or int(lost)), done
    if "2>" in streams:
        assert done.stderr == ""
    elif lost and not code:
        assert LOST.format(REASONS[streams]) in done.stderr
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize(
    ("command", "code", "prints"),
    [("--version", 0, True), ("recipes", 0, True), ("ptq nosuch.yaml", 2, False), ("ptq --json", 2, True)],
)
def test_commands_say_how_they_ended_whatever_the_streams_are(
    command: str, code: int, prints: bool, streams: str
) -> None:
    done = shell(streams, *command.split())
    check(done, streams, code, prints=prints)
    if not streams.startswith(">"):
        assert bool(done.stdout) == prints
        assert "--json" not in command or json.loads(done.stdout)["exit_code"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("streams", STREAMS)
def test_a_run_goes_on_to_its_end_whatever_the_streams_are(streams: str, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{path: 'builtin:wiki-llama-3m'}}\nmethod: {{name: rtn}}\noutput: {{path: '{tmp_path}/out'}}\n"
        "quant: {num_bits: 4, group_size: 64}\n"
    )
    check(shell(streams, "ptq", str(recipe)), streams, 0, prints=True)
    assert (tmp_path / "out" / "qtool.json").exists()
    check(shell(streams, "verify", str(tmp_path / "out")), streams, 0, prints=True)


def test_no_file_of_a_run_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    code = (
        "from qtool.cli.streams import occupy_descriptors; occupy_descriptors()\n"
        "file = open('f', 'w'); assert file.fileno() > 2; print('lost'); assert not file.write('')"
    )
    root = str(Path(qtool.__file__).parents[1])
    for streams in ("<&- >&- 2>&-", ">&-", "2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'"$@" {streams}', "sh", sys.executable, "-c", code],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": root},
            check=False,
        )
        assert done.returncode == 0
        assert (tmp_path / "f").read_bytes() == b""


def test_text_is_shown_escaped_without_secrets_and_in_the_encoding_of_the_stream() -> None:
    for encoding, expected in (
        ("ascii", r"\x1b[2J +- \xe9 \udc80 x://***@h"),
        ("utf-8", r"\x1b[2J ± é \udc80 x://***@h"),
    ):
        inner = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        guarded = Guarded(inner)
        print("\x1b[2J ± é \udc80 x://u:p@h", end="", file=guarded)
        guarded.flush()
        assert inner.buffer.getvalue().decode(encoding) == expected
        own = unescaped(guarded)  # type: ignore[arg-type] # a text stream as print() needs it
        own.write("\x1b[2J")
        own.flush()
        assert inner.buffer.getvalue().endswith(b"\x1b[2J")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_keys_of_a_recipe_reach_the_terminal_escaped(encoding: str, tmp_path: Path) -> None:
    recipe = tmp_path / "e.yaml"
    recipe.write_text('"\\e]0;owned\\a\\e[2J": 1\n"\\x9b31m": 1\n"\\u202eb": 1\nmodel: {path: "\\e[31mRED"}\n')
    done = shell("", "ptq", str(recipe), PYTHONIOENCODING=encoding, LC_ALL="C")
    assert done.returncode == 2
    for key in (r"\x1b]0;owned\x07\x1b[2J", r"\x9b31m", r"\u202eb"):
        assert f"\n  {key}: unknown key" in done.stderr
    assert not set(done.stderr) & set("\x1b\x07\x9b\u202e")


def test_a_debugging_traceback_has_no_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("http://alice:s3cretpw@host")

    monkeypatch.setenv("QTOOL_DEBUG", "1")
    monkeypatch.setattr("qtool.config.files.packaged", fail)
    assert main.main(["recipes", "--wrong"]) == 2
    assert main.main(["recipes"]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" in err
    assert "http://***@host" in err
    assert "s3cretpw" not in out + err
