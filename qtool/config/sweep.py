"""The sections of a sweep: its base recipe, axes, launcher and speed measurement."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from qtool.config.section import Section
from qtool.config.sections import Dtype
from qtool.system.errors import InputError


class LauncherConfig(Section):
    """The place where cells run."""

    name: Literal["local", "submitit", "ray"] = Field(
        "local", description="local: processes on this machine; submitit: Slurm jobs; ray: Ray tasks."
    )
    cluster: Literal["slurm", "local", "debug"] | None = Field(
        None, description="Cluster for the jobs of submitit; unset: Slurm if it is available, else this machine."
    )
    address: str | None = Field(None, description="Address of a running Ray cluster; unset: start Ray on this machine.")
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of submitit's update_parameters (timeout_min, slurm_partition, gpus_per_node, ...), or "
        "options of a Ray task (num_cpus, num_gpus, ...).",
    )

    @model_validator(mode="after")
    def _keys_act(self) -> "LauncherConfig":
        idle = [
            f"{key} acts only with name: {owner}"
            for key, owner in (("cluster", "submitit"), ("address", "ray"))
            if getattr(self, key) is not None and self.name != owner
        ]
        if self.parameters and self.name == "local":
            idle.append("parameters act only with a cluster (submitit, ray); --jobs gives the number of processes")
        if idle:
            raise ValueError("; ".join(idle))
        return self

    def check(self) -> None:
        """Check that the package of the launcher is installed.

        Raises:
            InputError: The package is not installed.
        """
        if self.name != "local" and find_spec(self.name) is None:
            extra = "qtool[cluster]" if self.name == "submitit" else self.name
            raise InputError(
                f"launcher.name: {self.name} needs the package {self.name}, which is not installed; "
                f"pip install '{extra}', or use local"
            )


class BenchConfig(Section):
    """The options of ``qtool bench``, which measures speed."""

    prompt_tokens: int = Field(256, ge=2, description="Tokens in the prompt.")
    new_tokens: int = Field(32, ge=1, description="Tokens decoded in each repeat.")
    repeats: int = Field(5, ge=1, description="Measurements of each number; the median is shown.")
    dtype: Dtype = Field("bfloat16", description="Precision of computation.")


class SweepConfig(Section):
    """A sweep: the keys that vary, and what is done with each cell."""

    recipe: str | dict[str, Any] = Field(
        default_factory=dict, description="Recipe that every cell starts from: a packaged name, a file, or sections."
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="Changes to the recipe of every cell: dotted key -> value."
    )
    grid: dict[str, list[Any] | dict[str, Any]] = Field(
        default_factory=dict,
        description="Axes; every combination of their values is a cell. A recipe key -> its values, as a list or by "
        "label; any other name -> label -> changes (dotted key -> value).",
    )
    exclude: tuple[dict[str, Any], ...] = Field(
        (),
        description="Cells to leave out: axis -> value or list of values; a cell is left out if all axes of an entry "
        "match.",
    )
    cells: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Further cells by name: dotted key -> value, and columns (axis -> label) for the table.",
    )
    over: tuple[str, ...] = Field(
        (), description="Axes over which the table gives mean and standard deviation, e.g. seed."
    )
    keep: Literal["all", "reports"] = Field(
        "all",
        description="all: keep checkpoints and reports; reports: delete the weights of a cell after measuring it.",
    )
    missing_models: Literal["error", "skip"] = Field(
        "error",
        description="skip: do not run a cell whose model is not on this machine, and download nothing; error: "
        "download the model, or refuse the sweep.",
    )
    bench: bool | BenchConfig = Field(
        False,
        description="Also measure speed, memory and energy, one cell after another: true, or a mapping with keys of "
        "qtool bench (repeats, ...).",
    )
    launcher: LauncherConfig = Field(LauncherConfig(), description="Launcher that runs the cells.")
    output: Path | None = Field(None, description="Folder of the sweep; unset: out/sweeps/<name of the file>.")

    def bench_options(self) -> BenchConfig | None:
        """The options of ``qtool bench``; the defaults if ``bench`` is only ``true``, ``None`` if it is ``false``."""
        if isinstance(self.bench, BenchConfig):
            return self.bench
        return BenchConfig() if self.bench else None
