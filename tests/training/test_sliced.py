"""The loss in slices is the loss of all tokens at once, and no tensor grows with tokens times vocabulary."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.architectures import make_config, move
from helpers.packed_tables import pack_table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from qtool.config.training import EndToEndConfig
from qtool.models.loaded import LoadedModel
from qtool.training import sliced, text_loss
from qtool.training.text_loss import TextLoss
