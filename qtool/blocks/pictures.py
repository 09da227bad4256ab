"""The features of pictures, which a multimodal model gives its decoder in the place of tokens, and what makes them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from qtool.models.linears import beside_decoder
from qtool.models.loaded import LoadedModel

UNREAD = ("last_hidden_state", "hidden_states", "attentions")  # parts of a tower's output that no decoder reads


class PictureFeatures:
    """The features of the pictures of each batch, computed once, however often the model is run up to its blocks."""

    def __init__(self, loaded: LoadedModel) -> None:
        """Find the module whose towers make features: the innermost, which the others call."""
        self._loaded = loaded
        makers = [module for module in loaded.model.modules() if hasattr(module, "get_image_features")]
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
                towers = (part for tower in beside_decoder(self._loaded.model) for part in tower.modules())
                with computing(self._loaded, towers):
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


@contextmanager
def computing(loaded: LoadedModel, modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let ``modules`` compute in ``loaded.dtype`` where a streamed model has another dtype; tables stay as they are."""
    cast: list[tuple[Tensor, Tensor]] = []
    try:
        for module in modules if loaded.streaming and loaded.dtype != loaded.storage_dtype else ():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.dtype == loaded.storage_dtype and not isinstance(module, nn.Embedding):
                    cast.append((tensor, tensor.data))
                    tensor.data = tensor.data.to(loaded.dtype)
        yield
    finally:
        for tensor, stored in cast:
            tensor.data = stored
