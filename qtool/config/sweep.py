"""The sections of a sweep: its base recipe, axes, launcher, and how speed is measured."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from qtool.config.sections import Section
from qtool.system.errors import InputError


class LauncherConfig(Section):
    """Where cells run."""

    name: Literal["local", "submitit", "ray"] = Field(
        "local", description="Processes of this machine, jobs of Slurm through submitit, or tasks of Ray."
    )
    cluster: Literal["slurm", "local", "debug"] | None = Field(
        None, description="What submitit submits to; unset: Slurm where it is there, else this machine."
    )
    address: str | None = Field(None, description="Of a running Ray cluster; unset: a Ray of this machine's own.")
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="Of submitit's update_parameters (timeout_min, slurm_partition, gpus_per_node, ...), or options of "
        "a Ray task (num_cpus, num_gpus, ...).",
    )

    @model_validator(mode="after")
    def _keys_act(self) -> "LauncherConfig":
        idle = [
            f"{key} acts only with name: {owner}"
            for key, owner in (("cluster", "submitit"), ("address", "ray"))
            if getattr(self, key) is not None and self.name != owner
        ]
        if self.parameters and self.name == "local":
            idle.append("parameters act only with a cluster; --jobs says how many processes there are")
        if idle:
            raise ValueError("; ".join(idle))
        return self

    def check(self) -> None:
        """Whether the package that it needs is there.

        Raises:
            InputError: it is not.
        """
        if self.name != "local" and find_spec(self.name) is None:
            extra = "qtool[cluster]" if self.name == "submitit" else self.name
            raise InputError(
                f"launcher.name: {self.name} needs the package {self.name}, which is not installed; "
                f"pip install '{extra}', or use local"
            )


class BenchConfig(Section):
    """How speed is measured: the options of ``qtool bench``."""

    prompt_tokens: int = Field(256, ge=2, description="Tokens of the prompt.")
    new_tokens: int = Field(32, ge=1, description="Tokens decoded in each repeat.")
    repeats: int = Field(5, ge=1, description="Of each number; the median is shown.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="Precision of computation."
    )


class SweepConfig(Section):
    """A sweep: what varies, and what is done with it."""

    recipe: str | dict[str, Any] = Field(
        default_factory=dict, description="What every cell starts from: a packaged name, a file, or sections."
    )
    set: dict[str, Any] = Field(default_factory=dict, description="Changes of every cell: dotted key -> value.")
    grid: dict[str, list[Any] | dict[str, Any]] = Field(
        default_factory=dict,
        description="Axes, of which every combination is a cell. A key of the recipe -> its values, as a list or by "
        "label; any other name -> sets of changes by label.",
    )
    exclude: tuple[dict[str, Any], ...] = Field(
        (), description="Cells to leave out: axis -> value or list of values; all of an entry must fit."
    )
    cells: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Further cells by name: dotted key -> value, and columns: their labels."
    )
    over: tuple[str, ...] = Field((), description="Axes over which means and standard deviations are taken, e.g. seed.")
    keep: Literal["all", "reports"] = Field(
        "all", description="reports: drop the weights of a cell when it has been measured."
    )
    missing_models: Literal["error", "skip"] = Field(
        "error", description="skip: a cell whose model is not on this machine is not run, and nothing is downloaded."
    )
    bench: bool | BenchConfig = Field(
        False, description="Measure speed, memory and energy too, one cell after another; true, or how: repeats, ..."
    )
    launcher: LauncherConfig = Field(LauncherConfig(), description="Where cells run.")
    output: Path | None = Field(None, description="Folder of the sweep; unset: out/sweeps/<name of the file>.")

    def bench_options(self) -> BenchConfig | None:
        """The options of ``qtool bench``; the defaults if ``bench`` is only ``true``, ``None`` if it is ``false``."""
        if isinstance(self.bench, BenchConfig):
            return self.bench
        return BenchConfig() if self.bench else None
