"""``qtool chat``: one answer, or a conversation in a terminal.

The text of the model goes to standard output, piece by piece. In a conversation all else is printed there as well, or
to standard error if standard output is no terminal.
"""

import math
import sys
from contextlib import redirect_stdout, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli.arguments import Json, Quiet
from qtool.cli.output import print_json
from qtool.cli.session import running, starting
from qtool.system import interrupts
from qtool.system.errors import InputError, QtoolError

if TYPE_CHECKING:
    from qtool.pipelines.chat import Answer, Chat

PROMPT = ">>> "
HELP = "/reset begins again, /system TEXT sets instructions, /exit or Ctrl-D ends.\nCtrl-C stops an answer."
STDIN = "-"  # value of --prompt that stands for standard input


def chat(
    model: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A folder that qtool wrote, any model folder, or a hub name.")
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Answer this and exit; - reads standard input. Default: a conversation in a terminal, else "
            "standard input.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="Instructions that open the conversation.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer. Default: 512.")
    ] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            min=0.0,
            metavar="T",
            help="0: the most likely tokens; higher: more varied. Default: as the model's generation config says.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of sampled tokens. Default: 0.")] = 0,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Device: cpu, cuda, cuda:1, ... Default: auto.")
    ] = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Talk to a model with packed kernels, or get one answer."""
    if temperature is not None and not math.isfinite(temperature):
        raise InputError(f"--temperature is {temperature}; give a number of 0 or more")
    from qtool.config.recipe import check
    from qtool.config.section import SEED_LIMIT
    from qtool.config.sections import ModelConfig

    if seed >= SEED_LIMIT:
        raise InputError(f"--seed is {seed}; it should be less than {SEED_LIMIT}")
    config = check(ModelConfig, {"path": model, "device": device}, "the command line")
    asked = _asked(prompt)
    if asked is None and as_json:
        raise InputError("--json prints one answer; give --prompt TEXT, or a prompt on standard input")
    with starting(quiet):
        from qtool.pipelines import chat as pipeline
    with running(quiet, None):
        opened = pipeline.open_chat(config, pipeline.Options(max_new_tokens, temperature, seed), system)
    if asked is None:
        _converse(opened)
    else:
        _answer_once(opened, asked, quiet, as_json)


def _asked(prompt: str | None) -> str | None:
    """Return the text to answer; ``None``: a conversation in a terminal."""
    if prompt is None and sys.stdin.isatty():
        return None
    if prompt in (None, STDIN):
        try:
            prompt = sys.stdin.read()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the prompt cannot be read from standard input: {error}") from None
        prompt = prompt.rstrip("\n")
    assert prompt is not None
    if not prompt.strip():
        raise InputError("the prompt is empty; give --prompt TEXT, or write it to standard input")
    return prompt


def _answer_once(opened: "Chat", prompt: str, quiet: bool, as_json: bool) -> None:
    from qtool.pipelines.chat import answer

    given = answer(opened, prompt, _silent if as_json else _stream)
    if as_json:
        print_json({"path": opened.loaded.path, "prompt": prompt, **given._asdict()})
        return
    _stream("\n")
    if not quiet:
        print(f"note: {_in_words(given)}", file=sys.stderr)


def _silent(text: str) -> bool:
    return True


def _stream(text: str) -> bool:
    """Print a piece of an answer; return whether somebody reads it."""
    print(text, end="", flush=True)
    return getattr(sys.stdout, "fault", None) is None


def _in_words(given: "Answer") -> str:
    """Return the length and the speed of an answer, and why it ended unless the model ended it."""
    ended = {
        "end": "",
        "length": "; it was cut off at --max-new-tokens",
        "context": "; it was cut off where the model's context ends: /reset begins again",
        "stopped": "; it was stopped",
    }[given.ended]
    speed = "" if given.tokens_per_second is None else f", {given.tokens_per_second:.3g} per second"
    return f"{given.tokens} tokens{speed}{ended}"


def _converse(opened: "Chat") -> None:
    """Answer what is written in the terminal until its end."""
    with suppress(ImportError):
        import readline  # noqa: F401  # lets input() edit lines and recall earlier ones
    _say(HELP)
    with interrupts.as_exceptions():
        while (line := _read_line()) is not None:
            try:
                if not _command(opened, line) and line.strip():
                    _reply(opened, line)
            except QtoolError as error:
                _say(f"error: {error}")
            except EOFError:
                return


def _read_line() -> str | None:
    """Return the next line; ``None`` at the end of the input. Ctrl-C drops the line."""
    while True:
        interrupts.check()
        try:
            if not sys.stdout.isatty():
                print(PROMPT, end="", file=sys.stderr, flush=True)
                line = sys.stdin.readline()
                return line.rstrip("\n") if line else None
            with redirect_stdout(sys.__stdout__):  # else Python edits no lines: ours is not the terminal's stream
                return input(PROMPT)
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            interrupts.check()  # a signal that ends the process comes through here
            _say("\n(Ctrl-D or /exit ends the conversation)")


def _command(opened: "Chat", line: str) -> bool:
    """Do what a line that begins with a slash asks for; return whether it was one. ``/exit`` raises ``EOFError``."""
    from qtool.pipelines.chat import set_system

    name, _, rest = line.strip().partition(" ")
    match name:
        case "/exit" | "/quit":
            raise EOFError
        case "/reset":
            set_system(opened, opened.system)
            _say("the conversation begins again")
        case "/system":
            set_system(opened, rest.strip() or None)
            _say("the conversation begins again" + (", with these instructions" if rest.strip() else ""))
        case "/help":
            _say(HELP)
        case _ if name.startswith("/"):
            _say(f"there is no command {name}; /help lists them")
        case _:
            return False
    return True


def _reply(opened: "Chat", line: str) -> None:
    from qtool.pipelines.chat import answer

    given = answer(opened, line, _stream)
    _stream("\n")
    if given.ended != "end":
        _say(f"({_in_words(given)})")


def _say(text: str) -> None:
    """Tell the user something that is no text of the model."""
    print(text, file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)
