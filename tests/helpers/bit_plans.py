"""Plans for tests."""

import torch

from qtool.allocation import plan
from qtool.allocation.plan import BitPlan, units_of
from qtool.blocks.job import Job
from qtool.config.budget import BudgetConfig
from qtool.config.quant import QuantConfig, TableGrid
from qtool.models.loaded import LoadedModel

TABLE = TableGrid(group_size=-1)  # one scale for each row


def budgeted(quant: QuantConfig | None = None, **budget: object) -> QuantConfig:
    """A grid with a budget."""
    return (quant or QuantConfig(group_size=32)).model_copy(update={"budget": BudgetConfig.model_validate(budget)})


def planned(loaded: LoadedModel, quant: QuantConfig, tokens: torch.Tensor) -> BitPlan:
    return plan.plan(Job(loaded, (), tokens), lambda: loaded, units_of(loaded, quant), quant)
