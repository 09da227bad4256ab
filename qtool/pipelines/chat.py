"""``qtool chat``: load a model as its user would serve it, and answer prompts, token by token.

Text is written by transformers' own ``generate``, with the sampling that the model's generation config asks for; packed
linears compute with this machine's kernels. A conversation is read again from its beginning for each answer.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from qtool.config.sections import ModelConfig
from qtool.data.vocabulary import check_ids
from qtool.exporters._readback import load_exported
from qtool.models import backend
from qtool.models.auto_class import is_multimodal
from qtool.models.cache_argument import takes_cache
from qtool.models.chat_template import Message, ends_of_text, prompt_ids
from qtool.models.linears import packed_linears
from qtool.models.loaded import LoadedModel
from qtool.models.loading import load_model
from qtool.models.quiet import without_progress_bars
from qtool.models.stepping import find_cache
from qtool.system import interrupts, progress
from qtool.system.errors import InputError

Show = Callable[[str], bool]  # shows the next piece of an answer; returns False if nobody reads it any more
ROOM = 256  # tokens for which a cache is tried


class Options(NamedTuple):
    """How answers are written."""

    max_new_tokens: int = 512
    temperature: float | None = None  # 0: the most likely tokens; None: as the model's generation config says
    seed: int = 0


class Answer(NamedTuple):
    """What a model wrote, and how long that took."""

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float  # from the prompt to the last token
    tokens_per_second: float | None  # of the tokens after the first, whose time is that of reading the prompt
    ended: Literal["end", "length", "context", "stopped"]
    """Why it ended: the model's own end, ``max_new_tokens``, a full context, or Ctrl-C."""


@dataclass
class Chat:
    """A loaded model, and the conversation so far: of a model without a chat template there is none."""

    loaded: LoadedModel
    use_cache: bool
    options: Options
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    @property
    def remembers(self) -> bool:
        """Whether the model has a chat template; one without continues each text by itself."""
        return bool(self.loaded.tokenizer.chat_template)


@without_progress_bars()
def open_chat(config: ModelConfig, options: Options, system: str | None) -> Chat:
    """Load the native, exported or float model that ``config`` names, for packed kernels where it has packed linears.

    Notes say which kernels serve it, and what it cannot do.

    Raises:
        InputError: the model cannot be loaded or writes no text, or ``system`` is given to a model without a template.
    """
    with progress.stage(f"loading {config.path}"):
        loaded = load_exported(config) or load_model(config, quantized=True)
        if not loaded.model.can_generate():
            raise InputError(f"{config.path} is a {type(loaded.model).__name__}, which writes no text")
        use_cache = takes_cache(loaded.model) or _own_cache_works(loaded)
    chat = Chat(loaded, use_cache, options)
    set_system(chat, system)
    if not chat.remembers:
        progress.note(
            f"{config.path} has no chat template, so it continues each text that you give, and remembers none"
        )
    if is_multimodal(loaded.model.config):
        progress.note(f"{config.path} reads pictures or sound as well; qtool chat gives it text only")
    if packed_linears(loaded.model):
        progress.say(f"backend fast: {backend.use_backend(loaded.model, 'fast')}")
    return chat


@torch.inference_mode()
def _own_cache_works(loaded: LoadedModel) -> bool:
    """Return whether a model that takes no KV cache writes the same text with what it remembers in its own way."""
    first = torch.arange(min(4, loaded.num_embeddings))[None]
    return find_cache(loaded, first, ROOM) is not None


def set_system(chat: Chat, text: str | None) -> None:
    """Set the instructions that open the conversation, and begin it again.

    Raises:
        InputError: the model has no chat template, or one that refuses instructions; the conversation stays.
    """
    if text is not None:
        if not chat.remembers:
            raise InputError(
                f"{chat.loaded.path} has no chat template, so it takes no system message; write it into the prompt"
            )
        opened = [{"role": "system", "content": text}, {"role": "user", "content": "?"}]
        prompt_ids(chat.loaded.tokenizer, opened, "the system message")
    chat.system, chat.turns = text, []


@torch.inference_mode()
def answer(chat: Chat, prompt: str, show: Show) -> Answer:
    """Let the model answer ``prompt``, or continue it, and give the text to ``show`` as it comes.

    The conversation then holds both. A ``KeyboardInterrupt`` ends the answer, which is kept as far as it came; if a
    signal asked the process to end, it goes on to the caller.

    Raises:
        InputError: the conversation does not fit the context, or cannot be read; it is as it was before.
    """
    loaded, options = chat.loaded, chat.options
    messages = [*chat.turns, {"role": "user", "content": prompt}]
    whole = [{"role": "system", "content": chat.system}, *messages] if chat.system is not None else messages
    ids = prompt_ids(loaded.tokenizer, whole if chat.remembers else prompt, "the prompt")
    room = loaded.max_length - len(ids)
    if not ids:
        raise InputError("the prompt is empty, and this model needs a first token; write something")
    if room < 1:
        raise InputError(
            f"the conversation has {len(ids)} tokens, and {loaded.path} is made for at most {loaded.max_length}; "
            "begin it again (/reset), or write a shorter prompt"
        )
    tokens = torch.tensor([ids])
    check_ids(tokens, loaded, "the prompt")
    ends, limit = ends_of_text(loaded), min(room, options.max_new_tokens)
    stream, started = _Stream(loaded, show), time.perf_counter()
    stopped = _generate(chat, tokens.to(loaded.device), stream, _generation_config(chat, ends, limit))
    text = str(loaded.tokenizer.decode(stream.tokens, skip_special_tokens=True))
    if chat.remembers and stream.tokens:
        chat.turns = [*messages, {"role": "assistant", "content": text}]
    ended: Literal["end", "length", "context", "stopped"] = "length" if limit == options.max_new_tokens else "context"
    if stopped:
        ended = "stopped"
    elif stream.tokens and stream.tokens[-1] in ends:
        ended = "end"
    times = stream.times
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None
    seconds = (times[-1] if times else time.perf_counter()) - started
    return Answer(text, len(ids), len(stream.tokens), seconds, speed, ended)


def _generate(chat: Chat, tokens: Tensor, stream: "_Stream", config: GenerationConfig) -> bool:
    """Let the model write into ``stream`` after ``tokens`` ``[1, t]``; return whether it was stopped."""
    model: Any = chat.loaded.model
    with _random_state(chat.options.seed):
        try:
            model.generate(tokens, attention_mask=torch.ones_like(tokens), streamer=stream, generation_config=config)
        except (KeyboardInterrupt, _UnreadError):
            if interrupts.received():
                raise
            stream.end()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
            return True
    return False


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Begin the random numbers of torch at ``seed`` inside the ``with`` block."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _generation_config(chat: Chat, ends: frozenset[int], limit: int) -> GenerationConfig:
    """Return the model's generation config with the options of the chat in their places."""
    config = copy.deepcopy(chat.loaded.model.generation_config or GenerationConfig())
    if chat.options.temperature is not None:
        config.do_sample = chat.options.temperature > 0
        config.temperature = chat.options.temperature or None
    if not config.do_sample:
        for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(config, name, None)  # they act on sampling, and transformers warns of them without it
    config.max_new_tokens, config.max_length = limit, None
    config.use_cache = chat.use_cache
    config.eos_token_id = sorted(ends) or None
    config.pad_token_id = min(ends, default=0)
    return config


class _UnreadError(Exception):
    """Nobody reads the answer any more."""


class _Stream(TextStreamer):
    """Gives the text of new tokens to a function, and keeps the tokens and their times."""

    def __init__(self, loaded: LoadedModel, show: Show) -> None:
        super().__init__(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.tokens: list[int] = []
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += value.flatten().tolist()
            self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]  # likewise

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        interrupts.check()
        if text and not self.show(text) and not stream_end:
            raise _UnreadError
