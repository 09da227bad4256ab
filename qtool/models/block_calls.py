"""Standing in for the forward of decoder blocks, to see how a model calls them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Call = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Any]  # Any: each architecture has arguments of its own


class Stop(Exception):
    """Raised inside a forward to end it early; the function that started the forward catches it."""


@contextmanager
def replaced_forwards(blocks: Sequence[nn.Module], call: Call) -> Iterator[None]:
    """Replace the forward of each block by ``call(index, hidden, args, kwargs)`` inside the ``with`` block.

    ``args`` and ``kwargs`` are the arguments besides the hidden states.
    """

    def forward_of(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                return call(index, args[0], args[1:], kwargs)
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            return call(index, kwargs["hidden_states"], (), rest)

        return forward

    for index, block in enumerate(blocks):
        block.forward = forward_of(index)  # on the instance, removed below
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states in what a block returned: a tensor, or a tuple or list that begins with one."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return what a block returned, with other hidden states in it."""
    if isinstance(output, tuple | list):
        return type(output)((hidden, *output[1:]))
    return hidden
