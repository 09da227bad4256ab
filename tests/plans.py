"""Plans for tests."""

import torch

from qtool import allocate
from qtool.allocate import Plan, units_of
from qtool.budget import BudgetConfig
from qtool.config import QuantConfig
from qtool.data import Calibration
from qtool.models import LoadedModel


def budgeted(quant: QuantConfig | None = None, **budget: object) -> QuantConfig:
    """A grid with a budget."""
    return (quant or QuantConfig(group_size=32)).model_copy(update={"budget": BudgetConfig.model_validate(budget)})


def planned(loaded: LoadedModel, quant: QuantConfig, tokens: torch.Tensor) -> Plan:
    return allocate.plan(loaded, lambda: loaded, units_of(loaded, quant), quant, Calibration(tokens))
