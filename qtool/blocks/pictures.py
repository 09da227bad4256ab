"""The features of pictures, which a multimodal model gives its decoder in the place of tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

UNREAD = ("last_hidden_state", "hidden_states", "attentions")  # parts of a tower's output that no decoder reads


class PictureFeatures:
    """The features of the pictures of each batch, computed once, however often the model is run up to its blocks."""

    def __init__(self, model: nn.Module) -> None:
        """Find the module whose towers make features: the innermost, which the others call."""
        makers = [module for module in model.modules() if hasattr(module, "get_image_features")]
        self._maker: Any = makers[-1] if makers else None  # Any: a method of that name has no common signature
        self._known: dict[tuple[int, ...], tuple[list[Tensor], Any]] = {}

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """Let the model get features that it made before of the same tensors, inside the ``with`` block."""
        maker = self._maker
        if maker is None:
            yield
            return

        def features(*args: Any, **kwargs: Any) -> Any:
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            key = tuple(map(id, tensors))  # the tensors are kept, so that no id is used twice
            if key not in self._known:
                self._known[key] = tensors, _lean(type(maker).get_image_features(maker, *args, **kwargs))
            return self._known[key][1]

        maker.get_image_features = features  # on the instance, removed below
        try:
            yield
        finally:
            del maker.get_image_features


def _lean(output: Any) -> Any:
    """Return what a tower returned without the parts that take memory and are not read."""
    if not isinstance(output, ModelOutput):
        return output
    return type(output)(**{key: value for key, value in output.items() if key not in UNREAD})
