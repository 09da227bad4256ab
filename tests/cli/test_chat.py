"""``qtool chat``: what goes to which stream, what ends it, and a conversation in a terminal."""

import io
import json
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from helpers import tiny
from helpers.terminals import Program, Terminal

from qtool.cli.main import main
from qtool.config.quant import QuantConfig
from qtool.system.printable import shown

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint of a chat model; only read it."""
    at = tmp_path_factory.mktemp("chat")
    (tiny.llama(at / "float") / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    tiny.quantize(at / "float", at / "q", QuantConfig(num_bits=4, group_size=32))
    return at / "q"


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    code = main(["chat", *map(str, args)])
    return code, *capsys.readouterr()


def test_one_prompt_has_one_answer_on_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompt", "The mill", "--max-new-tokens", "9", "--device", "cpu")
    code, out, err = run(capsys, folder, *options)
    assert code == 0, err
    assert "note: 9 tokens" in err
    assert "it was cut off at --max-new-tokens" in err
    code, found, err = run(capsys, folder, *options, "--json", "--quiet")
    given = json.loads(found)
    assert code == 0
    assert err == ""
    assert shown(f"{given['text']}\n") == out
    assert (given["tokens"], given["ended"], given["prompt"]) == (9, "length", "The mill")
    assert given["tokens_per_second"] > 0


def test_a_prompt_can_be_piped(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for args in ((), ("--prompt", "-")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("The mill\nby the bridge\n"))
        code, out, _ = run(capsys, folder, *args, "--max-new-tokens", "3", "--json")
        assert code == 0
        found.append(json.loads(out)["prompt"])
    assert found == ["The mill\nby the bridge"] * 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--prompt", " "), "the prompt is empty"),
        (("--prompt", "x" * 2000), "is made for at most 128"),
        (("--prompt", "x", "--temperature", "nan"), "--temperature"),
        (("--prompt", "x", "--seed", "4294967296"), "--seed is 4294967296; it should be less than"),
        (("--prompt", "x", "--device", "nosuch"), "'nosuch' is no device"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: str
) -> None:
    code, out, err = run(capsys, folder, *args)
    assert code == 2
    assert out == ""
    assert words in err


def test_a_folder_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "./nosuch", "--prompt", "x")
    assert code == 2
    assert "there is no folder ./nosuch" in err


class Session:
    """``qtool chat`` in a terminal."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.terminal = Terminal(80, 24)
        self.program = Program(self.terminal, ["chat", str(folder), *args], folder)

    def wait(self, until: Callable[[list[str]], bool]) -> list[str]:
        """Show the program until a condition on its lines holds, and return them."""
        end = time.monotonic() + 120
        self.program.show(lambda: until(self.terminal.lines()) or time.monotonic() > end)
        assert until(self.terminal.lines()), self.terminal.lines()
        return self.terminal.lines()

    def write(self, text: str, prompts: int) -> list[str]:
        """Type ``text``, and wait for the next prompt, which is number ``prompts``."""
        self.program.write(text)
        return self.wait(lambda lines: sum(line.startswith(">>>") for line in lines) >= prompts and lines[-1] == ">>>")

    def close(self) -> None:
        self.program.hang_up()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_conversation_in_a_terminal(folder: Path) -> None:
    with closing(Session(folder, "--max-new-tokens", "3", "--temperature", "0")) as session:
        lines = session.write("", 1)
        assert "/reset begins again, /system TEXT sets instructions, /exit or Ctrl-D ends." in lines
        first = session.write("The mill\n", 2)
        answer = first[first.index(">>> The mill") + 1 :]
        assert any("3 tokens" in line and "cut off at --max-new-tokens" in line for line in answer)
        assert session.write("/nosuch\n", 3)[-2] == "there is no command /nosuch; /help lists them"
        assert session.write("/reset\n", 4)[-2] == "the conversation begins again"
        again = session.write("The mill\n", 5)
        assert again[len(again) - len(answer) :][:-1][:1] == answer[:1]
        assert session.write("\x03", 6)[-2] == "(Ctrl-D or /exit ends the conversation)"
        assert any(line.startswith("error: the conversation has") for line in session.write("x" * 200 + "\n", 7))
        session.program.write("\x04")
        session.program.show()
        assert session.program.wait() == 0
        assert "Traceback" not in "\n".join(session.terminal.lines())
